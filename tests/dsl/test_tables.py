"""What a person reads at any width of the terminal: every number, whole; and whole lines where there is none."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from rich.cells import cell_len
from rich.console import Console

import fastgrad_dsl as fg
from fastgrad_dsl.bench import tuning
from fastgrad_dsl.commands import advise as advice
from fastgrad_dsl.commands import bench as bench
from fastgrad_dsl.commands import terminal
from fastgrad_dsl.commands import tune as tune_command
from fastgrad_dsl.commands.report_table import report_table
from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.tune import TuneRequest
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.report import Report
from tests.dsl.calibrations import calibration_of
from tests.dsl.models import EXAMPLES, INPUTS, always_polynomial, small
from tests.grids import wide

TUNE = TuneRequest(EXAMPLES / "bounded.tfg", {}, None, 1, 1024, "float32")
WIDTHS = (40, 60, 80, 200)
NESTED = """
use std

dim b
dim n <= 65536

block a_layer_with_a_name_that_is_long(x: float[b, n, 32]) -> float[b, n, 32] {
    return x + std.attention(x; heads = 2, qk_dim = 4, causal = true, gain = 1.0, near = 16) as attention_of_this_layer
}

block a_group_of_layers(x: float[b, n, 32]) -> float[b, n, 32] {
    repeat i in 3 {
        x = a_layer_with_a_name_that_is_long(x) as inner_layers_of_the_group
    }
    return x
}

model wide(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 32] = normal(std = 0.02)
    x = embedding(table, tokens)
    repeat i in 12 {
        x = a_group_of_layers(x) as outer_groups_of_layers
    }
    return x @ table.T
}

budget {
    output <= 0.1
    gradient <= 0.25
    at "*" degree = 2
}
"""


@cache
def nested() -> Any:
    return fg.compile(NESTED, target="torch", validate=False)


@cache
def reports() -> dict[str, Report]:
    compiled = small("bounded")
    calibration = calibration_of(compiled.plan_document)
    model = always_polynomial(compiled, compiled.module())
    return {
        "nested": nested().report(),
        "planned": compiled.report(),
        "calibrated": compiled.report(calibration=calibration),
        "measured": compiled.report(model, INPUTS["bounded"] * 2, calibration=calibration),
        "own": small("based").report(),
        "encoder_decoder": small("encoder_decoder").report(),
    }


def calibration() -> Calibration:
    found = reports()["calibrated"].calibration
    assert found is not None
    assert found.verification is not None
    return replace(found, verification=replace(found.verification, violations=1234))


def tuned() -> tune_command.Tuned:
    table, other = (64, 128, 64, 4, 2), (128, 64, 32, 8, 3)
    choices = [
        tuning.Choice("forward", "a name", table, other, 0.123456, 0.0987654, 31),
        tuning.Choice("backward_keys", "another", table, table, 0.00123, 0.00123, 29),
    ]
    found = tuning.shapes(fg.compile(EXAMPLES / "bounded.tfg", target="triton").program)
    return tune_command.Tuned(
        tuple((shape, choices) for shape in found), Path("a/cache/folder/of/a/user/tuned.json")
    )


def bench_document() -> dict[str, Any]:
    cell = {
        "n": 262_144,
        "heads": 8,
        "d": 16,
        "dv": 64,
        "dtype": "float32",
        "target": "auto",
        "forward_s": 1.2345,
        "backward_s": 23.456,
    }
    cells = [
        {
            **cell,
            "name": "polynomial degree 2, near 64",
            "degree": 2,
            "total_s": 24.69,
            "measured": True,
            "peak_share_total": 0.47,
        },
        {
            **cell,
            "name": "SDPA",
            "degree": None,
            "total_s": 2469.12,
            "measured": False,
            "peak_share_total": None,
        },
    ]
    memory = [{"n": 262_144, "contender": {"degree": 2}, "total": 16 * 2**20}]
    section = {
        "machine": {"cpu": "Intel(R) Xeon(R) Processor", "threads": 2, "torch": "2.13.0+cpu"},
        "cells": cells, "memory": memory,
        "output_error": {"n": 1024, "relative_l2": 0.0123, "rounding": [2.8e-7, 3e-7, 3.2e-7, 3.1e-7]},
    }  # fmt: skip
    return {"sections": {"attention": section}}


@cache
def advised(name: str) -> advice.AdviceDocument:
    return advice.make_advice(advice.AdviceRequest(EXAMPLES / f"{name}.tfg", {}))


def advised_on_data() -> advice.AdviceDocument:
    document = advised("bounded")
    found = calibration_of(fg.compile(EXAMPLES / "bounded.tfg").plan_document)
    measured = advice.Measured(found.data, found.weights, found.dims, found.planned)
    first = replace(document.attentions[0], candidates=found.attentions[0].candidates)
    return replace(document, measured=measured, attentions=(first,))


PRINTED: dict[str, Callable[[], None]] = {
    "check nested": lambda: terminal.print_plan(nested().program, "a/folder/with/a/long/name/nested.tfg"),
    "calibration": lambda: terminal.print_calibration(calibration()),
    "advise on data": lambda: advice.print_advice(advised_on_data()),
    "tune": lambda: tune_command.print_choices(tuned()),
    "tune --dry-run": lambda: tune_command.print_candidates(TUNE),
    "bench": lambda: bench.print_bench(bench_document()),
}
for _name in ("bounded", "llama", "based", "encoder_decoder"):
    PRINTED[f"check {_name}"] = partial(lambda n: terminal.print_plan(small(n).program, f"{n}.tfg"), _name)
for _wide in (False, True):
    _more = " --wide" * _wide
    for _name in ("nested", "planned", "calibrated", "measured", "own", "encoder_decoder"):
        PRINTED[f"report {_name}{_more}"] = partial(
            lambda name, wide: terminal.print_report(reports()[name], wide=wide), _name, _wide
        )
    for _name in ("bounded", "encoder_decoder", "based"):
        PRINTED[f"advise {_name}{_more}"] = partial(
            lambda name, wide: advice.print_advice(advised(name), wide=wide), _name, _wide
        )


def shown(show: Callable[[], None], width: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of this width gets; None: what a pipe gets."""
    out = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        if width is not None:
            made = Console(file=out, force_terminal=True, width=width, color_system=None, highlight=False)
            for module in (terminal, advice, bench, tune_command):
                patched.setattr(module, "console", lambda: made)
        show()
    return out.getvalue()


def numbers(text: str) -> list[str]:
    """Every word with a digit, without the punctuation around it."""
    words = re.split(r"[\s;()]+", text)
    return sorted(word.strip(",:.") for word in words if re.search(r"\d", word))


@pytest.mark.sampled(16)
@pytest.mark.parametrize("width", wide(WIDTHS, few=(40, 80)))
@pytest.mark.parametrize("name", PRINTED)
def test_no_number_is_lost_at_any_width(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, fitted = (shown(PRINTED[name], each, monkeypatch) for each in (None, width))
    assert "…" not in fitted
    assert max(map(cell_len, fitted.splitlines())) <= width
    wanted, found = (Counter(numbers(text)) for text in (whole, fitted))
    assert not {word: count for word, count in (wanted - found).items() if len(word) <= width - 8}, fitted
    glued = "".join(fitted.split())
    assert all(word in glued for word in whole.split() if len(word) > width - 8), (
        "a path is broken, and whole"
    )


@pytest.mark.parametrize("name", PRINTED)
def test_a_pipe_gets_whole_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    whole = shown(PRINTED[name], None, monkeypatch)
    assert "…" not in whole
    assert "\x1b" not in whole
    enough = shown(PRINTED[name], 100_000, monkeypatch)
    assert whole == enough


def test_the_first_report_fits_eighty_columns_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(PRINTED["report measured"], 80, monkeypatch).splitlines()
    heading = next(line for line in lines if line.startswith("attention "))
    assert heading.split() == ["attention", "decision", "measured", "measured", "as", "fast"]
    for entry in reports()["measured"]["attentions"]:
        line = next(line for line in lines if line.startswith(entry["path"] + " "))
        for what in ("output", "gradient"):
            assert f" {entry['errors'][what]['measured']:.2g} " in line


def test_columns_answer_what_is_known() -> None:
    """The best kind of error of each; eps before any data; nothing that is empty in every row."""
    headings = {
        name: [c.heading.replace("\n", " ") for c in report_table(r)[0]] for name, r in reports().items()
    }
    assert headings["measured"][2:] == ["output error measured", "gradient error measured", "times as fast"]
    assert headings["calibrated"][2:] == ["output error estimate", "gradient error estimate", "times as fast"]
    assert headings["planned"][2:] == ["eps bound", "times as fast"]
    for report in reports().values():
        for all_ in (False, True):
            columns, rows, _ = report_table(report, wide=all_)
            for place, column in enumerate(columns):
                if column.heading.startswith(("output", "gradient")):
                    assert {row[place] for row in rows} != {"-"}, column


def test_wide_tables_use_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 200 columns each attention is one line, and no column is wider than what stands in it."""
    report = reports()["measured"]
    lines = shown(PRINTED["report measured --wide"], 200, monkeypatch).splitlines()
    columns, rows, _ = report_table(report, wide=True)
    found = [line for line in lines if line.startswith("layers.")]
    assert [line.split() for line in found] == [" ".join(row).split() for row in rows]
    widest = [
        max(cell_len(text) for text in (*column.heading.split("\n"), *cells))
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True)
    ]
    assert max(map(len, found)) <= sum(widest) + 2 * (len(widest) - 1)


def test_a_row_that_does_not_fit_is_stacked() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=30, color_system=None)
    columns = [
        Column("name", is_number=False),
        Column("error\nmeasured"),
        Column("times\nas fast"),
        Column(""),
    ]
    print_table(console, columns, [["layers.0.attention.attend.again", "0.0123", "169", ""]])
    assert out.getvalue().splitlines() == [
        "layers.0.attention.attend.agai",
        "n",
        "    error measured: 0.0123",
        "    times as fast: 169",
    ]


@pytest.mark.parametrize("width", [1, 5, 12])
def test_a_terminal_of_hardly_any_width_loses_nothing(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    print_table(console, [Column("name", is_number=False), Column("error")], [["layers.0.attend", "0.0123"]])
    say(console, "at 0.5 of it", indent=2)
    assert "".join(out.getvalue().split()) == "layers.0.attenderror:0.0123at0.5ofit"


def test_what_is_quoted_is_counted_as_it_is_shown() -> None:
    """A control character is written as four; the row that then fits no line is stacked."""
    out = io.StringIO()
    console = terminal.PlainConsole.__new__(terminal.PlainConsole)
    Console.__init__(console, file=out, force_terminal=True, width=24, color_system=None)
    print_table(
        console, [Column("name", is_number=False), Column("error")], [["a\x1b\x07\x08b", "0.0123456"]]
    )
    assert out.getvalue().splitlines() == [r"a\x1b\x07\x08b", "    error: 0.0123456"]
