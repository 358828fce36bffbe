"""Lines and tables that fit the terminal, with nothing cut at any width; where the output is none, lines are whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from fastgrad_grammar import quote

if TYPE_CHECKING:
    from rich.console import Console

GAP = "  "  # between columns, and between the numbers of a row that is stacked
NARROWEST = 10  # columns in which a text is broken: less room than that counts as so much


@dataclass(frozen=True)
class Column:
    """A heading, of one line or more, over texts or over numbers, which stand at the right."""

    heading: str
    is_number: bool = True


def say(out: Console, text: str, *, indent: int = 0, style: str = "") -> None:
    """A paragraph: broken between words on a terminal, with every line indented, else one line."""
    for line in _broken(out, quote.terminal(text), indent):
        _line(out, " " * indent + line, style)


def print_table(out: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Cells below their headings where the rows fit, else each row as a paragraph: its name, then `heading: cell`."""
    rows = [list(map(quote.terminal, row)) for row in rows]
    headings = [column.heading.split("\n") for column in columns]
    widths = [
        max(map(cell_len, [*lines, *cells]))
        for lines, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    if out.is_terminal and sum(widths) + len(GAP) * (len(widths) - 1) > out.width:
        for row in rows:
            _stacked(out, columns, row)
        return
    height = max(map(len, headings))
    tops = zip(*([""] * (height - len(lines)) + lines for lines in headings), strict=True)
    for place, cells in enumerate([*tops, *rows]):
        padded = []
        for column, cell, width in zip(columns, cells, widths, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if column.is_number else cell + space)
        _line(out, GAP.join(padded).rstrip(), "bold" if place < height else "")


def _stacked(out: Console, columns: Sequence[Column], row: Sequence[str]) -> None:
    """A row as a name and, below it, as many `heading: cell` on a line as fit; each stays whole if it can."""
    name, *cells = row
    say(out, name, style="bold")
    room, line = max(out.width - 4, NARROWEST), ""
    for column, cell in zip(columns[1:], cells, strict=True):
        heading = column.heading.replace("\n", " ")
        part = f"{heading}: {cell}" if heading else cell
        if line and cell_len(line + GAP + part) > room:
            say(out, line, indent=4)
            line = ""
        line += GAP * bool(line and cell) + part * bool(cell)
    say(out, line, indent=4)


def _broken(out: Console, text: str, indent: int) -> Iterator[str]:
    if not out.is_terminal:
        yield text
        return
    for line in Text(text).wrap(out, max(out.width - indent, NARROWEST), tab_size=4):
        yield line.plain.rstrip()


def _line(out: Console, line: str, style: str) -> None:
    out.print(Text(line, style=style), soft_wrap=True)
