"""Byte-level text for language models: a file, its split, its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgrad_dsl.models.batches import check_memory
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

VALIDATION_SHARE = 0.1  # the end of the text is held out: neighbouring windows would otherwise leak


@dataclass(frozen=True)
class TextData:
    """A text as bytes, split into a head to train on and a held-out tail; uint8[length] each."""

    train: Tensor
    validation: Tensor

    @property
    def digest(self) -> str:
        """The SHA-256 of the whole text, in hexadecimal digits."""
        found = sha256(self.train.numpy().data)
        found.update(self.validation.numpy().data)
        return found.hexdigest()

    def batch(self, tokens: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and next-byte targets, int64 [batch, tokens] each, from random places to train on."""
        check_memory(f"a batch of {batch} times {tokens} tokens", 2 * 8 * batch * tokens)
        starts = torch.randint(self.train.numel() - tokens, (batch,), generator=generator)
        return _windows(self.train, starts.tolist(), tokens)

    def validation_batches(self, tokens: int, batch: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `limit` batches of the held-out part, always the same ones, in order."""
        places = list(range(0, self.validation.numel() - tokens, tokens))
        for first in range(0, min(len(places), limit * batch), batch):
            yield _windows(self.validation, places[first : first + batch], tokens)


def load_text(path: Path, tokens: int, option: str = "--seq") -> TextData:
    """Read any file as bytes for windows of `tokens`, whose number `option` of the command sets.

    Raises TfgError FG411 if the file is not a regular one or cannot be read, FG412 where a part is too short for one
    window.
    """
    try:
        check_regular(path)
        content = path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error) or "it does not fit into memory"
        raise TfgError.of("FG411", f"cannot read the text {path}: {reason}") from None
    data = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
    held_out = int(data.numel() * VALIDATION_SHARE)
    text = TextData(data[: data.numel() - held_out], data[data.numel() - held_out :])
    if min(text.train.numel(), text.validation.numel()) < tokens + 1:
        needed = int((tokens + 1) / VALIDATION_SHARE) + 1
        raise TfgError.of(
            "FG412",
            f"{path} has {data.numel()} bytes, too few for windows of {tokens} tokens",
            f"a tenth is held out for validation, so at least {needed} bytes are needed",
            f"give a longer text or a smaller {option}",
        )
    return text


def _windows(data: Tensor, starts: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([data[start : start + tokens + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]
