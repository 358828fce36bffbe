"""What a query does not see reaches neither its output nor a gradient, whatever it holds: NaN, Inf, huge numbers.

Kernels leave pairs out by weights of 0 in products of whole tiles, and 0 * NaN is NaN. In what is not a product they
select, so that a leak is always a number that is not finite in an output or a gradient. Hence a pass runs as it is, and
where all its results are finite they stand: one reading of the results is the whole cost. A backward pass whose outputs
or upstream gradients are not finite is none of these: a row of NaN has no weights, and its gradients are NaN, whatever
a kernel makes of it. Elsewhere `_Careful`

* replaces spoilt tokens by zeros: those with a number that is not finite, or with a monomial that overflows;
* runs the same pass: a row that sees none of them gets the same bits, because a kernel's row does not depend on finite
  numbers that it does not see;
* makes rows that see a spoilt token NaN, and the gradients that such a row reaches, unless its own gradient is 0;
* repeats the pass with values, and their gradients, times powers of 2 where it overflowed all the same: sums of weights
  times values of 1e37 do in float32. What had not overflowed is kept from the first.

On a device whose results cannot be read without waiting, every call is a careful one, and nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_op import compute_dtype
from .documents import document_ranges, document_runs

Kernel = Callable[..., Any]
Inputs = Sequence[Any]  # q, k, v, near_q, near_k, mask, documents
LARGE = 2.0**32  # values below it are not scaled: float32 leaves 2^95 to weights and sums


@dataclass(frozen=True)
class Sight:
    """What decides which keys a query sees, besides mask and documents; window: |i - j| < window, 0 without.

    degree: the most components of a token that are multiplied with each other; 1 without a polynomial.
    """

    causal: bool
    window: int = 0
    degree: int = 1

    def ranges(self, queries: int, keys: int, documents: Tensor | None, device: torch.device) -> Ranges:
        """The range of keys that each query sees, some of which a mask may hide."""
        return self._ranges(queries, keys, documents, device, self.causal, False)

    def seen_by(self, queries: int, keys: int, documents: Tensor | None, device: torch.device) -> Ranges:
        """The range of queries that see each key."""
        return self._ranges(keys, queries, documents, device, False, self.causal)

    def _ranges(
        self, own: int, others: int, documents: Tensor | None, device: torch.device, past: bool, future: bool
    ) -> Ranges:
        place = torch.arange(own, device=device)
        first = place if future else torch.zeros_like(place)
        behind = place + 1 if past else torch.full_like(place, others)
        if self.window:
            first, behind = first.maximum(place - self.window + 1), behind.minimum(place + self.window)
        first, behind = first.clamp(0, others)[None], behind.clamp(0, others)[None]
        if documents is not None:
            begin, end = document_ranges(document_runs(documents))
            first, behind = first.maximum(begin), behind.minimum(end)
        return Ranges(first, behind.maximum(first))


@dataclass(frozen=True)
class Ranges:
    """Tokens [first, behind) of the other side for each token: int64 [batch or 1, tokens]."""

    first: Tensor
    behind: Tensor

    def hold(self, flags: Tensor) -> Tensor:
        """bool [b, h, tokens]: whether one of flags, bool [b, h, others], is in a token's range."""
        counts = torch.nn.functional.pad(flags.cumsum(-1), (1, 0))
        ends = (x[:, None].expand(*flags.shape[:2], -1) for x in (self.first, self.behind))
        first, behind = (counts.gather(-1, end) for end in ends)
        return behind > first


def selective(
    forward: Kernel, backward: Kernel, sight: Sight, *, maximum: bool, on_device: bool = False
) -> tuple[Kernel, Kernel]:
    """The two passes of a kernel, in which nothing hidden leaks, and that give zeros where there are no tokens.

    forward(q, k, v, near_q, near_k, mask, documents, *attributes) and backward(gradient, the same, out, denominator,
    maximum, *attributes) as for `register_attention`; a first attribute is `exact_below`, under which the attention is
    exact. maximum: whether a row maximum is saved. on_device: kernels of other devices than a CPU select by themselves.
    """

    def run_forward(*inputs: Any) -> Any:
        given, attributes = inputs[:7], inputs[7:]
        return select_forward(
            forward, given, attributes, _exactly(sight, given, attributes), maximum, on_device
        )

    def run_backward(gradient: Tensor, *inputs: Any) -> Any:
        given, saved, attributes = inputs[:7], inputs[7:10], inputs[10:]
        seen = _exactly(sight, given, attributes)
        return select_backward(backward, gradient, given, saved, attributes, seen, on_device)

    return run_forward, run_backward


def _exactly(sight: Sight, inputs: Inputs, attributes: Sequence[Any]) -> Sight:
    tokens = max(inputs[0].shape[2], inputs[1].shape[2])
    return Sight(sight.causal, sight.window) if attributes and tokens < attributes[0] else sight


def select_forward(
    run: Kernel,
    inputs: Inputs,
    attributes: Sequence[Any],
    sight: Sight,
    maximum: bool,
    on_device: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """run(*inputs, *attributes), in which nothing hidden leaks: out, denominator, maximum. See `selective`."""
    q, k, v = inputs[:3]
    if 0 in (q.numel(), k.numel(), v.numel()):
        rows = q.new_zeros(q.shape[:-1], dtype=compute_dtype(q, k, v))
        out = v.new_zeros((*q.shape[:-1], v.shape[-1]))
        return out, rows, rows.clone() if maximum else rows.new_zeros((0,))
    if _reads(q) or on_device:
        outputs: tuple[Tensor, Tensor, Tensor] = run(*inputs, *attributes)
        if (on_device and not _reads(q)) or _sum_is_finite(outputs[0]):
            return outputs
    careful = _Careful(inputs, sight)
    outputs = run(*careful.inputs, *attributes)
    return careful.outputs(outputs, lambda scaled: run(*scaled, *attributes))


def select_backward(
    run: Kernel,
    gradient: Tensor,
    inputs: Inputs,
    saved: Sequence[Tensor],
    attributes: Sequence[Any],
    sight: Sight,
    on_device: bool = False,
) -> tuple[Tensor, ...]:
    """run(gradient, *inputs, *saved, *attributes), in which nothing hidden leaks: five gradients. See `selective`."""
    q, k, v = inputs[:3]
    if 0 in (q.numel(), k.numel(), v.numel()):
        return tuple(gradient.new_empty((0,)) if x is None else torch.zeros_like(x) for x in inputs[:5])
    if (on_device and not _reads(q)) or (_reads(q) and all(map(_sum_is_finite, (gradient, saved[0])))):
        gradients: tuple[Tensor, ...] = run(gradient, *inputs, *saved, *attributes)
        if not _reads(q) or all(map(_sum_is_finite, gradients)):
            return gradients
    careful = _Careful(inputs, sight)
    return careful.gradients(gradient, saved, lambda *arguments: run(*arguments, *attributes))


def _reads(tensor: Tensor) -> bool:
    """Whether a result can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _sum_is_finite(tensor: Tensor) -> bool:
    """True only if all numbers are finite; a sum of large ones may overflow."""
    return math.isfinite(tensor.sum(dtype=compute_dtype(tensor)).item())


class _Careful:
    """The inputs of a call without their spoilt tokens, and which rows see those."""

    def __init__(self, inputs: Inputs, sight: Sight) -> None:
        q, k, v, near_q, near_k, mask, documents = inputs
        self.groups, self.work = q.shape[1] // k.shape[1], compute_dtype(q, k, v)
        n, m = q.shape[2], k.shape[2]
        self.hidden = None if mask is None else ~mask[:, None]
        visible = (
            torch.ones_like(k[..., 0], dtype=torch.bool)
            if mask is None
            else mask[:, None].expand(k.shape[:3])
        )
        spoilt = self._spoilt(k, sight.degree) | self._spoilt(v)
        spoilt_rows = self._spoilt(q, sight.degree)
        if near_q is not None:
            spoilt, spoilt_rows = spoilt | self._spoilt(near_k), spoilt_rows | self._spoilt(near_q)
        keys = sight.ranges(n, m, documents, q.device)
        self.queries = sight.seen_by(n, m, documents, q.device)
        seeing = keys.hold(visible).repeat_interleave(self.groups, 1)
        self.rows = (keys.hold(spoilt & visible).repeat_interleave(self.groups, 1) | spoilt_rows) & seeing
        self.inputs: list[Any] = [
            None if x is None else _without(x, flags)
            for x, flags in zip(
                (q, k, v, near_q, near_k),
                (spoilt_rows, spoilt | ~visible, spoilt | ~visible, spoilt_rows, spoilt | ~visible),
                strict=True,
            )
        ] + [mask, documents]

    def _spoilt(self, x: Tensor, degree: int = 1) -> Tensor:
        """bool [b, h, t]: tokens of x [b, h, t, width] whose largest monomial of that degree is not finite."""
        largest = x.to(self.work).abs().amax(-1)
        monomial = largest
        for _ in range(degree - 1):
            monomial = monomial * largest
        return ~monomial.isfinite()

    def outputs(
        self,
        outputs: tuple[Tensor, Tensor, Tensor],
        run: Callable[[list[Any]], tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a pass on `inputs`, by `run` again where they overflowed, NaN in rows that see a spoilt token."""
        out, denominator, maximum = outputs
        rows = self.rows.unsqueeze(-1)
        whole = rows | out.isfinite()
        if not (_reads(out) and bool(whole.all())):
            scale = _scale(self.inputs[2])
            scaled = run([*self.inputs[:2], self.inputs[2] * scale.to(out.dtype), *self.inputs[3:]])[0]
            again = scaled.to(self.work) / scale.repeat_interleave(self.groups, 1)
            out = torch.where(whole, out, again.to(out.dtype))
        return out.masked_fill(rows, math.nan), denominator, maximum

    def gradients(
        self, gradient: Tensor, saved: Sequence[Tensor], run: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The gradients of the inputs, by run(gradient, *inputs, *saved) once or twice."""
        out, denominator, maximum = saved
        broken = self.rows | ~(out.isfinite().all(-1) & denominator.isfinite() & gradient.isfinite().all(-1))
        silent = ~(gradient != 0).any(-1)  # NaN is not 0
        dropped = broken | silent
        gradient, out = _without(gradient, dropped), _without(out, dropped)
        denominator = denominator.masked_fill(dropped, 1.0)
        maximum = maximum.masked_fill(dropped, 0.0) if maximum.numel() else maximum
        q, k, v, near_q, *rest = self.inputs
        q, near_q = _without(q, dropped), None if near_q is None else _without(near_q, dropped)
        found = run(gradient, q, k, v, near_q, *rest, out, denominator, maximum)
        if not (_reads(q) and all(bool(x.isfinite().all()) for x in found)):
            above, values = _scale(gradient, self.groups), _scale(v)
            shared = values.repeat_interleave(self.groups, 1)
            gradient = gradient * above.repeat_interleave(self.groups, 1).to(gradient.dtype)
            v, out = v * values.to(v.dtype), out * shared.to(out.dtype)
            again = run(gradient, q, k, v, near_q, *rest, out, denominator, maximum)
            found = self._merged(found, again, above, values)
        return self._marked(found, broken & ~silent, silent)

    def _merged(
        self, first: tuple[Tensor, ...], again: tuple[Tensor, ...], above: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        """The first gradients where they are finite, else those of scaled ones; above, values [b, Hk, 1, 1]."""
        merged = []
        for place, (x, y) in enumerate(zip(first, again, strict=True)):
            if x.numel():
                unscaled = y.to(self.work) / above.repeat_interleave(y.shape[1] // above.shape[1], 1)
                if place != 2:  # not of v
                    unscaled = unscaled / values.repeat_interleave(y.shape[1] // values.shape[1], 1)
                x = torch.where(x.isfinite(), x, unscaled.to(x.dtype))
            merged.append(x)
        return tuple(merged)

    def _marked(self, found: tuple[Tensor, ...], broken: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
        """NaN where a row reaches that has a gradient and is NaN, 0 for rows without a gradient and for hidden keys."""
        reached = self.queries.hold(broken.unflatten(1, (-1, self.groups)).any(2))
        hidden = torch.zeros_like(reached) if self.hidden is None else self.hidden.expand_as(reached)
        marks = [(broken, silent), (reached, hidden), (reached, hidden), (broken, silent), (reached, hidden)]
        return tuple(
            x if not x.numel() else _without(x.masked_fill(nan.unsqueeze(-1), math.nan), zero)
            for x, (nan, zero) in zip(found, marks, strict=True)
        )


def _without(x: Tensor, tokens: Tensor) -> Tensor:
    """x [b, h, t, width] with zeros at tokens, bool [b, h, t]."""
    return x.masked_fill(tokens.unsqueeze(-1), 0.0)


def _scale(x: Tensor, groups: int = 1) -> Tensor:
    """Powers of 2, [b, heads / groups, 1, 1]: 1 / a head's largest number where that is beyond LARGE, else 1."""
    largest = x.to(compute_dtype(x)).abs().unflatten(1, (-1, groups)).amax((2, 3, 4))
    exponent = torch.frexp(largest).exponent
    inverse = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest > LARGE, inverse, 1.0)[:, :, None, None]
