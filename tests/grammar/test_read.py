"""Files that cannot be read are diagnostics; those that can give the text, whatever their line ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.read import MAX_BYTES, read_source
from fastgrad_grammar.source import Source


def refused(path: Path | str) -> Diagnostic:
    with pytest.raises(TfgError) as caught:
        read_source(path)
    (found,) = caught.value.diagnostics
    assert found.span is None
    return found


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "model.tfg").touch()
    (tmp_path / "model.py").touch()
    found = refused(tmp_path / "modle.tfg")
    assert found.code == "FG001"
    assert found.message.endswith("modle.tfg: no such file")
    assert found.help == (f"did you mean {tmp_path / 'model.tfg'}?",)
    assert refused(tmp_path / "model").help == (f"did you mean {tmp_path / 'model.tfg'}?",)


def test_missing_file_in_a_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "none" / "a.tfg").help == ()


def test_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.tfg").touch()
    found = refused(tmp_path)
    assert (found.code, found.help) == ("FG001", (f"name a file, such as {tmp_path / 'a.tfg'}",))


def test_path_that_no_system_has() -> None:
    assert refused("a\0b.tfg").code == "FG001"


def test_name_that_is_too_long(tmp_path: Path) -> None:
    assert refused(tmp_path / ("a" * 5000)).code == "FG001"


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        (tmp_path / "a.tfg").touch()
        patch.setattr(os, "open", denied)  # a superuser may read every file
        found = refused(tmp_path / "a.tfg")
    assert found.code == "FG001"
    assert found.message.endswith("a.tfg: permission denied")


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.tfg"
    path.write_bytes(b"param a = 1\n# caf\xe9\n")
    found = refused(path)
    assert found.code == "FG002"
    assert found.message.endswith("byte 0xe9 at offset 17 (line 2)")


def test_large_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.tfg"
    path.write_bytes(b"\n" * MAX_BYTES)
    read_source(path)
    path.write_bytes(b"\n" * (MAX_BYTES + 1))
    assert refused(path).code == "FG003"
    with pytest.raises(TfgError) as caught:
        parse(Source("<text>", " " * (MAX_BYTES + 1)))
    assert caught.value.diagnostics[0].code == "FG003"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.tfg"
    path.write_bytes(b"\xef\xbb\xbf" + f"param a = 1{end}param b = 2{end}".encode())
    assert read_source(path).text == "param a = 1\nparam b = 2\n"
