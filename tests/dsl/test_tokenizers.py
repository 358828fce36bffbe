"""Tokenizers: texts to ids and back, while they come too, and files that are none."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Rules
from tokenizers import models

from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.models.tokenizer import ByteTokenizer, FileTokenizer, decode, load_tokenizer
from fastgrad_grammar.diagnostics import TfgError
from tests.dsl.tokenizers_of_tests import write_byte_fallback, write_tokenizer

Write = Callable[[Path], int]
CHARACTERS = (
    "ab c\n.\N{LATIN SMALL LETTER O WITH DIAERESIS}\N{SNOWMAN}\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}"
)
KINDS = pytest.mark.parametrize("write", [write_tokenizer, write_byte_fallback])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.json"


def made(write: Write, file: Path) -> FileTokenizer:
    size = write(file)
    found = load_tokenizer(file)
    assert found.size == size
    return found


def streamed(tokenizer: FileTokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.finish()]


@KINDS
def test_a_text_comes_back_as_the_library_decodes_it(write: Write, file: Path) -> None:
    tokenizer, chance = made(write, file), random.Random(0)
    for _ in range(200):
        text = "".join(chance.choices(CHARACTERS, k=chance.randrange(1, 20)))
        ids = tokenizer.encode(text.encode(), "it")
        assert ids.dtype == torch.int32
        whole = tokenizer.rules.decode(ids.tolist(), skip_special_tokens=False)
        assert decode(tokenizer, ids.tolist()) == whole == text


@KINDS
def test_a_character_of_several_tokens_is_shown_with_the_last(write: Write, file: Path) -> None:
    tokenizer = made(write, file)
    ids = tokenizer.encode("a\N{GRINNING FACE}b".encode(), "it").tolist()
    assert len(ids) == 6
    assert streamed(tokenizer, ids) == ["a", "", "", "", "\N{GRINNING FACE}", "b", ""]


@KINDS
def test_bytes_that_are_no_characters_are_shown_late_but_once(write: Write, file: Path) -> None:
    tokenizer = made(write, file)
    first = tokenizer.encode("\N{GRINNING FACE}".encode(), "it").tolist()[-4]
    found = streamed(tokenizer, [first] * 100)
    assert [len(piece) for piece in found] == [*[0] * 63, 64, *[0] * 36, 36]
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}" * 100


def test_any_ids_of_letters_for_bytes_stream_as_they_decode(file: Path) -> None:
    tokenizer, chance = made(write_tokenizer, file), random.Random(1)
    for _ in range(300):
        ids = [chance.randrange(tokenizer.size) for _ in range(chance.randrange(30))]
        assert decode(tokenizer, ids) == tokenizer.rules.decode(ids, skip_special_tokens=False)


def test_a_byte_that_breaks_no_earlier_character(file: Path) -> None:
    """Where the library would take back the snowman, since the run of bytes ends in one that is wrong."""
    tokenizer = made(write_byte_fallback, file)
    ids = [1 + byte for byte in b"\xe2\x98\x83\xff"]
    assert "".join(streamed(tokenizer, ids)) == "\N{SNOWMAN}\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_read_and_shown(file: Path) -> None:
    tokenizer = made(write_tokenizer, file)
    ids = tokenizer.encode(b"<s>the</s>", "it").tolist()
    assert [tokenizer.rules.id_to_token(each) for each in ids] == ["<s>", "the", "</s>"]
    assert decode(tokenizer, ids) == "<s>the</s>"


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    every = bytes(range(256))
    assert bytes(tokenizer.encode(every, "it").tolist()) == every
    assert decode(tokenizer, list("a\N{SNOWMAN}".encode())) == "a\N{SNOWMAN}"


def test_a_text_to_learn_as_tokens(file: Path, tmp_path: Path) -> None:
    tokenizer, text = made(write_tokenizer, file), tmp_path / "text.txt"
    text.write_text("the ca" * 200)
    data = load_text(text, 16, tokenizer=tokenizer)
    assert (
        torch.cat((data.train, data.validation)).tolist()
        == tokenizer.encode(text.read_bytes(), "it").tolist()
    )
    assert data.digest != load_text(text, 16).digest
    text.write_text("the ca" * 20)
    with pytest.raises(TfgError, match=r"\[FG412\] .* has 60 tokens, too few for windows of 16 tokens"):
        load_text(text, 16, tokenizer=tokenizer)
    text.write_bytes(b"the \xff")
    with pytest.raises(TfgError, match=r"\[FG411\] .*text.txt is not UTF-8 text: byte 0xff at offset 4"):
        load_text(text, 16, tokenizer=tokenizer)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b"null"])
def test_files_that_are_no_tokenizer(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(TfgError, match=r"\[FG436\] cannot use the tokenizer .*tokenizer.json: ."):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("words", "said"), [({}, "it has no tokens"), ({"a": 1 << 31}, "it has the id 2147483648")]
)
def test_ids_that_are_none_or_too_many(file: Path, words: dict[str, int], said: str) -> None:
    file.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}))
    with pytest.raises(TfgError, match=said):
        load_tokenizer(file)


def test_a_text_that_a_tokenizer_lacks(file: Path) -> None:
    Rules(models.WordLevel({"a": 0})).save(str(file))
    with pytest.raises(
        TfgError, match=r"\[FG436\] cannot use the tokenizer .*: it does not encode the prompt: "
    ):
        load_tokenizer(file).encode(b"b", "the prompt")


def test_mutated_files_are_read_or_refused(file: Path) -> None:
    write_byte_fallback(file)
    whole, chance = file.read_text(), random.Random(2)
    for _ in range(60):
        tree = json.loads(whole)
        mutate(tree, chance)
        file.write_text(json.dumps(tree))
        with suppress(TfgError):
            tokenizer = load_tokenizer(file)
            decode(tokenizer, tokenizer.encode(b"ab a", "it").tolist())


def mutate(tree: dict, chance: random.Random) -> None:
    """Put something else in one place."""
    name = chance.choice(list(tree))
    if isinstance(tree[name], dict) and tree[name] and chance.random() < 0.8:
        mutate(tree[name], chance)
    else:
        tree[name] = chance.choice([None, -1, 1 << 70, "x", [], {}, [["a", "b"]], {"type": "BPE"}, True])


def test_the_library_that_is_not_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TfgError, match=r"\[FG436\] --tokenizer needs the package tokenizers") as raised:
        load_tokenizer(file)
    assert raised.value.diagnostics[0].help == ("pip install 'fastgrad-dsl[tokenizers]'",)
