"""What generated modules need beyond PyTorch's functions: positions, masks on scores, checks of shapes, buffers.

Scores are [.., n, m], queries by keys. Everything is made on the device and in the dtype of its inputs when it is
needed, so that a model can move, be compiled and be exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .convolution import depthwise as depthwise
from .convolution import document_runs
from .convolution import shift as shift
from .linear_loss import linear_cross_entropy as linear_cross_entropy
from .parted import is_parted, of_own_heads
from .positions import of_angles, places, precision_of, turned, turns
from .softmax_pairs import Marks, Pairs, is_finite, is_mapped, is_small, select


def recomputed(run: Callable[..., Any], *given: Any, when: bool = True, **named: Any) -> Any:
    """run(*given, **named), whose values are not kept for the backward pass but made again there, where `when`.

    Dropout draws the same numbers again. Where PyTorch cannot do so (torch.func, torch.export) they are kept.
    """
    plain = torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None
    if not when or plain or not torch.is_grad_enabled():
        return run(*given, **named)
    return checkpoint(run, *given, use_reentrant=False, **named)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape is `expected`, where a name stands for any size but 0."""
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {list(shape)}, expected [{', '.join(map(str, expected))}]")
    if any(size == 0 for size in shape):  # PyTorch's fused attention ends the process
        raise ValueError(f"{name} has shape {list(shape)}, but every size is at least 1")


def check_dim(name: str, size: int, place: str, at_most: int | None = None, multiple_of: int = 1) -> None:
    """Raise ValueError where a dim breaks what the file declares of it at `place`."""
    if at_most is not None and size > at_most:
        raise ValueError(f"dim {name} is {size}, but {place} declares at most {at_most}")
    if multiple_of > 1 and size % multiple_of != 0:
        raise ValueError(f"dim {name} is {size}, but {place} declares a multiple of {multiple_of}")


def entries(x: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """`start` to `stop`, without it, along an axis; ValueError where these are not places of it in order."""
    if not 0 <= start <= stop <= x.shape[axis]:
        raise ValueError(f"slice {start}:{stop} of axis {axis}, which has {x.shape[axis]} entries")
    return x.narrow(axis, start, stop - start)


def entry(x: Tensor, axis: int, index: int) -> Tensor:
    """What stands at `index` of an axis; ValueError where that is no place of it."""
    if not 0 <= index < x.shape[axis]:
        raise ValueError(f"index {index} of axis {axis}, which has {x.shape[axis]} entries")
    return x.select(axis, index)


def truncate(x: Tensor) -> Tensor:
    """Whole numbers as int64, towards 0: NaN is 0, and what 64 bits do not hold their nearest, on every processor."""
    whole = x.masked_fill(x.isnan(), 0.0).long()
    return whole.masked_fill(x >= 2.0**63, 2**63 - 1).masked_fill(x < -(2.0**63), -(2**63))


def rotary(
    x: Tensor, base: float, *, stretch: Sequence[float] | None = None, inverse: bool = False
) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [.., n, d] by the angle position * base^(-2i/d); `inverse` turns back.

    stretch: what the angles of each pair are divided by, one number for all pairs or one for each.
    """
    if is_parted(x):
        return of_own_heads(lambda own: rotary(own, base, stretch=stretch, inverse=inverse), (x,))
    return turned(x, *turns(x, base, 0, stretch), inverse=inverse)


def sinusoid(length: int, width: int, like: Tensor, *, past: Tensor | int = 0) -> Tensor:
    """The positions of Vaswani et al.: [length, width], sines at even places and cosines at odd ones.

    past: the position of the first row.
    """
    precision = of_angles(like.device)
    rates = torch.arange(0, width, 2, device=like.device, dtype=precision) * (-math.log(10000.0) / width)
    angles = places(length, past, like.device, precision) * rates.exp()
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
    return table[:, :width].to(like.dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention, in which a token reaches no row that does not see it, whatever it holds.

    Rows that see one that is not finite are NaN, and so are the gradients that they reach (softmax_pairs.py). A graph
    that is compiled or exported, torch.vmap, where nothing can be asked, and a GPU, where asking would wait, have
    PyTorch's function as it is. In forward mode it is PyTorch's formula in n x m memory, since the fused kernels have
    no tangent.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _forward_mode():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

    if is_parted(q):

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return of_own_heads(own, (q, k, v))
    if torch.compiler.is_compiling() or q.device.type != "cpu" or is_mapped():
        return attend(q, k, v)
    groups = q.shape[-3] // k.shape[-3] if enable_gqa else 1
    marks = Marks(Pairs(attn_mask, is_causal, groups, q.shape[-2], k.shape[-2]))
    q, k, v = marks.enter(q, of_keys=False), marks.enter(k), marks.enter(v)
    if all(map(is_small, (q, k, v))) and is_finite(out := attend(q, k, v)):
        return marks.leave(out, None)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return marks.leave(*select(attend, q, k, v, marks.pairs, factor))


def _forward_mode() -> AbstractContextManager[None]:
    """Where tangents are computed, what has one of PyTorch's attention kernels."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """bool [n, m]: keys up to the query's own place; q [.., n, d], k [.., m, d]."""
    return _lower(q.shape[-2], k.shape[-2], q.device)


def window_mask(q: Tensor, k: Tensor, width: int) -> Tensor:
    """bool [n, m]: keys less than `width` places away; q [.., n, d], k [.., m, d]."""
    return _distances(q.shape[-2], k.shape[-2], q.device) < width


def alibi_bias(q: Tensor, k: Tensor) -> Tensor:
    """-slope * |i - j|: [h, n, m] for q [.., h, n, d], k [.., m, d]; slope 2^(-8 (i + 1) / h) for head i."""
    return _alibi(q.shape[-3], q.shape[-2], k.shape[-2], q)


def document_mask(ids: Tensor, rank: int) -> Tensor:
    """bool [b, .., n, n] of that rank: keys with no change of the ids between them and the query; ids [b, n]."""
    b, n = ids.shape
    middle = (1,) * (rank - 3)
    runs = document_runs(ids)
    return runs.view(b, *middle, n, 1) == runs.view(b, *middle, 1, n)


def padding_mask(mask: Tensor, rank: int) -> Tensor:
    """bool [b, .., 1, m] of that rank, from a mask [b, m] that is true for a real token."""
    b, m = mask.shape
    return mask.view(b, *(1,) * (rank - 2), m)


def apply_causal(scores: Tensor, fill: float = -math.inf) -> Tensor:
    """Scores of later keys become `fill`."""
    return scores.masked_fill(~_lower(scores.shape[-2], scores.shape[-1], scores.device), fill)


def apply_window(scores: Tensor, width: int, fill: float = -math.inf) -> Tensor:
    """Scores of keys `width` or more places away become `fill`."""
    return scores.masked_fill(_distances(scores.shape[-2], scores.shape[-1], scores.device) >= width, fill)


def apply_padding(scores: Tensor, mask: Tensor, fill: float = -math.inf) -> Tensor:
    """Scores of keys whose mask is false become `fill`; scores [b, .., n, m], mask bool [b, m]."""
    return scores.masked_fill(~padding_mask(mask, scores.ndim), fill)


def apply_documents(scores: Tensor, ids: Tensor, fill: float = -math.inf) -> Tensor:
    """Scores of keys of other runs of equal ids become `fill`; scores [b, .., n, n], ids int [b, n]."""
    return scores.masked_fill(~document_mask(ids, scores.ndim), fill)


def apply_prefix(scores: Tensor, length: Tensor, fill: float = -math.inf) -> Tensor:
    """Scores of later keys from `length` on become `fill`; scores [b, .., n, n], length int [b]."""
    n = scores.shape[-1]
    early = torch.arange(n, device=scores.device) < length.view(-1, *(1,) * (scores.ndim - 1))
    return scores.masked_fill(~(early | _lower(n, n, scores.device)), fill)


def apply_forget(scores: Tensor, log_gate: Tensor) -> Tensor:
    """Scores plus the sum of the log gates after key j up to query i, of keys up to the query; hidden pairs stay so.

    scores [.., n, n], log_gate [.., n]: a gate below -1000 counts as -1000, which forgets all.
    """
    return (scores + _forgotten(log_gate).to(scores.dtype)).masked_fill(scores == -math.inf, -math.inf)


def apply_decay(weights: Tensor, log_gate: Tensor) -> Tensor:
    """Weights times e^(what `apply_forget` adds to scores); weights [.., n, n], -inf for a hidden pair."""
    hidden, factor = weights == -math.inf, _forgotten(log_gate).exp().to(weights.dtype)
    return (weights.masked_fill(hidden, 0.0) * factor).masked_fill(hidden, -math.inf)


def apply_near_far(local: Tensor, far: Tensor, block: int) -> Tensor:
    """`local` where the blocks of `block` tokens of query and key are the same or touch, `far` elsewhere."""
    n, m = local.shape[-2:]
    queries, keys = (torch.arange(size, device=local.device) // block for size in (n, m))
    return torch.where((queries.unsqueeze(-1) - keys).abs() <= 1, local, far)


def apply_polynomial(scores: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The polynomial of the scores, by ascending powers; 0 where the score is -inf."""
    hidden = scores == -math.inf
    visible = scores.masked_fill(hidden, 0.0)
    result = torch.zeros_like(visible)
    for coefficient in reversed(coefficients):
        result = result * visible + coefficient
    return result.masked_fill(hidden, 0.0)


def centred_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm of the last axis, of rows from which their mean is taken before.

    F.layer_norm alone leaves rows longer than sqrt(d) where a row's entries are large and nearly equal, since it rounds
    the mean and each entry over the deviation. A mean that is rounded to the dtype leaves a difference that is exact
    there, of which F.layer_norm takes the rest.
    """
    wide, weight, bias = (t.to(precision_of(x)) for t in (x, weight, bias))
    centred = wide - wide.mean(-1, keepdim=True)
    return F.layer_norm(centred, x.shape[-1:], weight, bias, eps).to(x.dtype)


def normalize_rows(weights: Tensor) -> Tensor:
    """Weights over the sum of their row; those of -inf are 0, and a row of zeros stays one."""
    visible = weights.masked_fill(weights == -math.inf, 0.0)
    total = visible.sum(-1, keepdim=True)
    return visible / total.masked_fill(total == 0, 1.0)


def apply_alibi(scores: Tensor) -> Tensor:
    """Scores [.., h, n, m] with a bias that falls with the distance, at a rate of its own for each head."""
    return scores + _alibi(scores.shape[-3], scores.shape[-2], scores.shape[-1], scores)


def _lower(n: int, m: int, device: torch.device) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool, device=device).tril()


def _distances(n: int, m: int, device: torch.device) -> Tensor:
    return (torch.arange(n, device=device).unsqueeze(-1) - torch.arange(m, device=device)).abs()


def _forgotten(log_gate: Tensor) -> Tensor:
    """[.., n] gives [.., n, n] in float64: differences of running sums for earlier keys, 0 for others."""
    total = log_gate.double().clamp(min=-1000.0).cumsum(-1)
    n = log_gate.shape[-1]
    sums = total.unsqueeze(-1) - total.unsqueeze(-2)
    return sums.masked_fill(_lower(n, n, log_gate.device).mT, 0.0)


def _alibi(heads: int, n: int, m: int, like: Tensor) -> Tensor:
    slopes = torch.exp2(
        torch.arange(1, heads + 1, device=like.device, dtype=precision_of(like)) * (-8.0 / heads)
    )
    return -(slopes.view(-1, 1, 1) * _distances(n, m, like.device)).to(like.dtype)


def masked_softmax(scores: Tensor, axis: int) -> Tensor:
    """Softmax that gives zeros where all scores are -inf."""
    empty = (scores == -math.inf).all(axis, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(axis).masked_fill(empty, 0.0)


class BufferList(nn.Module):
    """Buffers by position, in the state_dict under `0`, `1` ..."""

    def __init__(self, values: Iterable[Tensor], persistent: bool = True) -> None:
        super().__init__()
        for i, value in enumerate(values):
            self.register_buffer(str(i), value, persistent)

    def __getitem__(self, i: int) -> Tensor:
        return self.get_buffer(str(i))


class BufferDict(nn.Module):
    """Buffers by key."""

    def __init__(self, values: Mapping[str, Tensor], persistent: bool = True) -> None:
        super().__init__()
        for key, value in values.items():
            self.register_buffer(key, value, persistent)

    def __getitem__(self, key: str) -> Tensor:
        return self.get_buffer(key)
