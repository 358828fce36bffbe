"""The generator of `make attack` writes every operation, every argument of one, and every spelling of its tables."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import pytest

from attack import operations
from attack.attentions import GAINS, ROWS, SCORES, WEIGHTED, attention
from attack.cases import sizes_of
from attack.grower import Grower, Typed, Unfit
from attack.operations import RULES
from attack.programs import Grown, grow
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.frontend.operations import NAMES, NEEDED, OPERATIONS, OVERLOADS, Operation
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.ops import OPS
from fastgrad_grammar.source import Source

SIGNS = {
    "+",
    "-",
    "*",
    "/",
    "@",
    "<",
    "<=",
    ">",
    ">=",
    "==",
    "!=",
    "negation",
    "not",
    ".T",
    "[..]",
    "if else",
}
TRIES = 24
NOT_WRITTEN = {
    **dict.fromkeys(("sum_to", "embedding_gradient", "repeat_backward", "weight_gradient", "depthwise_weights",
                     "poly_attention_backward"),
                    "stands in gradient graphs only"),
    **dict.fromkeys(("attention", "poly_attention"), "is what recognition makes"),
    "linear_cross_entropy": "is what the pass `loss` makes",
    "literal": "is what calibration makes",
}  # fmt: skip
"""Operations of the graph that no text of the generator becomes, and why."""

B, N, M = map(Dim.of, "bnm")


def _grower(seed: int) -> Grower:
    """A pool in which every operation finds operands."""
    inputs = [
        Typed("x", "float", (B, N, Dim.of(4))),
        Typed("y", "float", (B, M, Dim.of(4))),
        Typed("six", "float", (B, N, Dim.of(6))),
        Typed("q", "float", (B, Dim.of(2), N, Dim.of(4))),
        Typed("s", "float", (B, Dim.of(2), N, N)),
        Typed("single", "float", (B, Dim.of(1), Dim.of(4))),
        Typed("image", "float", (B, Dim.of(2), Dim.of(4), Dim.of(4))),
        Typed("tokens", "int", (B, N)),
        Typed("ids", "int", (B, N)),
        Typed("mask", "bool", (B, N)),
    ]
    before = "param p0 = 0.5\ndim b\ndim n <= 40 % 2\ndim m <= 40\n"
    return Grower(random.Random(seed), before, inputs, params={"p0": "0.5"})


@cache
def _written(name: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Well-typed expressions of a rule, and the operations of the graph that they become."""
    g, texts = _grower(len(name)), []
    for _ in range(TRIES):
        try:
            text = RULES[name](g)
            g.say(text)
        except Unfit:
            continue
        finally:
            g.pool = list(g.signature)
        texts.append(text)
    program = elaborate(Source("<attack>", g.text([g.signature[0]])))
    return tuple(texts), frozenset(node.op for graph in program.graphs for node in graph.nodes)


def test_there_is_a_rule_for_every_operation_and_sign() -> None:
    assert set(RULES) == set(NAMES) | SIGNS


@pytest.mark.sampled(30)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_writes_what_is_well_typed(name: str) -> None:
    texts, _ = _written(name)
    assert len(texts) > TRIES // 4
    if name in NAMES:
        assert all(re.search(rf"\b{name}\(", text) for text in texts)


def _optional() -> list[tuple[str, str]]:
    operations_: list[Operation] = [*OPERATIONS.values(), *(pair[0] for pair in OVERLOADS.values())]
    return [
        (operation.name, parameter.name)
        for operation in operations_
        for parameter in operation.parameters
        if parameter.default is not NEEDED and not parameter.is_tensor
    ]


@pytest.mark.parametrize(("name", "argument"), _optional())
def test_every_argument_is_given_and_left_out(name: str, argument: str) -> None:
    texts = _written(name)[0]
    given = [bool(re.search(rf"\b{argument} = ", text)) for text in texts]
    assert {True, False} <= set(given)


@pytest.mark.parametrize("name", ["shift", "depthwise"])
def test_documents_are_told_apart_or_not(name: str) -> None:
    given = [bool(re.search(r", (ids|tokens)\b", text)) for text in _written(name)[0]]
    assert {True, False} <= set(given)


@pytest.mark.medium
def test_every_spelling_of_attention_comes_about() -> None:
    tables: dict[str, Iterable[str]] = {"rows": ROWS, "gain": GAINS, "scores": SCORES, "weights": WEIGHTED}
    wanted = {f"{kind}: {name}" for kind, table in tables.items() for name in table}
    used: Counter[str] = Counter()
    for seed in range(400):
        g = _grower(seed)
        with suppress(Unfit):
            attention(g)
            used += g.used
        if wanted <= set(used):
            return
    pytest.fail(f"never written: {wanted - set(used)}")


@pytest.fixture(scope="module")
def grown() -> list[Grown]:
    return [grow(seed) for seed in range(12)]


@pytest.mark.medium
def test_programs_are_well_typed_and_few_statements_are_refused(grown: list[Grown]) -> None:
    for program in grown:
        elaborate(Source("<attack>", program.text))
    refused = sum(sum(program.refused.values()) for program in grown)
    assert refused < 0.05 * sum(program.tried for program in grown)


@pytest.mark.medium
def test_programs_hold_blocks_repeats_branches_and_budgets(grown: list[Grown]) -> None:
    used = sum((program.used for program in grown), Counter[str]())
    assert all(used[name] for name in ("block", "repeat", "if", "std"))
    texts = "\n".join(program.text for program in grown)
    assert all(word in texts for word in (" degree = ", "on_violation = ", " as "))


def test_a_seed_gives_a_program() -> None:
    assert grow(3).text == grow(3).text


@pytest.mark.medium
def test_every_operation_of_the_graph_is_written(grown: list[Grown]) -> None:
    programs = [elaborate(Source("<attack>", program.text)) for program in grown]
    found = {node.op for program in programs for graph in program.graphs for node in graph.nodes}
    found = found.union(*(_written(name)[1] for name in RULES))
    assert set(OPS) - found == set(NOT_WRITTEN)


def test_sizes_have_their_edges() -> None:
    text = "dim b\ndim n <= 40 % 4\nmodel p(x: float[b, n]) -> float[b, n] {\n    return x\n}\n"
    sizes = [sizes_of(text, random.Random(seed)) for seed in range(100)]
    assert {size["n"] for size in sizes} >= {4, 8, 40}
    assert 1 in {size["b"] for size in sizes}
    assert all(size["n"] % 4 == 0 and size["n"] <= 40 for size in sizes)


def test_ids_stay_below_their_tables() -> None:
    assert all(
        "tokens" in text or "ids" in text or f"high = {operations.IDS - 1}" in text
        for text in _written("embedding")[0]
    )
