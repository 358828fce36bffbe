"""The pass `step`: any split of a text into calls gives the results of the whole; what it keeps and refuses."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attack.programs import grow
from attack.steps import by_interpreter
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import weights
from fastgrad_compiler.ir.graph import STEP, Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.step import derive_step, with_step
from fastgrad_compiler.passes.streams import DECLINED, STREAMS
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.reference import interpret
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.dsl.models import EXAMPLES, SIZES

TOLERANCE = 1e-10
TOKENS = 13
SPLITS = ([1] * TOKENS, [TOKENS], [4, 1, 1, 7])


def compiled(text: str) -> Program:
    return run(elaborate(Source("<test>", text)), until="lowrank", validate=False)[-1].program


def model(
    body: str, inputs: str = "x: float[b, n, 4]", result: str = "float[b, n, 4]", above: str = ""
) -> str:
    lines = "\n".join(f"    {line}" for line in body.strip().split("\n"))
    return f"use std\ndim b\ndim n\ndim m\n{above}\nmodel m({inputs}) -> {result} {{\n{lines}\n}}\n"


def random_weights(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal weights, small enough that nothing overflows."""
    found = {}
    for path, node in weights(program):
        shape = [dim.constant or 1 for dim in node.tensor.shape]
        found[path] = 0.4 * torch.randn(shape, dtype=torch.float64, generator=generator)
    return found


def random_inputs(program: Program, sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
    """Inputs of the model: normal floats, ids below 4, and masks."""
    found = []
    for node in program[program.main].inputs:
        shape = [dim.evaluate(sizes) for dim in node.tensor.shape]
        if node.tensor.dtype == "int":
            found.append(torch.randint(0, 4, shape, generator=generator))
        elif node.tensor.dtype == "bool":
            found.append(torch.rand(shape, generator=generator) > 0.3)
        else:
            found.append(torch.randn(shape, dtype=torch.float64, generator=generator))
    return found


def worst(program: Program, seed: int = 0) -> float:
    """The largest difference of any split, relative to one plus the largest entry."""
    generator = torch.Generator().manual_seed(seed)
    names = {name for node in program[program.main].inputs for dim in node.tensor.shape for name in dim.names}
    sizes = dict.fromkeys(names, 3) | {"m": 5, "b": 2, str(program.along): TOKENS}
    values, inputs = random_weights(program, generator), random_inputs(program, sizes, generator)
    whole = interpret.run(program, inputs, values, dtype=torch.float64)
    wanted = [whole] if isinstance(whole, Tensor) else list(whole)
    errors = [0.0]
    for split in SPLITS:
        for found, expected in zip(by_interpreter(program, inputs, values, split), wanted, strict=True):
            assert found.shape == expected.shape
            errors.append(difference(found, expected))
    return max(errors)


def difference(found: Tensor, expected: Tensor) -> float:
    """Where both are not finite alike there is none."""
    if not found.is_floating_point():
        return float((found != expected).any())
    a, b = (torch.nan_to_num(x, nan=7.0, posinf=1e6, neginf=-1e6) for x in (found, expected))
    return float((a - b).abs().max() / (1.0 + b.abs().max())) if a.numel() else 0.0


def test_every_operation_has_a_rule_or_is_declined() -> None:
    assert STREAMS.keys() | DECLINED.keys() == OPS.keys()
    assert not STREAMS.keys() & DECLINED.keys()


# ---------------------------------------------------------------- equal to the whole


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", sorted(set(SIZES) - {"bert", "vit"}))
def test_examples(name: str) -> None:
    source = read_source(EXAMPLES / f"{name}.tfg")
    program = with_step(
        run(elaborate(source, params=SIZES[name]), until="lowrank", validate=False)[-1].program
    )
    verify(program, "step")
    assert parse_program(print_program(program)) == program
    assert program.along == "n"
    assert worst(program) < TOLERANCE


PIECES = {
    "softmax": "x = x + softmax(causal(x @ x.T)) @ x",
    "heads": "h_ = split_heads(x, 2)\nx = x + merge_heads(softmax(causal(h_ @ h_.T)) @ h_)",
    "bounded": "u_ = unit(x)\nx = x + softmax(causal(near_far(x @ x.T, u_ @ u_.T; block = 2))) @ x",
    "polynomial": "x = x + normalize_rows(causal(polynomial(x @ x.T; (1.0, 1.0, 0.5)))) @ x",
    "near": "x = x + normalize_rows(causal(near_far(exp(x @ x.T), polynomial(x @ x.T; (1.0, 1.0, 0.5)); 2))) @ x",
    "window": "x = x + softmax(causal(window(x @ x.T; width = 3))) @ x",
    "documents": "x = x + softmax(causal(documents(x @ x.T, ids))) @ x",
    "padding": "x = x + softmax(causal(padding(x @ x.T, keys))) @ x",
    "forget": "x = x + softmax(causal(forget(x @ x.T, log_sigmoid(mean(x; axis = -1))))) @ x",
    "alibi": "h_ = split_heads(x, 2)\nx = x + merge_heads(softmax(alibi(causal(h_ @ h_.T))) @ h_)",
    "cross": "x = x + softmax(x @ memory.T) @ memory",
    "cross padding": "x = x + softmax(padding(x @ memory.T, seen)) @ memory",
    "cross polynomial": "x = x + normalize_rows(polynomial(x @ memory.T; (1.0, 1.0, 0.5))) @ memory",
    "std": "x = x + std.attention(x; heads = 2, causal = true, gain = 1.0, near = 4, rope = 100.0)",
    "mixer": "x = x + std.mixer(x; heads = 2, qk_dim = 2, near = 2)",
    "conv": "x = x + std.short_conv(x; width = 3)",
    "documents of a convolution": "weight w_: float[2, 4] = normal(std = 1.0)\nx = depthwise(x, w_, ids)",
    "shift": "x = x + 0.5 * shift(x; by = 2)",
    "shift of documents": "x = x + 0.5 * shift(x, ids)",
    "token shift": "x = x + pad(x[:, :n - 1]; axis = 1, before = 1, after = 0)",
    "token shift after zeros": "x = x + concat(zeros(b, 2, 4), x[:, :n - 2]; axis = 1)",
    "rotary": "x = rotary(x; base = 100.0)",
    "stretched": "x = rotary(x; base = 100.0, stretch = (3.0,))",
    "sinusoid": "x = x + sinusoid(n, 4)",
    "positions": "x = x + 0.1 * unsqueeze(float(positions(n)); axis = -1)",
    "learned positions": "weight t_: float[40, 4] = normal(std = 1.0)\nx = x + t_[1:n + 1]",
    "norm": "x = std.rms_norm(x)",
    "mlp": "x = x + std.mlp(x; hidden = 8)",
    "reshape": "x = reshape(reshape(x, (b, n * 2, 2)), (b, n, 4))",
    "batch": "x = reshape(reshape(x, (b * n, 4)) * 2.0, (b, n, 4))",
    "permute": "x = permute(permute(x, (2, 1, 0)) * 0.5, (2, 1, 0))",
    "stack": "x = sum(stack(x, 0.5 * x; axis = 1); axis = 1)",
    "ids": "weight e_: float[4, 4] = normal(std = 1.0)\nx = x + embedding(e_, ids)",
    "mean of the memory": "x = x * tanh(mean(memory; axis = 1, keepdim = true))",
    "weights alone": "weight v_: float[4, 4] = normal(std = 1.0)\nx = x @ (v_ @ v_.T)",
    "branches": "x = where(x > 0.0, x, 0.1 * x)",
}
INPUTS = "x: float[b, n, 4], ids: int[b, n], keys: bool[b, n], memory: float[b, m, 4], seen: bool[b, m]"


def stepped(body: str) -> Program:
    program = with_step(compiled(model(f"{body}\nreturn x", INPUTS)), "n")
    verify(program, "step")
    assert parse_program(print_program(program)) == program
    return program


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    assert worst(stepped(PIECES[name])) < TOLERANCE


def random_body(seed: int) -> str:
    """Some pieces after each other, names made their own, some inside of repeats."""
    rng = random.Random(seed)
    lines: list[str] = []
    for place in range(rng.randint(2, 5)):
        piece = PIECES[rng.choice(sorted(PIECES))]
        piece = re.sub(r"\b([a-z])_(?!\w)", rf"\g<1>_{place}", piece)  # names of its own
        if rng.random() < 0.3 and "weight" not in piece and "std" not in piece:
            piece = (
                f"repeat i in {rng.randint(1, 3)} {{\n" + "\n".join(piece.split("\n")) + "\nx = 0.5 * x\n}"
            )
        if "std." in piece:
            piece = f"{piece} as part{place}"
        lines += piece.split("\n")
    return "\n".join(lines)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    assert worst(stepped(random_body(seed)), seed) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12, 412, 20))
def test_many_random_programs(first: int) -> None:
    for seed in range(first, first + 20):
        assert worst(stepped(random_body(seed)), seed) < TOLERANCE, seed


@pytest.mark.medium
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 24), marks=pytest.mark.slow)], ids=str)
def test_programs_of_the_attack(seeds: range) -> None:
    """All operations: where a step form is derived, it is right."""
    right = 0
    for seed in seeds:
        program = compiled(grow(seed).text)
        for along in ("n", "m"):
            try:
                form = with_step(program, along)
            except TfgError:
                continue
            try:
                error = worst(form, seed)
            except ValueError:  # an index that a text of this length does not have
                continue
            assert error < TOLERANCE, (seed, along)
            right += 1
    assert right >= len(seeds) // 3


# ---------------------------------------------------------------- what it looks like


def test_what_needs_nothing_is_shared() -> None:
    program = stepped("x = x + std.mlp(x; hidden = 8)\nx = std.short_conv(x; width = 2)")
    forms = {graph.name for graph in program.graphs if graph.name.endswith(STEP)}
    assert forms == {"m@step", "std.short_conv@step"}


def test_what_is_the_same_in_every_call_is_computed_once() -> None:
    program = stepped("y = std.rms_norm(memory)\nx = x + softmax(x @ tanh(y).T) @ y")
    (once,) = [node for node in program[str(program.step)].nodes if node.get("once")]
    computed = {node.op for node in program[str(once["graph"])].nodes}
    assert {"call", "tanh"} <= computed
    assert "attention" not in computed


def test_labels_of_what_is_kept_are_told_apart() -> None:
    body = "repeat i in 2 {\nx = x + shift(x)\n}\nrepeat i in 3 {\nx = x - shift(x)\n}\nx = x + shift(x)"
    program = stepped(body)
    labels = [node["state"] for graph in program.graphs for node in graph.nodes if node.get("state")]
    assert len(labels) == len(set(labels)) == 3


def test_a_program_without_a_step_form_stays_as_it_is() -> None:
    program = compiled(model("return x - mean(x; axis = 1, keepdim = true)"))
    assert derive_step(program) is program


# ---------------------------------------------------------------- refusals


REFUSED = {
    "return x - mean(x; axis = 1, keepdim = true)": "it mixes tokens",
    "return softmax(x @ x.T) @ x": "it sees later tokens: it is not causal",
    "return softmax(window(x @ x.T; width = 2)) @ x": "it sees later tokens: it is not causal",
    "return x @ (x.T @ x)": "the product sums over tokens",
    "return reshape(reshape(x, (b, 4, n)) * 2.0, (b, n, 4))": "it puts entries of several tokens together",
    "return tanh(causal(x @ x.T)) @ x": "every token meets every other one",
    "return x + x[:, 0:1]": "it takes tokens out",
    "return x + unsqueeze(x[:, 0]; axis = 1)": "it takes one token out",
    "return concat(x[:, 0:1], x[:, :n - 1]; axis = 1)": "it takes tokens out",
    "return pad(x[:, :n - 2]; axis = 1, before = 1, after = 1)": "it puts something before or after the tokens",
    "return softmax(x; axis = 1)": "it mixes tokens",
    "return permute(softmax(permute(x, (0, 2, 1)); axis = -1), (0, 2, 1))": "it mixes tokens",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_mixes_tokens_or_sees_later_ones_is_refused_with_its_place(body: str) -> None:
    with pytest.raises(TfgError) as caught:
        with_step(compiled(model(body)), "n")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FG501"
    assert REFUSED[body] in diagnostic.message
    assert diagnostic.span is not None
    assert diagnostic.span.place.startswith("<test>:7:")


def test_the_dim_is_found_where_one_alone_looks_back() -> None:
    assert with_step(compiled(model("return x + shift(x)"))).along == "n"
    assert with_step(compiled(model("return tanh(x)"))).along == "n"  # not b, the first axis


def test_a_dim_that_is_not_there_or_not_the_only_one_is_refused() -> None:
    with pytest.raises(TfgError, match=r"FG502.*no dim q"):
        with_step(compiled(model("return shift(x)")), "q")
    two = model(
        "return (shift(x), shift(y))",
        "x: float[b, n, 4], y: float[b, m, 4]",
        "(float[b, n, 4], float[b, m, 4])",
    )
    with pytest.raises(TfgError, match=r"FG502.*m or n"):
        with_step(compiled(two))
    with pytest.raises(TfgError, match="FG502"):
        with_step(compiled(model("return x", "x: float[4]", "float[4]")))
