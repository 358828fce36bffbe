"""Random edits: nothing that is written makes the server fail, and what it shows is always of the text as it is."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from lsprotocol import types

from fastgrad_dsl.lsp.completion import complete
from fastgrad_dsl.lsp.fixes import fixes
from fastgrad_dsl.lsp.hints import hints
from fastgrad_dsl.lsp.hover import hover
from fastgrad_dsl.lsp.items import ItemParser
from fastgrad_dsl.lsp.layout import folding, formatting
from fastgrad_dsl.lsp.lenses import lenses
from fastgrad_dsl.lsp.navigation import definition, highlights, references
from fastgrad_dsl.lsp.outline import outline
from fastgrad_dsl.lsp.problems import problems_of
from fastgrad_dsl.lsp.rename import Refused, rename
from fastgrad_dsl.lsp.shift import Shift
from fastgrad_dsl.lsp.signature_help import signature_help
from fastgrad_dsl.lsp.tokens import semantic_tokens
from fastgrad_grammar import ast
from fastgrad_grammar.parser import parse_tolerant
from fastgrad_grammar.source import Source, Span
from tests.lsp.editor import EXAMPLES, SPEC, Editor

PIECES = (
    *(
        "",
        "",
        "x",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "\n",
        "=",
        ",",
        ";",
        " ",
        '"',
        "#",
        ".",
        "@",
        ":",
        "->",
        "é",
        "\t",
    ),
    *(
        "block ",
        "dim n\n",
        "\nparam q = 3\n",
        "}\n",
        "if ",
        "1.5",
        "std.",
        "use std\n",
        "repeat i in 2 {\n",
        "\r\n",
    ),
    *('at "layers.*" exact\n', "softmax(", "\n\n\n", "return x\n", "😀", "0" * 30, "(" * 120, "\x00"),
)
WHOLE = types.Range(types.Position(0, 0), types.Position(10_000, 0))


def edits(start: str, seed: int, count: int) -> Iterator[str]:
    """Texts, each made from the one before it by one edit; now and then the start again."""
    chance = random.Random(seed)
    text = start
    for _ in range(count):
        if chance.random() < 0.3:
            text = start
        place = chance.randrange(len(text) + 1)
        end = min(len(text), place + chance.choice((0, 0, 0, 1, 1, 5, 60)))
        text = text[:place] + chance.choice(PIECES) + text[end:]
        yield text


def ask_everything(editor: Editor, text: str, chance: random.Random) -> None:
    """Open a text and ask for all that an editor asks for, at a random place."""
    document = editor.open(text)
    view = editor.known.view(document.path)
    assert view is not None
    at = document.lines.position(chance.randrange(len(document.text) + 1))
    views = editor.known.view
    hover(view, at, views)
    definition(editor.known, view, at)
    references(editor.known, view, at, declaration=True)
    highlights(view, at)
    complete(view, at, views)
    signature_help(view, at, views)
    with suppress(Refused):
        rename(editor.known, view, at, "fresh")
    fixes(view, document.uri, editor.shown())
    for feature in (formatting, folding, outline, semantic_tokens, lenses):
        feature(view)
    hints(view, WHOLE)


def check_fresh(editor: Editor, text: str) -> None:
    """What is shown is what an editor that opens this text first is shown."""
    other = Editor(editor.folder)
    other.open(text)
    assert editor.shown() == other.shown()


def attack(editor: Editor, start: str, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for place, text in enumerate(edits(start, seed, count)):
        ask_everything(editor, text, chance)
        if place % 10 == 0:
            check_fresh(editor, text)
    editor.open(start)
    assert editor.shown() == []


@pytest.mark.medium
def test_random_edits(editor: Editor) -> None:
    attack(editor, SPEC, seed=1, count=100)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_many_random_edits(editor: Editor, path: Any) -> None:
    attack(editor, path.read_text(encoding="utf-8"), seed=2, count=10_000 // len(EXAMPLES))


@pytest.mark.slow
def test_memory_does_not_grow(editor: Editor) -> None:
    """After a first round, a second one of the same length leaves no more behind than a few texts."""

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        sizes = []
        for seed in (1, 2, 3):
            for text in edits(SPEC, seed, 20):
                editor.open(text)
            editor.open(SPEC)
            sizes.append(held())
    finally:
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 20 * len(SPEC), sizes


# ---------------------------------------------------------------- what it rests on


def flat(value: Any) -> Any:
    """A tree with its places, as plain values."""
    if isinstance(value, tuple):
        return tuple(map(flat, value))
    if isinstance(value, Span):
        return value.start, value.end, value.text, value.place
    if isinstance(value, ast.Node):
        return type(value).__name__, *((name, flat(each)) for name, each in vars(value).items())
    return repr(value)


@pytest.mark.medium
def test_parsing_item_by_item_is_parsing() -> None:
    """Trees with their places, and every diagnostic."""
    parser, by_items = ItemParser(), 0
    for text in edits(SPEC, 3, 100):
        source = Source("spec.tfg", text)
        tree, errors = parse_tolerant(source)
        found = parser.parse(source)
        by_items += parser._by_items(source) is not None
        assert flat(tuple(vars(each).items() for each in errors)) == flat(
            tuple(vars(each).items() for each in found.diagnostics)
        )
        if not errors:
            assert flat(tree) == flat(found.tree)
    assert by_items > 15  # the others have brackets that do not match


def test_places_move_with_a_text() -> None:
    chance = random.Random(4)
    before = SPEC
    for text in edits(SPEC, 4, 200):
        shift = Shift(before, text)
        for _ in range(5):
            start = chance.randrange(len(text) + 1)
            end = min(len(text), start + 5)
            old = shift.span_to_old(start, end)
            if old is not None:
                assert before[slice(*old)] == text[start:end]
            assert 0 <= shift.to_old(start) <= len(before)
        before = text


def test_problems_name_the_files_they_are_in(editor: Editor) -> None:
    document = editor.open(SPEC.replace("depth {", "dept {"))
    found = problems_of(editor.known.analyse(document.path), editor.known.uri, "utf-16")
    assert list(found) == [document.path]
