"""What a rank is given of the tokens before its piece, and how their gradients go back.

Every exchange is one `all_to_all_single`, in which a rank sends what others need and nothing else; its backward pass is
the same with the sizes the other way round. Ranks that need nothing take part in it without rows. So all ranks run the
same operations in the same order, and autograd runs their backward passes in the reverse one: nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a sequence are: their lengths by rank of a group, this process's rank, and the group."""

    lengths: tuple[int, ...]
    rank: int
    group: Any

    @property
    def offsets(self) -> tuple[int, ...]:
        """The place of each piece's first token, and after them the length of the sequence."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def offset(self) -> int:
        """The place of this piece's first token."""
        return self.offsets[self.rank]

    def since(self, count: int) -> tuple[int, ...]:
        """By rank: the place `count` tokens before its piece, at least 0."""
        return tuple(max(0, offset - count) for offset in self.offsets[:-1])


def tokens_from(x: Tensor, axis: int, starts: Sequence[int], layout: Layout) -> Tensor:
    """The tokens [starts[rank], offset) along an axis, which earlier ranks hold; x: this rank's piece.

    starts: for every rank where its tokens begin, at most its offset.
    """
    offsets, rank = layout.offsets, layout.rank
    own, rows = offsets[rank], x.movedim(axis, 0)
    if all(start == offset for start, offset in zip(starts, offsets, strict=False)):
        return rows[:0].movedim(0, axis)
    asked = [
        (max(start, own) - own, min(offset, offsets[rank + 1]) - own)
        for start, offset in _each(starts, layout)
    ]
    sent = [rows[first:last] for first, last in asked if first < last]
    given = [
        max(0, min(own, offsets[source + 1]) - max(starts[rank], offsets[source]))
        for source in range(len(layout.lengths))
    ]
    packed = torch.cat(sent) if sent else rows[:0]
    return _exchange(packed, [max(0, last - first) for first, last in asked], given, layout.group).movedim(
        0, axis
    )


def earlier(x: Tensor, layout: Layout) -> Tensor:
    """[p, ..]: the tensors x of the p ranks before this one, all of one shape."""
    ranks = Layout((1,) * len(layout.lengths), layout.rank, layout.group)
    return tokens_from(x.unsqueeze(0), 0, (0,) * len(layout.lengths), ranks)


def _each(starts: Sequence[int], layout: Layout) -> list[tuple[int, int]]:
    """The tokens [first, last) that each rank asks for."""
    return list(zip(starts, layout.offsets, strict=False))


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
