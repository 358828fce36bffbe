"""The table of attentions and heads: its columns, and the cells of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgrad_dsl.documents.report import Exact, Head, Kind, Report, ReportedAttention, Spread
from fastgrad_dsl.report.words import (
    SOURCES,
    bound,
    decision,
    folded,
    keys_used,
    number,
    number_of_keys,
    share,
)

GROUPS = (
    ("", 7),
    ("output", 3),
    ("gradient of weights", 1),
    ("dQ", 2),
    ("dK", 2),
    ("dV", 2),
)
"""Headings over the columns, and how many each spans."""

GRADIENTS: tuple[Exact, ...] = ("dq", "dk", "dv")
PROVED: tuple[Kind, ...] = ("bound", "measured")


@dataclass(frozen=True)
class Cell:
    """What stands in a cell; `value` is the number behind it, None for a text or what is not known."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A heading with its cells for an attention and for one of its heads."""

    heading: str
    attention: Callable[[ReportedAttention], Cell]
    head: Callable[[Head], Cell] = lambda head: Cell("")
    is_number: bool = True


@dataclass(frozen=True)
class Row:
    """The cells of an attention and of its heads, which are sorted with it."""

    cells: tuple[Cell, ...]
    heads: tuple[tuple[Cell, ...], ...]


def column_labels() -> list[str]:
    """The headings of the columns with those over them, each complete, as in `output bound`."""
    groups = [name for name, span in GROUPS for _ in range(span)]
    return [f"{group} {column.heading}".strip() for group, column in zip(groups, COLUMNS, strict=True)]


def attention_rows(report: Report) -> list[Row]:
    """A row for each attention of a report."""
    return [
        Row(
            tuple(column.attention(entry) for column in COLUMNS),
            tuple(tuple(column.head(head) for column in COLUMNS) for head in entry.per_head or ()),
        )
        for entry in report.attentions
    ]


def weight_rows(report: Report) -> list[dict[str, str]]:
    """What the weights of attentions can be and are, by heading; those of which it is the same have a row together.

    Attentions of which nothing is known have none.
    """
    known: dict[tuple[float | None, Spread | None], list[str]] = {}
    for entry in report.attentions:
        if entry.largest_share is not None or entry.spread is not None:
            known.setdefault((entry.largest_share, entry.spread), []).append(entry.path)
    return [
        {
            "attention": folded(paths),
            "largest share (bound)": share(most),
            "keys seen": number_of_keys(spread.visible if spread else None),
            "keys used (measured)": keys_used(spread.planned if spread else None),
            "used by exact (measured)": keys_used(spread.exact if spread else None),
        }
        for (most, spread), paths in known.items()
    ]


def _error(what: Exact, kind: Kind) -> Column:
    write = bound if kind == "bound" else number

    def of_attention(entry: ReportedAttention) -> Cell:
        value = entry.errors.of(what).of(kind)
        zero = kind != "estimate" and what in entry.exact_zero
        return Cell("exact is 0" if zero else write(value), value)

    def of_head(head: Head) -> Cell:
        value = head.output.of(kind) if what == "output" else None
        return Cell(write(value) if value is not None else "", value)

    return Column(kind, of_attention, of_head)


def _reason(entry: ReportedAttention) -> Cell:
    if entry.family == "own":
        return Cell("not needed")
    guarded = ", guarded" if entry.guarded else ""
    return Cell((SOURCES[entry.range_source] if entry.range_source else "nothing bounds it") + guarded)


def _rounding(entry: ReportedAttention) -> Cell:
    """What it adds to eps in a float32 run, and where the kernel computes in float64."""
    found = entry.rounding
    if found is None:
        return Cell("")
    precise = " (float64)" if entry.precision == "float64" else ""
    return Cell(number(found.weights) + precise, found.weights)


def _seen(head: Head) -> Cell:
    if head.least is not None:
        return Cell(f"logits {number(head.least)} to {number(head.largest)} (measured)")
    return Cell("" if head.reach is None else f"logits at most {number(head.reach)} (bound, this batch)")


COLUMNS = (
    Column("attention", lambda e: Cell(e.path), lambda h: Cell(f"head {h.head}"), is_number=False),
    Column("decision", lambda e: Cell(decision(e)), is_number=False),
    Column("degree", lambda e: Cell(number(e.degree), e.degree)),
    Column("rank", lambda e: Cell(number(e.rank), e.rank)),
    Column("R", lambda e: Cell(number(e.bound), e.bound), lambda h: Cell(number(h.range), h.range)),
    Column("R is", _reason, _seen, is_number=False),
    Column("rounding (bound)", _rounding),
    _error("output", "bound"),
    _error("output", "estimate"),
    _error("output", "measured"),
    _error("gradient", "estimate"),
    *(_error(what, kind) for what in GRADIENTS for kind in PROVED),
)
