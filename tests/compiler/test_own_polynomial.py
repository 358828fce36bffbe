"""Attention whose weights are a polynomial of the model's own: recognised by structure, and left alone by budgets."""

from __future__ import annotations

import math

import pytest
import torch

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.approximation.own_polynomial import objection
from fastgrad_compiler.approximation.rational import trimmed
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.attention.table import attention_table, is_own
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.planning.candidates import MAX_RANK
from fastgrad_compiler.planning.cost import Shape, Way
from fastgrad_compiler.planning.own import with_own_lengths
from fastgrad_compiler.planning.plan import plan_attention
from fastgrad_compiler.planning.target_cost import dense_break_even
from fastgrad_compiler.reference.interpret import run_gradient
from fastgrad_grammar.diagnostics import TfgError
from tests.compiler.gradients import assert_gradient, derive, program_of, run_one, sample_of
from tests.compiler.test_attention import HEADS, SCORES, program, results

COEFFICIENTS = "coefficients = (1.0, 1.0, 0.5)"
P = f"%w = polynomial(%s, {COEFFICIENTS})\n"
END = "%p = normalize_rows(%w)\n%y = matmul(%p, %v)\nreturn %y"
MASK = "%mask = input() : bool[b, n]\n"
UNIT = "%qu = unit(%q)\n%ku = unit(%k)\n%kut = permute(%ku, axes = (0, 1, 3, 2))\n%t = matmul(%qu, %kut)\n"

SPELLINGS = {
    "unmasked": HEADS + SCORES + P + END,
    "causal on the weights": HEADS + SCORES + P + "%u = causal(%w)\n" + END.replace("%w", "%u"),
    "causal on the scores": HEADS + SCORES + "%u = causal(%s)\n" + P.replace("%s", "%u") + END,
    "causal on both": HEADS
    + SCORES
    + "%u = causal(%s)\n"
    + P.replace("%s", "%u")
    + "%x = causal(%w)\n"
    + END.replace("%w", "%x"),
    "padding on the weights, causal on the scores": HEADS
    + MASK
    + SCORES
    + "%u = causal(%s)\n"
    + P.replace("%s", "%u")
    + "%x = padding(%w, %mask)\n"
    + END.replace("%w", "%x"),
    "documents": HEADS
    + "%ids = input() : int[b, n]\n"
    + SCORES
    + P
    + "%u = documents(%w, %ids)\n"
    + END.replace("%w", "%u"),
    "scaled and negated scores": HEADS
    + SCORES
    + "%c = constant(value = -0.3)\n%u = mul(%s, %c)\n"
    + P.replace("%s", "%u")
    + END,
    "learned gain for each head": HEADS
    + '%tau = weight(init = ("zeros",), label = "tau") : float[4, 1, 1]\n'
    + SCORES
    + "%u = mul(%s, %tau)\n"
    + P.replace("%s", "%u")
    + END,
    "even powers": HEADS + SCORES + "%w = polynomial(%s, coefficients = (0.0, 0.0, 1.0, 0.0, 0.5))\n" + END,
    "over its sum": HEADS
    + SCORES
    + "%u = causal(%s)\n"
    + P.replace("%s", "%u")
    + "%a = sum(%w, axes = (-1,), keepdim = true)\n%p = div(%w, %a)\n%y = matmul(%p, %v)\nreturn %y",
    "over its sum, behind the values": HEADS
    + SCORES
    + P
    + "%a = sum(%w, axes = (-1,), keepdim = true)\n%o = matmul(%w, %v)\n%y = div(%o, %a)\nreturn %y",
    "v^T times transposed weights": HEADS
    + SCORES
    + P
    + "%p = normalize_rows(%w)\n%t = permute(%p, axes = (0, 1, 3, 2))\n"
    + "%vt = permute(%v, axes = (0, 1, 3, 2))\n%y = matmul(%vt, %t)\nreturn %y",
    "transposed scores": HEADS
    + "%qt = permute(%q, axes = (0, 1, 3, 2))\n%r = matmul(%k, %qt)\n%s = permute(%r, axes = (0, 1, 3, 2))\n"
    + P
    + END,
    "grouped": """
%q = input() : float[b, 4, n, 8]
%k0 = input() : float[b, 2, n, 8]
%v0 = input() : float[b, 2, n, 3]
%k = repeat_heads(%k0, times = 2)
%v = repeat_heads(%v0, times = 2)
"""
    + SCORES
    + P
    + END,
    "cross-attention": """
%q = input() : float[b, 4, n, 8]
%k = input() : float[b, 4, m, 8]
%v = input() : float[b, 4, m, 3]
%mask = input() : bool[b, m]
"""
    + SCORES
    + P
    + "%u = padding(%w, %mask)\n"
    + END.replace("%w", "%u"),
    "a single sequence": """
%q = input() : float[n, 8]
%k = input() : float[n, 8]
%v = input() : float[n, 3]
%kt = permute(%k, axes = (1, 0))
%s = matmul(%q, %kt)
"""
    + P
    + END,
    "exp nearby": HEADS
    + SCORES
    + P
    + "%e = exp(%s)\n%x = near_far(%e, %w, block = 2)\n%u = causal(%x)\n"
    + END.replace("%w", "%u"),
    "exp of other scores nearby": HEADS
    + SCORES
    + UNIT
    + P.replace("%s", "%t")
    + "%e = exp(%s)\n%x = near_far(%e, %w, block = 2)\n%u = causal(%x)\n"
    + END.replace("%w", "%u"),
    "exp of scaled scores nearby": HEADS
    + SCORES
    + P
    + "%c = constant(value = 0.5)\n%r = mul(%s, %c)\n%e = exp(%r)\n%x = near_far(%e, %w, block = 2)\n"
    + END.replace("%w", "%x"),
}

NEAR_MISSES = {
    "a window, which no kernel has": HEADS
    + SCORES
    + P
    + "%u = window(%w, width = 2)\n"
    + END.replace("%w", "%u"),
    "alibi": HEADS + SCORES + "%u = alibi(%s)\n" + P.replace("%s", "%u") + END,
    "less the largest score": HEADS
    + SCORES
    + "%a = amax(%s, axes = (-1,), keepdim = true)\n%u = sub(%s, %a)\n"
    + P.replace("%s", "%u")
    + END,
    "a fill of weights": HEADS + SCORES + P + "%u = causal(%w, fill = 0.5)\n" + END.replace("%w", "%u"),
    "a fill of bounded weights that exp would hide": HEADS
    + UNIT
    + P.replace("%s", "%t")
    + "%u = causal(%w, fill = -10000.0)\n"
    + END.replace("%w", "%u"),
    "a fill of bounded scores that exp would hide": HEADS
    + UNIT
    + "%u = causal(%t, fill = -10000.0)\n"
    + P.replace("%s", "%u")
    + END,
    "a near field of scores": HEADS
    + SCORES
    + UNIT
    + "%u = near_far(%s, %t, block = 2)\n"
    + P.replace("%s", "%u")
    + END,
    "a polynomial nearby, exp beyond": HEADS
    + SCORES
    + P
    + "%e = exp(%s)\n%x = near_far(%w, %e, block = 2)\n"
    + END.replace("%w", "%x"),
    "two polynomials": HEADS
    + SCORES
    + P
    + "%e = polynomial(%s, coefficients = (0.0, 0.0, 1.0))\n%x = near_far(%e, %w, block = 2)\n"
    + END.replace("%w", "%x"),
    "a mask inside of a near field": HEADS
    + SCORES
    + P
    + "%e = exp(%s)\n%u = causal(%w)\n%x = near_far(%e, %u, block = 2)\n"
    + END.replace("%w", "%x"),
    "weights without a sum": HEADS + SCORES + P + "%y = matmul(%w, %v)\nreturn %y",
    "the sum of another polynomial": HEADS
    + SCORES
    + P
    + "%o = polynomial(%s, coefficients = (1.0, 0.0, 0.5))\n"
    + "%a = sum(%o, axes = (-1,), keepdim = true)\n%p = div(%w, %a)\n%y = matmul(%p, %v)\nreturn %y",
    "masked weights over their sum, which is -inf": HEADS
    + SCORES
    + P
    + "%u = causal(%w)\n%a = sum(%u, axes = (-1,), keepdim = true)\n%p = div(%u, %a)\n%y = matmul(%p, %v)\nreturn %y",
    "columns instead of rows": HEADS
    + SCORES
    + P
    + "%t = permute(%w, axes = (0, 1, 3, 2))\n%n = normalize_rows(%t)\n%p = permute(%n, axes = (0, 1, 3, 2))\n"
    + "%y = matmul(%p, %v)\nreturn %y",
    "rows of queries": HEADS
    + "%qt = permute(%q, axes = (0, 1, 3, 2))\n%s = matmul(%k, %qt)\n"
    + P
    + "%n = normalize_rows(%w)\n%p = permute(%n, axes = (0, 1, 3, 2))\n%y = matmul(%p, %v)\nreturn %y",
    "one weight for all keys": HEADS + SCORES + "%w = polynomial(%s, coefficients = (1.0,))\n" + END,
    "weights returned as well": HEADS + SCORES + P + END + ", %p",
    "a sum of weights": HEADS + SCORES + P + "%e = exp(%s)\n%u = add(%w, %e)\n" + END.replace("%w", "%u"),
}


def own(of: Program) -> list[Node]:
    return [node for graph in of.graphs for node in graph.nodes if is_own(node)]


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spelling_is_recognised_and_means_the_same(spelling: str) -> None:
    before = program(spelling)
    after = recognise_attention(before)
    verify(after, "attention")
    assert parse_program(print_program(after)) == after
    (node,) = own(after)
    assert node.op == "poly_attention"
    left = {node.op for graph in after.graphs for node in graph.nodes}
    assert not left & {
        "polynomial",
        "normalize_rows",
        "exp",
        "matmul",
        "causal",
        "padding",
        "documents",
        "near_far",
    }
    torch.testing.assert_close(results(after), results(before), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spelling", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_miss_stays_as_it_is(spelling: str) -> None:
    before = program(spelling)
    assert recognise_attention(before) == before


@pytest.mark.parametrize("mask", ["", "%x = causal(%w)\n"])
def test_normalised_exp_is_softmax(mask: str) -> None:
    before = program(HEADS + SCORES + "%w = exp(%s)\n" + mask + END.replace("%w", "%x" if mask else "%w"))
    after = recognise_attention(before)
    (node,) = [node for node in after["main"].nodes if node.op == "attention"]
    assert node["causal"] == bool(mask)
    torch.testing.assert_close(results(after), results(before), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("spelling", "attribute", "expected"),
    [
        ("unmasked", "coefficients", (1.0, 1.0, 0.5)),
        ("unmasked", "degree", 2),
        ("unmasked", "eps", 0.0),
        ("unmasked", "bound", None),
        ("unmasked", "why", "exact: the model's own polynomial"),
        ("scaled and negated scores", "scale", -0.3),
        ("causal on both", "causal", True),
        ("padding on the weights, causal on the scores", "roles", ("padding",)),
        ("exp nearby", "near", 2),
        ("exp nearby", "roles", ()),
        ("exp of other scores nearby", "roles", ("near_q", "near_k")),
    ],
)
def test_node_says_what_was_recognised(spelling: str, attribute: str, expected: object) -> None:
    (node,) = own(recognise_attention(program(SPELLINGS[spelling])))
    assert node[attribute] == expected


# ---------------------------------------------------------------- gradients of what is not recognised

UNRECOGNISED = """
program p
main main
graph main {
    %s = input() : float[b, 2, n, n]
    %mask = input() : bool[b, n]
    %c = causal(%s)
    %w = polynomial(%c, coefficients = (1.0, 1.0, 0.5))
    %m = padding(%w, %mask)
    %y = normalize_rows(%m)
    return %y
}
"""


def test_gradient_of_masked_weights() -> None:
    """Of hidden pairs on either side of the polynomial, and of rows that see no key."""
    derived = derive(program_of(UNRECOGNISED))
    s, mask = sample_of(derived)
    mask[0, 0] = False  # the first query of the first sequence sees nothing
    assert not run_one(derived, [s, mask])[0, :, 0].any()
    assert_gradient(derived, [s, mask])
    one = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradient = run_gradient(derived, [s, mask], {}, [one])[0]["s"]
    assert gradient.isfinite().all()
    assert not gradient[0, :, 0].any()
    assert gradient[1].any()


def test_gradient_of_rows_without_weights() -> None:
    """Hidden entries, a row of nothing else, and a row of zeros."""
    body = "%s = input() : float[b, 4]\n%y = normalize_rows(%s)\nreturn %y"
    derived = derive(program_of(f"program p\nmain main\ngraph main {{\n{body}\n}}\n"))
    hidden = -math.inf
    rows = [[1.0, 2.0, hidden, 0.5], [hidden] * 4, [0.0, 0.0, hidden, 0.0]]
    assert_gradient(derived, [torch.tensor(rows, dtype=torch.float64)])


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_gradient_of_what_is_recognised(spelling: str) -> None:
    before = program(spelling)
    after = derive_gradient(recognise_attention(before))
    verify(after, "backward")
    weights = {"tau": torch.randn(4, 1, 1, dtype=torch.float64)} if "tau" in spelling else {}
    inputs = sample_of(before, n=6)
    assert_gradient(after, inputs, weights)
    result = run_one(after, inputs) if not weights else None
    cotangent = torch.ones_like(result) if result is not None else torch.ones(2, 4, 6, 3, dtype=torch.float64)
    first, second = (
        run_gradient(each, inputs, weights, [cotangent])[0] for each in (derive_gradient(before), after)
    )
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- budgets

TWO = (
    HEADS
    + UNIT
    + "%e = causal(%t)\n%f = softmax(%e, axis = -1)\n%exact = matmul(%f, %v)\n"
    + SCORES
    + "%w = polynomial(%s, coefficients = (1.0, 1.0, 0.5))\n%p = normalize_rows(%w)\n%mine = matmul(%p, %exact)\n"
    + "return %mine"
)


def planned(budget: str, max_rank: int = MAX_RANK) -> list[Node]:
    text = f"dim n <= 65536\nbudget {{\n{budget}\n}}\ngraph main {{\n{TWO}\n}}\n"
    after = plan_attention(recognise_attention(prove_bounds(program_of(text))), max_rank=max_rank)
    verify(after, "plan")
    assert parse_program(print_program(after)) == after
    return [entry.node for entry in attention_table(after)]


@pytest.mark.parametrize(
    "budget",
    [
        "output <= 0.1",
        "output <= 0.1\nnear = 64",
        'at "*" relative = 0.01',
        'at "*" degree = 2\nat "mine" exact',
    ],
)
def test_a_budget_does_not_change_it(budget: str) -> None:
    alone = with_own_lengths(recognise_attention(program(TWO)), "auto")
    assert planned(budget)[1] == own(alone)[0]


def test_the_plan_says_below_which_length_it_runs_on_all_pairs() -> None:
    """A rank of 45: the lengths are those of the cost model of each target."""
    (before,) = own(recognise_attention(program(TWO)))
    shape, way = Shape(n=1, m=1, d=8, dv=3, causal=False), Way(2)
    words = {"torch": "23 tokens (29 on a GPU)", "cpp": "29 tokens on a GPU", "auto": ""}
    for target, told in words.items():
        (node,) = own(with_own_lengths(recognise_attention(program(TWO)), target))
        lengths = tuple(dense_break_even(target, shape, way, on_gpu=gpu) for gpu in (False, True))
        assert (node["break_even"], node["break_even_gpu"]) == lengths
        added = f"; on all pairs below {told}, where that is faster (estimate)" if told else ""
        assert node["why"] == f"{before['why']}{added}"


def test_it_takes_no_share_of_a_budget() -> None:
    softmax = planned("output <= 0.1")[0]
    assert "output <= 0.1 shared equally by 1" in str(softmax["why"])


def test_a_rule_that_would_change_it_is_refused() -> None:
    with pytest.raises(TfgError) as caught:
        planned('at "*" degree = 2')
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FG311"
    assert 'attention "mine"' in diagnostic.message


def test_a_rank_over_the_limit_is_refused() -> None:
    assert planned("output <= 0.1", max_rank=45)
    with pytest.raises(TfgError) as caught:
        planned("output <= 0.1", max_rank=44)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["FG307"]


# ---------------------------------------------------------------- which polynomials

WEIGHTS = [
    (1.0, 1.0, 0.5),
    (0.0, 0.0, 1.0),
    (0.0, 0.0, 2.0, 0.0, 1.0),
    (1.0, 0.0, 0.0, 0.0, 1.0),
    (0.2500001, 1.0, 1.0),
    (1.0, -0.9, 1.0),
    (5e-324, 0.0, 1.0),
    (1e300, 1.0, 1e-300),
]
NO_WEIGHTS = [
    (),
    (1.0,),
    (1.0, 1.0),
    (1.0, 1.0, 0.5, 1 / 6),
    (0.0, 0.0, 0.0, 1.0),
    (1.0, 0.0, -1.0),
    (-1.0, 0.0, 1.0),
    (0.25, 1.0, 1.0),  # a double root
    (0.0, 1.0, 1.0),
    (0.0, 0.0, 0.0, 1.0, 1.0),
    (1.0, 1.0, 1e-320),  # its roots are out of range
    (0.0,) * 22 + (1.0,),
]


@pytest.mark.parametrize("coefficients", WEIGHTS, ids=str)
def test_polynomial_that_is_positive(coefficients: tuple[float, ...]) -> None:
    assert objection(coefficients) is None


@pytest.mark.parametrize("coefficients", NO_WEIGHTS, ids=str)
def test_polynomial_that_is_no_weight(coefficients: tuple[float, ...]) -> None:
    assert objection(coefficients) is not None


def test_the_constant_that_is_proposed_is_enough() -> None:
    found = objection((0.0, 1.0, 0.0, -0.5, 1.0))
    assert found is not None
    assert found.help is not None
    constant = float(found.help.removeprefix("a constant term above ").split()[0])
    assert objection((constant * 1.01, 1.0, 0.0, -0.5, 1.0)) is None
    assert objection((constant * 0.99, 1.0, 0.0, -0.5, 1.0)) is not None


def test_powers_that_are_not_there_do_not_count() -> None:
    assert trimmed((1.0, 0.0, 0.5, 0.0, 0.0)) == [1.0, 0.0, 0.5]
    assert trimmed((0.0, 0.0)) == []
