"""Small random inputs and weights on which `validate.py` runs a graph, a pure function of a seed."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite

import numpy as np

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import weights
from fastgrad_compiler.ir.graph import Bound, DimInfo, Graph, Node, Program, TensorType
from fastgrad_compiler.reference.oracle import Values
from fastgrad_compiler.reference.oracle_attention import Array

STYLES = ("plain", "large", "ties", "mixed", "alike")
"""How floats are drawn: standard normal; rows of sizes from 1/100 to 30; of few values, often 0; all of these; each row
one of two or its negative, and tensors of one shape the same, so that products of rows reach their limits.
"""
POOL = 1 << 16  # numbers that are drawn for one tensor at most; a larger one repeats them


@dataclass(frozen=True)
class Case:
    """One run: the sizes of the dims, how values are drawn, the seed, and a factor on floats.

    A `spare` case is for graphs that had a value in none of the others.
    With a `noise`, each float is multiplied by 1 + noise * a standard normal: to see what rounding may do.
    """

    sizes: Mapping[str, int]
    style: str = "plain"
    seed: int = 0
    scale: float = 1.0
    noise: float = 0.0
    spare: bool = False

    def generator(self, name: str, shape: tuple[int, ...]) -> np.random.Generator:
        """The generator of one tensor's values."""
        key = repr(shape) if self.style == "alike" else name
        return np.random.default_rng([self.seed, STYLES.index(self.style), zlib.crc32(key.encode())])

    def smaller(self) -> Case:
        """The same with floats of half the size."""
        return replace(self, scale=self.scale / 2)


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Lengths:
    """The sizes of the dims `names` in each case."""

    program: Program
    names: tuple[str, ...]

    @cached_property
    def _declared(self) -> Mapping[str, DimInfo]:
        return {info.name: info for info in self.program.dims}

    def sizes(self, least: int, step: int) -> dict[str, int]:
        """`least`, `least + step` .. of the dims in order."""
        return {name: self._allowed(name, least + step * place) for place, name in enumerate(self.names)}

    def long(self, size: int, names: Collection[str]) -> dict[str, int]:
        """`size` of some dims, 1 of the others."""
        return {name: self._allowed(name, size if name in names else 1) for name in self.names}

    def _allowed(self, name: str, size: int) -> int:
        """The size next to a wanted one that a dim may have: a multiple of what is declared, not above its limit."""
        info = self._declared.get(name, DimInfo(name))
        size = -(-size // info.multiple_of) * info.multiple_of
        most = size if info.at_most is None else info.at_most // info.multiple_of * info.multiple_of
        return max(min(size, most), info.multiple_of)


def _sliced(graph: Graph) -> int:
    """The largest number at which a slice ends."""
    ends = (node.get(key) for node in graph.nodes for key in ("stop", "index"))
    found = [Dim.of(end).constant for end in ends if isinstance(end, int | Dim)]
    return max((end for end in found if end is not None), default=255)


def _batches(types: Sequence[TensorType]) -> frozenset[str]:
    """The dims that only count batches: first in tensors of more than one dimension, or alone (a length for each)."""
    first = {name for type_ in types if len(type_.shape) > 1 for name in type_.shape[0].names}
    other = {name for type_ in types for dim in type_.shape[1:] for name in dim.names}
    return frozenset(first - other)


def cases(program: Program, graph: Graph, bands: Mapping[str, int]) -> Iterator[Case]:
    """What to run a graph on: lengths of 1 and small odd ones, and one longer than every band of the graph.

    `bands` has the dims that a near field or a window cuts, and the length from which on it does.
    """
    types = [type_ for node in graph.inputs for type_ in _types(node)]
    names = sorted({name for type_ in types for dim in type_.shape for name in dim.names})
    lengths = Lengths(program, tuple(names))
    yield Case(lengths.sizes(2, 3), "plain", 1)
    yield Case(lengths.sizes(3, 2), "large", 2)
    yield Case(lengths.sizes(5, 2), "ties", 3)
    yield Case(lengths.sizes(4, 1), "alike", 4)
    yield Case(lengths.sizes(1, 0), "mixed", 5)
    yield Case(lengths.sizes(7, 0), "mixed", 6)
    if bands:
        yield Case(lengths.long(max(bands.values()), bands), "plain", 7)
    many = set(names) - _batches(types)
    for size in (17, 64, _sliced(graph) + 2):  # for graphs that take a slice, which small dims do not have
        yield Case(lengths.long(size, many), "mixed", size, spare=True)


# ---------------------------------------------------------------- values


def drawn(node: Node, case: Case) -> Values:
    """The value of an input, or what stands for a node of several results."""
    if not isinstance(node.type, tuple):
        return draw(node, case)
    key = str(node.get("key", node.name))
    parts = (
        replace(node, type=type_, attributes=(("key", f"{key}.{i}"),)) for i, type_ in enumerate(node.type)
    )
    return tuple(draw(part, case) for part in parts)


def _types(node: Node) -> tuple[TensorType, ...]:
    return node.type if isinstance(node.type, tuple) else (node.tensor,)


def draw(node: Node, case: Case) -> Array:
    """A value within what is proved of a node, where that does not rest on an assertion.

    It depends on the attribute `key`, by default the name.
    """
    shape = _shape(node.tensor, case.sizes)
    generator = case.generator(str(node.get("key", node.name)), shape)
    if node.tensor.dtype == "bool":
        return _mask(generator, shape)
    if node.tensor.dtype == "int":
        return _runs(generator, shape)
    value = case.scale * _floats(generator, shape, case.style)
    if node.bound is not None and not node.bound.asserted:
        value = _within(value, node.bound)
    return value * (1.0 + case.noise * generator.standard_normal(shape)) if case.noise else value


def _shape(type_: TensorType, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(Dim.of(dim).evaluate(sizes) for dim in type_.shape)


def _floats(generator: np.random.Generator, shape: tuple[int, ...], style: str) -> Array:
    size = int(np.prod(shape))
    drawn = generator.standard_normal(min(size, POOL))
    value = np.resize(drawn, shape)
    rows = (*shape[:-1], 1) if shape else ()
    if style == "plain":
        return value
    if style == "alike":
        return _alike(generator, value)
    if style == "large":
        return value * 10.0 ** np.asarray(generator.uniform(-2.0, 1.5, rows))
    few = np.asarray(generator.choice([-1.0, -0.5, 0.0, 0.0, 1.0, 2.0], shape))
    if style == "ties":
        return few
    kind = np.asarray(generator.integers(0, 4, rows))
    sized = value * 10.0 ** np.asarray(generator.uniform(-2.0, 1.5, rows))
    return np.where(kind == 0, few, np.where(kind == 1, sized, value))


def _alike(generator: np.random.Generator, value: Array) -> Array:
    """Rows that are one of the first two, or its negative; a weight's too, in which that makes no difference."""
    if value.ndim < 2:
        return value
    rows = generator.integers(0, min(2, value.shape[-2]), value.shape[-2])
    signs = np.where(generator.random(value.shape[-2]) < 0.5, -1.0, 1.0)
    return np.asarray(np.take(value, rows, axis=-2) * signs[:, None])


def _mask(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Rows of which some are all true, some all false, and most have both, as padding at the end or anywhere."""
    rows, length = (*shape[:-1], 1) if shape else (), shape[-1] if shape else 1
    kind = np.asarray(generator.integers(0, 6, rows))
    end = (
        np.arange(length) < np.asarray(generator.integers(0, length + 1, rows)) if shape else np.asarray(True)
    )
    some = np.asarray(generator.random(shape) < 0.6)
    return np.where(kind == 0, True, np.where(kind == 1, False, np.where(kind < 4, some, end)))


def _runs(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Small ints in runs of equal ones, of which some come again later."""
    values = np.asarray(generator.integers(0, 4, shape))
    if not shape or shape[-1] == 0:
        return values
    starts = np.asarray(generator.random(shape) < 0.45)
    starts[..., 0] = True
    last = np.maximum.accumulate(np.where(starts, np.arange(shape[-1]), 0), axis=-1)
    return np.take_along_axis(values, last, axis=-1)


def _within(value: Array, bound: Bound) -> Array:
    """Moved into what is proved of a tensor: between its limits, and rows no longer than its norm."""
    if isfinite(bound.low) and isfinite(bound.high):
        share = 0.5 + 0.5 * np.tanh(value)  # of few values, the limits themselves among them
        value = bound.low + (bound.high - bound.low) * np.where(np.abs(value) > 2, np.round(share), share)
    value = np.clip(value, bound.low, bound.high)
    if bound.norm < inf and value.ndim:
        norms = np.sqrt(np.sum(value * value, axis=-1, keepdims=True))
        value = value * np.minimum(1.0, (1 - 1e-12) * bound.norm / np.maximum(norms, 1e-300))
    return value


class Weights(Mapping[str, Array]):
    """The weights and buffers of a graph by path, each drawn when it is asked for."""

    def __init__(self, program: Program, graph: Graph, case: Case) -> None:
        self._nodes = dict(weights(program, graph.name))
        self._case = case

    def __getitem__(self, path: str) -> Array:
        node = self._nodes[path]
        named = replace(node, attributes=(("key", f"weight {path}"),), bound=None)
        if node.tensor.dtype != "float":
            return draw(named, self._case)
        rows = node.tensor.shape[-2].evaluate({}) if len(node.tensor.shape) > 1 else 1
        return np.asarray(draw(named, self._case) * 1.5 / max(rows, 1) ** 0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)
