"""What an attention is: read off a node and written back, refused where no pass makes it, its operands by role."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import pytest

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.value import ATTENTION, OWN, Attention, Mask, Polynomial, Range, Verdict
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Attribute, Node
from fastgrad_compiler.ir.masks import OPERANDS
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.read import read_source
from tests.compiler.attention_variants import VARIANTS, Variant

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.tfg"))
BACKWARD = "poly_attention_backward"
WEIGHTS = Polynomial("balanced", (1.0, 1.1, 0.5), 0.02, 0.03, -1.5, "float64")
OWN_WEIGHTS = Polynomial(OWN, (1.0, 0.0, 0.5), eps=0.0, eps_prime=0.0)
PLANNED = Attention(polynomial=WEIGHTS, verdict=Verdict("polynomial", "it is cheaper", 512, 256))
ROLES = ("near_q", "near_k", *OPERANDS)
SUBSETS = [
    (*near, *masks)
    for near in ((), ROLES[:2])
    for count in range(len(OPERANDS) + 1)
    for masks in combinations(OPERANDS, count)
]


def with_roles(roles: tuple[str, ...]) -> Attention:
    own = "near_q" in roles
    masks = tuple(role for role in roles if role in OPERANDS)
    return Attention(Mask("forget" in masks, operands=masks), near=2 if own else None, own_near=own)


def node_of(attention: Attention, op: str, **changed: Attribute) -> Node:
    """A node that holds an attention, with other attributes in place of some."""
    return attention.on(Node("y", op, ("q", "k", "v"))).with_attributes(**changed)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_stage_of_an_example_is_read_and_written_back(path: Path) -> None:
    program = elaborate(read_source(str(path)), params={"depth": 2})
    stages = {stage.name: stage.program for stage in run(program, validate=False)}
    last = list(stages)[-9:]
    assert last == [
        "attention",
        "plan",
        "backward",
        "lowrank",
        "step",
        "training",
        "loss",
        "fuse",
        "memory",
    ]
    for name in last:
        nodes = [
            node for graph in stages[name].graphs for node in graph.nodes if node.op in (*ATTENTION, BACKWARD)
        ]
        assert nodes
        for node in nodes:
            attention, given = Attention.of(node), dict(node.attributes)
            if (
                node.op == BACKWARD and "precision" not in given
            ):  # of an own polynomial, which it does not say
                given["precision"] = "float32"
            written = attention.on(node)
            assert dict(written.attributes) == given, (name, node)
            assert (replace(written, attributes=()), Attention.of(written)) == (
                replace(node, attributes=()),
                attention,
            )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_form_of_a_node_is_read_as_it_is_written(variant: Variant) -> None:
    program = parse_program(variant.text)
    (node,) = (node for node in program[program.main].nodes if node.op == "attention")
    attention = Attention.of(node)
    assert attention.on(node) == node
    assert attention.mask == Mask(
        variant.causal, variant.window, tuple(role for role, _ in variant.roles if role in OPERANDS)
    )
    assert (attention.scale, attention.near, attention.alibi) == (0.7, variant.near, variant.alibi)
    assert attention.roles == tuple(role for role, _ in variant.roles)
    assert (attention.polynomial, attention.verdict, attention.range) == (None, None, Range())


RANGES = {
    "nothing": Range(),
    "proved": Range(2.0, proof=("rows of q", "rows of k")),
    "asserted": Range(2.5, True),
    "from weights": Range(3.0, False, ("norms",), "weights", 4.0),
    "of heads": Range((1.0, 3.0), False, (), "data"),
}


@pytest.mark.parametrize("known", RANGES.values(), ids=list(RANGES))
@pytest.mark.parametrize(
    "attention",
    [
        Attention(),
        Attention(Mask(True, 4), 0.5, alibi=True, verdict=Verdict("exact", "a window")),
        PLANNED,
        replace(PLANNED, near=8, own_near=True, mask=Mask(True, operands=tuple(OPERANDS))),
    ],
    ids=["plain", "window", "planned", "near"],
)
def test_a_value_comes_back_from_its_attributes(attention: Attention, known: Range) -> None:
    attention = replace(attention, range=known)
    node = node_of(attention, "attention")
    assert Attention.of(node) == attention
    assert list(node.attributes) == sorted(node.attributes)
    if attention.is_polynomial:
        assert Attention.of(node_of(attention, "poly_attention")) == attention


def test_the_models_own_polynomial_comes_back_without_what_only_approximations_have() -> None:
    own = Attention(polynomial=OWN_WEIGHTS, verdict=Verdict("polynomial", "the model's own"))
    node = node_of(own, "poly_attention")
    assert Attention.of(node) == own
    approximated = {key for key, _ in node_of(PLANNED, "poly_attention").attributes}
    assert approximated - {key for key, _ in node.attributes} == {
        "asserted",
        "positive_from",
        "precision",
        "proof",
    }


@pytest.mark.parametrize("op", [*ATTENTION, BACKWARD])
@pytest.mark.parametrize("known", RANGES.values(), ids=list(RANGES))
def test_attributes_are_those_of_the_operation(op: str, known: Range) -> None:
    found = replace(PLANNED, range=known).attributes(op)
    required, optional = set(OPS[op].attributes), set(OPS[op].optional)
    assert required <= set(found) <= required | optional
    if op != BACKWARD:
        assert ("source" in found, "reach" in found) == (known.source is not None,) * 2


def test_a_gradient_keeps_what_decides_its_numbers() -> None:
    found = Attention.of(node_of(replace(PLANNED, near=8, scale=0.25), BACKWARD))
    assert found.polynomial is not None
    assert (found.scale, found.near) == (0.25, 8)
    assert (found.polynomial.coefficients, found.polynomial.precision) == (WEIGHTS.coefficients, "float64")


def test_another_operation_is_no_attention() -> None:
    with pytest.raises(KeyError, match="softmax s has no attribute roles"):
        Attention.of(Node("s", "softmax", ("x",)))


@pytest.mark.parametrize(
    "roles",
    [
        ("near_k", "near_q"),
        ("documents", "padding"),
        ("padding", "padding"),
        ("padding", "near_q", "near_k"),
        ("mask",),
    ],
)
def test_roles_in_another_order_are_refused(roles: tuple[str, ...]) -> None:
    known = tuple(each for each in ROLES if each in roles)
    node = node_of(with_roles(known), "attention", roles=roles)
    with pytest.raises(CompilerBug, match="attention y has operands"):
        Attention.of(node)


# ---------------------------------------------------------------- what no pass makes

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a block of 0": ({"near": 0}, "an attention has a near of 0"),
    "a block below 0": ({"near": -1}, "an attention has a near of -1"),
    "a window of 0": ({"mask": Mask(window=0)}, "an attention has a window of 0"),
    "own near pairs without a near field": ({"own_near": True}, "near pairs, and no near field"),
    "a polynomial and a window": (
        {"polynomial": WEIGHTS, "mask": Mask(window=2)},
        "cannot serve its mask window",
    ),
    "a polynomial and alibi": ({"polynomial": WEIGHTS, "alibi": True}, "cannot serve its mask alibi"),
    "an own polynomial and alibi": ({"polynomial": OWN_WEIGHTS, "alibi": True}, "its mask alibi"),
    "a forget gate for later keys": (
        {"mask": Mask(operands=("forget",))},
        "a forget gate, and is not causal",
    ),
    "a forget gate and alibi": (
        {"mask": Mask(True, operands=("forget",)), "alibi": True},
        "or has slopes too",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_pass_makes_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(CompilerBug, match=message):
        Attention(**fields)
    with pytest.raises(CompilerBug, match=message):
        replace(Attention(), **fields)


def test_what_is_at_the_edge_of_the_checks_is_made() -> None:
    assert Attention(near=1, own_near=True).roles == ("near_q", "near_k")
    for attention, mask in (
        (Attention(Mask(window=1)), "window"),
        (Attention(alibi=True), "alibi"),
        (Attention(Mask(True, None, tuple(OPERANDS)), polynomial=WEIGHTS), ""),
    ):
        assert attention.unservable == mask
    with pytest.raises(CompilerBug, match="its mask window"):
        Attention(Mask(window=3)).served(fit("balanced", 2, 1.0), None)


def test_a_node_of_what_no_pass_makes_is_refused() -> None:
    for changed in ({"near": 0}, {"window": 0}, {"coefficients": (1.0, 1.0), "alibi": True}):
        with pytest.raises(CompilerBug, match="an attention"):
            Attention.of(node_of(Attention(), "attention", **changed))


# ---------------------------------------------------------------- operands


@pytest.mark.parametrize("roles", SUBSETS, ids=lambda roles: " ".join(roles) or "none")
def test_operands_by_role(roles: tuple[str, ...]) -> None:
    attention = with_roles(roles)
    assert attention.roles == roles
    names = ["a", "b", "c", *(f"its {role}" for role in roles)]
    by_role = attention.by_role(names)
    assert by_role == {"q": "a", "k": "b", "v": "c", **{role: f"its {role}" for role in roles}}
    assert list(by_role) == ["q", "k", "v", *roles]
    assert (attention.mask.padding, attention.mask.documents) == ("padding" in roles, "documents" in roles)
    for wrong in (names[:-1], [*names, "more"]):
        with pytest.raises(ValueError, match="zip"):
            attention.by_role(wrong)


def test_masks_of_nodes_and_what_is_seen_through_two() -> None:
    causal, window = Mask.of(Node("s", "causal")), Mask.of(Node("s", "window", (), (("width", 5),)))
    padding, documents = (Mask.of(Node("s", op)) for op in ("padding", "documents"))
    assert (causal, window, padding, documents) == (
        Mask(True),
        Mask(window=5),
        Mask(operands=("padding",)),
        Mask(operands=("documents",)),
    )
    assert documents & causal & padding & window == Mask(True, 5, ("padding", "documents"))
    assert window & Mask(window=3) == Mask(window=3) & window == Mask(window=3)
    assert Mask() & padding & padding == padding


# ---------------------------------------------------------------- ranges and polynomials


@pytest.mark.parametrize(
    ("known", "limit", "heads", "origin", "reach"),
    [
        (Range(), inf, (inf,), None, None),
        (Range(reach=3.0), inf, (inf,), None, 3.0),
        (Range(2.0), 2.0, (2.0,), "program", 2.0),
        (Range(2.0, True), 2.0, (2.0,), "asserted", 2.0),
        (Range(2.0, source="weights", reach=5.0), 2.0, (2.0,), "weights", 5.0),
        (Range((1.0, 3.0, 2.0), source="data"), 3.0, (1.0, 3.0, 2.0), "data", 3.0),
        (Range((1.0, 3.0), source="data", reach=4.0), 3.0, (1.0, 3.0), "data", 4.0),
    ],
)
def test_a_range_and_its_heads(
    known: Range, limit: float, heads: tuple[float, ...], origin: str | None, reach: float | None
) -> None:
    assert (known.limit, known.heads, known.origin) == (limit, heads, origin)
    assert Attention(range=known).reach == reach


@pytest.mark.parametrize("known", RANGES.values(), ids=list(RANGES))
def test_a_run_checks_logits_on_ranges_that_the_program_does_not_prove(known: Range) -> None:
    assert not Attention(range=known).is_guarded
    assert not Attention(range=known, polynomial=OWN_WEIGHTS).is_guarded
    assert Attention(range=known, polynomial=WEIGHTS).is_guarded == (known is not RANGES["proved"])


def test_what_was_fitted_is_what_serves() -> None:
    fitted = fit("balanced", 3, 2.0)
    served = replace(PLANNED, scale=0.5).served(fitted, 16, "float64")
    assert served == replace(PLANNED, scale=0.5, near=16, polynomial=served.polynomial)
    found = served.polynomial
    assert found is not None
    assert (found.family, found.degree, found.coefficients) == ("balanced", 3, fitted.coefficients)
    assert (found.eps, found.eps_prime) == (fitted.eps, fitted.eps_prime)
    assert (found.positive_from, found.precision) == (fitted.positive_from, "float64")
    assert (served.is_polynomial, served.is_own) == (True, False)
    assert Attention(polynomial=OWN_WEIGHTS).is_own
    assert not Attention().is_polynomial
