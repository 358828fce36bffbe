"""The parser tables of tfg.lark, which are data of the package: nothing is kept in a folder of the user's.

`python -m fastgrad_grammar.grammar` writes tfg.tables.json anew, after a change of tfg.lark or of lark's release.
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

_GRAMMAR = Path(__file__).with_name("tfg.lark")
_TABLES = Path(__file__).with_name("tfg.tables.json")


@lru_cache(maxsize=1)
def load_grammar() -> lark.Lark:
    """The LALR parser of tfg.lark, from its tables where they are of this grammar and this lark, else built anew."""
    text = _GRAMMAR.read_text(encoding="utf-8")
    if not _TABLES.exists():
        return build_grammar(text)
    tables = json.loads(_TABLES.read_text(encoding="utf-8"), object_pairs_hook=_with_numbers)
    return lark.Lark.load(tables["tables"]) if tables["of"] == _identity(text) else build_grammar(text)


def build_grammar(text: str) -> lark.Lark:
    """The LALR parser of a grammar text, built from scratch."""
    return lark.Lark(text, parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


def write_tables() -> None:
    """Write the tables of tfg.lark, as lark serialises them, to the package."""
    text = _GRAMMAR.read_text(encoding="utf-8")
    data, memo = build_grammar(text).memo_serialize([TerminalDef, Rule])
    tables = {"of": _identity(text), "tables": {"data": data, "memo": memo}}
    _TABLES.write_text(json.dumps(tables, separators=(",", ":")) + "\n", encoding="utf-8")


def _identity(text: str) -> str:
    """What tables depend on."""
    return f"lark {lark.__version__}, grammar {sha256(text.encode()).hexdigest()}"


def _with_numbers(pairs: list[tuple[str, object]]) -> dict[str | int, object]:
    """An object of the tables: the numbers of states, tokens and rules are keys, which JSON makes strings."""
    return {int(key) if key.isdecimal() else key: value for key, value in pairs}


if __name__ == "__main__":
    write_tables()
