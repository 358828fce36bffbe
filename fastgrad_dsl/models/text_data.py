"""Text for language models: a file as tokens, its split, its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fastgrad_dsl.models.batches import check_memory
from fastgrad_dsl.models.tokenizer import ByteTokenizer, Tokenizer
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

BYTES = ByteTokenizer()
VALIDATION_SHARE = 0.1  # the end of the text is held out: neighbouring windows would otherwise leak


@dataclass(frozen=True)
class TextData:
    """A text as the tokens of a tokenizer, split into a head to train on and a held-out tail; ints [length] each."""

    train: Tensor
    validation: Tensor
    tokenizer: Tokenizer = BYTES

    @property
    def digest(self) -> str:
        """The SHA-256 of all tokens, in hexadecimal digits; of bytes that of the text."""
        found = sha256(self.train.numpy().data)
        found.update(self.validation.numpy().data)
        return found.hexdigest()

    def places(self, tokens: int, batch: int, generator: torch.Generator) -> list[int]:
        """Where `batch` random windows of `tokens` and their targets begin in what there is to train on."""
        starts: list[int] = torch.randint(self.train.numel() - tokens, (batch,), generator=generator).tolist()
        return starts

    def windows(self, places: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets from these places to train on, int64 [places, tokens] each."""
        check_memory(f"a batch of {len(places)} times {tokens} tokens", 2 * 8 * len(places) * tokens)
        return _windows(self.train, places, tokens)

    def batch(self, tokens: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets, int64 [batch, tokens] each, from random places to train on."""
        check_memory(f"a batch of {batch} times {tokens} tokens", 2 * 8 * batch * tokens)
        return self.windows(self.places(tokens, batch, generator), tokens)

    def validation_batches(self, tokens: int, batch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `limit` batches of the held-out part, always the same ones, in order."""
        places = list(range(0, self.validation.numel() - tokens, tokens))
        for first in range(0, min(len(places), limit * batch), batch):
            yield _windows(self.validation, places[first : first + batch], tokens)


def load_text(path: Path, tokens: int, option: str = "--seq", tokenizer: Tokenizer = BYTES) -> TextData:
    """Read any file, by default as bytes, for windows of `tokens`, whose number `option` of the command sets.

    Raises TfgError FG411 if the file is not a regular one or cannot be read, FG412 where a part is too short for one
    window, and as `tokenizer.encode`.
    """
    data = tokenizer.encode(read_text(path), str(path))
    held_out = int(data.numel() * VALIDATION_SHARE)
    text = TextData(data[: data.numel() - held_out], data[data.numel() - held_out :], tokenizer)
    if min(text.train.numel(), text.validation.numel()) < tokens + 1:
        needed, unit = int((tokens + 1) / VALIDATION_SHARE) + 1, tokenizer.unit
        raise TfgError.of(
            "FG412",
            f"{path} has {data.numel()} {unit}s, too few for windows of {tokens} tokens",
            f"a tenth is held out for validation, so at least {needed} {unit}s are needed",
            f"give a longer text or a smaller {option}",
        )
    return text


def read_text(path: Path) -> bytes:
    """The content of any regular file; TfgError FG411 if it is none or cannot be read."""
    try:
        check_regular(path)
        return path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error) or "it does not fit into memory"
        raise TfgError.of("FG411", f"cannot read the text {path}: {reason}") from None


def _windows(data: Tensor, starts: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([data[start : start + tokens + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]
