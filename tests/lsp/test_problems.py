"""Diagnostics: those of the terminal, file by file, and gone when what was wrong is mended; and their quick fixes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastgrad_dsl.lsp.fixes import fixes
from fastgrad_dsl.lsp.problems import anchor
from fastgrad_grammar.codes import CODES
from tests.golden_errors import ERRORS
from tests.grids import wide
from tests.lsp.editor import EXAMPLES, ROOT, SPEC, Editor, applied

USER = 'use "parts.tfg" as parts\n\ndim n\n\nmodel m(x: float[n, 4]) -> float[n, 4] {\n    return parts.twice(x)\n}\n'
PARTS = "block twice(x: float[n, 4]) -> float[n, 4] {\n    return x + x\n}\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_sound(editor: Editor, path: Path) -> None:
    editor.open(path.read_text(encoding="utf-8"))
    assert editor.codes() == []


OF_OPTIONS = {"FG236", "FG401", "FG402", "FG403", "FG404", "FG405"}
"""Of the command line alone: no model is picked and no param set, and a file of blocks is there to be used."""


LONG = {"fg241_too_large"}
"""What takes seconds until it is refused."""
FILES = sorted(ERRORS.glob("*.tfg"))


@pytest.mark.sampled(40)
@pytest.mark.parametrize(
    "path",
    wide(FILES, few=[path for path in FILES if path.stem not in LONG]),
    ids=lambda path: path.stem,
)
def test_what_the_terminal_says_is_shown(editor: Editor, path: Path) -> None:
    wanted = set(re.findall(r"\[(FG\d+)\]", path.with_suffix(".out").read_text(encoding="utf-8")))
    shutil.copytree(ERRORS, editor.folder, dirs_exist_ok=True)
    editor.open(path.read_bytes().decode("utf-8", "replace"), path.name)
    files = [str(other.relative_to(editor.folder)) for other in editor.folder.rglob("*") if other.is_file()]
    shown = {code for name in files for code in editor.codes(name)}
    assert wanted - OF_OPTIONS <= shown


def test_an_error_of_syntax_and_its_mending(editor: Editor) -> None:
    editor.open(SPEC.replace("repeat i in depth", "repeat i on depth"))
    (found,) = editor.shown()
    assert found.code == "FG101"
    assert found.source == "fastgrad"
    line = SPEC[: SPEC.index("repeat i")].count("\n")
    assert (found.range.start.line, found.range.start.character) == (line, len("    repeat i "))
    editor.open(SPEC)
    assert editor.shown() == []


def test_notes_are_related_places_and_help_is_told(editor: Editor) -> None:
    editor.open(SPEC.replace("param heads = 4", "param heads = 4\nparam heads = 4"))
    (found,) = editor.shown()
    assert found.code == "FG202"
    assert found.related_information is not None
    assert found.related_information[0].message == "first here"
    assert found.related_information[0].location.range.start.line == 3


def test_an_error_in_the_library_is_shown_at_the_call(editor: Editor) -> None:
    editor.open(SPEC.replace("std.rms_norm(y)", "std.attention(y; heads = 7)"))
    (found,) = editor.shown()
    assert found.code == "FG244"
    assert found.range.start.line == SPEC[: SPEC.index("std.rms_norm(y)")].count("\n")
    assert found.related_information is not None
    assert "std/attention.tfg" in found.related_information[0].location.uri


def test_an_error_in_a_used_file_is_shown_there(editor: Editor) -> None:
    (editor.folder / "parts.tfg").write_text(PARTS)
    editor.open(USER)
    assert editor.codes() == editor.codes("parts.tfg") == []
    editor.open(PARTS.replace("x + x", "x + y"), "parts.tfg")  # not saved
    assert editor.codes("parts.tfg") == ["FG201"]
    assert editor.codes() == []
    editor.open(PARTS, "parts.tfg")
    assert editor.codes("parts.tfg") == []


def test_the_text_of_an_open_file_counts_not_that_of_the_disk(editor: Editor) -> None:
    (editor.folder / "parts.tfg").write_text(
        "block other(x: float[n, 4]) -> float[n, 4] {\n    return x\n}\n"
    )
    editor.open(USER)
    assert editor.codes() == ["FG201"]
    editor.open(PARTS, "parts.tfg")
    assert editor.codes() == []


def test_a_file_outside_of_the_folder_is_not_read(editor: Editor, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "parts.tfg").write_text(PARTS)
    editor.open(USER.replace('"parts.tfg"', '"../parts.tfg"'), "inner/spec.tfg")
    assert editor.codes("inner/spec.tfg") == ["FG235"]


def test_each_model_of_a_file_is_checked_and_blocks_alone_are_no_error(editor: Editor) -> None:
    second = SPEC.replace("model tiny", "model other").partition("model other")[2].partition("objective")[0]
    editor.open(f"{SPEC}\nmodel other{second.replace('embedding(table, tokens)', 'nowhere')}")
    assert editor.codes() == ["FG201"]
    editor.open(PARTS, "parts.tfg")
    assert editor.codes("parts.tfg") == []


def test_a_huge_file_is_refused(editor: Editor) -> None:
    editor.open(SPEC + "# " + "x" * (1 << 18))
    assert editor.codes() == ["FG003"]


def test_each_code_has_a_section_that_its_link_leads_to() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (FG\d+.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {anchor(code) for code in CODES} <= anchors


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("repeat i in dept {", "repeat i in depth {"),
        ("soft_max(causal", "softmax(causal"),
        ("output = 0.1", "output <= 0.1"),
        ("ouput <= 0.1", "output <= 0.1"),
        ("hiden = 4", "hidden = 4"),
        ("retrun x @", "return x @"),
    ],
)
def test_a_quick_fix_mends_what_it_is_for(editor: Editor, wrong: str, right: str) -> None:
    assert right in SPEC
    document = editor.open(SPEC.replace(right, wrong))
    view = editor.known.view(document.path)
    assert view is not None
    (fix,) = fixes(view, document.uri, editor.shown())
    assert fix.edit is not None
    assert fix.edit.changes is not None
    assert applied(document.text, list(fix.edit.changes[document.uri]), editor.known) == SPEC


def test_what_is_not_declared_is_declared(editor: Editor) -> None:
    for missing in ("use std\n\n", "dim b\n"):
        document = editor.open(SPEC.replace(missing, ""))
        view = editor.known.view(document.path)
        assert view is not None
        assert editor.codes()
        found = fixes(view, document.uri, editor.shown()[:1])
        text = document.text
        for fix in found[-1:]:
            assert fix.edit is not None
            assert fix.edit.changes is not None
            text = applied(text, list(fix.edit.changes[document.uri]), editor.known)
        editor.open(text)
        assert editor.codes() == [], missing
