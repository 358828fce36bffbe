"""Python text that `ruff format` leaves unchanged: expressions with precedence, statements broken as ruff does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastgrad_compiler.ir.graph import Node
from fastgrad_grammar.quote import comment, python_docstring, python_string

LINE_LENGTH = 110
INDENT = "    "

# Python's precedence of what is emitted, loosest first.
COMPARE, ADD, MULTIPLY, UNARY, ATOM = range(5)


@dataclass(frozen=True, slots=True)
class Expr:
    """A Python expression on one line.

    `call` is (function, arguments) if the text is a call that can be broken; `number`: it is a Python number, not a
    tensor.
    """

    text: str
    precedence: int = ATOM
    call: tuple[str, tuple[str, ...]] | None = None
    number: bool = False

    def __str__(self) -> str:
        return self.text

    def within(self, precedence: int) -> str:
        """The text, in parentheses where it binds looser than `precedence`."""
        return self.text if self.precedence >= precedence else f"({self.text})"

    @property
    def is_name(self) -> bool:
        """Whether this is a name, an attribute or a number: nothing is saved by keeping it in a variable."""
        return self.precedence == ATOM and self.text.replace(".", "").replace("_", "").isalnum()


def call(function: str, *arguments: object, **keywords: object) -> Expr:
    """`function(arguments, keyword=value)`; keywords that are None are left out."""
    texts = [str(argument) for argument in arguments]
    texts += [f"{name}={value}" for name, value in keywords.items() if value is not None]
    return Expr(f"{function}({', '.join(texts)})", ATOM, (function, tuple(texts)))


def method(receiver: Expr, name: str, *arguments: object, **keywords: object) -> Expr:
    """`receiver.name(arguments)`."""
    return call(f"{_receiver(receiver)}.{name}", *arguments, **keywords)


def attribute(receiver: Expr, name: str) -> Expr:
    """`receiver.name`."""
    return Expr(f"{_receiver(receiver)}.{name}")


def index(receiver: Expr, places: str) -> Expr:
    """`receiver[places]`."""
    return Expr(f"{_receiver(receiver)}[{places}]")


def binary(operator: str, left: Expr, right: Expr) -> Expr:
    """`left operator right` for + - * / // @ and comparisons, all taken as left-associative."""
    precedence = {"+": ADD, "-": ADD, "*": MULTIPLY, "/": MULTIPLY, "//": MULTIPLY, "@": MULTIPLY}.get(
        operator, COMPARE
    )
    tighter = precedence + 1
    left_text = left.within(tighter if precedence == COMPARE else precedence)
    number = left.number and right.number
    return Expr(f"{left_text} {operator} {right.within(tighter)}", precedence, number=number)


def negative(operand: Expr) -> Expr:
    """`-operand`."""
    return Expr(f"-{operand.within(UNARY)}", UNARY, number=operand.number)


def literal(value: float | int | bool | str | None) -> Expr:
    """A Python literal; infinities need `import math` in the module."""
    if isinstance(value, str):
        return Expr(python_string(value))
    if value is None:
        return Expr("None")
    if isinstance(value, float) and math.isinf(value):
        return Expr("math.inf" if value > 0 else "-math.inf", ATOM if value > 0 else UNARY, number=True)
    return Expr(repr(value), UNARY if value < 0 else ATOM, number=True)


def tuple_text(items: Iterable[object]) -> str:
    """`(a, b)`, `(a,)` or `()`."""
    texts = [str(item) for item in items]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def weight(operand: Expr) -> int:
    """What a variable for the operand would save: 0 for names and numbers."""
    return 0 if operand.is_name or operand.number else len(operand.text)


def noun(node: Node) -> str:
    """A name for what a node gives, where the user gave none."""
    if node.op == "call":
        return "fused" if node.is_fused else str(node["label"])
    names = {"matmul": "product", "poly_attention": "attention", "mul": "scaled", "add": "total"}
    return names.get(node.op, node.op)


def _receiver(expr: Expr) -> str:
    number = expr.text[:1].isdigit()
    return expr.text if expr.precedence == ATOM and not number else f"({expr.text})"


class Writer:
    """Lines of Python at a growing and shrinking indent; `margin` columns will be put before them later."""

    def __init__(self, margin: int = 0) -> None:
        self.lines: list[str] = []
        self._indent, self._margin = 0, margin

    @property
    def column(self) -> int:
        """Where the next line will begin."""
        return self._margin + len(INDENT) * self._indent

    @contextmanager
    def indented(self) -> Iterator[None]:
        """Lines written inside stand one level deeper."""
        self._indent += 1
        yield
        self._indent -= 1

    def line(self, text: str = "") -> None:
        """One line as it is."""
        self.lines.append(f"{INDENT * self._indent}{text}" if text else "")

    def comment(self, text: str) -> None:
        """A comment, cut to the line length."""
        room, text = LINE_LENGTH - self.column - 2, comment(text)
        self.line("# " + (text if len(text) <= room else text[: room - 3] + "..."))

    def docstring(self, text: str) -> None:
        """A docstring of one paragraph, filled to the line length."""
        room = LINE_LENGTH - self.column
        text = python_docstring(text)
        if len(text) + 6 <= room:
            self.line(f'"""{text}"""')
            return
        words = f'"""{text}'.split(" ")
        current = words[0]
        for word in words[1:]:
            if len(current) + 1 + len(word) > room:
                self.line(current)
                current = word
            else:
                current += f" {word}"
        self.line(current)
        self.line('"""')

    def statement(self, prefix: str, value: Expr, suffix: str = "") -> None:
        """`prefix value suffix`, such as `x = f(y)` or `return f(y)`, broken as ruff breaks it where it is too long."""
        whole = f"{prefix}{value}{suffix}"
        if self._fits(whole):
            self.line(whole)
        elif value.call is not None:
            self._broken_call(prefix, *value.call, suffix)
        elif self._fits(INDENT + value.text):
            self.line(f"{prefix}(")
            self.line(INDENT + value.text)
            self.line(f"){suffix}")
        else:
            self.line(whole)

    def names(self, prefix: str, entries: Iterable[str], opening: str = "", closing: str = "") -> None:
        """`prefix` and entries between brackets; one a line, in parentheses at least, where they do not fit on one."""
        items = list(entries)
        whole = f"{prefix}{opening}{', '.join(items)}{closing}"
        if self._fits(whole):
            self.line(whole)
            return
        self.line(f"{prefix}{opening or '('}")
        for item in items:
            self.line(f"{INDENT}{item},")
        self.line(closing or ")")

    def tuples(self, prefix: str, value: object) -> None:
        """`prefix value,` of tuples in tuples, of strings and numbers, one item a line where it is too long."""
        whole = f"{prefix}{_nested(value)},"
        if not isinstance(value, tuple) or self._fits(whole):
            self.line(whole)
            return
        self.line(f"{prefix}(")
        with self.indented():
            for item in value:
                self.tuples("", item)
        self.line("),")

    def _broken_call(self, prefix: str, function: str, arguments: tuple[str, ...], suffix: str) -> None:
        self.line(f"{prefix}{function}(")
        joined = INDENT + ", ".join(arguments)
        if self._fits(joined):
            self.line(joined)
        elif len(arguments) == 1 and arguments[0][-1] in "]}":
            with self.indented():
                self.names("", _items(arguments[0]), arguments[0][0], arguments[0][-1])
        elif len(arguments) == 1 and (generator := _GENERATOR.fullmatch(arguments[0])):
            for part in generator.groups():  # a comma after a generator is an error of syntax
                self.line(INDENT + part)
        else:
            for argument in arguments:
                self.line(f"{INDENT}{argument},")
        self.line(f"){suffix}")

    def _fits(self, text: str) -> bool:
        return self.column + len(text) <= LINE_LENGTH

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def _nested(value: object) -> str:
    if isinstance(value, tuple):
        return tuple_text(map(_nested, value))
    if isinstance(value, range):
        return f"range({value.stop})" if value.start == 0 else f"range({value.start}, {value.stop})"
    assert isinstance(value, int | str)
    return str(literal(value))


_GENERATOR = re.compile(r"(.*) (for _ in range\(\d+\))")


def _items(text: str) -> list[str]:
    """The items of the text of a list or a dict."""
    depth, start = 0, 1
    found = []
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 1:
            found.append(text[start:position].strip())
            start = position + 1
    return [*found, text[start:-1].strip()]
