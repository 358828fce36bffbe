"""The cross entropy of x @ w, which is computed for a chunk of tokens at a time: no tensor holds all logits.

With z = x w + bias, p = softmax(z) and the smoothed truth t = (1 - s) [class = target] + s / classes of each token, the
loss is the mean of log(sum of e^z) - sum of t z over the tokens that count, and the gradient of z is (p - t) / count.
Where a gradient is asked for, those of x, w and bias are formed in the forward pass, while the logits of a chunk are
there; the backward pass scales them. Sums over tokens are of float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .content_name import content_name, read_beside
from .operation import Operation, define, differentiate, refusals

LEAST_ENTRIES = 1 << 20  # logits of a chunk, however small x and w are

_SCHEMA = "Tensor x, Tensor w, Tensor targets, Tensor? bias, float smoothing, int? ignored"
_GRADIENTS = "Tensor x_gradient, Tensor w_gradient, Tensor bias_gradient"
_FLOATS = (0, 1, 3)  # of those inputs: x, w, bias
_SECOND = (
    "second derivatives of the loss of x @ w ({name}) are not available: it keeps its gradients in place of the "
    "logits; those of the objective of logits are, `loss(model(inputs), targets)`"
)


class _Given(NamedTuple):
    """x [n, d], w [d, classes], targets int [n], bias [classes] or None; weight of other classes, the one left out."""

    x: Tensor
    w: Tensor
    targets: Tensor
    bias: Tensor | None
    smoothing: float
    ignored: int | None


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    ignored: int | None = None,
) -> Tensor:
    """The mean of F.cross_entropy over all tokens, a scalar; the same numbers up to rounding.

    x [.., d], w [d, classes], targets int [..], bias [classes]. `smoothing` in [0, 1] and `ignored`, a target that does
    not count, are label_smoothing and ignore_index of PyTorch. Raises IndexError on a CPU for a target that is no
    class.
    """
    wide = torch.is_autocast_enabled(x.device.type)
    if wide:
        x, w, bias = _autocast(x), _autocast(w), None if bias is None else _autocast(bias)
    rows, ids = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    wanted = [_needs_gradient(t) for t in (rows, w, bias)]
    loss, *_ = OPERATION(rows, w, ids, bias, smoothing, ignored, wanted[0], wanted[1] or wanted[2])
    return loss if wide else loss.to(x.dtype)


def chunk_rows(x: Tensor, w: Tensor) -> int:
    """How many tokens have logits at a time: twice as many numbers as x and w hold, LEAST_ENTRIES at least."""
    most = max(2 * (x.numel() + w.numel()), LEAST_ENTRIES)
    return max(most // max(w.shape[1], 1), 1)


def _autocast(x: Tensor) -> Tensor:
    """As a product takes it there."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _needs_gradient(x: Tensor | None) -> bool:
    """Whether a derivative may be asked for: what torch.func wraps does not always tell."""
    if x is None:
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transformed or (x.requires_grad and torch.is_grad_enabled())


# ---------------------------------------------------------------- the operation


def _registered(name: str) -> Operation:
    """name(x, w, targets, bias, smoothing, ignored, of_x, of_w) -> (loss, count, gradients of the sum of losses)."""
    known = getattr(torch.ops.fastgrad, name, None)
    if known is not None:
        operation: Operation = known.default
        return operation
    flags = "bool of_x, bool of_w"
    backward = define(
        f"{name}_backward(Tensor gradient, Tensor count, {_GRADIENTS}, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
        _scaled,
        _fake_scaled,
        _loop,
    )
    differentiate(backward, *refusals(_SECOND.format(name=name)))
    whole = define(
        f"{name}({_SCHEMA}, {flags}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _loss, _fake, _loop
    )
    differentiate(whole, *_rules(whole, backward))
    return whole  # type: ignore[no-any-return]


def _rules(whole: Operation, backward_operation: Operation) -> tuple[Callable[..., Any], ...]:
    """The derivatives of the loss by its saved gradients; of one that was not foreseen, by a second call."""

    def setup(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*results[1:])
        kept = (*results[1:], *inputs[:4])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.options, ctx.wanted = inputs[4:6], inputs[6:]

    def gradients(ctx: Any, upstream: Tensor, asked: tuple[bool, bool]) -> tuple[Tensor, ...]:
        count, *formed, x, w, targets, bias = ctx.saved_tensors
        given = (x, w, targets, bias, *ctx.options)
        if any(a and not w for a, w in zip(asked, ctx.wanted, strict=True)):
            _, count, *formed = whole(*given, *asked)
        return backward_operation(upstream, count, *formed, *given)

    def backward(ctx: Any, upstream: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]  # the first is that of the dispatch keys
        if upstream is None:
            return (None,) * 8
        asked = needed[0], needed[1] or needed[3]
        of_x, of_w, of_bias = gradients(ctx, upstream, asked)
        return (
            of_x if needed[0] else None,
            of_w if needed[1] else None,
            None,
            of_bias if needed[3] else None,
            *(None,) * 4,
        )

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[object, ...]:
        moved = [tangents[place] for place in _FLOATS]
        one = torch.ones((), dtype=ctx.saved_tensors[0].dtype, device=ctx.saved_tensors[0].device)
        found = gradients(ctx, one, (moved[0] is not None, moved[1] is not None or moved[2] is not None))
        parts = [(g.to(one.dtype) * t).sum() for g, t in zip(found, moved, strict=True) if t is not None]
        return (sum(parts, torch.zeros_like(one)), *(None,) * 4)

    return setup, backward, jvp


# ---------------------------------------------------------------- the arithmetic


def _loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    smoothing: float,
    ignored: int | None,
    of_x: bool,
    of_w: bool,
) -> tuple[Tensor, ...]:
    """Loss, how many tokens count, and the gradients of the sum of their losses, empty where they are not asked for."""
    given = _Given(x, w, targets, bias, smoothing, ignored)
    _check_targets(given)
    work = _precision(x)
    counted = torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
    count = counted.sum().to(work)
    x_gradient = torch.empty_like(x) if of_x else x.new_empty(0)
    w_gradient = torch.zeros_like(w, dtype=work) if of_w else w.new_empty(0, dtype=work)
    with_bias = of_w and bias is not None
    bias_gradient = w.new_zeros(w.shape[1] if with_bias else 0, dtype=work)
    total, rows = torch.zeros((), dtype=work, device=x.device), chunk_rows(x, w)
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        losses, upstream = _chunk(given, part, counted[part], of_x or of_w)
        total += losses.sum()
        narrow = upstream.to(x.dtype)
        if of_x:
            torch.mm(narrow, w.t(), out=x_gradient[part])
        if of_w and work == w.dtype:
            w_gradient.addmm_(x[part].t(), narrow)
        elif of_w:
            w_gradient += x[part].t() @ narrow
        if with_bias:
            bias_gradient += upstream.sum(0)
        del losses, upstream, narrow  # before the logits of the next chunk are made
    return total / count, count, x_gradient, w_gradient, bias_gradient


def _chunk(given: _Given, part: slice, counted: Tensor, differentiated: bool) -> tuple[Tensor, Tensor]:
    """The losses of some tokens, 0 for those that do not count, and the gradient of their sum by the logits."""
    logits = (given.x[part] @ given.w).to(_precision(given.x))
    if given.bias is not None:
        logits += given.bias
    classes, share = logits.shape[-1], given.smoothing / max(logits.shape[-1], 1)
    place = torch.where(counted, given.targets[part].long(), 0)[:, None]
    total = logits.logsumexp(-1)
    losses = total - (1 - given.smoothing) * logits.gather(-1, place)[:, 0]
    if given.smoothing:
        losses -= share * logits.sum(-1)
    losses = torch.where(counted, losses, 0.0)
    if differentiated and classes:
        logits.sub_(total[:, None]).exp_()  # softmax
        if given.smoothing:
            logits -= share
        logits.scatter_add_(-1, place, logits.new_full((), given.smoothing - 1.0).expand(place.shape))
        if given.ignored is not None:
            logits.masked_fill_(~counted[:, None], 0.0)
    return losses, logits


def _check_targets(given: _Given) -> None:
    """As PyTorch: an IndexError on a CPU; on other devices `gather` ends what runs."""
    if given.targets.device.type != "cpu":
        return
    wrong = (given.targets < 0) | (given.targets >= given.w.shape[1])
    if given.ignored is not None:
        wrong &= given.targets != given.ignored
    if wrong.any():
        raise IndexError(f"Target {given.targets[wrong][0].item()} is out of bounds.")


def _scaled(gradient: Tensor, count: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    """The gradients of the mean, in the dtypes of x, w and bias, from those of the sum."""
    *formed, x, w, _, bias, _, _ = tensors
    factor = (gradient / count).to(count.dtype)
    like = (x, w, w if bias is None else bias)
    return tuple((g * factor).to(t.dtype) for g, t in zip(formed, like, strict=True))


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- fake tensors and vmap


def _fake(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    _: float,
    __: int | None,
    of_x: bool,
    of_w: bool,
) -> tuple[Tensor, ...]:
    work = _precision(x)
    scalar = x.new_empty((), dtype=work)
    return (
        scalar,
        torch.empty_like(scalar),
        torch.empty_like(x) if of_x else x.new_empty(0),
        torch.empty_like(w, dtype=work) if of_w else w.new_empty(0, dtype=work),
        w.new_empty(w.shape[1] if of_w and bias is not None else 0, dtype=work),
    )


def _fake_scaled(gradient: Tensor, count: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    *formed, x, w, _, bias, _, _ = tensors
    like = (x, w, w if bias is None else bias)
    return tuple(torch.empty_like(g, dtype=t.dtype) for g, t in zip(formed, like, strict=True))


def _loop(operation: Operation) -> Callable[..., object]:
    """vmap: one call for each sample, since each has a mean of its own."""

    def rule(info: Any, places: tuple[int | None, ...], *inputs: Any) -> object:
        calls = [
            operation(*(x if at is None else x.select(at, i) for x, at in zip(inputs, places, strict=True)))
            for i in range(info.batch_size)
        ]
        found = tuple(torch.stack(each) for each in zip(*calls, strict=True))
        return found, (0,) * len(found)

    return rule


OPERATION = _registered(
    content_name("linear_loss", [read_beside(__spec__, file) for file in ("linear_loss.py", "operation.py")])
)  # `fastgrad::linear_loss_HASH`, known before anything is traced
