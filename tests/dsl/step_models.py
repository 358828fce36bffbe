"""A step form that stands on the whole text: what generation asks of a model, without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrad_compiler.runtime.state import State


class Rerun(nn.Module):
    """A module whose only input is tokens, with a step form whose state is the text; `calls` has the steps' lengths."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens)
        return logits

    def start(self, batch_size: int) -> State:
        tokens = torch.empty(batch_size, 0, dtype=torch.int64)
        return State("rerun", torch.zeros((), dtype=torch.int64), {"tokens": tokens})

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(tokens.shape[1])
        state.tensors["tokens"] = torch.cat((state.tensors["tokens"], tokens), 1)
        state.position.add_(tokens.shape[1])
        return self.inner(state.tensors["tokens"])[:, -tokens.shape[1] :], state
