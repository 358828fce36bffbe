"""`fastgrad lsp` without its library."""

from __future__ import annotations

import sys

import pytest

from fastgrad_dsl.commands.cli import main


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] in ("pygls", "lsprotocol")]:
        monkeypatch.delitem(sys.modules, module)
    for module in [name for name in sys.modules if name.startswith("fastgrad_dsl.lsp")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pygls", None)
    monkeypatch.setitem(sys.modules, "lsprotocol", None)
    monkeypatch.setattr(sys, "argv", ["fastgrad", "lsp"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error[FG438]: `fastgrad lsp` needs the library lsprotocol")
    assert "pip install 'fastgrad-dsl[lsp]'" in err
