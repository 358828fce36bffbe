"""Causal attention of new tokens to all before them, from what is kept of those.

By a polynomial, a ring holds the last tokens as they are, twice the block of the near field; what leaves it is added to
the sums phi(k) [v, 1]^T of all earlier ones, in float64, so that nothing drifts. Native kernels add tokens when nothing
is near them any more; how many are in the sums is kept too, and the others of the ring are met one by one. Within a
window the ring is all there is. Exact attention keeps every token, in a cache that doubles when it is full.

Pairs with a token of the ring weigh what they weigh in a whole text: exp of the score where they are near, else the
polynomial. Nothing here decides by the number of tokens before, so that a step of fixed shapes compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_op import Inputs
from .exact_attention import exact_attention
from .guard import guard_of
from .parted import is_parted, of_own_heads
from .state import SHARED, Scope
from .step_sums import absorb, read, sums_shape
from .step_tokens import (
    AXES,
    Rule,
    Tokens,
    finite_values,
    gates_of,
    grouped,
    powers,
    quotient,
    since,
    slopes,
    softmax_of,
    work_dtype,
)

if TYPE_CHECKING:  # a build for other targets has no such file
    from .native_attention import NativeAttention

SUMMED = f"summed.{SHARED}"  # int64, no dimensions: how many tokens are in the sums
FEW = 16  # tokens that native kernels serve one by one
TILE = 128  # tokens at a time where there is no ring
LEAST_CACHE = 64
LEAST_LOG_GATE = -1000.0
Whole = Callable[..., Tensor]


# ---------------------------------------------------------------- calls


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None = None,
    near_k: Tensor | None = None,
    *,
    log_gate: Tensor | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    state: Scope,
    rule: Rule,
    whole: Whole | None = None,
    native: NativeAttention | None = None,
    guard: str = "",
) -> Tensor:
    """[b, H, c, dv]: the attention of c new tokens, whose inputs are those of `attention_op.Inputs`.

    whole: the same attention of a text from its beginning, which serves a long first call. guard: the key of the one
    that watches the logits; it sees those with the tokens of the ring, and what norms prove of all others. native:
    serves a few tokens at once, except under a guard, and sums up the keys of many.
    """
    inputs, count = Inputs(q, k, v, near_q, near_k, log_gate, mask, documents), q.shape[2]
    if (pieces := state.root.pieces) is not None:

        def own(*given: Any) -> Tensor:
            return pieces.attention(Inputs(*given), rule, whole, native, guard)

        return of_own_heads(own, inputs) if is_parted(q) else own(*inputs)
    if log_gate is not None:
        inputs = inputs._replace(log_gate=_effective(log_gate, mask, state))
    if native is not None and not guard and (found := _natively(native, inputs, state)) is not None:
        return found
    tokens = _new_tokens(inputs, state)
    kept = Kept(state, rule, tokens, guard, native)
    if state.known_past == 0 and count > kept.tile and (serve := whole or _exact(rule)) is not None:
        given: dict[str, Any] = {
            "log_gate": log_gate,
            "mask": mask,
            "documents": documents,
            "guard": guard or None,
        }
        out = serve(q, k, v, near_q, near_k, **{key: x for key, x in given.items() if x is not None})
        kept.add(tokens)
        return out
    parts = []
    for first in range(0, count, kept.tile):
        last = min(first + kept.tile, count)
        near = None if near_q is None else near_q[:, :, first:last]
        parts.append(kept.next(q[:, :, first:last], near, tokens.slice(first, last)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def memory_step(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, state: Scope, rule: Rule
) -> Tensor:
    """[b, H, c, dv]: polynomial attention of new tokens to all keys of another sequence, summed up once."""
    if state.starts:
        sums = torch.zeros((*k.shape[:2], *sums_shape(k, v, rule)), dtype=torch.float64, device=k.device)
        absorb(sums, k, v, mask, None, work_dtype(q, rule))
        state.keep(sums)
    (sums,) = state.kept()
    found = read(grouped(q, k).to(work_dtype(q, rule)), sums, rule)
    return quotient(found[..., :-1], found[..., -1:]).to(v.dtype).flatten(1, 2)


def _natively(native: NativeAttention, inputs: Inputs, state: Scope) -> Tensor | None:
    """The attention of a few tokens in one call, None where PyTorch's operations must serve it."""
    past, sums = state.known_past, state.find("sums")
    if past is None or sums is None or state.starts or not 0 < inputs.q.shape[2] <= FEW:
        return None
    if not state.once("plain", native.is_plain):
        return None
    ring = [state.find(name) for name in Tokens._fields[:-1]]
    operation = native.stepper((*inputs[:5], *ring[:3]))
    if operation is None:
        return None
    if inputs.documents is not None:
        inputs = inputs._replace(documents=_runs(inputs.documents, state))
    kept = (state.find("document"), state.find(SUMMED), sums)
    return native.step(operation, inputs, ring, *kept, past)


def _exact(rule: Rule) -> Whole | None:
    """What serves a text from its beginning exactly."""
    if rule.coefficients or rule.alibi:
        return None
    near, window = rule.near or None, rule.window or None
    return partial(exact_attention, scale=rule.scale, causal=True, near=near, window=window)


def _new_tokens(inputs: Inputs, state: Scope) -> Tokens:
    """The new tokens of a call; those that the padding mask hides are zeros."""
    _, k, v, _, near_k, log_gate, mask, documents = inputs
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        near_k = None if near_k is None else near_k.masked_fill(hidden, 0.0)
    places = torch.arange(k.shape[2], device=k.device) + state.past
    return Tokens(
        k, v, near_k, log_gate, mask, None if documents is None else _runs(documents, state), places
    )


def _effective(log_gate: Tensor, mask: Tensor | None, state: Scope) -> Tensor:
    """float64 [b, h, c]: the gates of visible tokens, with those of the hidden ones before them; 0 of hidden tokens.

    So a hidden query reads the keys before it as the last visible one does: a factor that its whole row has cancels
    (docs/mathematics.md, section 12), and would leave nothing of a row whose keys are all far back.
    """
    gates = log_gate.double().clamp(LEAST_LOG_GATE, 0.0)
    if mask is None:
        return gates
    pending = state.get("pending", lambda: gates.new_zeros(gates.shape[:2]))
    total = pending.unsqueeze(-1) + gates.cumsum(-1)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).cummax(-1).values[:, None]
    reached = total.gather(-1, last.clamp(min=0).expand_as(total)).masked_fill(last < 0, 0.0)
    pending.copy_(total[..., -1] - reached[..., -1])
    return reached.diff(dim=-1, prepend=torch.zeros_like(reached[..., :1]))


def _runs(ids: Tensor, state: Scope) -> Tensor:
    """int64 [b, c]: the number of each token's document, of the runs of equal ids since the first token."""
    last = state.get("id", lambda: ids.new_zeros((ids.shape[0], 1)))
    document = state.get("document", lambda: last.new_zeros(last.shape, dtype=torch.int64))
    runs = document + (ids != torch.cat((last, ids[:, :-1]), 1)).cumsum(1)
    last.copy_(ids[:, -1:])
    return runs


# ---------------------------------------------------------------- what is kept


class Kept:
    """What an attention keeps of its tokens: the last of them in a ring, or all; and the sums of those before."""

    def __init__(
        self, state: Scope, rule: Rule, like: Tokens, guard: str = "", native: NativeAttention | None = None
    ) -> None:
        self.state, self.rule, self.guard, self.native = state, rule, guard, native
        self.size = rule.ring if rule.ring is not None else self._capacity(like)
        self.tile = min(self.size, TILE) if rule.ring else TILE
        self.ring = Tokens._make((*map(self._made, Tokens._fields, like[:-1], AXES), like.places))
        self.sums: Tensor | None = None
        if rule.coefficients:
            shape = (*like.k.shape[:2], *sums_shape(like.k, like.v, rule))
            self.sums = state.get(
                "sums", lambda: torch.zeros(shape, dtype=torch.float64, device=like.k.device)
            )
        self.summed: Tensor | None = None
        if self.sums is not None and self.size:
            self.summed = state.get(SUMMED, lambda: like.places.new_zeros(()))

    def _made(self, name: str, like: Tensor | None, axis: int) -> Tensor | None:
        if like is None:
            return None
        shape = list(like.shape)
        shape[axis] = self.size
        found = self.state.get(name, lambda: like.new_zeros(shape))
        if found.shape[axis] < self.size:  # a cache that is full
            shape[axis] -= found.shape[axis]
            found = torch.cat((found, like.new_zeros(shape)), axis)
            self.state.put(name, found)
        return found

    def _capacity(self, like: Tokens) -> int:
        """Of a cache of all tokens."""
        held = self.state.find("k")
        least = max(0 if held is None else held.shape[2], self.state.root.capacity, LEAST_CACHE)
        known = self.state.known_past
        needed = 0 if known is None else known + like.k.shape[2]
        return least if needed <= least else max(needed, 2 * least)

    def next(self, q: Tensor, near_q: Tensor | None, new: Tokens) -> Tensor:
        """The attention of some new tokens, no more than `tile`, which are added."""
        if self.rule.ring is None:
            self.add(new)
            return self._exact(q, near_q, new, self._cache(new))
        keys = new.after(self._earlier(new))
        weighed = self._softmax if self.sums is None else self._attend
        out = weighed(q, near_q, new, keys)
        self.add(new)
        return out

    # ------------------------------------------------------------ tokens that are kept

    def _earlier(self, new: Tokens) -> Tokens:
        """The tokens of the ring, with their places before new ones; those that are in the sums count as none."""
        last = new.places[0] - 1
        slots = torch.arange(self.size, device=new.places.device)
        places = last - torch.remainder(last - slots, max(self.size, 1))
        if self.summed is not None:
            places = torch.where(places < self.summed, -1, places)
        return self.ring._replace(places=places)

    def _cache(self, new: Tokens) -> Tokens:
        """All tokens of a cache, of which the new ones are the last."""
        known = self.state.known_past
        slots = torch.arange(self.size, device=new.places.device)
        found = self.ring._replace(places=torch.where(slots <= new.places[-1], slots, -1))
        return found if known is None else found.slice(0, int(new.places[-1]) + 1)

    def add(self, new: Tokens) -> None:
        """Keep new tokens, any number of them; what leaves the ring is added to the sums."""
        count, size = new.places.shape[0], self.size
        self._forget(new)
        fresh = new if new.log_gate is None else new._replace(log_gate=since(new.log_gate))
        if self.rule.ring is not None and count > size:
            if self.sums is not None:
                if size:
                    self._sum_up(self._earlier(new), new)
                self._sum_up(fresh.slice(0, count - size), new)
            fresh = fresh.slice(count - size, count)
        elif self.sums is not None:
            slots = torch.remainder(new.places, max(size, 1))
            picked = zip(self._earlier(new), AXES, strict=True)
            self._sum_up(
                Tokens._make(None if x is None else x.index_select(axis, slots) for x, axis in picked), new
            )
        if self.summed is not None:
            torch.maximum(self.summed, new.places[-1] + 1 - size, out=self.summed)
        if new.run is not None:
            self._document().copy_(new.run[:, -1:])
        if size:
            slots = fresh.places if self.rule.ring is None else torch.remainder(fresh.places, size)
            for held, x, axis in zip(self.ring[:-1], fresh[:-1], AXES, strict=False):
                if held is not None and x is not None:
                    held.index_copy_(axis, slots, x.to(held.dtype))

    def _forget(self, new: Tokens) -> None:
        """Decay what is kept by the gates of new tokens; forget the sums where a new document has begun."""
        if new.log_gate is not None and self.ring.log_gate is not None:
            total = new.log_gate.sum(-1, keepdim=True)
            self.ring.log_gate.add_(total)
            if self.sums is not None:
                self.sums.mul_(total.exp().unsqueeze(-1))
        if new.run is not None and self.sums is not None:
            other = new.run[:, -1:] != self._document()
            self.sums.masked_fill_(other[:, None, None], 0.0)

    def _document(self) -> Tensor:
        """int64 [b, 1]: the number of the document of the last token."""
        found = self.state.find("document")
        assert found is not None
        return found

    def _sum_up(self, left: Tokens, new: Tokens) -> None:
        """Add tokens that are not in the ring any more to the sums; their gates are up to the last new token."""
        assert self.sums is not None
        there = (left.places >= 0)[None]
        if left.seen is not None:
            there = there & left.seen
        if left.run is not None and new.run is not None:
            there = there & (left.run == new.run[:, -1:])
        factor = None if left.log_gate is None else left.log_gate.exp()
        given = (self.sums, left.k, left.v, there, factor, work_dtype(left.k, self.rule))
        if self.native is None or self.state.known_past is None or not self.native.absorb(*given):
            absorb(*given)

    # ------------------------------------------------------------ weights

    def _attend(self, q: Tensor, near_q: Tensor | None, new: Tokens, keys: Tokens) -> Tensor:
        """By a polynomial with its sums: [b, H, c, dv]."""
        assert self.sums is not None
        work = work_dtype(q, self.rule)
        rows = grouped(q, new.k).to(work)
        visible = self._visible(new, keys)
        near = None
        if self.rule.near:
            near = self._near(new, keys)
        if self.guard and not torch.compiler.is_compiling() and not self.state.starts:
            rows = self._watched(rows, new, keys, visible if near is None else visible & ~near)
        scores = self.rule.scale * (rows @ keys.k.to(work).mT.unsqueeze(2))
        gates = gates_of(new, keys)
        top = torch.zeros((), dtype=work, device=q.device)
        weights = powers(self.rule.coefficients, scores)
        damping = None if gates is None else gates.to(work).exp()
        if near is not None:
            local = scores
            if near_q is not None and keys.near_k is not None:
                local = grouped(near_q, new.k).to(work) @ keys.near_k.to(work).mT.unsqueeze(2)
            local = (
                (local if gates is None else local + gates).masked_fill(~(near & visible), -math.inf).to(work)
            )
            top = local.amax(-1, keepdim=True).clamp(min=0.0)
            fade = (-top).exp()
            far = weights * fade if damping is None else weights * damping * fade
            weights = torch.where(near, (local - top).exp(), far)
        elif damping is not None:
            weights = weights * damping
        weights = weights.masked_fill(~visible, 0.0)
        values, spoilt = finite_values(keys.v.to(work), visible, new)
        found = read(rows, self.sums, self.rule)
        factor = (-top.double()).exp()
        if new.log_gate is not None:
            factor = factor * new.log_gate.cumsum(-1)[:, :, None, :, None].exp()
        found = found * factor
        if new.run is not None:
            other = new.run != self._document()
            found = found.masked_fill(other[:, None, None, :, None], 0.0)
        total = weights.sum(-1, keepdim=True).double() + found[..., -1:]
        out = quotient((weights @ values.unsqueeze(2)).double() + found[..., :-1], total)
        if spoilt is not None:
            out = out.masked_fill(spoilt, math.nan)
        return out.to(new.v.dtype).flatten(1, 2)

    def _watched(self, rows: Tensor, new: Tokens, keys: Tokens, served: Tensor) -> Tensor:
        """Queries [b, h, G, c, d] that the guard has seen, scaled down if it clamps; served: pairs of the far field."""
        longest = self.state.get("longest", lambda: rows.new_zeros(new.k.shape[:2]))
        lengths = torch.linalg.vector_norm(new.k, dim=-1, dtype=rows.dtype).amax(-1)
        torch.maximum(longest, lengths.to(longest.dtype), out=longest)
        scale = abs(self.rule.scale)
        limits = scale * torch.linalg.vector_norm(rows, dim=-1) * longest[:, :, None, None]
        guard = guard_of(self.guard)
        if guard.spec.policy == "clamp":
            bounds = torch.tensor(guard.spec.bounds, dtype=rows.dtype, device=rows.device)
            bounds = bounds.expand(limits.shape[1] * limits.shape[2]).reshape(*limits.shape[1:3], 1)
            guard.watch(limits.amax((0, 3)).flatten(), limits.amax((0, 3)).flatten())
            factor: Tensor = (bounds / limits.clamp(min=1e-30)).clamp(max=1.0)
            return rows * factor.unsqueeze(-1)
        scores = scale * (rows @ keys.k.to(rows.dtype).mT.unsqueeze(2)).abs()
        seen = scores.masked_fill(~served, 0.0).amax(-1)
        guard.watch(limits.amax((0, 3)).flatten(), seen.amax((0, 3)).flatten())
        return rows

    def _exact(self, q: Tensor, near_q: Tensor | None, new: Tokens, keys: Tokens) -> Tensor:
        """By all keys: [b, H, c, dv]."""
        visible, rule = self._visible(new, keys), self.rule
        if not (
            rule.near or rule.alibi or new.log_gate is not None or new.seen is not None or new.run is not None
        ):
            alone = q.shape[2] == 1 and self.state.known_past is not None
            return F.scaled_dot_product_attention(
                q,
                keys.k,
                keys.v,
                attn_mask=None if alone else visible[:, 0, 0],
                scale=rule.scale,
                enable_gqa=q.shape[1] != keys.k.shape[1],
            )
        return self._softmax(q, near_q, new, keys, of_cache=True)

    def _softmax(
        self, q: Tensor, near_q: Tensor | None, new: Tokens, keys: Tokens, of_cache: bool = False
    ) -> Tensor:
        """By softmax of the scores of some keys: [b, H, c, dv]; of_cache: see `gates_of`."""
        visible, rule, work = self._visible(new, keys), self.rule, work_dtype(q, self.rule)
        scores = rule.scale * (grouped(q, new.k).to(work) @ keys.k.to(work).mT.unsqueeze(2))
        if rule.near and near_q is not None and keys.near_k is not None:
            local = grouped(near_q, new.k).to(work) @ keys.near_k.to(work).mT.unsqueeze(2)
            scores = torch.where(self._near(new, keys), local, scores)
        if rule.alibi:
            scores = scores - slopes(q, new.k) * (new.places[:, None] - keys.places)
        values = finite_values(keys.v.to(work), visible, new)
        return softmax_of(scores, gates_of(new, keys, of_cache), visible, values).to(new.v.dtype)

    def _near(self, new: Tokens, keys: Tokens) -> Tensor:
        """bool [c, t]: which keys stand in a new token's block of the near field, or the one before."""
        return (new.places[:, None] // self.rule.near - keys.places // self.rule.near) <= 1

    def _visible(self, new: Tokens, keys: Tokens) -> Tensor:
        """bool [b or 1, 1, 1, c, t]: which keys each new token sees."""
        places = new.places[:, None]
        visible = (keys.places >= 0) & (keys.places <= places)
        if self.rule.window:
            visible = visible & (places - keys.places < self.rule.window)
        visible = visible[None]
        if keys.seen is not None:
            visible = visible & keys.seen[:, None]
        if keys.run is not None and new.run is not None:
            visible = visible & (keys.run[:, None] == new.run[:, :, None])
        return visible[:, None, None]
