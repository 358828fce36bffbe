"""What a converted model learns: the outputs of exact attention, layer by layer, and those of the whole original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad_compiler.attention.table import AttentionEntry
from fastgrad_compiler.runtime import exact_attention as attention
from fastgrad_dsl.api.compiled import owner_of
from fastgrad_dsl.conversion.inputs import Inputs

MAP = ".map_q"
"""How the path of a weight ends that std.attend has with `far_dim` alone."""


@dataclass(frozen=True)
class Site:
    """A converted attention: the path of its block in the model, and what the exact one sees.

    rows: whether queries and keys are the same tokens, so that padding has no results that count.
    """

    path: str
    causal: bool
    rows: bool


def sites_of(model: nn.Module, converted: Sequence[AttentionEntry]) -> tuple[Site, ...]:
    """The blocks of the converted attentions in a model of the changed spec."""
    blocks = (name.removesuffix(MAP) for name in model.state_dict() if name.endswith(MAP))
    entries = {entry.full_path.rpartition(".")[0]: entry for entry in converted}
    found = {path: entries[path] for path in blocks if path in entries}
    return tuple(
        Site(path, entry.attention.mask.causal, entry.queries == entry.keys) for path, entry in found.items()
    )


@dataclass
class AttentionTransfer:
    """The mean over attentions of |y - t|^2 / |t|^2: y what a converted one gives, t what softmax gives.

    Each gets the queries, keys and values that the original has there, since softmax's results go on through the model:
    the attentions learn independently of each other, in one pass, and only their own weights get gradients. This is the
    attention transfer of LoLCATs (arXiv 2410.10254) and Hedgehog (arXiv 2402.04347), on results instead of weights, so
    that no n x n matrix is made: memory is that of both attentions, linear in the length.
    """

    sites: tuple[Site, ...]
    inputs: Inputs

    def of(self, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss of a batch; `targets` are not read."""
        return self.errors(model, inputs[0]).mean()

    def errors(self, model: nn.Module, batch: Tensor) -> Tensor:
        """|y - t|^2 / |t|^2 of each attention on a batch, [sites]."""
        errors: list[Tensor] = []
        with ExitStack() as watched:
            for site in self.sites:
                block, _ = owner_of(model, f"{site.path}{MAP}")
                watched.enter_context(_watched(block, site, errors))
            model(*self.inputs.unpacked(batch))
        return torch.stack(errors)


@contextmanager
def _watched(block: Any, site: Site, errors: list[Tensor]) -> Iterator[None]:
    """Calls of a block give the exact results, and note the error of its own."""
    learned = block.forward

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each.detach() for each in (q, k, v))
        with torch.no_grad():
            exact = exact_attention(q, k, v, mask, causal=site.causal)
        given = (q, k, v) if mask is None else (q, k, v, mask)
        errors.append(relative_error(learned(*given), exact, mask if site.rows else None))
        return exact

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(e)) v of q [b, h, n, e], k [b, g, m, e] and v [b, g, m, c], as [b, n, h c].

    mask, bool [b, m]: which keys are there; a row that sees none is 0. Memory is linear in the length.
    """
    y = attention.exact_attention(q, k, v, mask=mask, causal=causal)
    return y.transpose(-3, -2).flatten(-2)


@dataclass
class Distillation:
    """The mean over results of |y - t|^2 / |t|^2: y of the model, t of the original, on the tokens that are there.

    For vectors of length 1 this is 2 - 2 cos, so that the mean squared error and the cosine are one.
    """

    original: nn.Module = field(repr=False)
    inputs: Inputs

    def of(self, model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The loss of a batch; `targets` are not read."""
        given = self.inputs.unpacked(inputs[0])
        with torch.no_grad():
            wanted = _results(self.original(*given))
        mask = self.inputs.mask(inputs[0])
        pairs = zip(_results(model(*given)), wanted, strict=True)
        return torch.stack([relative_error(y, t, mask if y.ndim > 2 else None) for y, t in pairs]).mean()


def _results(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return given if isinstance(given, tuple) else (given,)


def relative_error(y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """|y - t|^2 / |t|^2 over all entries, without the rows [b, n] where the mask is false; a scalar."""
    difference = y - target
    if mask is not None:
        shown = mask.unsqueeze(-1)
        difference, target = difference.masked_fill(~shown, 0.0), target.masked_fill(~shown, 0.0)
    return difference.square().sum() / target.square().sum().clamp_min(1e-30)
