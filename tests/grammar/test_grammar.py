"""The parser's tables come from the cache where that is sound, and parsing never depends on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import lark
import pytest

from fastgrad_grammar import grammar
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source

TEXT = Path(grammar.__file__).with_name("tfg.lark").read_text(encoding="utf-8")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not loaded the grammar yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(grammar, "user_cache_dir", lambda _: str(folder))
    grammar.load_grammar.cache_clear()
    yield folder
    grammar.load_grammar.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time the tables are built from the grammar's text."""
    calls: list[str] = []
    build = grammar.build_grammar

    def counted(text: str) -> lark.Lark:
        calls.append(text)
        return build(text)

    monkeypatch.setattr(grammar, "build_grammar", counted)
    return calls


def load_and_parse() -> None:
    grammar.load_grammar.cache_clear()
    assert len(parse(Source("<text>", "param a = 1 + 2 * 3\n")).items) == 1


def test_tables_are_built_once_and_then_read(cache: Path, built: list[str]) -> None:
    load_and_parse()
    load_and_parse()
    assert len(built) == 1
    assert [path.suffix for path in cache.iterdir()] == [".pickle"]


@pytest.mark.parametrize("damage", [b"", b"short", b"\x80\x05" * 40])
def test_damaged_entry_is_replaced(cache: Path, built: list[str], damage: bytes) -> None:
    load_and_parse()
    (entry,) = cache.iterdir()
    sound = entry.read_bytes()
    for broken in (damage, sound[:-1], sound[:40] + b"x" + sound[41:]):
        entry.write_bytes(broken)
        built.clear()
        load_and_parse()
        load_and_parse()
        assert len(built) == 1


def test_folder_that_cannot_be_made(cache: Path, built: list[str]) -> None:
    cache.write_text("a file where the folder should be")
    load_and_parse()
    load_and_parse()
    assert len(built) == 2


def test_another_grammar_has_another_entry(cache: Path) -> None:
    assert grammar._cache_entry(TEXT) != grammar._cache_entry(TEXT + "\n")


def test_the_grammar_has_no_conflict(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lark settles shift/reduce conflicts silently; in debug mode it says so."""
    monkeypatch.setattr(lark.logger, "propagate", True)
    with caplog.at_level(logging.DEBUG, logger=lark.logger.name):
        lark.Lark(TEXT, parser="lalr", lexer="basic", debug=True)
    assert "onflict" not in caplog.text
