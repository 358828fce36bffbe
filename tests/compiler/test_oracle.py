"""The oracle: its meaning of each operation is torch's, and it runs programs of every stage as the others do."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, Program, attributes
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.reference import oracle_attention
from fastgrad_compiler.reference.interpret import run as run_torch
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.oracle import evaluate
from fastgrad_compiler.reference.oracle_operations import DECLINED, MEANING, STRUCTURE
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_grammar.source import Source
from tests.compiler.attention_variants import VARIANTS, Variant
from tests.initial_weights import initial_weights

Array = NDArray[Any]
ENV = Env({"n": 5}, torch.float64, torch.device("cpu"))
INF = math.inf


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def apply(op: str, *inputs: Array, **values: Attribute) -> Array:
    return np.asarray(MEANING[op](Node("x", op, attributes=attributes(**values)), list(inputs), ENV.dims))


def as_torch(op: str, *inputs: Array, **values: Attribute) -> Tensor:
    given = [torch.from_numpy(np.array(x)) for x in inputs]
    result = TORCH[op](Node("x", op, attributes=attributes(**values)), given, ENV)
    assert isinstance(result, Tensor)
    return result


def same(found: Array, expected: Tensor) -> None:
    assert found.dtype == expected.numpy().dtype
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-13, atol=1e-13)


def test_every_operation_has_a_meaning_or_is_declined_by_name() -> None:
    assert {*MEANING, *DECLINED, *STRUCTURE} == set(OPS)
    assert len(MEANING) + len(DECLINED) + len(STRUCTURE) == len(OPS)


def test_it_needs_no_torch_and_no_rule_of_the_compiler() -> None:
    """Beside itself it imports the graph and how paths are made of it."""
    code = (
        "import sys, fastgrad_compiler.reference.oracle\n"
        "print(*sorted(m for m in sys.modules if m.startswith('fastgrad_compiler.') or m in ('torch', 'scipy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [name.removeprefix("fastgrad_compiler.") for name in done.stdout.split()]
    needed = ["calls", "dim", "flatten", "graph", "names"]
    own = ["oracle", "oracle_attention", "oracle_convolution", "oracle_operations"]
    assert names == [
        "ir",
        *(f"ir.{name}" for name in needed),
        "reference",
        *(f"reference.{name}" for name in own),
    ]


# ---------------------------------------------------------------- each operation against torch

X = normal(2, 3, 5, 4)
SCORES = normal(2, 3, 5, 5)
HIDDEN = np.where(normal(2, 3, 5, 5, seed=3) > 0.5, -INF, SCORES)
HIDDEN[:, :, 2] = -INF
MASK = np.array([[True, False, True, True, False], [False] * 5])
LENGTHS = np.array([2, 9])
IDS = np.array([[1, 1, 2, 1, 1], [0, 0, 0, 3, 3]])
WHOLE = np.array([[-7, 0, 3], [2, -1, 5]])
EDGES = np.array(
    [-INF, -800.0, -40.0, -1.5, -0.5, -1e-9, 0.0, 1e-9, 0.5, 1.5, 2.9, 40.0, 800.0, INF, math.nan]
)
GATES = -np.abs(normal(2, 3, 5, seed=4))
N = Dim.of("n")

Case = tuple[tuple[Array, ...], dict[str, Attribute]]


def case(*inputs: Array, **values: Attribute) -> Case:
    return inputs, values


PAIR = (normal(2, 3, 4), normal(3, 1, seed=1))
CASES: dict[str, list[Case]] = {
    "constant": [case(value=2.5), case(value=3), case(value=True)],
    "fill": [case(shape=(2, N), value=-1.0), case(shape=(), value=2.0)],
    "literal": [case(values=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), label="c")],
    "arange": [case(stop=N), case(stop=3)],
    "sinusoid": [case(length=N, width=6), case(length=3, width=5)],
    "reshape": [case(X, shape=(6, 4, N)), case(WHOLE, shape=(6,))],
    "permute": [case(X, axes=(0, 2, 3, 1)), case(X, axes=(-1, -2, -3, -4))],
    "split_heads": [case(normal(2, 5, 12), heads=3), case(normal(5, 12), heads=4)],
    "merge_heads": [case(X)],
    "repeat_heads": [case(X, times=2)],
    "concat": [case(X, X[:, :, :2], axis=2), case(X, X, X, axis=-1)],
    "stack": [case(WHOLE, WHOLE, axis=0), case(X, X, axis=-1), case(X, X, axis=2)],
    "slice": [case(X, axis=2, start=1, stop=N - 1), case(X, axis=-1, start=0, stop=4)],
    "select": [case(X, axis=-1, index=2), case(X, axis=2, index=N - 1)],
    "pad": [case(X, axis=-2, before=1, after=2), case(X, axis=0, before=0, after=1)],
    "patches": [case(normal(2, 3, 8, 12), size=4)],
    "broadcast_to": [case(normal(3, 1), shape=(2, 3, N)), case(np.asarray(1.5), shape=(2, 2))],
    "sum_to": [case(X, shape=(3, 1, 4)), case(X, shape=()), case(X, shape=(2, 3, 5, 4))],
    "embedding": [case(normal(6, 3), IDS)],
    "embedding_gradient": [case(normal(2, 5, 3), IDS, rows=6)],
    "one_hot": [case(IDS, classes=N)],
    **{op: [case(*PAIR), case(WHOLE, np.asarray(2)), case(WHOLE, np.asarray(0.5)), case(EDGES, EDGES[::-1])]
       for op in ("add", "sub", "mul", "minimum", "maximum", "less", "less_equal", "equal")},
    "div": [case(*PAIR), case(WHOLE, np.asarray(4)), case(EDGES, EDGES[::-1])],
    **{op: [case(EDGES), case(X), case(np.asarray(0.3))] for op in (
        "neg", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "gelu", "silu", "abs", "erf", "log_sigmoid",
        "assume_bound")},
    "dropout": [case(X, p=0.5)],
    "softplus": [case(EDGES[(EDGES < 20) | (EDGES > 50)])],  # torch's is the identity above 20, and 2e-9 off there
    "logical_not": [case(MASK)],
    "cast": [case(EDGES[1:-2], dtype="int"), case(EDGES, dtype="bool"), case(MASK, dtype="float"),
             case(MASK, dtype="int"), case(WHOLE, dtype="float"), case(WHOLE, dtype="bool"), case(X, dtype="float")],
    "clamp": [case(EDGES, low=-1.0, high=1.0), case(EDGES, low=None, high=1.0)],
    "where": [case(MASK, normal(2, 5), np.asarray(2.0)), case(MASK, IDS, IDS + 1), case(MASK, IDS, normal(5))],
    "matmul": [case(X, normal(4, 2)), case(X, normal(3, 4, 2)), case(normal(2, 3), normal(3, 4, seed=1))],
    **{op: [case(X, axes=(-1,), keepdim=True), case(X, axes=(-1, -3), keepdim=False), case(X, axes=(), keepdim=True),
            case(X, axes=(-4, -3, -2, -1), keepdim=False)] for op in ("sum", "mean", "amax")},
    "softmax": [case(HIDDEN, axis=-1), case(HIDDEN, axis=-2), case(X * 1e4, axis=1)],
    "layer_norm": [case(X, normal(4), normal(4, seed=1), eps=1e-5)],
    "rms_norm": [case(X, normal(4), eps=1e-6), case(X * 1e-5, normal(4), eps=1e-6)],
    "unit": [case(X), case(X * 1e-7), case(np.zeros((2, 3)))],
    "causal": [case(SCORES), case(SCORES, fill=-9.0)],
    "window": [case(SCORES, width=2), case(normal(2, 5, 7), width=3, fill=-9.0)],
    "padding": [case(SCORES, MASK), case(SCORES[:, 0], MASK, fill=0.0)],
    "documents": [case(SCORES, IDS), case(SCORES[:, 0], IDS, fill=-9.0)],
    "prefix": [case(SCORES, LENGTHS), case(SCORES[:, 0], LENGTHS + 1, fill=-9.0)],
    **{op: [case(HIDDEN, GATES), case(SCORES[0, 0], GATES[0, 1]), case(SCORES, np.minimum(X[..., 0] * 800.0, 0.0))]
       for op in ("forget", "decay")},
    "near_far": [case(SCORES, SCORES + 9, block=1), case(normal(5, 7), normal(5, 7, seed=1), block=2)],
    "polynomial": [case(HIDDEN, coefficients=(1.0, -0.5, 0.25, 2.0)), case(X, coefficients=(0.0, 0.0, 1.0))],
    "normalize_rows": [case(np.exp(HIDDEN)), case(HIDDEN), case(np.zeros((2, 3)))],
    "rotary": [case(X, base=10000.0), case(X, base=50.0, inverse=True), case(X, base=50.0, stretch=(0.5, 3.0))],
    "shift": [case(X, by=1), case(X, IDS, by=2), case(X, IDS, by=-1), case(X, by=7), case(X, IDS, by=-7)],
    "depthwise": [case(X, normal(3, 4)), case(X, normal(7, 4), IDS), case(X, normal(2, 4), IDS, reverse=True)],
    "depthwise_weights": [case(X, X, width=7), case(X, normal(2, 3, 5, 4, seed=1), IDS, width=3)],
    "alibi": [case(SCORES), case(normal(8, 4, 6))],
    "cross_entropy": [case(normal(2, 5, 7), IDS), case(normal(7) * 1e3, np.asarray(4)),
                      case(normal(2, 5, 7), IDS, smoothing=0.5, ignored=int(IDS[0, 0]))],
    "linear_cross_entropy": [case(normal(2, 5, 3), normal(3, 7), IDS),
                             case(normal(2, 5, 3), normal(3, 7), IDS, normal(7, seed=1), smoothing=0.5),
                             case(normal(2, 5, 3), normal(3, 7), IDS, ignored=int(IDS[0, 0]))],
    "mse": [case(X, X[::-1])],
}  # fmt: skip


def test_every_meaning_is_compared() -> None:
    assert set(CASES) == set(MEANING) - {"attention", "poly_attention"}  # below


@pytest.mark.sampled(30)
@pytest.mark.parametrize("op", CASES)
def test_an_operation_is_torchs(op: str) -> None:
    for inputs, values in CASES[op]:
        with np.errstate(all="ignore"):
            same(apply(op, *inputs, **values), as_torch(op, *inputs, **values))


def test_softmax_and_rows_that_see_nothing() -> None:
    assert apply("softmax", np.array([[-INF, -INF], [0.0, -INF]]), axis=-1).tolist() == [[0, 0], [1, 0]]
    assert apply("normalize_rows", np.array([[-INF, -INF], [3.0, -INF]])).tolist() == [[0, 0], [1, 0]]


def test_a_cast_goes_towards_zero() -> None:
    assert apply("cast", np.array([-1.9, -0.5, 0.5, 1.9]), dtype="int").tolist() == [-1, 0, 0, 1]
    beyond = apply("cast", np.array([math.nan, INF, -INF, 1e300, -(2.0**63)]), dtype="int")
    assert beyond.tolist() == [0, 2**63 - 1, -(2**63), 2**63 - 1, -(2**63)]


def test_reductions_of_nothing() -> None:
    nothing = np.zeros((2, 0))
    with np.errstate(all="ignore"):
        assert apply("sum", nothing, axes=(-1,), keepdim=False).tolist() == [0, 0]
        assert np.isnan(apply("mean", nothing, axes=(-1,), keepdim=False)).tolist() == [True, True]
        assert np.isnan(apply("mse", nothing, nothing))
        assert apply("matmul", nothing, nothing.T).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="zero-size"):
        apply("amax", nothing, axes=(-1,), keepdim=False)


def test_a_row_whose_sum_is_zero_is_left_as_it_is() -> None:
    assert apply("normalize_rows", np.array([[1.0, -1.0, -INF], [1.0, 3.0, 0.0]])).tolist() == [
        [1, -1, 0],
        [0.25, 0.75, 0],
    ]


def test_a_clamp_of_ints_gives_ints() -> None:
    found = apply("clamp", WHOLE, low=-1.5, high=2.5)
    assert (found.dtype.name, found.tolist()) == ("int64", [[-1, 0, 2], [2, -1, 2]])


@pytest.mark.parametrize(
    ("op", "inputs", "values"),
    [
        ("embedding", (normal(3, 2), np.array([3])), {}),
        ("embedding", (normal(3, 2), np.array([-1])), {}),
        ("one_hot", (np.array([5]),), {"classes": N}),
        ("cross_entropy", (normal(1, 3), np.array([3])), {}),
        ("cross_entropy", (normal(1, 3), np.array([3])), {"ignored": 4}),
        ("slice", (normal(4),), {"axis": 0, "start": 0, "stop": N}),
        ("select", (normal(4),), {"axis": 0, "index": 4}),
        ("patches", (normal(1, 1, 4, 6),), {"size": 4}),
    ],
)
def test_what_has_no_value(op: str, inputs: tuple[Array, ...], values: dict[str, Attribute]) -> None:
    with pytest.raises(ValueError, match=r"of an axis of|where there are|in patches of"):
        apply(op, *inputs, **values)


# ---------------------------------------------------------------- attention


def drawn(program: Program, sizes: dict[str, int], seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    result: dict[str, Array] = {}
    for node in program[program.main].inputs:
        shape = tuple(dim.evaluate(sizes) for dim in node.tensor.shape)
        value: Array = generator.standard_normal(shape)
        if node.tensor.dtype == "int":
            value = generator.integers(0, 3, shape)
        result[node.name] = np.asarray(value < 0.3) if node.tensor.dtype == "bool" else value
    return result


def by_torch(program: Program, inputs: dict[str, Array], weights: dict[str, Tensor]) -> list[Array]:
    result = run_torch(
        program, {k: torch.from_numpy(x) for k, x in inputs.items()}, weights, dtype=torch.float64
    )
    return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("coefficients", [None, (1.0, 1.0, 0.5)], ids=["softmax", "polynomial"])
def test_attention_in_every_form(variant: Variant, coefficients: tuple[float, ...] | None) -> None:
    program = infer_shapes(parse_program(variant.text))
    if coefficients is not None:
        if variant.window or variant.alibi:
            return
        attention = program["main"]["y"]
        kept = [(k, v) for k, v in attention.attributes if k not in ("window", "alibi")]
        kept += [("coefficients", coefficients)]
        node = Node(attention.name, "poly_attention", attention.inputs, tuple(sorted(kept)), attention.type)
        main = program["main"]
        nodes = (*main.nodes[:-1], node)
        program = program.with_graphs([type(main)(main.name, nodes, main.outputs, main.block)])
    inputs = drawn(program, {"b": 2, "n": 7, "m": 7 if "cross" not in variant.name else 9})
    (found,) = evaluate(program, inputs, {})
    (expected,) = by_torch(program, inputs, {})
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs(causal: bool) -> None:
    q, k, v = normal(2, 4, 6, 3), normal(2, 4, 6, 3, seed=1), normal(2, 4, 6, 2, seed=2)
    node = Node("a", "attention", attributes=attributes(
        roles=(), causal=causal, scale=0.7, near=None, window=None, alibi=False, bound=None, asserted=False, proof=(),
    ))  # fmt: skip
    given = [torch.from_numpy(x) for x in (q, k, v)]
    expected = functional.scaled_dot_product_attention(
        given[0], given[1], given[2], is_causal=causal, scale=0.7
    )
    np.testing.assert_allclose(oracle_attention.attention(node, [q, k, v]), expected.numpy(), rtol=1e-12)


# ---------------------------------------------------------------- programs

SPEC = """
use std
param near = 2
dim b
dim n

block layer(x: float[b, n, d]; heads: int, near: int) -> float[b, n, d] {
    x = x + std.attention(std.rms_norm(x); heads, causal = true, gain = 1.0, near = near, rope = 100.0)
    x = x + std.swiglu(std.rms_norm(x) as ffn; hidden = 12)
    return x
}

model m(tokens: int[b, n], mask: bool[b, n]) -> (float[b, n, 9], float[b, n, 8]) {
    weight table: float[9, 8] = normal(std = 1.0)
    buffer shift: float[8] = ones()
    x = embedding(table, tokens) + shift
    repeat i in 3 { x = layer(x; 2, near) as layers }
    return (x @ table.T, where(reshape(mask, (b, n, 1)), x, -x))
}
budget { near = 2 }
"""


def keep(seen: dict[str, Array]) -> Callable[[str, Node, Array], None]:
    """A watch that keeps values by path."""
    return lambda path, node, value: seen.update({path: value})


def test_a_program_at_every_stage_and_its_paths() -> None:
    stages = {stage.name: stage.program for stage in run(elaborate(Source("<text>", SPEC)))}
    inputs, weights = drawn(stages["shapes"], {"b": 2, "n": 9}), initial_weights(stages["shapes"], 1)
    given = {path: tensor.double().numpy() for path, tensor in weights.items()}
    exact = by_torch(stages["shapes"], inputs, weights)
    for name, program in stages.items():
        seen: dict[str, Array] = {}
        found = evaluate(program, inputs, given, watch=keep(seen))
        expected = by_torch(program, inputs, weights) if name == "lowrank" else exact
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)
        assert {"tokens", "mask", "layers.0.attention.x", "layers.2.attention.wq"} <= set(seen)
        assert np.array_equal(seen["layers.1.attention.wq"], given["layers.1.attention.wq"])


def test_types_may_be_missing() -> None:
    program = parse_program(
        "main main\ngraph main {\n    %x = input() : float[n, 3]\n    %y = exp(%x)\n    return %y\n}\n"
    )
    assert program["main"]["y"].type is None
    (found,) = evaluate(program, {"x": np.zeros((2, 3))}, {})
    assert found.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"main takes \['x'\], not \[\]"),
        ({"x": np.zeros(3)}, "of shape"),
        ({"x": np.zeros((2, 4))}, r"x is float\[n, 3\], not of shape \(2, 4\)"),
        ({"x": np.zeros((2, 3), bool)}, "x is an array of bool, not of float"),
    ],
)
def test_inputs_are_checked(inputs: dict[str, Array], message: str) -> None:
    program = parse_program("main main\ngraph main {\n    %x = input() : float[n, 3]\n    return %x\n}\n")
    with pytest.raises(ValueError, match=message):
        evaluate(program, inputs, {})


def test_gradient_graphs_are_declined() -> None:
    stages = run(elaborate(Source("<text>", SPEC)))
    program = stages[-1].program
    gradient = program[str(program.gradient)]
    inputs = {**drawn(program, {"b": 1, "n": 4})}
    for node in gradient.inputs:
        inputs.setdefault(node.name, np.zeros(tuple(d.evaluate({"b": 1, "n": 4}) for d in node.tensor.shape)))
    weights = {p: t.double().numpy() for p, t in initial_weights(program).items()}
    with pytest.raises(NotImplementedError, match="is of gradient graphs"):
        evaluate(program, inputs, weights, graph=gradient.name)
