"""A step form that stands on the whole text: what generation asks of a model, without a compiler."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class WholeText:
    """A state that is the tokens themselves."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    @property
    def position(self) -> Tensor:
        return torch.tensor(self.tokens.shape[1])

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def clone(self) -> Self:
        return type(self)(self.tokens.clone())

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self.tokens[rows])

    def repeat(self, times: int) -> Self:
        return type(self)(self.tokens.repeat(times, 1))

    def save(self, path: Path, model: Rerun) -> None:
        save_file({"tokens": self.tokens}, path, {"model": model.digest})


class Rerun(nn.Module):
    """A module whose only input is tokens, with a step form that runs the whole text again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []  # the lengths of all steps

    @property
    def digest(self) -> str:
        """Of the weights."""
        found = sha256()
        for weight in self.inner.state_dict().values():
            found.update(weight.double().numpy().tobytes())
        return found.hexdigest()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens)
        return logits

    def start(self, batch_size: int) -> WholeText:
        return WholeText(torch.empty(batch_size, 0, dtype=torch.int64))

    def step(self, tokens: Tensor, state: WholeText) -> tuple[Tensor, WholeText]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(tokens.shape[1])
        state.tokens = torch.cat((state.tokens, tokens), 1)
        return self.inner(state.tokens)[:, -tokens.shape[1] :], state

    def load_state(self, path: Path) -> WholeText:
        with safe_open(path, framework="pt") as stream:
            if (stream.metadata() or {}).get("model") != self.digest:
                raise ValueError(f"{path} holds the state of another model")
            return WholeText(stream.get_tensor("tokens"))
