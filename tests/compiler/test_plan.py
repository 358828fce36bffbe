"""The plan: which attention is approximated how, why, and what is refused."""

from __future__ import annotations

import time

import pytest
import torch

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.planning.plan import AttentionEntry, attention_table, plan_attention
from fastgrad_compiler.planning.settings import matches
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from tests.initial_weights import initial_weights

LAYER = """
graph layer block layer {{
    %x = input() : float[b, n, 64]
    %w = weight(init = ("normal", 0.0, 0.5), label = "w") : float[64, 64]
    %h = matmul(%x, %w)
    %s = split_heads(%h, heads = {heads})
    {unit}
    %c = constant(value = {gain})
    %q = mul(%u, %c)
    %kt = permute(%u, axes = (0, 1, 3, 2))
    %d = matmul(%q, %kt)  # m.tfg:5
    {mask}
    %p = softmax(%m, axis = -1)
    %o = matmul(%p, %s)  # m.tfg:7
    %y = merge_heads(%o)
    return %y
}}
"""

MODEL = """
dim n <= {longest}
{budget}
graph main {{
    %x = input() : float[b, n, 64]
    %y = repeat(%x, bodies = (("body", {depth}),), carried = 1) : float[b, n, 64]
    return %y
}}
graph body {{
    %x = input() : float[b, n, 64]
    %y = call(%x, graph = "layer", label = "layers") : float[b, n, 64]
    return %y
}}
"""


def model(
    *rules: str,
    limits: str = "",
    depth: int = 4,
    heads: int = 8,
    gain: float = 1.0,
    mask: str = "%m = causal(%d)",
    unit: str = "%u = unit(%s)",
    longest: int = 65536,
    budget: bool = True,
) -> Program:
    """A stack of layers, each one attention of width 64 / heads; rules as in the budget, limits before
    them.
    """
    lines = "\n".join(["budget {", limits, *(f"at {rule}" for rule in rules), "}"]) if budget else ""
    text = MODEL.format(longest=longest, budget=lines, depth=depth)
    text += LAYER.format(heads=heads, gain=gain, mask=mask, unit=unit)
    return recognise_attention(prove_bounds(infer_shapes(parse_program(text))))


def planned(program: Program) -> list[AttentionEntry]:
    after = plan_attention(program, target="torch")
    verify(after, "plan")
    assert parse_program(print_program(after)) == after
    return list(attention_table(after))


def refused(program: Program) -> tuple[Diagnostic, ...]:
    with pytest.raises(TfgError) as caught:
        plan_attention(program)
    return caught.value.diagnostics


def decisions(entries: list[AttentionEntry]) -> list[object]:
    return [
        entry.node.get("degree") if entry.node["decision"] == "polynomial" else "exact" for entry in entries
    ]


def why(entry: AttentionEntry) -> str:
    return str(entry.node["why"])


# ---------------------------------------------------------------- which degree


def test_without_a_budget_all_is_exact_and_says_so() -> None:
    entries = planned(model(budget=False))
    assert decisions(entries) == ["exact"] * 4
    assert all("no budget asks for an approximation" in why(entry) for entry in entries)


@pytest.mark.parametrize(
    ("relative", "degree"), [(0.5, 1), (0.1, 2), (0.02, 3), (0.005, 4), (0.0005, 5), (1e-5, 6), (1e-6, 7)]
)
def test_least_degree_whose_eps_meets_relative(relative: float, degree: int) -> None:
    """eps of the balanced family on [-1, 1]: 0.35, 0.087, 0.013, 1.1e-3, 9.6e-5, 6.7e-6, 4e-7."""
    assert decisions(planned(model(f'"*" relative = {relative}'))) == [degree] * 4


def test_polynomial_is_that_of_the_bound_and_family() -> None:
    (entry,) = planned(model('"*" degree = 4', '"*" family = "minimax"', depth=1, gain=2.0))
    expected = fit("minimax", 4, 2.0)
    node = entry.node
    assert (node["bound"], node["family"], node["degree"]) == (2.0, "minimax", 4)
    assert (node["coefficients"], node["eps"], node["eps_prime"], node["positive_from"]) == (
        expected.coefficients,
        expected.eps,
        expected.eps_prime,
        expected.positive_from,
    )
    assert node["break_even"] == 1249  # (14 r (dv + 1) + 2 * 64 (4 d + 3 (dv + 1))) / (4 d + 3 dv)
    assert entry.rank == 495


@pytest.mark.parametrize(
    ("limits", "attribute"), [("output <= 0.01", "output"), ("gradient <= 0.05", "score_gradient")]
)
def test_budget_is_shared_by_the_certificates(limits: str, attribute: str) -> None:
    """The degree meets its quarter of the budget, and one less does not."""
    entries = planned(model(limits=limits))
    (degree,) = set(decisions(entries))
    assert isinstance(degree, int)
    share = float(limits.split()[-1]) / 4
    shown = [
        getattr(certificate(p.eps, p.eps_prime), attribute)
        for p in (fit("balanced", g, 1.0) for g in (degree - 1, degree))
    ]
    assert shown[1] <= share < shown[0]
    assert "shared equally by 4, layer gains taken as 1" in why(entries[0])


def test_shares_grow_when_fewer_attentions_are_approximated() -> None:
    exact = [f'"layers.{i}" exact' for i in range(1, 40)]
    many, one = (planned(model(*rules, limits="output <= 0.01", depth=40)) for rules in ([], exact))
    assert decisions(many)[0] == 5
    assert decisions(one)[0] == 3
    assert "shared equally by 1" in why(one[0])


def test_odd_degree_needs_a_proved_range() -> None:
    """An asserted range may be left, and beyond it an odd degree turns negative."""
    free, word = "%u = rotary(%s, base = 100.0)", "%a = assume_bound(%d, bound = 1.0)\n%m = causal(%a)"
    proved = planned(model('"*" relative = 0.02', depth=1))
    asserted = planned(model('"*" relative = 0.02', depth=1, unit=free, mask=word))
    assert decisions(proved) == [3]
    assert "positive only for logits above -1.866" in why(proved[0])
    assert decisions(asserted) == [4]
    assert "|s| <= 1 is asserted, not proved" in why(asserted[0])


def test_pinned_degree_over_its_share_is_noted() -> None:
    (entry,) = planned(model('"*" degree = 2', limits="output <= 1e-4", depth=1))
    assert entry.node["degree"] == 2
    assert (
        "certificate 0.04358 exceeds its share 0.0001 of the budget: the report's measurement decides"
        in why(entry)
    )


# ---------------------------------------------------------------- exact, and why


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (model(limits="output <= 0.1", unit="%u = neg(%s)"), "no bound of its logits is proved"),
        (model(limits="output <= 0.1", mask="%m = window(%d, width = 8)"), "which stays exact: O(n w), w = 8"),
        (model(limits="output <= 0.1", mask="%m = alibi(%d)"), "cannot serve the mask `alibi`"),
        (model('"*" exact', limits="output <= 0.1"), "the budget leaves it exact"),
        (model(limits="output <= 0.1", longest=256), "exact is cheaper below n = 507 at degree 3"),
        (model('"*" relative = 1e-13', heads=2), "no degree serves it: at degree 3 eps 0.01265 exceeds"),
        (model('"*" family = "taylor"'), "it sets neither a limit nor a degree"),
    ],
    ids=["no bound", "window", "alibi", "exact", "short", "rank", "no limit"],
)  # fmt: skip
def test_exact_attention_says_why(case: Program, reason: str) -> None:
    entries = planned(case)
    assert decisions(entries) == ["exact"] * 4
    assert all(reason in why(entry) for entry in entries)


def test_pinned_degree_is_kept_where_exact_would_be_cheaper() -> None:
    assert decisions(planned(model('"*" degree = 4', longest=256))) == [4] * 4


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("layers.0", True),
        ("layers.0.*", True),
        ("layers.*", True),
        ("*", True),
        ("layers", True),
        ("layers.[01]", True),
        ("*.attend", True),
        ("layers.0.attend.y", True),
        ("layers.1", False),
        ("layer", False),
        ("attend", False),
    ],
)
def test_pattern_matches_a_path_and_what_it_lies_in(pattern: str, matched: bool) -> None:
    assert matches(pattern, "layers.0.attend.y") == matched


def test_later_rules_override() -> None:
    rules = (
        '"*" degree = 2',
        '"layers.1" exact',
        '"layers.2" degree = 4',
        '"layers.3" exact',
        '"layers.3" degree = 6',
    )
    assert decisions(planned(model(*rules))) == [2, "exact", 4, 6]


def test_near_field_of_the_budget_and_of_a_rule() -> None:
    entries = planned(model('"layers.1" near = 32', '"layers.2" exact', limits="output <= 0.1\nnear = 64"))
    assert [entry.node["near"] for entry in entries] == [64, 32, None, 64]
    assert entries[1].node["break_even"] != entries[0].node["break_even"]


def test_own_near_field_is_kept() -> None:
    mask = "%f = constant(value = 3.0)\n%l = mul(%d, %f)\n%t = near_far(%l, %d, block = 16)\n%m = causal(%t)"
    (entry,) = planned(model(limits="output <= 0.1\nnear = 64", mask=mask, depth=1))
    assert (entry.node["near"], entry.node["roles"], entry.node["bound"]) == (16, ("near_q", "near_k"), 1.0)
    assert entry.node["decision"] == "polynomial"


# ---------------------------------------------------------------- refusals

FREE = "%u = neg(%s)"
REFUSALS = {
    "FG301": model('"layers.1" degree = 2', unit=FREE),
    "FG302": model('"layer.1" degree = 2'),
    "FG303": model('"*" degree = 21'),
    "FG304": model('"*" degree = 3', '"*" family = "taylor"', gain=4.0),
    "FG305": model('"*" degree = 2', '"*" relative = 0.01'),
    "FG306": model('"*" degree = 2', '"*" family = "taylor"', gain=4.0),
    "FG307": model('"*" degree = 10'),
    "FG308": model(
        '"*" near = 8', limits="output <= 0.1", mask="%t = near_far(%d, %d, block = 16)\n%m = causal(%t)"
    ),
    "FG309": model('"*" degree = 2', mask="%m = window(%d, width = 4)"),
    "FG310": model('"*" near = 8', '"*" relative = 1e-9', heads=2),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_rule_that_cannot_be_obeyed_is_refused(code: str) -> None:
    (diagnostic,) = refused(REFUSALS[code])
    assert diagnostic.code == code
    assert diagnostic.help or code == "FG303"


def test_remedies_hold() -> None:
    """The degree and the range that FG305 names do what it says, and little more would not."""
    (diagnostic,) = refused(REFUSALS["FG305"])
    assert (
        'attention "layers.0" (and 3 more): degree 2 has eps 0.08699, over relative <= 0.01'
        in diagnostic.message
    )
    assert diagnostic.help[0] == "degree 4 does it: eps 0.001129, rank 495"
    assert diagnostic.help[1] == "a smaller gain: |s| <= 0.447 instead of 1 serves at degree 2"
    assert fit("balanced", 2, 0.447).eps <= 0.01 < fit("balanced", 2, 0.46).eps


def test_all_wrong_rules_are_told_at_once() -> None:
    found = refused(
        model(
            '"layer.1" degree = 2',
            '"layers.1" degree = 10',
            '"layers.2" degree = 1',
            '"layers.2" relative = 0.01',
        )
    )
    assert [diagnostic.code for diagnostic in found] == ["FG302", "FG307", "FG305"]


# ---------------------------------------------------------------- graphs


def test_equal_decisions_share_one_graph_in_a_deep_model() -> None:
    program = model(limits="output <= 1.0", depth=96)
    started = time.perf_counter()
    after = plan_attention(program)
    assert time.perf_counter() - started < 1.0
    assert [graph.name for graph in after.graphs] == ["main", "body", "layer"]
    assert after["main"]["y"]["bodies"] == (("body", 96),)
    assert len(attention_table(after)) == 96


def test_different_decisions_clone_graphs_and_split_repeats() -> None:
    after = plan_attention(model('"*" degree = 2', '"layers.0" exact', '"layers.5" degree = 4', depth=6))
    verify(after, "plan")
    assert after["main"]["y"]["bodies"] == (("body", 1), ("body_2", 4), ("body_3", 1))
    assert [entry.graph for entry in attention_table(after)] == ["layer", *["layer_2"] * 4, "layer_3"]
    assert {graph.name: graph.block for graph in after.graphs}["layer_3"] == "layer"


def test_plan_changes_no_value() -> None:
    """Decisions are attributes; the exact meaning of the program stays."""
    before = model('"*" degree = 2', '"layers.0" exact', depth=3)
    after = plan_attention(before)
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = initial_weights(before, seed=1, dtype=torch.float64)
    assert set(weights) == set(initial_weights(after)) == {"layers.0.w", "layers.1.w", "layers.2.w"}
    torch.testing.assert_close(run(after, [x], weights), run(before, [x], weights), rtol=0, atol=0)


def test_paths_are_short_where_a_call_holds_one_attention() -> None:
    (entry,) = attention_table(model(depth=1))
    assert (entry.path, entry.full_path) == ("layers.0", "layers.0.o")
    assert (entry.d, entry.dv, entry.rank) == (8, 8, None)


def test_two_attentions_of_one_graph_keep_their_names() -> None:
    text = """
    graph main {
        %q = input() : float[b, 2, n, 8]
        %k = unit(%q)
        %kt = permute(%k, axes = (0, 1, 3, 2))
        %s = matmul(%k, %kt)
        %p = softmax(%s, axis = -1)
        %first = matmul(%p, %q)
        %s2 = matmul(%k, %kt)
        %t = causal(%s2)
        %p2 = softmax(%t, axis = -1)
        %second = matmul(%p2, %first)
        return %second
    }
    """
    program = recognise_attention(prove_bounds(infer_shapes(parse_program(text))))
    assert [entry.path for entry in attention_table(program)] == ["first", "second"]
