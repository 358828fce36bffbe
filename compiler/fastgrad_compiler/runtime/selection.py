"""What a query does not see reaches neither its output nor a gradient, whatever it holds: NaN, Inf, huge numbers.

Kernels leave pairs out by weights of 0 in products of whole tiles, and 0 * NaN is NaN. In what is not a product they
select, so that a leak is always a number that is not finite in an output or a gradient. Hence a pass runs as it is, and
where all its results are finite they stand: one reading of the results is the whole cost. A backward pass whose outputs
or upstream gradients are not finite is none of these: a row of NaN has no weights, and its gradients are NaN, whatever
a kernel makes of it. Elsewhere `_Careful`

* replaces spoilt tokens by zeros: those with a number that is not finite, or with a monomial that overflows; a gate is
  spoilt by NaN, and seen by the rows that see a key before it and one from it on;
* runs the same pass: a row that sees none of them gets the same bits, because a kernel's row does not depend on finite
  numbers that it does not see;
* makes rows that see a spoilt token NaN, and the gradients that such a row reaches, unless its own gradient is 0;
* repeats the pass with values times a power of 2 where it overflowed all the same: sums of weights times values of 1e37
  do in float32. What had not overflowed is kept from the first. A backward pass is repeated twice: for the rows that
  see no value beyond LARGE without these, and for the others, so that no hidden value decides how others are rounded.

On a device whose results cannot be read without waiting, every call is a careful one, and nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .attention_op import FLOATS, INPUTS, compute_dtype, is_short
from .decay import next_visible
from .sight import Ranges, Sight

Kernel = Callable[..., Any]
Inputs = Sequence[Any]  # of `attention_op.Inputs`
BEHIND = INPUTS + 3  # where a pass's attributes begin, after what was saved
OF_QUERIES, GATES = (0, 3), 5  # places of the floating inputs
LARGE = 2.0**32  # values below it are not scaled: float32 leaves 2^95 to weights and sums
LARGE_UPSTREAM = 2.0**64  # nor upstream gradients below this one
SCALES = {
    torch.float32: (2.0**-100, 2.0**-40),
    torch.float64: (2.0**-800, 2.0**-400),
}  # of values, of gradients


def selective(
    forward: Kernel, backward: Kernel, sight: Sight, *, maximum: bool, on_device: bool = False
) -> tuple[Kernel, Kernel]:
    """The two passes of a kernel, in which nothing hidden leaks, and that give zeros where there are no tokens.

    forward(*inputs, *attributes) and backward(gradient, *inputs, out, denominator, maximum, *attributes) as for
    `register_attention`; a first attribute is `exact_below`, under which the attention is exact. maximum: whether a row
    maximum is saved. on_device: kernels of other devices than a CPU select by themselves, at the lengths
    that they serve.
    """

    def run_forward(*inputs: Any) -> Any:
        given, attributes = inputs[:INPUTS], inputs[INPUTS:]
        short = _one_by_one(given, attributes)
        seen = replace(sight, degree=1) if short else sight
        return select_forward(forward, given, attributes, seen, maximum, on_device and not short)

    def run_backward(gradient: Tensor, *inputs: Any) -> Any:
        given, saved, attributes = inputs[:INPUTS], inputs[INPUTS:BEHIND], inputs[BEHIND:]
        short = _one_by_one(given, attributes)
        seen = replace(sight, degree=1) if short else sight
        return select_backward(backward, gradient, given, saved, attributes, seen, on_device and not short)

    return run_forward, run_backward


def selective_tangent(run: Kernel, sight: Sight) -> Kernel:
    """The tangent of a kernel, in which nothing hidden leaks, by the arguments of its operation.

    run(tangents, inputs, (out, denominator, maximum), *attributes) -> the tangent of out; a first attribute as for
    `selective`.
    """

    def run_tangent(*arguments: Any) -> Tensor:
        given, attributes = arguments[FLOATS : FLOATS + INPUTS], arguments[FLOATS + BEHIND :]
        return select_tangent(
            run, arguments, replace(sight, degree=1) if _one_by_one(given, attributes) else sight
        )

    return run_tangent


def _one_by_one(inputs: Inputs, attributes: Sequence[Any]) -> bool:
    """Whether a call meets its pairs one by one, for which no components of a token are multiplied with each other."""
    return bool(attributes) and is_short(inputs, attributes[0])


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
    if (on_device and not _reads(q)) or (_reads(q) and all(map(_sum_is_finite, _of_logits(inputs)))):
        outputs: tuple[Tensor, Tensor, Tensor] = run(*inputs, *attributes)
        if not _reads(q) or _sum_is_finite(outputs[0]):
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
    """run(gradient, *inputs, *saved, *attributes), in which nothing hidden leaks: six gradients. See `selective`."""
    q, k, v = inputs[:3]
    if 0 in (q.numel(), k.numel(), v.numel()):
        return tuple(gradient.new_empty((0,)) if x is None else torch.zeros_like(x) for x in inputs[:FLOATS])
    if (on_device and not _reads(q)) or (_reads(q) and all(map(_sum_is_finite, (gradient, saved[0])))):
        gradients: tuple[Tensor, ...] = run(gradient, *inputs, *saved, *attributes)
        if not _reads(q) or all(map(_sum_is_finite, gradients)):
            return gradients
    careful = _Careful(inputs, sight)
    return careful.gradients(gradient, saved, lambda *arguments: run(*arguments, *attributes))


def select_tangent(run: Kernel, arguments: Sequence[Any], sight: Sight) -> Tensor:
    """The tangent of out, in which nothing hidden leaks; arguments and run as for `selective_tangent`.

    A tangent that is not there is zeros. One that overflows stays so.
    """
    given = arguments[FLOATS:]
    inputs, saved, attributes = given[:INPUTS], given[INPUTS:BEHIND], given[BEHIND:]
    if 0 in (x.numel() for x in inputs[:3]):
        return torch.zeros_like(saved[0])
    tangents = [
        torch.zeros_like(x) if dx is None and x is not None else dx
        for x, dx in zip(inputs[:FLOATS], arguments[:FLOATS], strict=True)
    ]
    if _reads(inputs[0]):
        found: Tensor = run(tangents, inputs, saved, *attributes)
        if _sum_is_finite(found):
            return found
    careful = _Careful(inputs, sight, tangents)
    return careful.tangent(tangents, saved, lambda *given: run(*given, *attributes))


def _of_logits(inputs: Inputs) -> list[Tensor]:
    return [x for x in (*inputs[:2], *inputs[3:5]) if x is not None]


def _reads(tensor: Tensor) -> bool:
    """Whether a result can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _sum_is_finite(tensor: Tensor) -> bool:
    """True only if all numbers are finite; a sum of large ones may overflow."""
    return math.isfinite(tensor.sum(dtype=compute_dtype(tensor)).item())


class _Careful:
    """The inputs of a call without their spoilt tokens, and which rows see those; a tangent spoils its token too."""

    def __init__(self, inputs: Inputs, sight: Sight, tangents: Sequence[Any] | None = None) -> None:
        q, k, v, near_q, near_k, log_gate, mask, documents = inputs
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
        for place, x in enumerate((tangents or ())[:GATES]):
            if x is not None and place in OF_QUERIES:
                spoilt_rows = spoilt_rows | self._spoilt(x)
            elif x is not None:
                spoilt = spoilt | self._spoilt(x)
        keys = self.keys = sight.ranges(n, m, documents, q.device)
        spoilt_gates = None
        if log_gate is not None:
            self.gates = _gates(keys, mask)
            spoilt_gates = log_gate.isnan()
            if tangents is not None and tangents[GATES] is not None:
                spoilt_gates = spoilt_gates | ~tangents[GATES].isfinite()
            crossing = self.gates.hold(spoilt_gates).repeat_interleave(self.groups, 1)
            spoilt_rows = spoilt_rows | crossing
        self.queries = keys.transposed()
        seeing = keys.hold(visible).repeat_interleave(self.groups, 1)
        self.rows = (keys.hold(spoilt & visible).repeat_interleave(self.groups, 1) | spoilt_rows) & seeing
        hidden = spoilt | ~visible
        self.flags: list[Any] = [spoilt_rows, hidden, hidden, spoilt_rows, hidden, spoilt_gates]
        self.inputs: list[Any] = [*self._cleaned((q, k, v, near_q, near_k, log_gate)), mask, documents]

    def _cleaned(self, tensors: Sequence[Any]) -> list[Any]:
        """Tensors like the floating inputs without the spoilt tokens."""
        return [
            None if x is None else _without(x, flags) for x, flags in zip(tensors, self.flags, strict=True)
        ]

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
            scale = _scale(self.inputs[2], LARGE, SCALES[self.work][0])
            scaled = run([*self.inputs[:2], self.inputs[2] * scale.to(out.dtype), *self.inputs[3:]])[0]
            again = scaled.to(self.work) / scale.repeat_interleave(self.groups, 1)
            out = torch.where(whole, out, again.to(out.dtype))
        return out.masked_fill(rows, math.nan), denominator, maximum

    def tangent(self, tangents: Sequence[Any], saved: Sequence[Tensor], run: Callable[..., Tensor]) -> Tensor:
        """The tangent of out by run(tangents, inputs, saved), NaN in rows that see a spoilt token."""
        out, denominator, maximum = saved
        broken = self.rows | ~(out.isfinite().all(-1) & denominator.isfinite())
        maximum = maximum.masked_fill(broken, 0.0) if maximum.numel() else maximum
        kept = (_without(out, broken), denominator.masked_fill(broken, 1.0), maximum)
        found = run(self._cleaned(tangents), self.inputs, kept)
        return found.masked_fill(broken.unsqueeze(-1), math.nan)

    def gradients(
        self, gradient: Tensor, saved: Sequence[Tensor], run: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The gradients of the inputs, by run(gradient, *inputs, *saved) once or twice."""
        out, denominator, _ = saved
        broken = self.rows | ~(out.isfinite().all(-1) & denominator.isfinite() & gradient.isfinite().all(-1))
        silent = ~(gradient != 0).any(-1)  # NaN is not 0
        dropped, v = broken | silent, self.inputs[2]
        found = self._pass(run, gradient, saved, dropped, v)
        if not (_reads(gradient) and all(bool(x.isfinite().all()) for x in found)):
            large = (v.abs() > LARGE).any(-1)
            rows = self.keys.hold(large).repeat_interleave(self.groups, 1)
            values, factor = SCALES[self.work]
            above = _scale(gradient, LARGE_UPSTREAM, factor, self.groups)
            gradient = gradient * above.repeat_interleave(self.groups, 1).to(gradient.dtype)
            first = self._pass(run, gradient, saved, dropped | rows, _without(v, large))
            scaled = (out * values, *saved[1:])
            second = self._pass(run, gradient, scaled, dropped | ~rows, v * values)
            found = self._merged(found, first, second, above, values)
        return self._marked(found, broken & ~silent, silent)

    def _pass(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        gradient: Tensor,
        saved: Sequence[Tensor],
        dropped: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, ...]:
        """The gradients that rows have part in, except those dropped, bool [b, H, n]; v: the values."""
        out, denominator, maximum = saved
        q, k, _, near_q, *rest = self.inputs
        q, near_q = _without(q, dropped), None if near_q is None else _without(near_q, dropped)
        denominator = denominator.masked_fill(dropped, 1.0)
        maximum = maximum.masked_fill(dropped, 0.0) if maximum.numel() else maximum
        gradient, out = _without(gradient, dropped), _without(out, dropped)
        return run(gradient, q, k, v, near_q, *rest, out, denominator, maximum)

    def _merged(
        self,
        found: tuple[Tensor, ...],
        first: tuple[Tensor, ...],
        second: tuple[Tensor, ...],
        above: Tensor,
        values: float,
    ) -> tuple[Tensor, ...]:
        """What was found where it is finite, else the sum of the others, which are divided by their scales."""
        merged = []
        for place, (x, y, z) in enumerate(zip(found, first, second, strict=True)):
            if x.numel():
                factor = 1.0 if place == 2 else values  # the gradient of v does not depend on v
                total = y.to(self.work) + z.to(self.work) / factor
                scale = above.repeat_interleave(x.shape[1] // above.shape[1], 1)
                total = total / (scale if x.ndim == scale.ndim else scale.squeeze(-1))
                x = torch.where(x.isfinite(), x, total.to(x.dtype))
            merged.append(x)
        return tuple(merged)

    def _marked(self, found: tuple[Tensor, ...], broken: Tensor, silent: Tensor) -> tuple[Tensor, ...]:
        """NaN where a row reaches that has a gradient and is NaN, 0 for rows without a gradient and for hidden keys."""
        of_heads = broken.unflatten(1, (-1, self.groups)).any(2)
        reached = self.queries.hold(of_heads)
        hidden = torch.zeros_like(reached) if self.hidden is None else self.hidden.expand_as(reached)
        of_rows, of_keys = (broken, silent), (reached, hidden)
        marks = [of_rows, of_keys, of_keys, of_rows, of_keys]
        *floats, gates = found
        marked = [
            x if not x.numel() else _without(x.masked_fill(nan.unsqueeze(-1), math.nan), zero)
            for x, (nan, zero) in zip(floats, marks, strict=True)
        ]
        if gates.numel():
            gates = gates.masked_fill(self.gates.transposed().hold(of_heads), math.nan)
        return (*marked, gates)


def _without(x: Tensor, tokens: Tensor) -> Tensor:
    """x [b, h, t, width] or [b, h, t] with zeros at tokens, bool [b, h, t]."""
    return x.masked_fill(tokens if x.ndim == tokens.ndim else tokens.unsqueeze(-1), 0.0)


def _gates(keys: Ranges, mask: Tensor | None) -> Ranges:
    """The gates that decide a row: those after the first key that its query sees, up to the last."""
    first, behind, n = keys.first, keys.behind, keys.others
    if mask is not None:
        place = torch.arange(1, n + 1, device=mask.device)
        shown = torch.nn.functional.pad(next_visible(mask), (0, 1), value=n)
        first = shown.gather(1, first.expand_as(mask))
        behind = behind.minimum(torch.where(mask, place, 0).cummax(-1).values)
    return Ranges((first + 1).minimum(behind), behind, n)


def _scale(x: Tensor, limit: float, factor: float, groups: int = 1) -> Tensor:
    """The factor for heads with a number beyond the limit, 1 for others: [b, heads / groups, 1, 1]."""
    largest = x.to(compute_dtype(x)).abs().unflatten(1, (-1, groups)).amax((2, 3, 4))
    return torch.where(largest > limit, factor, torch.ones_like(largest))[:, :, None, None]
