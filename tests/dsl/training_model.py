"""A model that trains in milliseconds, and a text for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrad_dsl.models.text_data import TextData

TEXT = bytes(range(32, 127)) * 40


class Bigram(nn.Module):
    """Next-byte logits from the byte before; with dropout, so that a run depends on torch's own generator too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(256, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.dropout(self.table(tokens), 0.1, self.training) * self.gain @ self.table.weight.T


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text_data() -> TextData:
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    return TextData(data[: -len(TEXT) // 10], data[-len(TEXT) // 10 :])
