"""Rules of `weight_rules.py` for operations that move entries without changing them."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from fastgrad_compiler.analysis.weights.rows import Rows, Term, add, merge, releaded, split, swap_heads
from fastgrad_compiler.analysis.weights.step import Rule, Step, broadcast, known
from fastgrad_compiler.ir.graph import integer, sequence


def _reshape(step: Step, rows: Rows) -> Rows | None:
    source, target = step.inputs[0].tensor.shape, step.shape
    if not source or not target or source[-1].constant is None or step.width is None:
        return None
    if source[-1] == target[-1]:
        return releaded(rows, source[:-1], target[:-1])
    if len(target) > 1 and target[-2] * target[-1] == source[-1]:
        heads = integer(target[-2].constant)
        return releaded(split(rows, heads), (*source[:-1], target[-2]), target[:-1])
    if len(source) > 1 and source[-2] * source[-1] == target[-1]:
        heads = integer(source[-2].constant)
        return releaded(merge(rows, heads), source[:-2], target[:-1])
    if source[-1].divide(target[-1]) is not None:  # shorter rows, cut from the old ones
        return step.ball(rows.norm.max(), rows)
    return None


def _permute(step: Step, rows: Rows) -> Rows | None:
    axes = [integer(axis) % step.rank for axis in sequence(step.node["axes"])]
    if axes[-1] != step.rank - 1:
        return None

    def moved(x: Tensor, further: int) -> Tensor:
        return x.permute(*axes[:-1], *range(x.dim() - further, x.dim()))

    return rows.on_lead(moved)


def _split_heads(step: Step, rows: Rows) -> Rows | None:
    heads = step.size("heads")
    return None if heads is None else swap_heads(split(rows, heads))


def _merge_heads(step: Step, rows: Rows) -> Rows | None:
    heads = step.inputs[0].tensor.shape[-3].constant
    return None if heads is None else merge(swap_heads(rows), heads)


def repeated(rows: Rows, count: int) -> Rows:
    """Each head `count` times in a row."""

    def repeat(x: Tensor, further: int) -> Tensor:
        axis = x.dim() - further - 2
        return x if x.shape[axis] == 1 else x.repeat_interleave(count, axis)

    return rows.on_lead(repeat)


def _repeat_heads(step: Step, rows: Rows) -> Rows | None:
    count = step.size("times")
    return None if count is None else repeated(rows, count)


def _slice(step: Step, rows: Rows) -> Rows | None:
    start, stop, axis = step.size("start"), step.size("stop"), step.axis()
    if start is None or stop is None:
        return None
    if axis == step.rank - 1:
        terms = tuple(Term(t.radius, t.dense[..., start:stop]) for t in rows.terms)
        return replace(rows, terms=terms, offset=rows.offset[..., start:stop])
    return rows.on_lead(lambda x, _: x if x.shape[axis] == 1 else x.narrow(axis, start, stop - start))


def _select(step: Step, rows: Rows) -> Rows | None:
    index, axis = step.size("index"), step.axis(step.rank + 1)
    if index is None or axis == step.rank:
        return None
    return rows.on_lead(lambda x, _: x.select(axis, 0 if x.shape[axis] == 1 else index))


def _concat(step: Step) -> Rows | None:
    """Side by side along rows; along another axis, rows of any of them."""
    found = [rows for rows in step.rows if rows is not None]
    if len(found) < len(step.rows):
        return None
    if step.axis() < step.rank - 1:
        norms = [rows.norm.amax(step.axis(), keepdim=True) for rows in found]
        return step.ball(torch.stack(torch.broadcast_tensors(*norms)).amax(0), *found)
    ends = list(accumulate(rows.width for rows in found))
    return reduce(
        add, [_padded(rows, end - rows.width, ends[-1] - end) for rows, end in zip(found, ends, strict=True)]
    )


def _padded(rows: Rows, before: int, after: int) -> Rows:
    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (before, after))

    terms = tuple(Term(t.radius, pad(t.dense)) for t in rows.terms)
    return replace(rows, terms=terms, offset=pad(rows.offset))


SHAPES: dict[str, Rule] = {
    "reshape": known(_reshape, 0),
    "permute": known(_permute, 0),
    "split_heads": known(_split_heads, 0),
    "merge_heads": known(_merge_heads, 0),
    "repeat_heads": known(_repeat_heads, 0),
    "broadcast_to": lambda step: broadcast(step)[0],
    "slice": known(_slice, 0),
    "select": known(_select, 0),
    "concat": _concat,
}
