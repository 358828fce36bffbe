"""What a rank is given of the tokens before its piece, and how their gradients go back.

Every exchange is one `all_to_all_single`, in which a rank sends what others need and nothing else; its backward pass is
the same with the sizes the other way round. Ranks that need nothing take part in it without rows. So all ranks run the
same operations in the same order, and autograd runs their backward passes in the reverse one: nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrad_compiler.runtime.pieces import Layout


@dataclass
class RankLayout(Layout):
    """Each rank of a group holds a piece."""

    group: Any

    def tokens_from(self, x: Tensor, axis: int, starts: Sequence[int]) -> Tensor:
        """As the base class says."""
        offsets, rank = self.offsets, self.rank
        own, rows = offsets[rank], x.movedim(axis, 0)
        if all(start == offset for start, offset in zip(starts, offsets, strict=False)):
            return rows[:0].movedim(0, axis)
        asked = [
            (max(start, own) - own, min(offset, offsets[rank + 1]) - own)
            for start, offset in zip(starts, offsets, strict=False)
        ]
        sent = [rows[first:last] for first, last in asked if first < last]
        given = [
            max(0, min(own, offsets[source + 1]) - max(starts[rank], offsets[source]))
            for source in range(len(self.lengths))
        ]
        packed = torch.cat(sent) if sent else rows[:0]
        found = _exchange(packed, [max(0, last - first) for first, last in asked], given, self.group)
        return found.movedim(0, axis)

    def earlier_sum(self, sums: Tensor, log_decay: Tensor | None) -> Tensor:
        """As the base class says: every earlier rank sends its own sums and its decay."""
        parts = [sums.flatten(2)] if log_decay is None else [sums.flatten(2), log_decay]
        received = self._earlier(torch.cat(parts, -1))
        if log_decay is None:
            return received.sum(0).reshape(sums.shape)
        logs = torch.cat((received[1:, ..., -1:], torch.zeros_like(received[:1, ..., -1:])))
        later = logs.flip(0).cumsum(0).flip(0)  # of the pieces between each one and this one
        return (received[..., :-1] * later.exp()).sum(0).reshape(sums.shape)

    def _earlier(self, x: Tensor) -> Tensor:
        """[p, ..]: the tensors x of the p ranks before this one, all of one shape."""
        ranks = RankLayout((1,) * len(self.lengths), self.rank, self.group)
        return ranks.tokens_from(x.unsqueeze(0), 0, (0,) * len(self.lengths))


def _exchange(rows: Tensor, sent: list[int], given: list[int], group: Any) -> Tensor:
    """Rows for each rank after each other, of which this one is given those that the others have for it."""
    if rows.dtype == torch.bool:
        return _exchange(rows.to(torch.uint8), sent, given, group).bool()
    found: Tensor = _AllToAll.apply(rows, sent, given, group)  # type: ignore[no-untyped-call]
    return found


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], given: list[int], group: Any) -> Tensor:
        ctx.sizes = sent, given, group
        return _all_to_all(rows, sent, given, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, given, group = ctx.sizes
        return _all_to_all(gradients[0], given, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], given: list[int], group: Any) -> Tensor:
    received = rows.new_empty((sum(given), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), given, sent, group=group)
    return received


class _Share(torch.autograd.Function):
    """The sum over ranks of a number, whose gradient is that of each rank's own share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Any) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def sum_of_shares(share: Tensor, group: Any) -> Tensor:
    """The sum of a number over the ranks of a group, the same on each; the gradient is that of this rank's share."""
    total: Tensor = _Share.apply(share, group)  # type: ignore[no-untyped-call]
    return total
