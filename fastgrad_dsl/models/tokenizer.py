"""Texts as tokens: bytes, or the tokens of a tokenizer.json; and tokens as text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
MANY = 1 << 31  # ids are less
LONGEST_HELD = 64  # tokens that end in no whole character: a longer run of such bytes is not waited for


class TextStream(Protocol):
    """Tokens to text, one after the other: what was returned is never taken back."""

    def push(self, token: int) -> str:
        """The text that is certain with one more token; empty within a character."""
        ...

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that was never completed."""
        ...


class Tokenizer(Protocol):
    """How a text is split into tokens, whose ids are less than `size`; `unit` is what a person calls one of them."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def unit(self) -> str:
        """`byte` or `token`."""
        ...

    @property
    def source(self) -> bytes | None:
        """The file that has its rules; None if it needs none."""
        ...

    def encode(self, text: bytes, name: str) -> Tensor:
        """The ids of a text, an int tensor [tokens]; TfgError FG411, which calls the text `name`, if it is not UTF-8.

        Nothing is added to the text: a token that a model expects at the beginning is written in the text.
        """
        ...

    def stream(self) -> TextStream:
        """A new stream from the beginning of a text."""
        ...


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens."""
    stream = tokenizer.stream()
    return "".join([*map(stream.push, tokens), stream.finish()])


# ---------------------------------------------------------------- bytes


@dataclass(frozen=True)
class ByteTokenizer:
    """A token is a byte, its id the byte's value."""

    size: int = 256
    unit: str = "byte"
    source: bytes | None = None

    def encode(self, text: bytes, name: str) -> Tensor:
        """uint8 [bytes]; any bytes will do."""
        return torch.from_numpy(np.frombuffer(bytearray(text), np.uint8))

    def stream(self) -> TextStream:
        """Characters of UTF-8 as soon as they are complete."""
        return _Utf8Stream()


class _Utf8Stream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


# ---------------------------------------------------------------- tokenizer.json


@dataclass(frozen=True)
class FileTokenizer:
    """The tokenizer of a file that the library tokenizers wrote; `source` is the file's content."""

    path: str
    source: bytes = field(repr=False)
    rules: tokenizers.Tokenizer = field(repr=False)
    size: int
    unit: str = "token"

    def encode(self, text: bytes, name: str, *, special: bool = False) -> Tensor:
        """int32 [tokens], with the special tokens that the file puts around a text where `special`.

        TfgError FG411 if the text is not UTF-8, FG436 if the tokenizer has no tokens for it.
        """
        try:
            characters = text.decode()
        except UnicodeDecodeError as error:
            said = f"{name} is not UTF-8 text: byte 0x{text[error.start]:02x} at offset {error.start}"
            raise TfgError.of("FG411", said) from None
        try:
            found = self.rules.encode(characters, add_special_tokens=special).ids
        except Exception as error:  # the library has no class for what it refuses
            raise _unusable(self.path, f"it does not encode {name}: {error}") from None
        return torch.tensor(found, dtype=torch.int32)

    def stream(self) -> TextStream:
        """Text as soon as no later token can change it; special tokens are shown as the file spells them."""
        return _TokenStream(self.rules)


class _TokenStream:
    """Decodes the tokens since the last text together with those of that text: decoders look at what is before.

    This is how text-generation-inference streams: the text of the earlier tokens is cut from that of both.
    """

    def __init__(self, rules: tokenizers.Tokenizer) -> None:
        self._rules = rules
        self._tokens: list[int] = []
        self._shown = 0  # of the tokens, how many are text already
        self._text = ""  # of those

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decoded(self._tokens)
        held = len(self._tokens) - self._shown
        if text.endswith(UNKNOWN) and held < LONGEST_HELD:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._decoded(self._tokens))

    def _advance(self, text: str) -> str:
        pending = self._tokens[self._shown :]
        # what was shown changes where bytes make no character together with those before
        new = text[len(self._text) :] if text.startswith(self._text) else self._decoded(pending)
        self._tokens = pending
        self._shown = len(self._tokens)
        self._text = self._decoded(self._tokens)
        return new

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._rules.decode(tokens, skip_special_tokens=False)
        return text


def load_tokenizer(path: str | Path) -> FileTokenizer:
    """The tokenizer of a tokenizer.json.

    Raises TfgError FG436 if the file cannot be read or is none, or if the package tokenizers is not installed.
    """
    try:
        check_regular(path)
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise _unusable(path, getattr(error, "strerror", None) or str(error)) from None
    library = _library()
    try:
        rules: tokenizers.Tokenizer = library.Tokenizer.from_str(source.decode())
        rules.no_truncation()  # which a file may ask for: texts are whole
        rules.no_padding()
        largest = max(rules.get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # the library has no class for what it refuses
        raise _unusable(path, str(error).strip() or type(error).__name__) from None
    if not 0 <= largest < MANY:
        raise _unusable(path, "it has no tokens" if largest < 0 else f"it has the id {largest}")
    return FileTokenizer(str(path), source, rules, largest + 1)


def check_size(tokenizer: Tokenizer, vocabulary: int, model: str) -> None:
    """TfgError FG436 where a tokenizer has ids that a model, of `vocabulary` ids, does not."""
    if tokenizer.size > vocabulary:
        message = f"the tokenizer has {tokenizer.size:,} {tokenizer.unit}s, and model {model} {vocabulary:,}"
        raise TfgError.of("FG436", message, "give the tokenizer that the model was trained with")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        help_ = "pip install 'fastgrad-dsl[tokenizers]'"
        raise TfgError.of("FG436", "--tokenizer needs the package tokenizers", help_) from None
    return tokenizers


def _unusable(path: str | Path, reason: str) -> TfgError:
    return TfgError.of("FG436", f"cannot use the tokenizer {path}: {reason}")
