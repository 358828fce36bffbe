"""What a rank is given of the tokens before its piece, and how their gradients go back.

Every exchange is one `all_to_all_single`, in which a rank sends what others need and nothing else; its backward pass is
the same with the sizes the other way round. Ranks that need nothing take part in it without rows. So all ranks run the
same operations in the same order, and autograd runs their backward passes in the reverse one: nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrad_compiler.runtime.pieces import Layout

_SENDING = ThreadPoolExecutor(1, "fastgrad-exchange")


@dataclass
class RankLayout(Layout):
    """Each rank of a group holds a piece."""

    group: Any
    SENDS: ClassVar[bool] = True

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

    def begin_sum(
        self, sums: Tensor, log_decay: Tensor | None, *, later: bool = False
    ) -> Callable[[], Tensor]:
        """As the base class says; on a CPU a thread sends them, whatever this one does meanwhile."""
        if sums.device.type != "cpu":
            found = self.sum_of_others(sums, log_decay, later=later)
            return lambda: found
        sent = _SENDING.submit(copy_context().run, self.sum_of_others, sums, log_decay, later=later)
        return lambda: ended(sent)

    @torch.no_grad()
    def sum_of_others(self, sums: Tensor, log_decay: Tensor | None, *, later: bool) -> Tensor:
        """The sums of all earlier ranks, or of all later ones, as `Layout.earlier_sum` has them.

        By recursive doubling (Hillis and Steele 1986): log2(ranks) rounds, rounded up. In the round of a distance D a
        rank is sent one sum, that of the D ranks up to the one D before it.
        """
        before, left, distance = torch.zeros_like(sums), None, 1
        if log_decay is not None:
            left = torch.zeros_like(log_decay)  # of what is before those that `before` is the sum of
        while distance < len(self.lengths):
            sender = self.rank + (distance if later else -distance)
            with_own = sums + (before if log_decay is None else before * log_decay.exp().unsqueeze(-1))
            if log_decay is None or left is None:
                before = before + self._from(sender, with_own)
            else:
                own_left = left + log_decay
                found = self._from(sender, torch.cat((with_own.flatten(2), own_left), -1))
                earlier = found[..., :-1].unflatten(-1, sums.shape[2:])
                before = before + left.exp().unsqueeze(-1) * earlier
                left = left + found[..., -1:]
            distance *= 2
        return before

    def _from(self, sender: int, x: Tensor) -> Tensor:
        """The tensor x of another rank, where all are sent those of ranks so far away; zeros where there is none."""
        sent, given = ([0] * len(self.lengths) for _ in range(2))
        for sizes, rank in ((given, sender), (sent, 2 * self.rank - sender)):
            if 0 <= rank < len(self.lengths):
                sizes[rank] = 1
        rows = x.unsqueeze(0)[: sum(sent)]
        return _exchange(rows, sent, given, self.group).sum(0)


def ended(sent: Future[Tensor]) -> Tensor:
    """What a thread was sent, when it is there."""
    return sent.result()


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
