"""`context_parallel`: generated models run on the piece of each sequence that this rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgrad_compiler.runtime.piece_run import PieceRun
from fastgrad_compiler.runtime.pieces import Layout, served, serving
from fastgrad_dsl.distributed.exchange import RankLayout, sum_of_shares
from fastgrad_grammar.diagnostics import TfgError


@contextmanager
def context_parallel(mesh: DeviceMesh) -> Iterator[None]:
    """Within it each rank of a mesh of one dimension holds a contiguous piece of every sequence, in the order of ranks.

    Around forward and backward passes of generated models: their results are those of this rank's tokens, and the
    gradients of weights this rank's share, whose sum over the ranks is that of the whole. Pieces may differ in length.
    Every rank runs the same models in the same order. What torch.compile made runs without it.

    Raises ValueError for a mesh of several dimensions, or within another context.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"context_parallel takes one dimension of a mesh, such as mesh['context'], not {mesh.ndim}"
        )
    if serving() is not None:
        raise ValueError("context_parallel is within another one")
    with served(_Ranks(mesh.get_group())), torch.compiler.set_stance("force_eager"):
        yield


def shard_sequence(tensors: Tensor | Sequence[Tensor], mesh: DeviceMesh, axis: int = 1) -> Any:
    """This rank's piece of whole sequences, that of tensors along an axis: n tokens in pieces of n / ranks, rounded.

    The first pieces are one token longer where ranks do not divide n. Raises ValueError for fewer tokens than ranks.
    """
    if isinstance(tensors, Tensor):
        count, rank, tokens = mesh.size(), mesh.get_local_rank(), tensors.shape[axis]
        if tokens < count:
            raise ValueError(
                f"{tokens} tokens are too few for {count} ranks, of which each needs one at least"
            )
        return tensors.tensor_split(count, axis)[rank].contiguous()
    return tuple(shard_sequence(each, mesh, axis) for each in tensors)


def mean_over_tokens(mean: Tensor, tokens: int) -> Tensor:
    """The mean over the tokens of all ranks, from the mean over `tokens` of this one's; itself outside of a context.

    The same on every rank; its gradient is that of this rank's share.
    """
    pieces = serving()
    if not isinstance(pieces, _Ranks):
        return mean
    total = torch.tensor([tokens], dtype=torch.int64, device=mean.device)
    dist.all_reduce(total, group=pieces.group)
    return sum_of_shares(mean * (tokens / total.item()), pieces.group)


class _Ranks(PieceRun):
    """The pieces of the sequences of a group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def run(self, model: nn.Module, *given: Any, **named: Any) -> Any:
        """What `forward` of a generated model gives for this rank's piece."""
        if not hasattr(type(model), "STEP"):
            message = f"model {type(model).__name__} has no step form, and so it cannot run on a piece of a sequence"
            raise TfgError.of("FG502", message, "`compiled.stepped()` says which operation is in the way")
        return super().run(model, *given, **named)

    def enter(self, tokens: int, batch: int | None, device: torch.device) -> Layout:
        """The layout by the lengths of all ranks. ValueError where a rank has no token, or other sequences."""
        own = torch.tensor([tokens, -1 if batch is None else batch], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own, group=self.group)
        lengths, batches = zip(*(each.tolist() for each in found), strict=True)
        if min(lengths) < 1:
            raise ValueError("a rank has no token of the sequence, but each needs one at least")
        if len(set(batches)) > 1:
            raise ValueError(f"the ranks have pieces of different numbers of sequences: {list(batches)}")
        return RankLayout(lengths, dist.get_rank(self.group), self.group)
