"""A `repeat` as a loop over its iterations; carried values are variables that the loop rebinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fastgrad_compiler.codegen.liveness import FOREVER
from fastgrad_compiler.codegen.names import base, variable
from fastgrad_compiler.codegen.writer import INDENT, Expr, Writer, noun, weight
from fastgrad_compiler.ir.calls import runs
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.names import unique

if TYPE_CHECKING:
    from fastgrad_compiler.codegen.block import Block


@dataclass(frozen=True)
class _Loop:
    """Variables of the carried values, expressions of the invariant ones, and the variable that counts."""

    carried: tuple[str, ...]
    invariant: tuple[Expr, ...]
    counter: str


def write_repeat(block: Block, node: Node) -> None:
    """The loop, and its results under their names."""
    results = _results(block, node)
    loop = _begin(block, node, results)
    ran = runs(node)
    firsts = list(accumulate((times for _, times in ran), initial=0))
    total = firsts.pop()
    bodies = [_body(block, name, loop, first, 1) for (name, _), first in zip(ran, firsts, strict=True)]
    if len(set(bodies)) > 1:
        bodies = [_body(block, name, loop, first, 2) for (name, _), first in zip(ran, firsts, strict=True)]
    block.writer.line(f"for {loop.counter} in range({total}):")
    with block.writer.indented():
        _alternatives(block.writer, loop.counter, bodies, [times for _, times in ran])
    for name, target in zip(results, loop.carried, strict=True):
        block.holders[target] = block.at if name is None else block.statements.last_use[name]
        if name is not None:
            block.values[name] = Expr(target)
    block.last_comment = ""


def _results(block: Block, node: Node) -> list[str | None]:
    """The names of the carried results, None for one that nothing reads."""
    if not isinstance(node.type, tuple):
        return [node.name]
    items = {user["index"]: user.name for user in block.graph.users[node.name]}
    return [items.get(i) for i in range(len(node.type))]


def _begin(block: Block, node: Node, results: Sequence[str | None]) -> _Loop:
    """First values of the loop's variables are assigned where they are not there already."""
    carried: list[str] = []
    body = block.module.program[runs(node)[0][0]]
    firsts, invariants = node.inputs[: len(results)], node.inputs[len(results) :]
    given = [block.value(name) for name in node.inputs]
    fixed = [
        block.bind(value, noun(block.graph[name])) if weight(value) else value
        for name, value in zip(invariants, given[len(results) :], strict=True)
    ]
    for position, (first, name) in enumerate(zip(firsts, results, strict=True)):
        target = given[position].text
        shared = first in invariants or firsts.count(first) > 1
        reusable = target in block.holders and target not in carried and not shared
        if not (reusable and block.statements.last_use[first] <= block.at):
            stem = base(name or body.inputs[position].name, block.graph.by_name)
            target = block.allocate(variable(stem), FOREVER, strict=True)
            block.writer.statement(f"{target} = ", given[position])
        block.holders[target] = FOREVER
        carried.append(target)
    taken = {*block.holders, *block.dims.values()}
    counter = next((name for name in "ijk" if name not in taken), None) or unique("i", taken)
    return _Loop(tuple(carried), tuple(fixed), counter)


def _body(block: Block, name: str, loop: _Loop, first: int, depth: int) -> tuple[str, ...]:
    """The lines of the iteration `first`, which will stand `depth` levels below the block's."""
    graph = block.module.program[name]
    inner = block.inside(graph, loop.counter, first, [*map(Expr, loop.carried), *loop.invariant])
    inner.writer = Writer(block.writer.column + depth * len(INDENT))
    for node, target in zip(graph.inputs, loop.carried, strict=False):
        inner.holders[target] = inner.statements.last_use[node.name]
    inner.write()
    found = zip(loop.carried, inner.results(), strict=True)
    moved = [(target, value) for target, value in found if value.text != target]
    if len(moved) == 1:
        inner.writer.statement(f"{moved[0][0]} = ", moved[0][1])
    elif moved:
        inner.writer.line(f"{', '.join(t for t, _ in moved)} = {', '.join(str(v) for _, v in moved)}")
    return tuple(inner.writer.lines)


def _alternatives(
    writer: Writer, counter: str, bodies: Sequence[tuple[str, ...]], times: Sequence[int]
) -> None:
    """One body where all are the same, else a choice by the counter."""
    places: dict[tuple[str, ...], list[int]] = {}
    start = 0
    for body, count in zip(bodies, times, strict=True):
        places.setdefault(body, []).extend(range(start, start + count))
        start += count
    if len(places) == 1:
        _lines(writer, bodies[0])
        return
    idle = places.pop((), None)
    for number, (body, where) in enumerate(places.items()):
        last = number == len(places) - 1 and idle is None
        writer.line("else:" if last else f"{'elif' if number else 'if'} {counter} {_among(where)}:")
        with writer.indented():
            _lines(writer, body)


def _lines(writer: Writer, lines: Sequence[str]) -> None:
    for line in lines or ("pass",):
        writer.line(line)


def _among(places: Sequence[int]) -> str:
    """`== 3`, `in range(2, 6)`, `in range(0, 6, 2)` or `in (0, 3, 4)`."""
    if len(places) == 1:
        return f"== {places[0]}"
    steps = {after - before for before, after in pairwise(places)}
    if len(steps) != 1 or len(places) == 2:
        return f"in ({', '.join(map(str, places))})"
    (step,) = steps
    if step == 1:
        return f"in range({places[0]}, {places[-1] + 1})" if places[0] else f"in range({places[-1] + 1})"
    return f"in range({places[0]}, {places[-1] + 1}, {step})"
