"""The table of attentions on the terminal: what is asked most, or all that is known."""

from __future__ import annotations

from collections.abc import Callable

from fastgrad_dsl.commands.tables import Column
from fastgrad_dsl.documents.pairs import WHATS, What, of
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.documents.report import Kind, Report
from fastgrad_dsl.documents.report import ReportedAttention as Entry
from fastgrad_dsl.report.words import (
    KEYS_USED,
    LARGEST_SHARE,
    bound,
    factor,
    family,
    keys_used,
    number,
    number_of_keys,
    share,
)

KINDS: tuple[Kind, ...] = ("measured", "estimate", "bound")  # of errors, the best first

Made = tuple[Column, Callable[[Entry], str]]

NAME: Made = (Column("attention", is_number=False), lambda entry: entry.path)
EPS: Made = (Column("eps\nbound"), lambda entry: number(entry.eps))
SHARE: Made = (Column("largest\nshare\nbound"), lambda entry: share(entry.largest_share))
PLAN: tuple[Made, ...] = (
    (Column("rank"), lambda entry: number(entry.rank)),
    (Column("R"), lambda entry: number(entry.bound)),
    SHARE,
    EPS,
    (Column("rounding\nbound"), lambda entry: number(entry.rounding.weights if entry.rounding else None)),
    (Column("exact\nbelow"), lambda entry: number(entry.break_even if is_approximated(entry) else None)),
)
SPREAD: tuple[Made, ...] = (
    (Column("keys\nseen"), lambda entry: number_of_keys(entry.spread.visible if entry.spread else None)),
    (Column("keys\nused\nmeasured"), lambda entry: keys_used(entry.spread.planned if entry.spread else None)),
    (
        Column("used\nby exact\nmeasured"),
        lambda entry: keys_used(entry.spread.exact if entry.spread else None),
    ),
)


def report_table(report: Report, *, wide: bool = False) -> tuple[list[Column], list[list[str]], list[str]]:
    """The columns, a row for each attention, and sentences on what the columns are.

    Not `wide`: the decision, the best kind of error that is known (eps where none is), and time. Errors of a kind that
    is known of no polynomial have no column.
    """
    known = [(what, kind) for what in WHATS for kind in KINDS if _is_known(report, what, kind)]
    if not wide:
        known = list({what: (what, kind) for what, kind in reversed(known)}.values())[::-1]
    errors = [_error(what, kind) for what, kind in known]
    spread = SPREAD if any(entry.spread for entry in report.attentions) else ()
    middle = [*PLAN, *errors, *spread] if wide else errors or [EPS]
    made = [NAME, (Column("decision", is_number=False), _decision), *middle, _speed(report)]
    rows = [[cell(entry) for _, cell in made] for entry in report.attentions]
    return [column for column, _ in made], rows, _legend(report, {kind for _, kind in known}, wide=wide)


def _is_known(report: Report, what: What, kind: Kind) -> bool:
    served = [entry for entry in report.attentions if is_approximated(entry)]
    return any(of(entry.errors, what).of(kind) is not None for entry in served)


def _legend(report: Report, kinds: set[str], *, wide: bool) -> list[str]:
    measured_here = report.batch is not None
    said = {
        "measured": "measured: this attention alone against exact softmax, on this batch",
        "estimate": "estimate: how far the whole model moves when this attention alone is made exact"
        if measured_here
        else "estimate: the part of this attention in the whole model's error, by the calibration",
        "bound": "bound: proved for this batch",
    }
    found = [
        f"relative L2 errors, smaller is better; {'; '.join(said[kind] for kind in KINDS if kind in kinds)}"
    ]
    eps = ["eps: the largest relative error of a weight (bound)"] if wide or not kinds else []
    most = [LARGEST_SHARE] if wide else []
    used = [KEYS_USED] if wide and any(entry.spread for entry in report.attentions) else []
    speed = "times as fast: as exact attention at the longest lengths, forward and backward (estimate)"
    return [
        *(found if kinds else []),
        *eps,
        *most,
        *used,
        speed,
        *([] if wide else ["`fastgrad report --wide` shows all that is known of each"]),
    ]


def _decision(entry: Entry) -> str:
    if entry.decision != "polynomial":
        return "exact"
    return f"{family(entry.family)} {entry.degree}" + ("" if entry.near is None else f", near {entry.near}")


def _error(what: What, kind: Kind) -> Made:
    write = bound if kind == "bound" else number

    def cell(entry: Entry) -> str:
        zero = kind != "estimate" and what in entry.exact_zero
        return "exact is 0" if zero else write(of(entry.errors, what).of(kind))

    return Column(f"{what}\nerror\n{kind}"), cell


def _speed(report: Report) -> Made:
    def cell(entry: Entry) -> str:
        return "-" if entry.cost is None else factor(report.costs[entry.cost].speed_up)

    return Column("times\nas fast"), cell
