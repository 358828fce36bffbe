"""Causal attention of a piece's tokens to themselves and to all before them, which are in earlier pieces.

The last tokens of earlier pieces are put before a piece's own, so many that the near fields and the window of its
first token are whole, from where a block of the near field begins. A kernel of the whole text serves these; of keys
before them there are sums of features, or with exact attention all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention_op import WORK_BYTES, Inputs, compute_dtype
from .documents import document_runs
from .exact_attention import exact_attention
from .functions import softmax_attention
from .guard_key import read_key
from .native_sums import read as native_read
from .native_sums import sum_up as native_sum_up
from .pieces import Layout
from .step_sums import read, sums_of, sums_shape
from .step_tokens import AXES, Rule, grouped, slopes, work_dtype

Whole: TypeAlias = Callable[..., Tensor]
LEAST_LOG_GATE = -1000.0


def attention_of_piece(
    inputs: Inputs, rule: Rule, whole: Whole | None, native: Any, guard: str, layout: Layout
) -> Tensor:
    """[b, H, c, dv]: the attention of the c tokens of a piece; `Inputs` are those of the piece.

    whole: the kernel by a polynomial; native: its `NativeAttention`, or None. Raises ValueError where its guard would
    have to change what it computes.
    """
    if rule.coefficients and whole is not None:
        return _by_polynomial(inputs, rule, whole, native, guard, layout)
    banded = rule.window and not rule.alibi
    starts = layout.since(rule.window - 1) if banded else (0,) * len(layout.lengths)
    extended = _extended(inputs, starts, layout)
    return _exactly(inputs.q, extended, rule)


def _extended(inputs: Inputs, starts: tuple[int, ...], layout: Layout) -> Inputs:
    """Inputs for the tokens from a start on, whose queries are zeros before the piece."""
    q, k, v, near_q, near_k, log_gate, mask, documents = inputs
    ahead = layout.offset - starts[layout.rank]

    def more(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else torch.cat((layout.tokens_from(x, axis, starts), x), axis)

    keys = [more(x, axis) for x, axis in zip((k, v, near_k, log_gate, mask, documents), AXES, strict=False)]
    assert keys[0] is not None
    assert keys[1] is not None
    near = None if near_q is None else F.pad(near_q, (0, 0, ahead, 0))
    return Inputs(F.pad(q, (0, 0, ahead, 0)), keys[0], keys[1], near, *keys[2:])


# ---------------------------------------------------------------- exactly


def _exactly(q: Tensor, extended: Inputs, rule: Rule) -> Tensor:
    """Softmax attention of queries, which are those of the last keys."""
    c, plain = q.shape[2], extended.log_gate is None and not rule.near and not rule.window
    if not rule.alibi and not (plain and extended.mask is None and extended.documents is None):
        _, k, v, *rest = extended
        near_q, near_k, log_gate, mask, documents = rest
        out = exact_attention(
            extended.q,
            k,
            v,
            near_q,
            near_k,
            mask,
            documents,
            log_gate=log_gate,
            scale=rule.scale,
            causal=True,
            near=rule.near or None,
            window=rule.window or None,
        )
        return out[:, :, -c:]
    k = extended.k
    places = torch.arange(k.shape[2], device=k.device)
    distance = places[-c:, None] - places
    seen = _visible(extended, distance, rule)
    bias = None
    if rule.alibi:
        rates = slopes(q, k).view(1, -1, 1, 1)
        bias = (-rates * distance).to(q.dtype).masked_fill(~seen, -torch.inf)
    return softmax_attention(
        q,
        k,
        extended.v,
        attn_mask=seen if bias is None else bias,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _visible(extended: Inputs, distance: Tensor, rule: Rule) -> Tensor:
    """bool [c, m] or [b, 1, c, m]: which keys the last c tokens see."""
    seen = distance >= 0
    if rule.window:
        seen = seen & (distance < rule.window)
    if extended.mask is not None:
        seen = seen & extended.mask[:, None, None]
    if extended.documents is not None:
        runs = document_runs(extended.documents)
        seen = seen & (runs[:, None, -distance.shape[0] :, None] == runs[:, None, None])
    return seen


# ---------------------------------------------------------------- by a polynomial


def _by_polynomial(
    inputs: Inputs, rule: Rule, whole: Whole, native: Any, guard: str, layout: Layout
) -> Tensor:
    """By the kernel of the whole text on what is near, and sums of what is before."""
    if guard and (policy := read_key(guard).policy) in ("exact", "clamp"):
        raise ValueError(
            f"a guard of the policy {policy} cannot change an attention whose keys are in several pieces"
        )
    width = rule.near
    starts = tuple(max(0, (place // width - 1) * width) if width else place for place in layout.offsets)
    extended = _extended(inputs, starts[:-1], layout)
    operations = None if native is None else native.of_piece(inputs.q, inputs.k, inputs.v)
    own, log_decay, factor = _own_sums(extended, starts, rule, operations, layout)
    module: Any = sys.modules[whole.__module__]
    sent = (layout, own, log_decay) if layout.SENDS else (None, None, None)
    sums, *found = _Kernel.apply(module.OPERATION, guard, *sent, *extended)  # type: ignore[no-untyped-call]
    if not layout.SENDS:
        sums = layout.earlier_sum(own, log_decay)
    ahead = extended.q.shape[2] - inputs.q.shape[2]
    rows = grouped(extended.q, inputs.k)[..., ahead:, :]
    if not layout.rank:
        zeros = sums[:, :, None, :1].to(compute_dtype(rows))  # whose gradients others wait for
        far = zeros.expand(*rows.shape[:-1], -1)
    else:
        far = _read(rows, sums, None if factor is None else factor[..., ahead:], rule, operations)
    before = F.pad(far, (0, 0, ahead, 0)).flatten(1, 2)
    out: Tensor = _Joined.apply(before, *found)  # type: ignore[no-untyped-call]
    return out[:, :, ahead:]


def _own_sums(
    extended: Inputs, starts: tuple[int, ...], rule: Rule, operations: Any, layout: Layout
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sums of the keys of this piece for later ones, and what tells how earlier ones count.

    float64 [b, h, r, dv + 1], of the last document and decayed to its end; the logarithm of what is left there of sums
    before the piece, [b, h, 1]; and by which factor each token sees these, [b, h or 1, t].
    """
    k, v, log_gate, mask = extended.k, extended.v, extended.log_gate, extended.mask
    count = 0 if layout.rank == len(layout.lengths) - 1 else starts[layout.rank + 1] - starts[layout.rank]
    gates = None if log_gate is None else log_gate.double().clamp(LEAST_LOG_GATE, 0.0).cumsum(-1)
    runs = _runs(extended, starts, layout)
    there, decay = None if mask is None else mask[:, :count], None
    if runs is not None and count:
        same = runs[:, :count] == runs[:, count - 1 : count]
        there = same if there is None else there & same
    if gates is not None and count:
        decay = (gates[..., count - 1 : count] - gates[..., :count]).exp()
    given = k[:, :, :count], v[:, :, :count], there, decay
    if operations is not None and count:
        sums = native_sum_up(operations, *given, sums_shape(k, v, rule)[0], work_dtype(k, rule))
    else:
        sums = _sum_up(*given, rule)
    if gates is None and runs is None:
        return sums, None, None
    return sums, _log_decay(k, gates, runs, count), _factor(gates, runs, mask)


def _runs(extended: Inputs, starts: tuple[int, ...], layout: Layout) -> Tensor | None:
    """int64 [b, t]: how many documents begin from the start to each token; 0 where it is of that before the start."""
    ids = extended.documents
    if ids is None:
        return None
    before = tuple(max(0, start - 1) for start in starts[:-1])
    own = ids[:, layout.offset - starts[layout.rank] :]
    first = torch.cat((layout.tokens_from(own, 1, before), own), 1)[:, :1]
    previous = torch.cat((first, ids[:, :-1]), 1)
    return (ids != previous).cumsum(1)


def _log_decay(k: Tensor, gates: Tensor | None, runs: Tensor | None, count: int) -> Tensor:
    """float64 [b, h, 1]: what is left of earlier sums after the first `count` tokens, -inf where a document begins."""
    left = torch.zeros((*k.shape[:2], 1), dtype=torch.float64, device=k.device)
    if gates is not None:
        left = left + gates[..., :count][..., -1:].sum(-1, keepdim=True)
    if runs is not None and count:
        left = left.masked_fill((runs[:, count - 1] > 0)[:, None, None], -torch.inf)
    return left


def _factor(gates: Tensor | None, runs: Tensor | None, mask: Tensor | None) -> Tensor:
    """float64 [b, h or 1, t]: by which factor each token sees what is before the start.

    At a token that the mask hides that of the last visible one, as in `runtime/decay.py`.
    """
    factor = None if gates is None else gates.exp()
    if factor is not None and mask is not None:
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = torch.where(mask, places, 0).cummax(-1).values
        factor = F.pad(factor, (1, 0), value=1.0).gather(-1, last[:, None].expand_as(factor))
    if runs is None:
        assert factor is not None
        return factor
    same = (runs == 0)[:, None]
    seen: Tensor = same.double() if factor is None else factor.masked_fill(~same, 0.0)
    return seen


def _sum_up(k: Tensor, v: Tensor, there: Tensor | None, factor: Tensor | None, rule: Rule) -> Tensor:
    """float64 [b, h, r, dv + 1]: the sums of keys. Their features are made again in the backward pass."""
    work, degree, shape = work_dtype(k, rule), len(rule.coefficients) - 1, sums_shape(k, v, rule)

    def part(k: Tensor, v: Tensor, there: Tensor | None, factor: Tensor | None) -> Tensor:
        found: Tensor = sums_of(k, v, there, factor, degree, work).double()
        return found

    size = _block(k, shape[0])
    total = torch.zeros((*k.shape[:2], *shape), dtype=torch.float64, device=k.device)
    for first in range(0, max(k.shape[2], 1), size):
        here = slice(first, first + size)
        given = (k[:, :, here], v[:, :, here], None if there is None else there[:, here])
        decay = None if factor is None else factor[:, :, here]
        total = total + checkpoint(part, *given, decay, use_reentrant=False, preserve_rng_state=False)
    return total


def _read(rows: Tensor, sums: Tensor, factor: Tensor | None, rule: Rule, operations: Any) -> Tensor:
    """[b, h, G, c, dv + 1]: what queries [b, h, G, c, d] read, times a factor of each token. All is made again, too."""
    work, kept = work_dtype(rows, rule), compute_dtype(rows)

    def part(rows: Tensor, sums: Tensor, factor: Tensor | None) -> Tensor:
        if operations is None:
            found = read(rows.to(work), sums, rule)
        else:
            found = native_read(operations, rows.flatten(1, 2), sums, work).unflatten(1, rows.shape[1:3])
        return (found if factor is None else found * factor[:, :, None, :, None]).to(kept)

    if operations is not None and factor is None:  # which keeps nothing else
        return part(rows, sums, None)
    size = _block(rows.flatten(1, 2), sums.shape[2])
    parts = rows.split(size, 3)
    factors = [None] * len(parts) if factor is None else factor.split(size, -1)
    pairs = zip(parts, factors, strict=True)
    return torch.cat(
        [checkpoint(part, x, sums, f, use_reentrant=False, preserve_rng_state=False) for x, f in pairs], 3
    )


def _block(x: Tensor, rank: int) -> int:
    """Tokens whose features, four times float64 [b, h, t, rank], take no more than WORK_BYTES."""
    return max(1, WORK_BYTES // (4 * 8 * rank * x.shape[0] * x.shape[1]))


class _Kernel(torch.autograd.Function):
    """A kernel's own pairs, while sums are on their way: of earlier pieces, and back of the gradients of later ones.

    It gives the earlier sums (None without a layout that sends), what the kernel gives, and one tensor more that takes
    no memory: in place of gradients `_Joined` hands back to all these what the kernel's backward pass asks for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operation: Any,
        guard: str,
        layout: Layout | None,
        sums: Tensor | None,
        log_decay: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        end = None if layout is None or sums is None else layout.begin_sum(sums, log_decay)
        own, denominator, maximum, *flag = operation(*inputs, 0, guard)
        earlier = None if end is None else end()
        ctx.save_for_backward(*inputs, *flag, log_decay, earlier)
        ctx.operation, ctx.guard, ctx.layout = operation, guard, layout
        return earlier, own, denominator, maximum, own.new_zeros(()).expand_as(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_earlier, gradient, total, maximum, out = gradients
        *inputs, flag, log_decay, earlier = ctx.saved_tensors
        end = None if ctx.layout is None else ctx.layout.begin_sum(of_earlier, log_decay, later=True)
        derivative = getattr(torch.ops.fastgrad, f"{ctx.operation._opname}_backward").default
        found = derivative(gradient, *inputs, out, total, maximum, flag, 0, ctx.guard)
        floats = (None if x is None else g for x, g in zip(inputs, found, strict=False))
        later = None if end is None else end()
        of_decay = None
        if (
            later is not None and log_decay is not None
        ):  # the earlier sums that are left count for later pieces
            of_decay = (later * earlier).sum((-2, -1)).unsqueeze(-1) * log_decay.exp()
        return None, None, None, later, of_decay, *floats, None, None


class _Joined(torch.autograd.Function):
    """A kernel's attention together with [N, D] of keys before its inputs.

    Its backward pass needs of a row no more than O, D and m of all keys (docs/mathematics.md, section 4): with those of
    the kernel's keys and the others together it gives the gradients of its own pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, before: Tensor, own: Tensor, denominator: Tensor, maximum: Tensor, _: Tensor
    ) -> Tensor:
        far, kept = before.to(denominator.dtype), denominator
        shift = torch.ones_like(denominator)  # e^-m of the far keys
        if maximum.numel():
            top = torch.where(far[..., -1] == 0, maximum, maximum.clamp(min=0.0))
            kept = denominator * torch.where(top == maximum, 1.0, (maximum - top).exp())
            maximum, shift = top, top.clamp(min=0.0).neg().exp()
        total = kept + far[..., -1] * shift
        scale = torch.where(total == 0, 0.0, total.reciprocal())
        rows = own.to(far.dtype) * (kept * scale).unsqueeze(-1)
        out: Tensor = (rows + far[..., :-1] * (shift * scale).unsqueeze(-1)).to(own.dtype)
        ctx.save_for_backward(out, total, maximum, shift * scale)
        ctx.dtype = before.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        out, total, maximum, scale = ctx.saved_tensors
        upstream = gradient.to(scale.dtype) * scale.unsqueeze(-1)
        delta = -(upstream * out).sum(-1, keepdim=True)
        return torch.cat((upstream, delta), -1).to(ctx.dtype), gradient, total, maximum, out
