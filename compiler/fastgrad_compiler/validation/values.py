"""When two values agree, and when a run says nothing because float64 ends or a proved bound does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

import numpy as np

from fastgrad_compiler.ir.graph import Graph
from fastgrad_compiler.ir.masks import MASKS
from fastgrad_compiler.reference.oracle import Values
from fastgrad_compiler.reference.oracle_attention import Array

TOLERANCE = 1e-9  # of the largest entry of a row; what rounding does to these operations stays far below
AMPLIFIED = 100.0  # times what noise on inputs does to a value, and no more, is what rounding may do to it
LARGEST, LEAST = 1e150, 1e-250  # magnitudes whose squares and quotients float64 has
_SELECTING = frozenset(  # operations whose results are no larger than their operands
    (*MASKS, "near_far", "softmax", "permute", "reshape", "broadcast_to")
)
_POLES = ("div", "log", "rsqrt")


def each(value: Values) -> tuple[Array, ...]:
    """The tensors of a value."""
    return value if isinstance(value, tuple) else (value,)


def unequal(old: Values, new: Values) -> str | None:
    """How two values differ beyond rounding; None where they do not.

    Where the earlier one is NaN, which the program leaves undefined, the later one may be anything; an infinity stays.
    """
    if len(each(old)) != len(each(new)):
        return f"{len(each(old))} results became {len(each(new))}"
    for wanted, found in zip(each(old), each(new), strict=True):
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            return f"{wanted.dtype} of shape {wanted.shape} became {found.dtype} of shape {found.shape}"
        off = _off(wanted, found)
        wrong = off > _allowed(wanted)
        if wrong.any():
            worst = np.unravel_index(np.argmax(np.where(wrong, off, -1.0)), wanted.shape)
            place = ", ".join(map(str, worst))
            share = f"{int(wrong.sum())} of {wrong.size} entries differ"
            return f"{share}: [{place}] is {wanted[worst].item()} before and {found[worst].item()} after"
    return None


def is_rounding(old: Values, new: Values, noisy: Iterable[Values]) -> bool:
    """Whether two values of one shape differ by no more than what `noisy` runs of the earlier one explain."""
    moved = [np.zeros(wanted.shape) for wanted in each(old)]
    for other in noisy:
        offs = [_off(wanted, found) for wanted, found in zip(each(old), each(other), strict=True)]
        moved = [np.maximum(most, off) for most, off in zip(moved, offs, strict=True)]
    return all(
        wanted.shape == found.shape
        and bool((_off(wanted, found) <= _allowed(wanted) + AMPLIFIED * most).all())
        for wanted, found, most in zip(each(old), each(new), moved, strict=True)
    )


def _off(wanted: Array, found: Array) -> Array:
    """|wanted - found|; 0 where wanted is NaN, infinite where only one of them is finite."""
    if wanted.dtype != np.float64:
        return np.where(wanted == found, 0.0, inf)
    with np.errstate(all="ignore"):
        off = np.abs(wanted - found)
    return np.where(np.isnan(wanted) | (wanted == found), 0.0, np.where(np.isnan(off), inf, off))


def _allowed(wanted: Array) -> Array:
    """TOLERANCE of the largest entry of each row, and a little of the largest one of all."""
    if wanted.dtype != np.float64:
        return np.zeros(wanted.shape)
    sizes = np.where(np.isfinite(wanted), np.abs(wanted), 0.0)
    rows = sizes.max(axis=-1, keepdims=True, initial=0.0) if wanted.ndim else sizes
    return np.asarray(TOLERANCE * (rows + 1e-6 * sizes.max(initial=0.0)))


# ---------------------------------------------------------------- runs that say nothing


def is_extreme(graph: Graph, values: Mapping[str, Values]) -> bool:
    """Whether float64 ends near a value: then two programs that mean the same may differ.

    So do they where a pole of a function is met: 0 of an infinite value is NaN, and nearly 0 of it is infinite.
    """
    for name, value in values.items():
        node = graph[name]
        tensors = [tensor for tensor in each(value) if tensor.dtype == np.float64]
        if node.op not in _SELECTING and any(map(_is_large, tensors)):
            return True
        if node.op == "exp" and _ends(each(values[node.inputs[0]])[0], tensors[0]):
            return True
        if node.op == "decay" and _is_lost(values[node.inputs[0]], tensors[0]):
            return True
        if node.op in _POLES and _any_infinite(tensors) and not _any_infinite(each(values[node.inputs[0]])):
            return True
    return False


def _is_lost(weights: Values, decayed: Array) -> bool:
    """Whether a weight is 0, or nearly, by its gates: a factor of a row cancels, unless it leads there."""
    return bool(((np.abs(decayed) < LEAST) & (each(weights)[0] != 0)).any())


def _any_infinite(tensors: Iterable[Array]) -> bool:
    return any(bool(np.isinf(tensor).any()) for tensor in tensors)


def _is_large(tensor: Array) -> bool:
    sizes = np.abs(tensor)
    return bool(np.isfinite(sizes[sizes > LARGEST]).any())


def _ends(exponents: Array, exponentials: Array) -> bool:
    lost = (exponentials < LEAST) & (exponents != -inf)
    return bool((lost | (exponentials == inf)).any())


def is_as_proved(graph: Graph, values: Mapping[str, Values]) -> bool:
    """Whether every value lies within what is proved of its node, as that is on inputs of which less may be true."""
    fills = [float(str(node["fill"])) for node in graph.nodes if node.get("fill") is not None]
    for name, value in values.items():
        bound = graph[name].bound
        if bound is None or bound.asserted or isinstance(value, tuple) or value.dtype != np.float64:
            continue
        visible = np.isfinite(value) & ~np.isin(value, fills)  # a bound does not speak of what a mask hides
        seen = np.where(visible, value, 0.0)
        low, high = (function(value[visible], initial=0.0) for function in (np.min, np.max))
        norm = np.sqrt(np.sum(seen * seen, axis=-1)).max(initial=0.0) if value.ndim else 0.0
        slack = 1e-9 * (1.0 + max(-low, high))
        if visible.any() and not (np.min(value[visible]) >= bound.low - slack and high <= bound.high + slack):
            return False
        if norm > bound.norm * (1.0 + 1e-9) + 1e-300:
            return False
    return True
