"""What a model takes of texts: its tokens alone, or padded texts with their mask and types, packed in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.models.batches import Input, check_memory, model_inputs
from fastgrad_dsl.models.text_data import BYTES, VALIDATION_SHARE, read_text
from fastgrad_dsl.models.tokenizer import FileTokenizer, Tokenizer, check_size
from fastgrad_grammar.diagnostics import TfgError

LEAST = 20  # texts, of which a tenth is held out


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a model are made of int64 [b, n], tokens, or [b, n, 2], tokens and whether they are there.

    named: of each input what it gets: "tokens", "mask" or "types", which are zeros.
    """

    named: tuple[str, ...] = ("tokens",)

    def unpacked(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the model."""
        tokens = packed if packed.ndim == 2 else packed[..., 0]
        made = {"tokens": tokens, "types": torch.zeros_like(tokens), "mask": self.mask(packed)}
        return tuple(each for name in self.named if (each := made[name]) is not None)

    def mask(self, packed: Tensor) -> Tensor | None:
        """Which tokens are there, bool [b, n]; None where all are."""
        return packed[..., 1] == 1 if packed.ndim == 3 else None


def encoder_inputs(program: Program) -> Inputs | None:
    """Those of a model of padded texts: ids [b, n], and perhaps a mask and types alike; None for any other model."""
    given = model_inputs(program)
    shapes = {each.shape for each in given}
    if len(shapes) != 1 or len(given[0].shape) != 2 or given[0].dtype != "int":
        return None
    others = [_name_of(each) for each in given[1:]]
    if None in others or others.count("mask") > 1:
        return None
    return Inputs(("tokens", *(name for name in others if name is not None)))


def _name_of(given: Input) -> str | None:
    return {"bool": "mask", "int": "types"}.get(given.dtype)


@dataclass(frozen=True)
class Texts:
    """Texts of several lengths as tokens, split into those to train on and those that are held out.

    A batch is int64 [b, n, 2], tokens and whether they are there; n is its longest text, or the length that is asked
    for, at which a text is cut. Without a mask in the model, its shortest text. The targets of a batch are zeros [b].
    """

    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    tokenizer: Tokenizer = BYTES
    padded: bool = True

    @property
    def digest(self) -> str:
        """The SHA-256 of all tokens, in hexadecimal digits."""
        found = sha256()
        for text in (*self.train, *self.validation):
            found.update(text.numpy().data)
            found.update(b"\n")
        return found.hexdigest()

    @property
    def longest(self) -> int:
        """The tokens of the longest text that is held out."""
        return max(text.numel() for text in self.validation)

    def places(self, tokens: int, batch: int, generator: torch.Generator) -> list[int]:
        """Which texts make a random batch."""
        drawn: list[int] = torch.randint(len(self.train), (batch,), generator=generator).tolist()
        return drawn

    def windows(self, places: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """The batch of these texts."""
        check_memory(f"a batch of {len(places)} times {tokens} tokens", 2 * 8 * len(places) * tokens)
        return self._batch([self.train[place] for place in places], tokens)

    def validation_batches(self, tokens: int, batch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `limit` batches of what is held out, always the same ones, in order."""
        for first in range(0, min(len(self.validation), limit * batch), batch):
            yield self._batch(self.validation[first : first + batch], tokens)

    def _batch(self, texts: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
        sizes = [min(text.numel(), tokens) for text in texts]
        length = max(sizes) if self.padded else min(sizes)
        packed = torch.zeros(len(texts), length, 2, dtype=torch.int64)
        for row, text, size in zip(packed, texts, sizes, strict=True):
            kept = min(size, length)
            row[:kept, 0] = text[:kept]
            row[:kept, 1] = 1
            row[kept - 1, 0] = text[-1]  # the token that ends a text, also of one that is cut
        return packed, torch.zeros(len(texts), dtype=torch.int64)


def load_texts(path: Path, inputs: Inputs, tokenizer: Tokenizer, vocabulary: int, model: str) -> Texts:
    """The lines of a file as texts, each with the special tokens of its tokenizer; empty lines are none.

    Raises TfgError FG411 for a file that cannot be read, FG412 where there are too few lines, FG436 for a tokenizer
    with more ids than the model.
    """
    check_size(tokenizer, vocabulary, model)
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if len(lines) < LEAST:
        said = f"{path} has {len(lines)} lines with text, and an encoder learns from at least {LEAST}"
        raise TfgError.of("FG412", said, "each line is a text of its own")
    texts = [_encoded(line, tokenizer, str(path)) for line in lines]
    texts = [text for text in texts if text.numel()]
    held_out = max(1, int(len(texts) * VALIDATION_SHARE))
    return Texts(tuple(texts[:-held_out]), tuple(texts[-held_out:]), tokenizer, "mask" in inputs.named)


def _encoded(line: bytes, tokenizer: Tokenizer, name: str) -> Tensor:
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer.encode(line, name, special=True)
    return tokenizer.encode(line, name).to(torch.int32)
