"""What a shape rule says when operands do not fit, and the small checks that every rule is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NoReturn

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, TensorType, Type
from fastgrad_compiler.ir.words import counted

Shape = tuple[Dim, ...]
ONE = Dim.of(1)


@dataclass(frozen=True, slots=True)
class Blame:
    """One side of a misfit: `text` is said of axis `axis` (None: the whole) of input `input`."""

    input: int
    axis: int | None
    text: str


SURFACE: dict[str, str] = {
    "add": "`+`",
    "sub": "`-`",
    "mul": "`*`",
    "div": "`/`",
    "neg": "unary minus",
    "matmul": "`@`",
    "less": "an order comparison",
    "less_equal": "an order comparison",
    "equal": "`==`",
    "logical_not": "`not`",
    "amax": "max",
    "select": "an index",
    "slice": "a slice",
}
"""How the language writes what the graph calls otherwise."""


class ShapeError(Exception):
    """Operands that an operation does not take: `code` is FG2xx, `blame` names the sides, first cause first."""

    def __init__(
        self, code: str, message: str, blame: Iterable[Blame] = (), help_: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.blame = tuple(blame)
        self.help = tuple(help_)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a rule is asked: the operation's name, its operands' types and its attributes.

    `declared` is the type that the node states itself (inputs and weights have no other); `multiples` says what
    run-time dims are multiples of; `graphs` are the graphs that a call can name, their types known.
    """

    op: str
    inputs: tuple[Type, ...]
    attributes: Mapping[str, Attribute]
    multiples: Mapping[str, int] = field(default_factory=dict)
    declared: Type | None = None
    graphs: Mapping[str, Graph] = field(default_factory=dict)

    def tensor(self, index: int) -> TensorType:
        """The type of operand `index`; FG209 where it is several tensors."""
        found = self.inputs[index]
        if not isinstance(found, TensorType):
            fail("FG209", f"{self.op} takes one tensor, not several", Blame(index, None, "several results"))
        return found

    def whole(self, index: int) -> Blame:
        """Operand `index` as a side of a misfit."""
        return Blame(index, None, f"{self.inputs[index]} here")

    def dim(self, name: str) -> Dim:
        """The attribute `name`, an int or a dim."""
        return dimension(self, self.attributes[name])

    def axis(self, rank: int, index: int = 0) -> int:
        """The attribute `axis` as a negative int; FG206 where a tensor of `rank` dims has no such axis."""
        return axis_of(self, self.attributes["axis"], rank, index)

    def integer(self, name: str) -> int:
        """The attribute `name`, an int."""
        value = self.attributes[name]
        if isinstance(value, bool) or not isinstance(value, int):
            fail("FG217", f"attribute {name} of {self.op} is {value!r}, not an int")
        return value


def fail(code: str, message: str, *blame: Blame, help_: str | None = None) -> NoReturn:
    """Raise a ShapeError."""
    raise ShapeError(code, message, blame, () if help_ is None else (help_,))


def show(shape: Sequence[Dim]) -> str:
    """`[b, n, 256]`."""
    return f"[{', '.join(map(str, shape))}]"


def dimension(site: Site, value: Attribute) -> Dim:
    """A part of an attribute that is an int or a dim."""
    if isinstance(value, bool) or not isinstance(value, int | Dim):
        fail("FG217", f"{value!r} in {site.op} is not a dimension")
    return Dim.of(value)


def want_float(site: Site, index: int, least: int = 0, most: int | None = None) -> TensorType:
    """Operand `index`, a float tensor of as many dims (`want_rank`)."""
    want_dtype(site, index, "float")
    return want_rank(site, index, least, most)


def want_dtype(site: Site, index: int, *dtypes: str, help_: str | None = None) -> TensorType:
    """Operand `index`, which has one of `dtypes`; FG209 otherwise."""
    found = site.tensor(index)
    if found.dtype not in dtypes:
        if help_ is None and "float" in dtypes:
            help_ = "convert it with float(x)"
        fail(
            "FG209",
            f"{SURFACE.get(site.op, site.op)} takes a tensor of {' or '.join(dtypes)}, not {found}",
            site.whole(index),
            help_=help_,
        )
    return found


def want_rank(site: Site, index: int, least: int, most: int | None = None) -> TensorType:
    """Operand `index`, which has at least `least` dims (at most `most`; by default any number); FG205 otherwise."""
    found = site.tensor(index)
    rank = len(found.shape)
    if rank < least or (most is not None and rank > most):
        count = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        plural = "" if count in ("1", "at least 1") else "s"
        fail(
            "FG205",
            f"{SURFACE.get(site.op, site.op)} takes a tensor of {count} dimension{plural}, not {found}",
            Blame(index, None, f"{counted(rank, 'dimension')} here"),
        )
    return found


def want_equal(
    site: Site, first: tuple[int, int], second: tuple[int, int], what: str, help_: str | None = None
) -> None:
    """The dims at two places (operand, axis) are equal; FG203 with both sides otherwise."""
    one, two = site.tensor(first[0]).shape[first[1]], site.tensor(second[0]).shape[second[1]]
    if one != two:
        fail("FG203", what, Blame(*first, f"{one} here"), Blame(*second, f"{two} here"), help_=help_)


def axis_of(site: Site, axis: Attribute, rank: int, index: int = 0) -> int:
    """`axis` as a negative int; FG206 where a tensor of `rank` dims has no such axis."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        fail("FG217", f"axis of {site.op} is {axis!r}, not an int")
    if not -rank <= axis < rank:
        reach = f"its axes are {-rank} to {rank - 1}" if rank else "it is a scalar"
        fail("FG206", f"{site.op} over axis {axis} of a tensor with {rank} dimensions: {reach}",
             site.whole(index))  # fmt: skip
    return axis if axis < 0 else axis - rank


def broadcast(site: Site, indices: Sequence[int], verb: str) -> Shape:
    """The common shape of the operands `indices`; FG203 with both sides where two dims differ and neither is 1."""
    shapes = {index: site.tensor(index).shape for index in indices}
    rank = max((len(shape) for shape in shapes.values()), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        dim, source = ONE, indices[0]
        for index, shape in shapes.items():
            if len(shape) < -axis or shape[axis] == ONE or shape[axis] == dim:
                continue
            if dim != ONE:
                pair = f"{show(shapes[source])} and {show(shape)}"
                fail(
                    "FG203",
                    f"{verb} of {pair}: axis {axis} differs and neither side is 1",
                    Blame(source, axis, f"{dim} here"),
                    Blame(index, axis, f"{shape[axis]} here"),
                )
            dim, source = shape[axis], index
        result.append(dim)
    return tuple(result)


def want_axes(site: Site, first: int, second: int, axes: Iterable[int], what: str) -> None:
    """Two operands have the same dims at these axes; FG203 for the first that differs."""
    for axis in axes:
        want_equal(site, (first, axis), (second, axis), f"{what}: axis {axis} differs")


def product(shape: Iterable[Dim]) -> Dim:
    """The number of elements."""
    return prod(shape, start=ONE)


def results(types: Sequence[TensorType]) -> Type:
    """One type alone, several as a tuple."""
    return types[0] if len(types) == 1 else tuple(types)
