"""The derived gradient graph agrees with torch autograd of the interpreter's forward, for every operation."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
import torch

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.passes.backward import DECLINED, VJP, derive_gradient
from fastgrad_compiler.pipeline import run as run_passes
from fastgrad_compiler.reference.interpret import run, run_gradient
from fastgrad_grammar.source import Source
from tests.compiler.attention_variants import PADDING, VARIANTS, Variant
from tests.compiler.gradients import assert_gradient, derive, program_of, sample_of
from tests.initial_weights import initial_weights


@dataclass(frozen=True)
class Case:
    """`expression` over inputs %a, %b, ... of these types."""

    types: tuple[str, ...]
    expression: str
    positive: bool = False

    @property
    def text(self) -> str:
        """A program of one operation."""
        names = "abcdefgh"
        lines = [f"%{name} = input() : {type_}" for name, type_ in zip(names, self.types, strict=False)]
        body = "\n    ".join([*lines, f"%y = {self.expression}", "return %y"])
        dims = "dim n % 2\n" if "n/2" in self.expression else ""
        return f"program p\nmain main\n{dims}\ngraph main {{\n    {body}\n}}\n"


F, G, S = "float[b, n, 4]", "float[n, 1]", "float[b, 2, n, n]"

CASES: dict[str, tuple[Case, ...]] = {
    **{
        op: (Case((F,), f"{op}(%a)"),)
        for op in ("neg", "exp", "tanh", "sigmoid", "relu", "gelu", "silu", "abs")
    },
    **{op: (Case((F,), f"{op}(%a)"),) for op in ("log_sigmoid", "softplus", "erf", "unit", "merge_heads")},
    **{op: (Case((F,), f"{op}(%a)", positive=True),) for op in ("log", "sqrt", "rsqrt")},
    **{
        op: (
            Case((F, F), f"{op}(%a, %b)"),
            Case((F, G), f"{op}(%a, %b)"),
            Case((G, "float[4]"), f"{op}(%a, %b)"),
        )
        for op in ("add", "sub", "mul", "div", "minimum", "maximum")
    },
    "cast": (Case((F,), 'cast(%a, dtype = "float")'),),
    "clamp": (
        Case((F,), "clamp(%a, high = 1.1, low = -0.7)"),
        Case((F,), "clamp(%a, high = none, low = -0.7)"),
    ),
    "where": (Case(("bool[n, 4]", F, "float[4]"), "where(%a, %b, %c)"),),
    "matmul": (
        Case((F, "float[b, 4, m]"), "matmul(%a, %b)"),
        Case((F, "float[4, 3]"), "matmul(%a, %b)"),
        Case(("float[n, 4]", "float[b, 1, 4, 3]"), "matmul(%a, %b)"),
    ),
    "reshape": (Case((F,), "reshape(%a, shape = [b*n, 2, 2])"),),
    "permute": (Case((F,), "permute(%a, axes = (1, 2, 0))"), Case((F,), "permute(%a, axes = (0, -1, -2))")),
    "split_heads": (Case((F,), "split_heads(%a, heads = 2)"),),
    "repeat_heads": (Case(("float[b, 2, n, 3]",), "repeat_heads(%a, times = 3)"),),
    "concat": (
        Case((F, "float[b, m, 4]", F), "concat(%a, %b, %c, axis = -2)"),
        Case((F, "float[b, n, 2]"), "concat(%a, %b, axis = 2)"),
    ),
    "stack": (Case((F, F), "stack(%a, %b, axis = 0)"), Case((F, F), "stack(%a, %b, axis = -1)")),
    "slice": (
        Case((F,), "slice(%a, axis = -1, start = 1, stop = 3)"),
        Case((F,), "slice(%a, axis = 1, start = 2, stop = <n - 1>)"),
    ),
    "select": (
        Case((F,), "select(%a, axis = -1, index = 2)"),
        Case((F,), "select(%a, axis = 1, index = <n - 1>)"),
    ),
    "pad": (Case((F,), "pad(%a, after = 1, axis = -2, before = 2)"),),
    "patches": (Case(("float[b, 3, 4, 6]",), "patches(%a, size = 2)"),),
    "broadcast_to": (Case((G,), "broadcast_to(%a, shape = [2, n, 4])"),),
    "sum_to": (Case((F,), "sum_to(%a, shape = [n, 1])"),),
    "embedding": (Case(("float[3, 4]", "int[b, n]"), "embedding(%a, %b)"),),
    "embedding_gradient": (Case((F, "int[b, n]"), "embedding_gradient(%a, %b, rows = 3)"),),
    **{
        op: (
            Case((F,), f"{op}(%a, axes = (-1,), keepdim = false)"),
            Case((F,), f"{op}(%a, axes = (-3, -2), keepdim = true)"),
            Case((F,), f"{op}(%a, axes = (-1, -2, -3), keepdim = false)"),
        )
        for op in ("sum", "mean", "amax")
    },
    "softmax": (Case((F,), "softmax(%a, axis = -1)"), Case((F,), "softmax(%a, axis = -2)")),
    "polynomial": (
        Case((F,), "polynomial(%a, coefficients = (1.0, -0.5, 0.25, 0.1, 0.2))"),
        Case((F,), "polynomial(%a, coefficients = (0.0, 0.0, 1.0))"),
        Case((F,), "polynomial(%a, coefficients = (2.0,))"),
    ),
    "normalize_rows": (
        Case((F,), "normalize_rows(%a)", positive=True),
        Case(("float[4]",), "normalize_rows(%a)"),
    ),
    "layer_norm": (Case((F, "float[4]", "float[4]"), "layer_norm(%a, %b, %c, eps = 1e-05)"),),
    "rms_norm": (Case((F, "float[4]"), "rms_norm(%a, %b, eps = 0.1)"),),
    "causal": (Case((S,), "causal(%a, fill = -2.0)"),),
    "window": (Case((S,), "window(%a, fill = -2.0, width = 2)"),),
    "padding": (Case(("float[b, 2, m, n]", "bool[b, n]"), "padding(%a, %b, fill = -2.0)"),),
    "documents": (Case((S, "int[b, n]"), "documents(%a, %b, fill = -2.0)"),),
    "prefix": (Case((S, "int[b]"), "prefix(%a, %b, fill = -2.0)"),),
    **{op: (Case((S, "float[b, 2, n]"), f"{op}(%a, %b)"),) for op in ("forget", "decay")},
    "near_far": (Case((S, S), "near_far(%a, %b, block = 1)"), Case((S, S), "near_far(%a, %b, block = 2)")),
    "assume_bound": (Case((S,), "assume_bound(%a, bound = 9.0)"),),
    "rotary": (
        Case((F,), "rotary(%a, base = 100.0)"),
        Case((F,), "rotary(%a, base = 100.0, inverse = true)"),
    ),
    "shift": (Case((F,), "shift(%a, by = 2)"), Case((F, "int[b, n]"), "shift(%a, %b, by = -1)")),
    "depthwise": (
        Case((F, "float[3, 4]"), "depthwise(%a, %b)"),
        Case((F, "float[3, 4]", "int[b, n]"), "depthwise(%a, %b, %c)"),
        Case((F, "float[2, 4]", "int[b, n]"), "depthwise(%a, %b, %c, reverse = true)"),
    ),
    "depthwise_weights": (Case((F, F, "int[b, n]"), "depthwise_weights(%a, %b, %c, width = 3)"),),
    "alibi": (Case((S,), "alibi(%a)"),),
    "dropout": (Case((F,), "dropout(%a, p = 0.5)"),),
    "cross_entropy": (Case((F, "int[b, n]"), "cross_entropy(%a, %b)"),),
    "mse": (Case((F, F), "mse(%a, %b)"),),
}
ELSEWHERE = {"item", "call", "repeat", "attention", "poly_attention"}  # tested below and in test_lowrank


def test_every_op_has_a_rule_or_is_declined() -> None:
    assert VJP.keys() | DECLINED.keys() == OPS.keys()
    assert not VJP.keys() & DECLINED.keys()
    assert CASES.keys() | ELSEWHERE == VJP.keys()


@pytest.mark.sampled(40)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{op}-{i}") for op, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_rule_agrees_with_autograd(case: Case) -> None:
    program = derive(program_of(case.text))
    inputs = sample_of(program)
    if case.positive:
        inputs = [x.abs() for x in inputs]
    assert_gradient(program, inputs)


STRUCTURE = """
program p
main main
objective loss

graph inner {
    %x = input() : float[n, 4]
    %c = input() : int[]
    %w = weight(init = ("normal", 0.0, 0.5), label = "w") : float[4, 4]
    %unused = weight(init = ("normal", 0.0, 0.5), label = "unused") : float[4]
    %y = matmul(%x, %w)
    %z = tanh(%y)
    %k = add(%c, %c)
    return %y, %k, %z
}

graph table {
    %w = weight(init = ("normal", 0.0, 1.0), label = "w") : float[4]
    return %w
}

graph body {
    %x = input() : float[n, 4]
    %step = input() : int[]
    %shift = input() : float[4]
    %v = weight(init = ("normal", 0.0, 0.5), label = "v") : float[4]
    %one = constant(value = 1)
    %next = add(%step, %one)
    %parts = call(%x, %step, graph = "inner", label = "deep")
    %y = item(%parts, index = 0)
    %z = item(%parts, index = 2)
    %scaled = mul(%z, %v)
    %s = mul(%y, %step)
    %t = add(%scaled, %s)
    %u = add(%t, %shift)
    return %u, %next
}

graph other {
    %x = input() : float[n, 4]
    %step = input() : int[]
    %shift = input() : float[4]
    %v = weight(init = ("normal", 0.0, 0.5), label = "v") : float[4]
    %y = mul(%x, %v)
    return %y, %step
}

graph main {
    %x = input() : float[n, 4]
    %ids = input() : int[n]
    %spare = input() : float[n]
    %shift = call(graph = "table", label = "table")
    %zero = constant(value = 1)
    %many = repeat(%x, %zero, %shift, bodies = (("body", 2), ("other", 1), ("body", 1)), carried = 2)
    %y = item(%many, index = 0)
    %count = item(%many, index = 1)
    %parts = call(%y, %count, graph = "inner", label = "inner")
    %z = item(%parts, index = 2)
    %squared = mul(%z, %z)
    return %squared, %x, %squared
}

graph loss {
    %x = input() : float[n, 4]
    %ids = input() : int[n]
    %l = cross_entropy(%x, %ids)
    return %l
}
"""


@pytest.fixture(scope="module")
def structure() -> Program:
    return derive(program_of(STRUCTURE))


def test_calls_and_repeats_agree_with_autograd(structure: Program) -> None:
    """Several runs of a repeat, an int carried, invariants, results without a use, an input returned."""
    weights = initial_weights(structure, 0, torch.float64)
    assert {"v.0", "v.2", "v.3", "deep.1.w", "inner.unused", "table.w"} <= weights.keys()
    assert_gradient(structure, sample_of(structure), weights)


def test_objective_has_a_backward_too(structure: Program) -> None:
    loss = structure["loss.backward"]
    assert [node.name for node in loss.inputs] == ["x", "ids", "_d_l"]
    x, ids = sample_of(structure, "loss")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(run(structure, [x, ids], {}, graph="loss"), x)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(run(structure, [x.detach(), ids, one], {}, graph="loss.backward"), expected)


def test_gradient_is_hierarchical(structure: Program) -> None:
    assert structure.gradient == "main.backward"
    names = [graph.name for graph in structure.graphs]
    assert len(set(names)) == len(names) == 13  # `table` is called with both results used, and with one
    assert {"inner.backward", "body.backward", "other.backward", "table.backward", "main.backward"} < set(
        names
    )
    backward = next(node for node in structure["main.backward"].nodes if node.op == "repeat_backward")
    assert backward["backward"] == ("body.backward", "other.backward", "body.backward")


def test_what_nothing_depends_on_has_no_cotangent() -> None:
    """0 times what is infinite is not 0: of an input that a block leaves unread, and of a result that nobody reads."""
    text = """
    dim b
    block part(x: float[b, 4, 4], y: float[b, 4, 4]) -> (float[b, 4, 4], float[b, 4, 4]) {
        weight w: float[1] = zeros()
        return (x * 2.0, causal(y) * w)
    }
    block unread(x: float[b, 4, 4], y: float[b, 4, 4]) -> float[b, 4, 4] {
        return x * 3.0
    }
    model m(x: float[b, 4, 4]) -> float[b, 4, 4] {
        weight w: float[1] = zeros()
        (a, c) = part(x, x) as p
        return unread(a, causal(x) * w) as u
    }
    """
    program = run_passes(elaborate(Source("m.tfg", text)), until="backward", validate=False)[-1].program
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    weights = {path: torch.zeros(1, dtype=torch.float64) for path in ("w", "p.w")}
    of_inputs, of_weights = run_gradient(program, [x], weights, [torch.ones_like(x)], dtype=torch.float64)
    torch.testing.assert_close(of_inputs["x"], torch.full_like(x, 6.0))
    assert all(torch.equal(each, torch.zeros_like(each)) for each in of_weights.values())


def test_only_what_a_cotangent_needs_is_computed() -> None:
    derived = derive(
        program_of(
            """
            program p
            main main
            graph main {
                %x = input() : float[n]
                %ids = input() : int[n]
                %doubled = add(%ids, %ids)
                %e = exp(%x)
                %t = tanh(%e)
                %z = add(%t, %doubled)
                %unused = sigmoid(%z)
                return %z
            }
            """
        )
    )
    names = {node.name for node in derived["main.backward"].nodes}
    assert names == {"x", "ids", "_d_z", "e", "t", "_mul", "_constant", "_sub", "_d_e", "_d_x"}


def test_second_derivatives_are_declined(structure: Program) -> None:
    with pytest.raises(CompilerBug, match="repeat_backward"):
        derive_gradient(replace(structure, main="main.backward", gradient=None))


def test_a_derived_name_that_is_taken_gets_a_number() -> None:
    derived = derive(
        program_of(
            """
            program p
            main main
            graph main.backward {
                %x = input() : float[n]
                %y = exp(%x)
                return %y
            }
            graph main {
                %x = input() : float[n]
                %y = call(%x, graph = "main.backward", label = "f")
                return %y
            }
            """
        )
    )
    assert derived.gradient == "main.backward_2"
    assert_gradient(derived, sample_of(derived))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_attention_backward_agrees_with_autograd(variant: Variant) -> None:
    program = derive(program_of(variant.text))
    assert "attention.backward" in program.by_name
    assert_gradient(program, sample_of(program))


def test_a_row_without_a_visible_key_has_no_gradient() -> None:
    program = derive(program_of(Variant("padding", roles=PADDING).text))
    q, k, v, mask = sample_of(program)
    mask[0] = False
    d_inputs, _ = run_gradient(program, [q, k, v, mask], {}, [torch.ones(2, 4, 5, 2, dtype=torch.float64)])
    for g in d_inputs.values():
        assert g.isfinite().all()
        assert not g[0].any()
        assert g[1].any() or g is d_inputs["q"]


def deep(layers: int) -> Program:
    """A decoder as deep as told, in the shape that elaboration gives it."""
    return program_of(STRUCTURE.replace('(("body", 2), ("other", 1), ("body", 1))', f'(("body", {layers}),)'))


def test_depth_costs_nothing() -> None:
    shallow, tall = deep(1), deep(96)
    assert len(derive_gradient(shallow).graphs) == len(derive_gradient(tall).graphs)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        derive_gradient(tall)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
