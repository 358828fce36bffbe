"""Polynomial attention as an operation: native kernels serve it where they can, PyTorch's operations elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention_op import (
    FLOATS,
    INPUTS,
    Floats,
    Inputs,
    compute_dtype,
    is_short,
    plan_tiles,
    row_groups,
)
from .decay import Decays, gate_gradient, log_decay, sum_of_later
from .documents import document_runs
from .exact_attention import exact_backward, exact_forward
from .guard import ATTRIBUTES, exact_flag, guarded
from .kernel_spec import KernelSpec, choose_chunk, folded_coefficients
from .monomials import blocks, rank, weights
from .operation import Operation, Pass, register_attention
from .polynomial_features import Workspace
from .polynomial_rows import Rows
from .polynomial_sweeps import Saved, backward_rows, forward_rows
from .precision import in_float64
from .selection import selective
from .sight import Sight
from .tangent import polynomial_tangent

Place = tuple[slice, slice]


class Backend(Protocol):
    """Native kernels of an attention, which serve some calls and give None for others."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """out, denominator and maximum, of the inputs of `Inputs`."""

    def backward(self, gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...] | None:
        """Six gradients, of the same inputs and what the forward pass saved."""


def register_polynomial(
    name: str, spec: KernelSpec, *, native: Backend | None = None, triton: Backend | None = None
) -> Operation:
    """Register the operation `fastgrad::name` with its derivatives, once a process, and return it.

    It takes the inputs of `attention_op.Inputs`, `exact_below` and the key of a guard. native, triton: serve it on a
    CPU and on a GPU.
    """
    backends = [backend for backend in (triton, native) if backend is not None]
    passes: tuple[Pass, Pass] = (partial(forward, spec, backends), partial(backward, spec, backends))
    if spec.precision == "float64":
        passes = in_float64(*passes)
    saves_maximum, near = spec.saves_maximum, spec.near or 0
    sight = Sight(spec.causal, degree=spec.degree)
    passes = selective(*passes, sight, maximum=saves_maximum, on_device=triton is not None)
    passes = guarded(*passes, spec.scale, spec.causal, near)
    tangent = polynomial_tangent(spec)
    return register_attention(name, ATTRIBUTES, *passes, tangent, maximum=saves_maximum, flag=exact_flag)


def forward(spec: KernelSpec, backends: Sequence[Backend], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, n, dv], denominator [B, H, n] and maximum [B, H, n] (of a near field; else without elements)."""
    *given, exact_below = arguments
    inputs, near = Inputs(*given), spec.near or 0
    short = is_short(inputs, exact_below)
    if short and not spec.own:
        out, denominator, maximum = exact_forward(*inputs, spec.scale, spec.causal, near, 0)
        return out, denominator, torch.zeros_like(denominator) if near else maximum
    for backend in () if short else backends:
        if (outputs := backend.forward(*inputs)) is not None:
            return outputs
    q, v, dtype = inputs.q, inputs.v, compute_dtype(*inputs[:3])
    saved = Saved(
        v.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(q.shape[:-1], dtype=dtype),
        q.new_empty(q.shape[:-1] if near else (0,), dtype=dtype),
    )
    for place, rows in _groups(spec, inputs, short):
        forward_rows(rows, Saved(*(_by_key_head(x, inputs, place) for x in saved)))
    return saved


def backward(
    spec: KernelSpec, backends: Sequence[Backend], gradient: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients of the floating inputs, from that of out [B, H, n, dv]; none has no elements."""
    *given, exact_below = arguments
    inputs, saved = Inputs(*given[:INPUTS]), Saved(*given[INPUTS:])
    short = is_short(inputs, exact_below)
    if short and not spec.own:
        exactly = (*given, spec.scale, spec.causal, spec.near or 0, 0)
        return exact_backward(gradient, *exactly)
    for backend in () if short else backends:
        if (found := backend.backward(gradient, *given)) is not None:
            return found
    kept, dtype = inputs.floats, compute_dtype(*inputs[:3])
    dq, dk, dv = (_zeros(x, dtype) for x in inputs[:3])
    near_q, near_k = (None if x is None else _zeros(x, dtype) for x in kept[3:5])
    sums = None if kept.log_gate is None else _zeros(kept.log_gate, torch.float64)
    gradients = Floats(dq, dk, dv, near_q, near_k, sums)
    for place, rows in _groups(spec, inputs, short):
        upstream = _by_key_head(gradient, inputs, place)
        of_rows = Saved(*(_by_key_head(x, inputs, place) for x in saved))
        backward_rows(rows, upstream, of_rows, _rows_of(gradients, inputs, place))
    if inputs.mask is not None:
        gradients.v.masked_fill_(~inputs.mask[:, None, :, None], 0.0)
    if sums is not None and kept.log_gate is not None:
        runs = None if inputs.documents is None else document_runs(inputs.documents)
        later = sum_of_later(sums, runs)
        gradients = gradients._replace(log_gate=gate_gradient(later, kept.log_gate, *inputs[FLOATS:]))
    return tuple(
        inputs.q.new_empty((0,)) if g is None or x is None else g.to(x.dtype)
        for g, x in zip(gradients, kept, strict=True)
    )


def plan(
    spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, dense: bool = False
) -> tuple[int, int, torch.dtype]:
    """Queries in a tile, bytes of work buffers for a row of keys, and the precision of the arithmetic."""
    dtype, size = compute_dtype(q, k, v), choose_chunk(spec)
    degree = 1 if dense else spec.degree
    features = rank(spec.d, degree)
    largest = max((block.size for block in blocks(spec.d, degree)), default=0)
    columns = (4 + spec.documents + spec.forget) * (spec.dv + 1) + 2 * (spec.near_d or 0)
    per_query = (3 if spec.forget else 2) * features + largest + degree * spec.d + columns
    per_row = (5 if spec.two_sided else 3) * features * (spec.dv + 1)  # states, and what is added to one
    window = k.shape[2] if dense else 0 if spec.total else size
    if spec.near is not None and not dense:
        window += (2 if spec.causal else 3) * spec.near
    if spec.forget:
        window *= 2  # sums of gates of all pairs, in float64
    groups = q.shape[1] // k.shape[1]
    return *plan_tiles(size, groups, window, per_query, per_row, dtype.itemsize), dtype


def _groups(spec: KernelSpec, inputs: Inputs, dense: bool) -> Iterator[tuple[Place, Rows]]:
    """The rows of a call in groups whose work buffers fit, and their place in [batch, key heads].

    dense: pairs are met one by one, for which the only features of a token are its components.
    """
    q, k, v, *_, mask, documents = inputs
    size, row_bytes, dtype = plan(spec, q, k, v, dense)
    work = Workspace(q, dtype, spec.d, () if dense else blocks(spec.d, spec.degree))
    of_states = () if dense else weights(spec.d, folded_coefficients(spec))
    diagonal = torch.tensor(of_states, dtype=dtype, device=q.device)
    runs = None if documents is None else document_runs(documents)
    sums = None if inputs.log_gate is None else log_decay(inputs.log_gate, mask, documents)
    for place in row_groups(k.shape[0], k.shape[1], row_bytes):
        shown = None if mask is None else mask[place[0]]
        of_rows = Inputs(*_rows_of(inputs.floats, inputs, place), mask=shown)
        own = None if runs is None else runs[place[0]]
        decays = None if sums is None else Decays(sums[place], dtype)
        yield place, Rows(spec, work, size, diagonal.unsqueeze(-1), of_rows, own, decays, dense)


def _by_key_head(x: Tensor, inputs: Inputs, place: Place) -> Tensor:
    """Some rows of x [B, H, n, ..] as [b, h, G, n, ..]: query head i belongs to key head i // G."""
    return x.unflatten(1, (inputs.k.shape[1], -1))[place] if x.ndim > 1 else x


def _rows_of(x: Floats, inputs: Inputs, place: Place) -> Floats:
    """Some rows of tensors like the floating inputs."""
    near_q = None if x.near_q is None else _by_key_head(x.near_q, inputs, place)
    near_k = None if x.near_k is None else x.near_k[place]
    log_gate = None if x.log_gate is None else x.log_gate[place]
    return Floats(_by_key_head(x.q, inputs, place), x.k[place], x.v[place], near_q, near_k, log_gate)


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
