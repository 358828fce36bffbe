"""Carets stand under the exact characters, whatever the line is made of."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fastgrad_grammar.diagnostics import Diagnostic, Note
from fastgrad_grammar.render import MAX_COLUMNS, render
from fastgrad_grammar.source import Source, Span

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def shown(text: str, start: int, end: int, label: str = "") -> str:
    return render([Diagnostic("FG101", "wrong", Span(Source("a.tfg", text), start, end), label)])


def test_the_form_of_the_language_page() -> None:
    lines = ["", "w1"] + [""] * 11 + ["    x = x @ w1", ""]
    source = Source("gpt.tfg", "\n".join(lines))
    place = source.text.index("x @ w1")
    found = Diagnostic(
        "FG204",
        "inner dimensions differ",
        Span(source, place, place + 6),
        "256 here but 128 here",
        (Note("declared here", Span(source, 1, 3)), Note("a plain note")),
        ("declare w1 as float[d_model, hidden]",),
    )
    assert render([found]) == (
        "error[FG204]: inner dimensions differ\n"
        "  --> gpt.tfg:14:9\n"
        "   |\n"
        "14 |     x = x @ w1\n"
        "   |         ^^^^^^ 256 here but 128 here\n"
        "   = note: a plain note\n"
        "   = help: declare w1 as float[d_model, hidden]\n"
        "note: declared here\n"
        "  --> gpt.tfg:2:1\n"
        "   |\n"
        " 2 | w1\n"
        "   | --\n"
    )


def test_without_a_place() -> None:
    assert render([Diagnostic("FG001", "cannot read a.tfg", help=("name a file",))]) == (
        "error[FG001]: cannot read a.tfg\n  = help: name a file\n"
    )


def test_summary_counts_errors_and_warnings() -> None:
    error, warning = Diagnostic("FG101", "a"), Diagnostic("FG101", "b", severity="warning")
    assert render([]) == ""
    assert render([warning]) == "warning[FG101]: b\n"
    assert render([error, error]).endswith("\n\n2 errors\n")
    assert render([error, warning, warning]).endswith("\n\n1 error, 2 warnings\n")


def test_tabs_are_widened() -> None:
    assert shown("\tx =\ty", 5, 6).splitlines()[3:] == ["1 |     x =    y", "  |            ^"]


def test_wide_and_combining_characters() -> None:
    assert shown('s = "漢字" + e\u0301 + z', 16, 17).splitlines()[3:] == [
        '1 | s = "漢字" + e\u0301 + z',
        "  |                  ^",
    ]
    assert shown('"漢字"', 0, 4).splitlines()[-1] == "  | ^^^^^^"


def test_control_and_unpaired_characters_are_replaced() -> None:
    output = shown("a\x00\x1b[2J\ud800\u202eb", 7, 8)
    output.encode()
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in output.replace("\n", ""))


def test_end_of_file() -> None:
    assert shown("param a =", 9, 9, "expected an expression").splitlines()[2:] == [
        "  |",
        "1 | param a =",
        "  |          ^ expected an expression",
    ]
    assert shown("param a = 1\n", 12, 12).splitlines()[-2:] == ["2 |", "  | ^"]


def test_span_over_several_lines() -> None:
    text = "x = f(\n    a,\n    b,\n)\n"
    assert shown(text, 4, len(text) - 1, "this call").splitlines()[2:] == [
        "  |",
        "1 | x = f(",
        "  |     ^^",
        "...",
        "4 | )",
        "  | ^ this call",
    ]


def test_long_lines_are_cut_around_the_place() -> None:
    text = "a" * 5000 + "HERE" + "b" * 5000
    line, marks = shown(text, 5000, 5004).splitlines()[3:]
    assert len(line) < MAX_COLUMNS + 60
    assert line.startswith("1 | ...aaa")
    assert line.endswith("bbb...")
    assert line[marks.index("^") :].startswith("HERE")
    assert marks.count("^") == 4


def test_colour_only_adds_escapes() -> None:
    found = Diagnostic("FG101", "wrong", Span(Source("a", "x = y"), 4, 5), "here", (Note("n"),), ("h",))
    coloured = render([found, found], colour=True)
    assert coloured != render([found, found])
    assert ANSI.sub("", coloured) == render([found, found])


@given(st.text(st.characters(), max_size=80), st.integers(0, 80), st.integers(0, 80))
def test_every_span_of_every_text_is_rendered(text: str, start: int, length: int) -> None:
    start = min(start, len(text))
    output = shown(text, start, min(start + length, len(text)), "label")
    output.encode()
    assert "^" in output
    assert "label" in output
