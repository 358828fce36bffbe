"""Tokens moved along their sequence, and the depthwise convolution over those before them.

Tokens are [.., n, c], weights [width, c]. Documents are runs of equal ids int [b, n] of tokens [b, .., n, c]: a token
of another one counts as 0, whatever it holds, as one before the first does.

PyTorch's convolutions want [b, c, n] and pass over it channel by channel. These leave tokens as they are, with a
multiply-add on slices of one result for each weight; a backward pass keeps x and w alone. They compute in float32 at
least, and give the dtype of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .softmax_pairs import is_mapped

_BLOCK = (
    1 << 18
)  # entries of a tensor at a time where products are added up, so that the sums stay in a cache


def shift(x: Tensor, ids: Tensor | None = None, *, by: int) -> Tensor:
    """x_(t - by) at the place of token t; a negative `by` takes later tokens."""
    return _moved(x, None if ids is None else document_runs(ids), by)


def depthwise(x: Tensor, w: Tensor, ids: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The sum of w_k x_(t - k) over k, channel by channel; `reverse`: of w_k x_(t + k)."""
    return _convolved(x, w, None if ids is None else document_runs(ids), reverse)


def document_runs(ids: Tensor) -> Tensor:
    """int64 [b, n]: how often the id changed up to each token, from any number on; ids [b, n] of any integer dtype."""
    before = F.pad(ids, (1, 0)).narrow(1, 0, ids.shape[1])
    return (ids != before).cumsum(1)


def _convolved(x: Tensor, w: Tensor, runs: Tensor | None, reverse: bool) -> Tensor:
    if not _is_traced(x, w):
        result: Tensor = _Convolution.apply(x, w, runs, reverse)  # type: ignore[no-untyped-call]
        return result
    work, sign = _precision(x), -1 if reverse else 1
    total = x.to(work) * w[0].to(work)
    for k in range(1, w.shape[0]):
        total = total + _moved(x, runs, sign * k).to(work) * w[k].to(work)
    return total.to(x.dtype)


def _products(a: Tensor, b: Tensor, runs: Tensor | None, width: int) -> Tensor:
    """[width, c]: for each k the sum of a_t b_(t - k) over the tokens of all sequences."""
    if not _is_traced(a, b):
        result: Tensor = _Products.apply(a, b, runs, width)  # type: ignore[no-untyped-call]
        return result
    work, tokens = _precision(a), tuple(range(a.ndim - 1))
    return torch.stack([(a.to(work) * _moved(b, runs, k).to(work)).sum(tokens) for k in range(width)])


def _is_traced(*tensors: Tensor) -> bool:
    """Whether what runs is compiled, exported, mapped or carries tangents: PyTorch then has rules for its own
    operations, and a compiler makes one loop of them.
    """
    if torch.compiler.is_compiling() or is_mapped() or forward_ad._current_level >= 0:
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor  # by torch.autograd.grad with is_grads_batched
    return any(map(batched, tensors))


class _Convolution(torch.autograd.Function):
    """(x, w, runs, reverse): `_convolved`."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, runs: Tensor | None, reverse: bool) -> Tensor:
        work, n = _precision(x), x.shape[-2]
        wide, w = x.to(work), w.to(work)
        total = wide * w[0]
        for k in range(1, min(w.shape[0], n)):
            late, early = slice(k, n), slice(0, n - k)
            here, there = (early, late) if reverse else (late, early)
            total[..., here, :].addcmul_(_tokens(wide, runs, here, there), w[k])
        return total.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, runs, ctx.reverse = inputs
        ctx.save_for_backward(x, w, runs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, runs = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _convolved(gradient, w, runs, not ctx.reverse)
        if ctx.needs_input_grad[1]:
            a, b = (x, gradient) if ctx.reverse else (gradient, x)
            dw = _products(a, b, runs, w.shape[0]).to(w.dtype)
        return dx, dw, None, None


class _Products(torch.autograd.Function):
    """(a, b, runs, width): `_products`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, runs: Tensor | None, width: int) -> Tensor:
        work, n = _precision(a), a.shape[-2]
        size = max(min(n, _BLOCK * n // max(a.numel(), 1)), 1) if a.device.type == "cpu" else max(n, 1)
        total = a.new_zeros((width, *a.shape[:-2], size, a.shape[-1]), dtype=work)
        for first in range(0, n, size):
            last = min(first + size, n)
            for k in range(min(width, last)):
                here = slice(max(first, k), last)
                there = slice(here.start - k, last - k)
                sums = total[k, ..., : last - here.start, :]
                sums.addcmul_(a[..., here, :].to(work), _tokens(b, runs, here, there).to(work))
        return total.sum(tuple(range(1, total.ndim - 1)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, runs = ctx.saved_tensors
        da = _convolved(b, gradient, runs, False) if ctx.needs_input_grad[0] else None
        db = _convolved(a, gradient, runs, True) if ctx.needs_input_grad[1] else None
        return da, db, None, None


def _moved(x: Tensor, runs: Tensor | None, by: int) -> Tensor:
    n, before, after = x.shape[-2], max(by, 0), max(-by, 0)
    moved = F.pad(x, (0, 0, before, after)).narrow(-2, after, n)
    if runs is None or by == 0:
        return moved
    other = runs != F.pad(runs, (before, after), value=-1).narrow(-1, after, n)
    return moved.masked_fill(_of_tokens(other, x.ndim), 0.0)


def _tokens(x: Tensor, runs: Tensor | None, here: slice, there: slice) -> Tensor:
    """The tokens `there`, as those at `here` see them."""
    tokens = x[..., there, :]
    if runs is None or here == there:
        return tokens
    return tokens.masked_fill(_of_tokens(runs[:, here] != runs[:, there], x.ndim), 0.0)


def _of_tokens(flags: Tensor, rank: int) -> Tensor:
    """[b, n] as [b, .., n, 1] of a rank."""
    b, n = flags.shape
    return flags.reshape(b, *(1,) * (rank - 3), n, 1)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
