"""Each rule on rows alone: rows of the result lie in the set that the rule says, for rows of the inputs' sets.

A set is c + the sum of images x M of balls: a row y is in it where u.y <= u.c + sum of rho ||M u|| in every
direction u.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np
import pytest
import torch

from fastgrad_compiler.analysis.weights.rows import Form, Rows, Term
from fastgrad_compiler.analysis.weights.rules import ROWS, UNREAD
from fastgrad_compiler.analysis.weights.step import Step
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Bound, Node, TensorType, attributes
from tests.compiler.reference import Array, reference
from tests.compiler.rule_cases import CASES, Case, evaluated

ROUNDING = 1e-9
X = "float[b, n, 6]"
WIDE = "float[b, 3, n, 4]"
MORE: dict[str, tuple[Case, ...]] = {
    "reshape": (
        Case((X,), "reshape(%a, shape = [b*n, 6])"),
        Case((X,), "reshape(%a, shape = [b, n, 3, 2])"),
        Case((X,), "reshape(%a, shape = [b, n, 1, 6])"),
        Case(("float[b, n, 2, 3]",), "reshape(%a, shape = [b, n, 6])"),
        Case(("float[b, 2, 3, 6]",), "reshape(%a, shape = [b, 6, 6])"),
        Case(("float[2, 3, 4]",), "reshape(%a, shape = [6, 4])"),
        Case((X,), "reshape(%a, shape = [b, 2*n, 3])"),
    ),
    "permute": (
        Case((WIDE,), "permute(%a, axes = (0, 2, 1, 3))"),
        Case((WIDE,), "permute(%a, axes = (1, 0, -2, -1))"),
    ),
    "merge_heads": (Case((WIDE,), "merge_heads(%a)"),),
    "slice": (
        Case((WIDE,), "slice(%a, axis = 1, start = 1, stop = 3)"),
        Case((WIDE,), "slice(%a, axis = 3, start = 0, stop = 2)"),
    ),
    "select": (
        Case((WIDE,), "select(%a, axis = 1, index = 2)"),
        Case((WIDE,), "select(%a, axis = -3, index = 0)"),
    ),
    "concat": (
        Case((WIDE, WIDE), "concat(%a, %b, axis = -3)"),
        Case((WIDE, WIDE), "concat(%a, %b, axis = 3)"),
    ),
    "matmul": (
        Case((WIDE, "float[3, 4, 5]"), "matmul(%a, %b)"),
        Case(("float[n, 4]", "float[3, 4, 2]"), "matmul(%a, %b)"),
    ),
    "mul": (
        Case((WIDE, "float[3, 1, 1]"), "mul(%a, %b)"),
        Case((WIDE, "float[b, 1, n, 1]"), "mul(%a, %b)"),
        Case(("float[n, 1]", "float[4]"), "mul(%a, %b)"),
    ),
    "div": (Case((WIDE, "float[3, 1, 4]"), "div(%a, %b)"),),
    "layer_norm": (Case(("float[3, n, 4]", "float[4]", "float[4]"), "layer_norm(%a, %b, %c, eps = 0.0)"),),
}


@dataclass(frozen=True)
class Drawn:
    """What is known of an input (None: nothing but perhaps a bound), and a tensor of which it is true."""

    rows: Rows | None
    tensor: Array
    bound: Bound | None = None


def leads(rng: np.random.Generator, known: Sequence[int | None]) -> tuple[int, ...]:
    """Sizes of lead axes: the tensor's, or 1 where all rows are alike or the size is known at run time only."""
    return tuple(size if size is not None and rng.random() < 0.5 else 1 for size in known)


def drawn_term(rng: np.random.Generator, known: Sequence[int | None], width: int) -> Term:
    form: Form = ("dense", "dense", "diagonal", "centred")[int(rng.integers(4))]
    rows = int(rng.integers(1, 5)) if form == "dense" else 1
    matrix = torch.from_numpy(rng.normal(size=(*leads(rng, known), rows, width)))
    return Term(torch.from_numpy(rng.uniform(0.1, 2.0, leads(rng, known))), matrix, form)


def drawn_rows(rng: np.random.Generator, known: Sequence[int | None], width: int) -> Rows:
    terms = tuple(drawn_term(rng, known, width) for _ in range(int(rng.integers(1, 4))))
    offset = rng.normal(size=(*leads(rng, known), width)) * rng.choice([0.0, 1.0])
    return Rows(terms, torch.from_numpy(offset))


def member(rng: np.random.Generator, rows: Rows, shape: tuple[int, ...]) -> Array:
    """A tensor whose rows are all at the limits of their balls."""
    total = np.broadcast_to(rows.offset.numpy(), shape).copy()
    for term in rows.terms:
        dense = term.dense.numpy()
        dense = np.broadcast_to(dense, (*shape[:-1], *dense.shape[-2:]))
        x = rng.normal(size=dense.shape[:-1])
        if rng.random() < 0.5:  # along the direction that the matrix stretches most
            x = np.einsum("...kw,...w->...k", dense, rng.normal(size=shape))
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        x = x / np.where(norm == 0, 1.0, norm) * np.broadcast_to(term.radius.numpy(), shape[:-1])[..., None]
        total += np.einsum("...k,...kw->...w", x, dense)
    return np.asarray(total)


def drawn_input(
    case: Case, node: Node, sizes: Mapping[str, int], known: Mapping[str, Dim], rng: np.random.Generator
) -> Drawn:
    shape = tuple(dim.evaluate(sizes) for dim in node.tensor.shape)
    if node.tensor.dtype == "int":
        limit = sizes[case.ids] if isinstance(case.ids, str) else case.ids or 3
        return Drawn(None, np.asarray(rng.integers(0, limit, shape)))
    if node.tensor.dtype == "bool":
        return Drawn(None, np.asarray(rng.random(shape) < 0.6))
    constants = [dim.substitute(known).constant for dim in node.tensor.shape]
    weights = ("layer_norm", "rms_norm", "matmul", "div", "depthwise")
    weight = case.node.op in weights and node.name != "a"
    kind = rng.random() * (0.3 if weight else 1.0)
    if kind < 0.25 and None not in constants:
        value = np.asarray(rng.normal(size=shape) + rng.choice([0.0, 3.0]))
        return Drawn(Rows((), torch.from_numpy(value), weights=("w",)), value)
    if kind < 0.4 or not shape or constants[-1] is None:
        most = float(rng.choice([0.5, 1.0, 2.0]))
        norm = most * sqrt(shape[-1] if shape else 1)
        return Drawn(None, rng.choice([-most, most, 0.0], shape), Bound(-most, most, norm))
    rows = drawn_rows(rng, constants[:-1], shape[-1])
    return Drawn(rows, member(rng, rows, shape))


def excess(claim: Rows, y: Array, rng: np.random.Generator) -> float:
    """The most by which a row is beyond the set in some direction, relative to its extent there."""
    offset = np.broadcast_to(claim.offset.numpy(), y.shape)
    worst: float = -1.0
    for direction in (y - offset, *rng.normal(size=(3, *y.shape))):
        reach = np.zeros(y.shape[:-1])
        for term in claim.terms:
            dense = np.broadcast_to(term.dense.numpy(), (*y.shape[:-1], *term.dense.shape[-2:]))
            image = np.linalg.norm(np.einsum("...kw,...w->...k", dense, direction), axis=-1)
            reach += term.radius.numpy() * image
        size = np.linalg.norm(direction, axis=-1) * (np.linalg.norm(y, axis=-1) + 1)
        beyond = (direction * (y - offset)).sum(-1) - reach
        worst = max(worst, float((beyond / np.where(size == 0, 1.0, size)).max(initial=-1.0)))
    return worst


def claims(case: Case, count: int) -> list[tuple[Rows, Array, np.random.Generator, str]]:
    """What the rule says of the results of drawn inputs, with the results."""
    rng, found = np.random.default_rng(zlib.crc32(str(case).encode())), []
    for _ in range(count):
        sizes = {"b": 2, "n": 2 if case.even else int(rng.choice([1, 3])), "m": 2}
        known = {name: Dim.of(size) for name, size in sizes.items() if rng.random() < 0.5}
        given = [drawn_input(case, node, sizes, known, rng) for node in case.graph.inputs]
        names = [node.name for node in case.graph.inputs]
        read = [names.index(name) for name in case.node.inputs]

        def told(node: Node, known: Mapping[str, Dim] = known) -> Node:
            shape = tuple(dim.substitute(known) for dim in node.tensor.shape)
            values = {k: v.substitute(known) if isinstance(v, Dim) else v for k, v in node.attributes}
            return replace(node, attributes=attributes(**values), type=TensorType(node.tensor.dtype, shape))

        inputs = tuple(replace(told(case.graph.inputs[i]), bound=given[i].bound) for i in read)
        step = Step(told(case.node), inputs, tuple(given[i].rows for i in read))
        claim = ROWS[case.node.op](step)
        if claim is not None and step.width is not None:
            y = reference(case.node.op, [given[i].tensor for i in read], case.values(sizes))
            what = f"{case} of {[each.rows and len(each.rows.terms) for each in given]} at {sizes}"
            found.append((claim.shaped(step.rank, step.width), y, rng, what))
    return found


def cases_of(op: str) -> list[Case]:
    floats = [case for case in CASES[op] if case.node.tensor.dtype == "float" and case.node.tensor.shape]
    return [*floats, *MORE.get(op, ())]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("count", [15, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", sorted(ROWS))
def test_no_row_leaves_the_set_of_its_rule(op: str, count: int) -> None:
    told = 0
    for case in cases_of(op):
        for claim, y, rng, what in claims(case, count):
            told += 1
            assert excess(claim, y, rng) <= ROUNDING, what
            norm = np.broadcast_to(claim.norm.numpy(), y.shape[:-1])
            assert (np.linalg.norm(y, axis=-1) <= norm * (1 + ROUNDING) + ROUNDING).all(), what
    assert told >= 5


def narrowed(claim: Rows) -> Rows:
    terms = tuple(replace(term, radius=0.3 * term.radius) for term in claim.terms)
    return replace(claim, terms=terms)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("op", sorted(ROWS))
def test_a_rule_that_claims_too_much_is_found(op: str) -> None:
    """Each rule with its balls at a third of their radius."""
    assert any(
        excess(narrowed(claim), y, rng) > ROUNDING
        for case in cases_of(op)
        for claim, y, rng, _ in claims(case, 25)
    )


def test_every_rule_and_attribute_is_tested() -> None:
    for op in ROWS:
        assert cases_of(op), op
    for op in ("concat", "slice", "select"):
        axes = {int(evaluated(case.node["axis"], {})) for case in cases_of(op)}
        assert min(axes) < 0 < max(axes)
    assert set(UNREAD) <= set(ROWS)


def test_what_a_rule_does_not_read_does_not_matter() -> None:
    for op, places in UNREAD.items():
        for case in cases_of(op):
            inputs = tuple(case.graph[name] for name in case.node.inputs)
            rng = np.random.default_rng(0)
            rows = []
            for node in inputs:
                constants = [dim.constant for dim in node.tensor.shape]
                plain = node.tensor.dtype == "float" and constants and constants[-1] is not None
                width = constants[-1] if constants else None
                rows.append(Rows((), torch.ones(*(size or 1 for size in constants), dtype=torch.float64))
                            if len(constants) == 1 and plain
                            else drawn_rows(rng, constants[:-1], width) if plain and width else None)  # fmt: skip
            less = [None if place in places else each for place, each in enumerate(rows)]
            one, other = (ROWS[op](Step(case.node, inputs, tuple(each))) for each in (rows, less))
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(one.norm, other.norm)


def test_a_factor_that_a_mask_hides_in_part_is_not_bounded() -> None:
    case = CASES["mul"][0]
    rows = Rows((Term(torch.ones(1, 1), torch.ones(1, 1, 1, 4), "diagonal"),), torch.zeros(1, 1, 4))
    left, right = case.graph.inputs
    told = [replace(right, bound=Bound(-1.0, 1.0, norm)) for norm in (2.0, inf)]
    found = [ROWS["mul"](Step(case.node, (left, factor), (rows, None))) for factor in told]
    assert found[0] is not None
    assert found[1] is None


def test_a_set_is_told_from_its_neighbour() -> None:
    """The measure itself: a row inside, one at the limit, one beyond."""
    rows = Rows((Term(torch.tensor(2.0), torch.eye(3)[:2]),), torch.tensor([0.0, 0.0, 1.0]))
    rng = np.random.default_rng(0)
    inside, limit, beyond, aside = (
        np.array(y) for y in ([1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [2.0, 1.0, 1.0], [0.0, 0.0, 2.0])
    )
    assert excess(rows, inside, rng) < 0
    assert abs(excess(rows, limit, rng)) < 1e-12
    assert excess(rows, beyond, rng) > 0.01
    assert excess(rows, aside, rng) > 0.01
