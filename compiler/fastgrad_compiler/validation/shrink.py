"""How large a graph is when it runs, and the same graph with smaller numbers where it is too large for that.

A model of 4,096 patches has that length in its text. Its attention means the same at a length of 9, so that is what is
run: a number is replaced wherever it is a size, before and after the pass alike. So is the width of a band, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, Program, TensorType, Type
from fastgrad_compiler.validation.cases import Case, cases

ENTRIES = 2_500_000  # of the largest tensor of a run
BEYOND = 7  # tokens of a run that a near field or a window leaves outside
SMALL = 64  # a number up to this needs not be made smaller
_BANDS = {"near_far": (("block", 2),), "window": (("width", 1),), "attention": (("near", 2), ("window", 1))}
_SIZES = ("shape", "start", "stop", "length", "rows")  # attributes that hold sizes

Reach = dict["str | int", int]


@dataclass(frozen=True)
class Fit:
    """Two programs to run and on what, and which lengths and widths of theirs were made smaller for it."""

    before: Program
    after: Program
    cases: tuple[Case, ...]
    numbers: Mapping[int, int] = field(default_factory=dict)
    widths: Mapping[int, int] = field(default_factory=dict)

    @property
    def shrunk(self) -> bool:
        """Whether any were."""
        return bool(self.numbers or self.widths)

    def smaller(self, program: Program) -> Program:
        """A program with the same numbers made smaller."""
        return _shrunk(program, self.numbers, self.widths)


def fits(before: Program, after: Program, old: str, new: str) -> Iterator[Fit]:
    """The programs with the cases that are small enough for the graphs `old` and `new`; smaller ones if need be."""
    given = cases(before, before[old], _named(_reach(before[old], after[new])))
    small, large = _sorted(before[old], after[new], given)
    yield Fit(before, after, small)
    if not large:
        return
    numbers = _lengths((before[old], after[new]), large[-1])
    widths = sorted(_widths(before[old]) | _widths(after[new]))
    narrow = {width: 2 + rank for rank, width in enumerate(widths)}
    for count in range(len(numbers) + 1):
        for narrower in ({}, narrow):
            found = _smaller(before, after, (old, new), numbers[:count], narrower)
            if found:
                yield from found
                return


def _smaller(
    before: Program,
    after: Program,
    names: tuple[str, str],
    numbers: Sequence[int],
    narrower: Mapping[int, int],
) -> list[Fit]:
    """The programs with short lengths for `numbers`, and with lengths that bands cut; none where they are too large."""
    old, new = names
    slim = _shrunk(before, {}, narrower), _shrunk(after, {}, narrower)
    reach = _reach(slim[0][old], slim[1][new])
    found: list[Fit] = []
    for least in (9, max(reach.values())) if numbers and reach else (9,):
        shorter = {number: least + 2 * rank for rank, number in enumerate(numbers)}
        pair = _shrunk(slim[0], shorter, {}), _shrunk(slim[1], shorter, {})
        small, large = _sorted(pair[0][old], pair[1][new], cases(pair[0], pair[0][old], _named(reach)))
        if large:
            return []
        found.append(Fit(*pair, small if not found else _last(small), shorter, narrower))
    return found


def _last(given: tuple[Case, ...]) -> tuple[Case, ...]:
    """The longest of the cases that matter."""
    return tuple(case for case in given if not case.spare)[-1:]


def _sorted(old: Graph, new: Graph, given: Iterable[Case]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases that are small enough, and those of the others that matter."""
    small: list[Case] = []
    large: list[Case] = []
    for case in given:
        (small if _fit(old, new, case) else large).append(case)
    return tuple(small), tuple(case for case in large if not case.spare)


def _named(reach: Reach) -> dict[str, int]:
    return {name: size for name, size in reach.items() if isinstance(name, str)}


# ---------------------------------------------------------------- what is large


def _fit(old: Graph, new: Graph, case: Case) -> bool:
    return not any(_entries(node, case) > ENTRIES for graph in (old, new) for node in graph.nodes)


def _entries(node: Node, case: Case) -> int:
    """The entries of a node's value, 0 where they are not known."""
    if not isinstance(node.type, TensorType):
        return 0
    try:
        return prod(dim.evaluate(case.sizes) for dim in node.type.shape)
    except ValueError:
        return 0


def _lengths(graphs: tuple[Graph, Graph], case: Case) -> list[int]:
    """The numbers in the last two axes of tensors that are too large, as scores are: those of the largest first."""
    nodes = [node for graph in graphs for node in graph.nodes if _entries(node, case) > ENTRIES]
    nodes.sort(key=lambda node: -_entries(node, case))
    dims = (dim.constant for node in nodes for dim in node.tensor.shape[-2:])
    return list(dict.fromkeys(number for number in dims if number is not None and number > SMALL))


def _reach(*graphs: Graph) -> Reach:
    """The dims, by name or number, that a near field or a window cuts, and sizes with pairs on either side of it."""
    found: Reach = {}
    for graph in graphs:
        for node in graph.nodes:
            for key, blocks in _BANDS.get(node.op, ()):
                width = node.get(key)
                for dim in _pair_axes(graph, node) if isinstance(width, int) else ():
                    name = dim.constant if dim.constant is not None else next(iter(dim.names))
                    found[name] = max(found.get(name, 0), blocks * int(str(width)) + BEYOND)
    return found


def _pair_axes(graph: Graph, node: Node) -> tuple[Dim, ...]:
    """The dims of queries and keys."""
    if node.op == "attention":
        types = [graph[name].type for name in node.inputs[:2]]
        return tuple(type_.shape[-2] for type_ in types if isinstance(type_, TensorType))
    return node.type.shape[-2:] if isinstance(node.type, TensorType) else ()


def _widths(graph: Graph) -> set[int]:
    values = (node.get(key) for node in graph.nodes for key, _ in _BANDS.get(node.op, ()))
    return {value for value in values if isinstance(value, int)}


# ---------------------------------------------------------------- smaller numbers


def _shrunk(program: Program, numbers: Mapping[int, int], widths: Mapping[int, int]) -> Program:
    """The program with these sizes and these widths of bands replaced."""

    def size(value: Attribute) -> Attribute:
        if isinstance(value, tuple):
            return tuple(map(size, value))
        if isinstance(value, Dim):
            return value if value.constant is None else Dim.of(numbers.get(value.constant, value.constant))
        return numbers.get(value, value) if isinstance(value, int) else value

    def typed(type_: Type | None) -> Type | None:
        if isinstance(type_, tuple):
            return tuple(replace(each, shape=_dims(size(each.shape))) for each in type_)
        return None if type_ is None else replace(type_, shape=_dims(size(type_.shape)))

    def attribute(node: Node, key: str, value: Attribute) -> Attribute:
        if key in _SIZES:
            return size(value)
        band = key in [name for name, _ in _BANDS.get(node.op, ())] and isinstance(value, int)
        return widths.get(int(str(value)), value) if band else value

    def changed(node: Node) -> Node:
        given = tuple((key, attribute(node, key, value)) for key, value in node.attributes)
        return replace(node, attributes=given, type=typed(node.type))

    return program.with_graphs(
        replace(graph, nodes=tuple(map(changed, graph.nodes))) for graph in program.graphs
    )


def _dims(value: Attribute) -> tuple[Dim, ...]:
    return tuple(dim for dim in value if isinstance(dim, Dim)) if isinstance(value, tuple) else ()
