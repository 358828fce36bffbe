"""The parser's tables are data of the package, are those of the grammar, and nothing else is read or written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lark
import pytest

from fastgrad_grammar import grammar
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parents[2]
TEXT = Path(grammar.__file__).with_name("tfg.lark").read_text(encoding="utf-8")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by one each time the tables are built from the grammar's text, in a process that has not loaded any."""
    calls: list[str] = []
    build = grammar.build_grammar

    def counted(text: str) -> lark.Lark:
        calls.append(text)
        return build(text)

    monkeypatch.setattr(grammar, "build_grammar", counted)
    grammar.load_grammar.cache_clear()
    yield calls
    grammar.load_grammar.cache_clear()


def load_and_parse() -> None:
    grammar.load_grammar.cache_clear()
    assert len(parse(Source("<text>", "param a = 1 + 2 * 3\n")).items) == 1


def test_the_tables_of_the_package_are_used(built: list[str]) -> None:
    """Where this fails: `python -m fastgrad_grammar.grammar`."""
    load_and_parse()
    assert built == []


def test_they_are_those_of_the_grammar() -> None:
    stored, fresh = grammar.load_grammar(), grammar.build_grammar(TEXT)
    assert {str(rule) for rule in stored.rules} == {str(rule) for rule in fresh.rules}
    assert {repr(terminal) for terminal in stored.terminals} == {
        repr(terminal) for terminal in fresh.terminals
    }
    tables = [each.parser.parser._parse_table for each in (stored, fresh)]
    first, second = ([len(actions) for _, actions in sorted(table.states.items())] for table in tables)
    assert sorted(first) == sorted(second)


def test_tables_of_another_lark_or_grammar_are_not_used(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lark, "__version__", "0.0")
    load_and_parse()
    assert len(built) == 1
    monkeypatch.undo()
    monkeypatch.setattr(grammar, "_GRAMMAR", tmp_path / "tfg.lark")
    (tmp_path / "tfg.lark").write_text(TEXT + "\n")
    grammar.load_grammar.cache_clear()
    assert grammar.load_grammar().source_path != "<deserialized>"
    monkeypatch.setattr(grammar, "_TABLES", tmp_path / "absent")
    load_and_parse()


def test_what_is_written_is_read(built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grammar, "_TABLES", tmp_path / "tables.json")
    grammar.write_tables()
    assert len(built) == 1
    load_and_parse()
    assert len(built) == 1
    assert json.loads((tmp_path / "tables.json").read_text())["of"] == grammar._identity(TEXT)


def test_a_planted_cache_is_neither_read_nor_written(tmp_path: Path) -> None:
    """A pickle under the name that the cache of parser tables had ran its code, whoever wrote it."""
    planted = """
import hashlib, pickle, sys, os, lark, pathlib
class Evil:
    def __reduce__(self):
        return (print, ("code of a stranger ran",))
text = pathlib.Path(sys.argv[1]).read_text()
key = hashlib.sha256(f"{lark.__version__} {sys.version} {text}".encode()).hexdigest()[:24]
payload = pickle.dumps(Evil())
for folder in ("cache/fastgrad", "ours"):
    os.makedirs(folder)
    pathlib.Path(folder, f"grammar-{key}.pickle").write_bytes(hashlib.sha256(payload).digest() + payload)
"""
    where = Path(grammar.__file__).with_name("tfg.lark")
    subprocess.run([sys.executable, "-c", planted, where], cwd=tmp_path, check=True)
    before = sorted(tmp_path.rglob("*"))
    code = "from fastgrad_grammar.parser import parse, Source; parse(Source('<text>', 'param a = 1\\n'))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "compiler", "grammar")),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "FASTGRAD_CACHE": str(tmp_path / "ours"),
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ("", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_grammar_has_no_conflict(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lark settles shift/reduce conflicts silently; in debug mode it says so."""
    monkeypatch.setattr(lark.logger, "propagate", True)
    with caplog.at_level(logging.DEBUG, logger=lark.logger.name):
        lark.Lark(TEXT, parser="lalr", lexer="basic", debug=True)
    assert "onflict" not in caplog.text
