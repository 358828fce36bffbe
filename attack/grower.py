"""A program that is grown statement by statement: elaboration itself says whether one fits, and of what type it is."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Program, TensorType
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source

Shape = tuple[Dim, ...]
_WORD = re.compile(r"\w+")


class Unfit(Exception):
    """There is no operand for an operation, or what was written is not well typed."""


@dataclass(frozen=True)
class Typed:
    """An expression of a known type. `named` is whether it is a name, which costs nothing to read again."""

    text: str
    dtype: str
    shape: Shape
    named: bool = True

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def type(self) -> str:
        """The type as the language writes it."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def size(self, axis: int) -> int | None:
        """The size of an axis, None where a run decides it."""
        return self.shape[axis].constant


def tuple_of(dims: Sequence[object]) -> str:
    """A tuple of dims or numbers as the language writes it."""
    return f"({', '.join(map(str, dims))}{',' if len(dims) == 1 else ''})"


def constant_shape(shape: Sequence[Dim]) -> bool:
    """Whether compilation knows every dim, as a weight's have to be."""
    return all(dim.constant is not None for dim in shape)


@dataclass
class Grower:
    """The text so far. `before` is what stands above all: params and dims; `blocks` are texts by name.

    `used` counts the operations that were written, `refused` the codes of the diagnostics that others met.
    """

    rng: random.Random
    before: str
    signature: list[Typed]
    name: str = "attacked"
    blocks: dict[str, str] = field(default_factory=dict)
    prefix: str = ""  # of new names: those of blocks are none of the model's
    params: dict[str, str] = field(default_factory=dict)  # name of a compile-time float to its value
    lines: list[str] = field(default_factory=list)
    pool: list[Typed] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tried: int = 0
    _count: int = 0
    _open: int = 0

    def __post_init__(self) -> None:
        self.pool = list(self.signature)

    # ------------------------------------------------------------ text

    def text(self, results: Sequence[Typed], extra: Sequence[str] = ()) -> str:
        """The whole program, which returns these values, with further lines before the return."""
        inputs = ", ".join(f"{each.text}: {each.type}" for each in self.signature)
        types = ", ".join(each.type for each in results)
        values = ", ".join(each.text for each in results)
        one = len(results) == 1
        body = "\n".join(f"    {line}" for line in (*self.lines, *extra, *"}" * self._open))
        header = f"model {self.name}({inputs}) -> {types if one else f'({types})'} {{"
        above = self.before + "".join(self.blocks.values())
        return f"{above}{header}\n{body}\n    return {values if one else f'({values})'}\n}}\n"

    def fresh(self, letter: str = "v") -> str:
        """A name that is free."""
        self._count += 1
        return f"{self.prefix}{letter}{self._count}"

    # ------------------------------------------------------------ statements

    def say(self, expression: str, *, inline: bool = False) -> Typed:
        """Bind an expression to a name, or (`inline`) only learn its type. Raises Unfit where it is not well typed."""
        name = self.fresh()
        lines = [f"{name} = {expression}"]
        if inline:
            return replace(self.typed(lines, name), text=f"({expression})", named=False)
        return self.raw(lines, name)

    def sometimes(self, expression: str) -> Typed:
        """An expression that gets a name, or none: spelled again wherever it is read."""
        return self.say(expression, inline=self.rng.random() < 0.35)

    def declare(self, kind: str, shape: Sequence[object], initial: str = "") -> Typed:
        """A weight or a buffer."""
        name = self.fresh("w")
        dims = ", ".join(map(str, shape))
        return self.raw([f"{kind} {name}: float[{dims}]{f' = {initial}' if initial else ''}"], name)

    def typed(self, lines: Sequence[str], name: str) -> Typed:
        """What a name is that these lines bind, which are not taken."""
        return self._type(name, self._elaborated(lines))

    def raw(self, lines: Sequence[str], name: str) -> Typed:
        """Several lines that bind a name."""
        found = self.typed(lines, name)
        self.lines += lines
        self.pool.append(found)
        return found

    @contextmanager
    def inside(self, *opening: str) -> Iterator[None]:
        """Statements in the braces that the first line opens; all are taken back where one raises Unfit."""
        lines, pool = list(self.lines), list(self.pool)
        self.lines += opening
        self._open += 1
        try:
            yield
            self.check()
        except Unfit:
            self.lines = lines
            raise
        finally:
            self.pool = pool
            self._open -= 1
        self.lines.append("}")

    def check(self) -> None:
        """Raises Unfit where the text as it stands is not well typed."""
        self._accepted(self.text([self.signature[0]]))

    def _elaborated(self, lines: Sequence[str]) -> Program:
        """Lines by themselves, what they read as inputs: quicker than the whole text."""
        words = set(_WORD.findall(" ".join(lines)))
        read = [each for each in self.pool if each.text in words] or self.signature[:1]
        blocks = "".join(text for name, text in self.blocks.items() if name in words)
        inputs = ", ".join(f"{each.text}: {each.type}" for each in read)
        body = "\n".join(f"    {line}" for line in (*lines, f"return {read[0].text}"))
        text = f"{self.before}{blocks}model {self.name}({inputs}) -> {read[0].type} {{\n{body}\n}}\n"
        return self._accepted(text)

    def _accepted(self, text: str) -> Program:
        self.tried += 1
        try:
            return elaborate(Source("<attack>", text))
        except TfgError as error:
            for diagnostic in error.diagnostics:
                self.refused[f"{diagnostic.code} {diagnostic.message}"] += 1
            raise Unfit from None

    @staticmethod
    def _type(name: str, program: Program) -> Typed:
        for graph in program.graphs:
            node = graph.by_name.get(name)
            if node is not None and isinstance(node.type, TensorType):
                return Typed(name, node.type.dtype, node.type.shape)
        raise Unfit  # another name for a value that has one

    # ------------------------------------------------------------ operands

    def pick(self, dtype: str = "float", where: Callable[[Typed], bool] = lambda _: True) -> Typed:
        """A value of the pool, rather a late one. Raises Unfit where none fits."""
        found = [each for each in self.pool if each.dtype == dtype and where(each)]
        if not found:
            raise Unfit
        return found[max(self.rng.randrange(len(found)), self.rng.randrange(len(found)))]

    def partner(self, other: Typed, dtype: str = "float") -> Typed:
        """A value that broadcasts with another."""
        return self.pick(dtype, lambda each: _broadcasts(each.shape, other.shape))

    def number(self, *choices: float) -> str:
        """A compile-time float: one of the choices, a random one, or a param."""
        if self.params and self.rng.random() < 0.15:
            return self.rng.choice(sorted(self.params))
        chosen = bool(choices) and self.rng.random() < 0.7
        value = self.rng.choice(choices) if chosen else round(self.rng.uniform(-3, 3), 3)
        return f"{value:.3f}" if abs(value) >= 1e-2 or value == 0 else f"{value:.6f}"

    def positive(self) -> str:
        """A compile-time float above 0."""
        return f"{self.rng.choice([0.25, 0.5, 1.0, 1.5, 2.0, 4.0, round(self.rng.uniform(0.05, 6), 2)]):.2f}"

    def axis(self, operand: Typed) -> int:
        """An axis, from the front or the end. Raises Unfit for a scalar."""
        if operand.rank == 0:
            raise Unfit
        return self.rng.randrange(-operand.rank, operand.rank)


def _broadcasts(one: Shape, other: Shape) -> bool:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(x == y or x.constant == 1 or y.constant == 1 for x, y in pairs)
