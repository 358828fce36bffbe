"""Bounds: what is proved holds on data, is as sharp as it should be, and comes with its reasons."""

from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt

import pytest
import torch

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.analysis.bounds.rules import BOUND, DECLINED
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Bound, Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.pipeline import run as pipeline
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.source import Source

INPUTS = """
%x = input() : float[2, 4, 6, 8]  # a.tfg:1
%z = input() : float[2, 4, 6, 8]
%mask = input() : bool[2, 6]
%ids = input() : int[2, 6]
%v = input() : float[n, 8]
%g = weight(init = ("zeros",), label = "g") : float[4, 1, 1]
%w = weight(init = ("zeros",), label = "w") : float[8]
%two = constant(value = 2.0)
%q = unit(%x)  # a.tfg:3
%k = unit(%z)  # a.tfg:4
%kt = permute(%k, axes = (0, 1, 3, 2))
%s = matmul(%q, %kt)  # a.tfg:5
"""

FILL = -12345.0

GATE = "%a = amax(%x, axes = (-1,), keepdim = false)\n%l = log_sigmoid(%a)\n"

# the node that is looked at, what follows the inputs above, and its exact bound (low, high, norm)
CASES = {
    "unit rows": ("%y = add(%q, %two)", "q", (-1, 1, 1)),
    "unit of positive entries": ("%e = exp(%x)\n%y = unit(%e)", "y", (0, 1, 1)),
    "Cauchy-Schwarz": ("%y = neg(%s)", "y", (-1, 1, sqrt(6))),
    "scaled q": ("%r = mul(%q, %two)\n%y = matmul(%r, %kt)", "y", (-2, 2, 2 * sqrt(6))),
    "divided scores": ("%y = div(%s, %two)", "y", (-0.5, 0.5, sqrt(6) / 2)),
    "gain behind a sigmoid": (
        "%a = sigmoid(%g)\n%b = mul(%two, %a)\n%r = mul(%q, %b)\n%y = matmul(%r, %kt)",
        "y",
        (-2, 2, 2 * sqrt(6)),
    ),
    "gain behind tanh": ("%a = tanh(%g)\n%y = mul(%s, %a)", "y", (-1, 1, sqrt(6))),
    "gain behind clamp": (
        "%a = clamp(%g, low = 0.5, high = 3.0)\n%y = mul(%s, %a)",
        "y",
        (-3, 3, 3 * sqrt(6)),
    ),
    "rotation": ("%y = rotary(%q, base = 10000.0)", "y", (-1, 1, 1)),
    "rotation of clamped entries": (
        "%a = clamp(%x, low = -1.0, high = 1.0)\n%y = rotary(%a, base = 100.0)",
        "y",
        (-sqrt(2), sqrt(2), sqrt(8)),
    ),
    "triangle inequality": ("%y = sub(%q, %k)", "y", (-2, 2, 2)),
    "repeated, then joined heads": (
        "%r = repeat_heads(%q, times = 2)\n%y = merge_heads(%r)",
        "y",
        (-1, 1, sqrt(8)),
    ),
    "joined and split heads": ("%r = merge_heads(%q)\n%y = split_heads(%r, heads = 2)", "y", (-1, 1, 2)),
    "rows cut by a reshape": ("%y = reshape(%q, shape = [2, 4, 6, 2, 4])", "y", (-1, 1, 1)),
    "rows joined by a reshape": ("%y = reshape(%q, shape = [2, 4, 48])", "y", (-1, 1, sqrt(6))),
    "rows mixed by a reshape": ("%y = reshape(%q, shape = [2, 4, 16, 3])", "y", (-1, 1, sqrt(3))),
    "concat": ("%y = concat(%q, %k, axis = -1)", "y", (-1, 1, sqrt(2))),
    "stack": ("%y = stack(%q, %k, axis = -1)", "y", (-1, 1, sqrt(2))),
    "slice": ("%y = slice(%q, axis = -1, start = 0, stop = 3)", "y", (-1, 1, 1)),
    "select": ("%y = select(%q, axis = 1, index = 0)", "y", (-1, 1, 1)),
    "pad": ("%a = exp(%q)\n%y = pad(%a, axis = -1, before = 1, after = 0)", "y", (0, 2.718281828459045, inf)),
    "softmax": ("%y = softmax(%x, axis = -1)", "y", (0, 1, 1)),
    "polynomial": ("%y = polynomial(%q, coefficients = (1.0, 1.0, 0.5))", "y", (0, 2.5, 2.5 * sqrt(8))),
    "odd powers": ("%y = polynomial(%q, coefficients = (0.0, -2.0, 0.0, 1.0))", "y", (-3, 3, 3 * sqrt(8))),
    "even powers of anything": ("%y = polynomial(%x, coefficients = (1.0, 0.0, 1.0))", "y", (0, inf, inf)),
    "shares of positive weights": ("%e = exp(%q)\n%y = normalize_rows(%e)", "y", (0, 1, 1)),
    "shares of weights of any sign": ("%y = normalize_rows(%q)", "y", None),
    "a mask on weights is not bounded": (
        "%e = exp(%s)\n%a = causal(%e, fill = -12345.0)\n%y = normalize_rows(%a)",
        "y",
        None,
    ),
    "trained norms are not bounded": ("%y = rms_norm(%x, %w, eps = 1e-05)", "y", None),
    "clamped weights of a norm": (
        "%a = clamp(%w, low = -1.0, high = 1.0)\n%y = rms_norm(%x, %a, eps = 1e-05)",
        "y",
        (-sqrt(8), sqrt(8), sqrt(8)),
    ),
    "weights are not bounded": ("%y = neg(%w)", "y", None),
    "masks keep what is visible": (
        "%a = causal(%s)\n%b = padding(%a, %mask)\n%y = window(%b, width = 2)",
        "y",
        (-1, 1, inf),
    ),
    "documents": ("%a = documents(%s, %ids)\n%y = mul(%a, %two)", "y", (-2, 2, inf)),
    "what a mask hides is not bounded": ("%a = causal(%s)\n%y = abs(%a)", "y", None),
    "a mask's fill is an entry": ("%a = causal(%s, fill = -12345.0)\n%y = abs(%a)", "y", (0, 12345, inf)),
    "exp of a mask": ("%a = causal(%s)\n%y = exp(%a)", "y", (0, 2.718281828459045, inf)),
    "mean": ("%y = mean(%q, axes = (-2,), keepdim = true)", "y", (-1, 1, 1)),
    "sum": ("%y = sum(%q, axes = (-1,), keepdim = false)", "y", (-8, 8, 8 * sqrt(6))),
    "amax": ("%y = amax(%q, axes = (-1,), keepdim = true)", "y", (-1, 1, 1)),
    "gelu": ("%y = gelu(%q)", "y", (-0.1701, 1, 1)),
    "silu": ("%y = silu(%q)", "y", (-0.2785, 1, 1)),
    "softplus": ("%y = softplus(%x)", "y", (0, inf, inf)),
    "log_sigmoid": ("%y = log_sigmoid(%x)", "y", (-inf, 0, inf)),
    "a forget gate": (f"{GATE}%y = forget(%s, %l)", "y", (-inf, 1, inf)),
    "a gate of any sign": ("%a = amax(%x, axes = (-1,), keepdim = false)\n%y = forget(%s, %a)", "y", None),
    "weights with a forget gate": (
        f"{GATE}%e = exp(%s)\n%y = decay(%e, %l)",
        "y",
        (0, 2.718281828459045, inf),
    ),
    "shares of weights with a forget gate": (
        f"{GATE}%e = exp(%s)\n%d = decay(%e, %l)\n%y = normalize_rows(%d)",
        "y",
        (0, 1, 1),
    ),
    "weights with a gate of any sign": (
        "%a = amax(%x, axes = (-1,), keepdim = false)\n%e = exp(%s)\n%y = decay(%e, %a)",
        "y",
        (0, inf, inf),
    ),
    "square": ("%y = mul(%x, %x)", "y", (0, inf, inf)),
    "reciprocal": ("%a = mul(%q, %q)\n%b = add(%a, %two)\n%y = div(%two, %b)", "y", (2 / 3, 1, sqrt(8))),
    "division by what may be 0": ("%y = div(%q, %k)", "y", None),
    "minimum": ("%y = minimum(%x, %two)", "y", (-inf, 2, inf)),
    "maximum": ("%a = tanh(%x)\n%y = maximum(%a, %two)", "y", (2, 2, 2 * sqrt(8))),
    "where": ("%c = less(%x, %z)\n%y = where(%c, %q, %two)", "y", (-1, 2, 2 * sqrt(8))),
    "alibi": ("%y = alibi(%s)", "y", (-inf, 1, inf)),
    "dropout": ("%y = dropout(%q, p = 0.0)", "y", (-1, 1, 1)),
    "near and far": ("%f = mul(%s, %two)\n%y = near_far(%s, %f, block = 2)", "y", (-2, 2, 2 * sqrt(6))),
    "log": ("%a = clamp(%x, low = 1.0, high = 10.0)\n%y = log(%a)", "y", (0, 2.302585092994046, inf)),
    "rsqrt": ("%a = clamp(%x, low = 4.0, high = 16.0)\n%y = rsqrt(%a)", "y", (0.25, 0.5, sqrt(8) / 2)),
}


def program(body: str, output: str = "y") -> Program:
    """A typed program with its bounds; its result is `output`."""
    return prove_bounds(infer_shapes(parse_program(f"graph main {{\n{INPUTS}{body}\nreturn %{output}\n}}\n")))


def close(found: Bound, low: float, high: float, norm: float) -> bool:
    return [found.low, found.high, found.norm] == pytest.approx([low, high, norm], rel=1e-9)


@pytest.mark.parametrize(("body", "node", "expected"), CASES.values(), ids=CASES.keys())
def test_bound_of_an_operation(body: str, node: str, expected: tuple[float, float, float] | None) -> None:
    found = program(body)["main"][node].bound
    if expected is None:
        assert found is None
        return
    assert found is not None
    low, high, norm = expected
    assert [found.low, found.high] == pytest.approx([low, high], rel=1e-9)
    if norm != inf and found.norm != inf:
        assert found.norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.sampled(30)
@pytest.mark.parametrize(("body", "node", "expected"), CASES.values(), ids=CASES.keys())
def test_no_tensor_leaves_its_bound(
    body: str, node: str, expected: tuple[float, float, float] | None
) -> None:
    """Every node of every case, on inputs of several sizes; entries that a mask hides are left out."""
    proved = program(body)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0, 30.0):
        inputs = {
            "x": size * torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64),
            "z": size * torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64),
            "v": size * torch.randn(5, 8, generator=generator, dtype=torch.float64),
            "mask": torch.arange(6) < torch.tensor([[3], [6]]),
            "ids": (torch.arange(6) >= 2).long().expand(2, 6),
        }
        weights = {
            "g": size * torch.randn(4, 1, 1, generator=generator, dtype=torch.float64),
            "w": size * torch.randn(8, generator=generator, dtype=torch.float64),
        }
        for each in proved["main"].nodes:
            if each.bound is None or each.tensor.dtype != "float":
                continue
            graph = replace(proved["main"], outputs=(each.name,))
            value = run(proved.with_graphs([graph]), inputs, weights, dtype=torch.float64)
            assert isinstance(value, torch.Tensor)
            visible = value[torch.isfinite(value) & (value != FILL)] if value.ndim else value
            if not visible.numel():
                continue
            assert visible.min() >= each.bound.low - 1e-9, each.name
            assert visible.max() <= each.bound.high + 1e-9, each.name
            if value.ndim and visible.numel() == value.numel():
                assert value.norm(dim=-1).max() <= each.bound.norm + 1e-9, each.name


def test_every_operation_has_a_rule_or_a_reason() -> None:
    assert set(BOUND) | set(DECLINED) == set(OPS)
    assert not set(BOUND) & set(DECLINED)
    assert all(DECLINED.values())


# A range that was claimed once, and what some input or weight makes of it: (node y, low, high) is what is true.
TRUE_RANGES = {
    "whole numbers may be 1 less": (
        "%a = sigmoid(%g)\n%b = constant(value = 0.2)\n%c = mul(%a, %b)\n%d = constant(value = 1.85)\n"
        '%e = add(%c, %d)\n%f = cast(%e, dtype = "int")\n%y = cast(%f, dtype = "float")',
        (1.0, 2.0),
    ),
    "whole numbers are rounded into": (
        "%a = sigmoid(%g)\n%b = constant(value = 0.99999999)\n%c = mul(%a, %b)\n"
        '%f = cast(%c, dtype = "int")\n%y = cast(%f, dtype = "float")',
        (0.0, 1.0),  # in float32, where the factor is 1
    ),
    "a sum of as many as there are tokens": (
        "%a = sigmoid(%v)\n%o = add(%a, %two)\n%y = sum(%o, axes = (-2,), keepdim = true)",
        (2.0, 1e9),
    ),
    "a product over as many as there are tokens": (
        "%a = sigmoid(%v)\n%o = add(%a, %two)\n%t = permute(%o, axes = (1, 0))\n%y = matmul(%t, %o)",
        (4.0, 1e9),
    ),
    "what a factor leaves hidden": ("%a = causal(%s)\n%b = mul(%a, %two)\n%c = neg(%b)\n"
                                    "%y = clamp(%c, high = 10.0, low = -10.0)", (-2.0, 10.0)),
    "asserted of scores of which nothing else is known": (
        "%f = matmul(%x, %kt)\n%a = causal(%f)\n%b = assume_bound(%a, bound = 1.0)\n%y = exp(%b)", (0.0, 2.71)),
    "asserted of what a rule knows nothing of": (
        "%a = causal(%s)\n%b = mul(%a, %s)\n%c = softplus(%b)\n%d = log(%c)\n%e = assume_bound(%d, bound = 1.0)\n"
        "%y = exp(%e)", (0.0, 2.71)),
    "two that are hidden": ("%a = causal(%s)\n%b = mul(%a, %a)\n%y = clamp(%b, high = 10.0, low = 0.0)", (0.0, 10.0)),
    "ints of 64 bits are not all floats": (
        "%a = constant(value = 9007199254740993)\n%b = constant(value = 9007199254740992)\n%y = sub(%a, %b)",
        (1.0, 1.0),
    ),
    "ints that overflow": ("%a = abs(%ids)\n%y = mul(%a, %ids)", (-(2.0**63), 2.0**63)),
    "what has underflown": ("%a = clamp(%x, high = -1000.0, low = -2000.0)\n%b = sigmoid(%a)\n%e = exp(%z)\n"
                            "%y = mul(%b, %e)", (0.0, 1e300)),
    "the polynomial of -infinity": (
        "%r = relu(%x)\n%a = log(%r)\n%y = polynomial(%a, coefficients = (1.0, 0.0, 1.0))", (0.0, inf)),
}  # fmt: skip


@pytest.mark.parametrize(("body", "true"), TRUE_RANGES.values(), ids=TRUE_RANGES.keys())
def test_a_range_holds_what_a_run_can_give(body: str, true: tuple[float, float]) -> None:
    found = program(body)["main"]["y"].bound
    assert found is None or (found.low <= true[0] and true[1] <= found.high)


TRUNCATED = """dim b
dim n
model m(x: float[b, n, 4]) -> float[b, n, 4] {{
    weight tau: float[1] = zeros()
    q = unit(x) / (float({whole}) - 0.8)
    return softmax(causal(q @ unit(x).T)) @ x
}}
"""


@pytest.mark.parametrize(
    ("whole", "limit"),
    [("int(sigmoid(tau) * 0.2 + 1.85)", None), ("clamp(int(sigmoid(tau) * 0.2 + 1.85); 1, 2)", 5.0)],
)
def test_logits_over_whole_numbers(whole: str, limit: float | None) -> None:
    """The divisor is 0.2 or 1.2, so that logits reach 5; of an `int` that may come of NaN nothing above 0 is proved."""
    stages = pipeline(elaborate(Source("m.tfg", TRUNCATED.format(whole=whole))), until="attention")
    (found,) = (node for node in stages[-1].program["m"].nodes if node.op == "attention")
    assert found["bound"] == (limit if limit is None else pytest.approx(limit, rel=1e-12))


def test_proof_names_each_step_and_its_line_once() -> None:
    found = program(
        "%r = rotary(%q, base = 100.0)  # a.tfg:6\n%t = mul(%r, %two)  # a.tfg:7\n%y = matmul(%t, %kt)  # a.tfg:8"
    )
    bound = found["main"]["y"].bound
    assert bound is not None
    assert bound.proof == (
        "rows of q have norm at most 1: unit divides each row by its norm (a.tfg:3)",
        "rows of r have norm at most 1: rotary is a rotation (a.tfg:6)",
        "rows of t have norm at most 2: times 2 (a.tfg:7)",
        "rows of k have norm at most 1: unit divides each row by its norm (a.tfg:4)",
        "|y| is at most 2: Cauchy-Schwarz with norms 2 and 1 (a.tfg:8)",
    )


def test_proof_holds_no_premise_that_is_not_needed() -> None:
    bound = program("%e = exp(%q)\n%y = tanh(%e)\n%u = unit(%y)", "u")["main"]["u"].bound
    assert bound is not None
    assert not any("tanh" in line and "norm" in line for line in bound.proof[-1:])
    assert bound.proof[-1].startswith("rows of u have norm at most 1: unit")


def test_asserted_bound_is_marked_and_passes_on() -> None:
    found = program("%f = matmul(%x, %kt)\n%a = assume_bound(%f, bound = 3.0)  # a.tfg:9\n%y = mul(%a, %two)")
    bound = found["main"]["y"].bound
    assert bound is not None
    assert bound.asserted
    assert (bound.low, bound.high) == (-6, 6)
    assert any("assumed in the file, not proved (a.tfg:9)" in line for line in bound.proof)


def test_assumption_that_is_proved_anyway_is_not_an_assertion() -> None:
    bound = program("%y = assume_bound(%s, bound = 1.5)")["main"]["y"].bound
    assert bound is not None
    assert not bound.asserted
    assert bound.high == 1


CALLS = """
graph main {
    %x = input() : float[2, 8]
    %two = constant(value = 2.0)
    %q = unit(%x)
    %a = call(%q, graph = "double", label = "first") : float[2, 8]
    %b = call(%a, graph = "double", label = "second") : float[2, 8]
    return %b
}
graph double {
    %v = input() : float[2, 8]
    %two = constant(value = 2.0)
    %y = mul(%v, %two)
    return %y
}
"""


def test_calls_are_followed_with_the_facts_of_each_site() -> None:
    found = prove_bounds(infer_shapes(parse_program(CALLS)))
    first, second, inside = (found["main"]["a"].bound, found["main"]["b"].bound, found["double"]["y"].bound)
    assert first is not None
    assert second is not None
    assert inside is not None
    assert close(first, -2, 2, 2)
    assert close(second, -4, 4, 4)
    assert close(inside, -4, 4, 4)  # the join over both sites


REPEAT = """
graph main {{
    %x = input() : float[2, 8]
    %q = unit(%x)
    %w = weight(init = ("zeros",), label = "w") : float[8, 8]
    %y = repeat(%q, %w, bodies = (("body", 5),), carried = 1) : float[2, 8]
    return %y
}}
graph body {{
    %v = input() : float[2, 8]
    %w = input() : float[8, 8]
    %two = constant(value = 2.0)
    {step}
    return %r
}}
"""


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("%r = rotary(%v, base = 10.0)", 1.0),
        ("%t = matmul(%v, %w)\n%r = unit(%t)", 1.0),
        ("%r = mul(%v, %two)", None),
        ("%t = matmul(%v, %w)\n%r = add(%v, %t)", None),
    ],
)
def test_carried_values_keep_a_bound_that_every_iteration_keeps(step: str, expected: float | None) -> None:
    found = prove_bounds(infer_shapes(parse_program(REPEAT.format(step=step))))
    for bound in (found["main"]["y"].bound, found["body"]["v"].bound):
        assert (bound and bound.norm) == expected


def test_many_call_sites_cost_little_and_stay_sound() -> None:
    """Beyond a limit of contexts the inputs of a graph are unknown."""
    steps = "\n".join(
        f'%v{i + 1} = call(%v{i}, graph = "double", label = "c{i}") : float[2, 8]' for i in range(40)
    )
    text = f"graph main {{\n%x = input() : float[2, 8]\n%v0 = unit(%x)\n{steps}\nreturn %v40\n}}\n"
    found = prove_bounds(infer_shapes(parse_program(text + CALLS[CALLS.index("graph double") :])))
    inside = found["double"]["y"].bound
    assert inside is None
    assert found["main"]["v3"].bound is not None
    assert found["main"]["v40"].bound is None
