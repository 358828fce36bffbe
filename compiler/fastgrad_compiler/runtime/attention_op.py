"""What attention kernels share: checks of their inputs, the call of an operation, a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .parted import is_parted, of_own_heads

NAMESPACE = "fastgrad"
WORK_BYTES = (
    20 * 2**20
)  # what the work buffers of one call may take, whatever the batch, the heads and the rank
LEAST_TILE = 16
SCORE_BUFFERS = 4  # tensors (queries, window) that a kernel's backward holds
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Floats(NamedTuple):
    """The inputs of an attention that have gradients, or these: q [b, H, n, d], k [b, Hk, m, d], v [b, Hk, m, dv].

    near_q [b, H, n, near_d] and near_k [b, Hk, m, near_d]: of separate near logits. log_gate [b, Hk, n], at most 0:
    the logarithm of what each token leaves of the weights of the keys before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    near_q: Tensor | None = None
    near_k: Tensor | None = None
    log_gate: Tensor | None = None


class Inputs(NamedTuple):
    """The inputs of an attention: those of `Floats`, mask, bool [b, m], True for a real token, integer ids [b, n]."""

    q: Tensor
    k: Tensor
    v: Tensor
    near_q: Tensor | None = None
    near_k: Tensor | None = None
    log_gate: Tensor | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None

    @property
    def floats(self) -> Floats:
        """Those that have gradients."""
        return Floats(self.q, self.k, self.v, self.near_q, self.near_k, self.log_gate)


def is_short(inputs: Sequence[Any], exact_below: int) -> bool:
    """Whether a call, by its inputs from q and k on, has fewer tokens than `exact_below`."""
    q, k = inputs[:2]
    return bool(max(q.shape[2], k.shape[2]) < exact_below)


FLOATS, INPUTS = len(Floats._fields), len(Inputs._fields)  # of an operation: the first, and all


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: the precision of scores, features and states."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def call_attention(
    operation: Callable[..., tuple[Tensor, ...]], inputs: Inputs, *attributes: object
) -> Tensor:
    """Flatten the leading dimensions to one batch, run the operation and give `out` its leading dimensions back."""
    if is_parted(inputs.q):
        return of_own_heads(lambda *own: call_attention(operation, Inputs(*own), *attributes), inputs)
    leading = inputs.q.shape[:-3]
    inner = (*(3 for _ in inputs[:5]), 2, 1, 1)
    given = [None if x is None else _one_batch(x, own) for x, own in zip(inputs, inner, strict=True)]
    out = operation(*given, *attributes)[0]
    return out.squeeze(0) if not leading else out.unflatten(0, leading) if len(leading) > 1 else out


def exact_limit(q: Tensor, exact_below: int, exact_below_gpu: int | None) -> int:
    """The length below which attention is exact, on the device of q; None: the same on a GPU as on a CPU."""
    return exact_below if exact_below_gpu is None or q.device.type == "cpu" else exact_below_gpu


def _one_batch(tensor: Tensor, inner: int) -> Tensor:
    if tensor.ndim == inner:
        return tensor.unsqueeze(0)
    return tensor.flatten(0, tensor.ndim - inner - 1)


def check_inputs(inputs: Inputs, causal: bool) -> None:
    """Raise ValueError unless q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv] and the rest fit together."""
    q, k, v, near_q, near_k, log_gate, mask, documents = inputs
    if min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError("q, k and v need at least three dimensions: [.., heads, tokens, width]")
    if k.shape[-3] == 0:
        raise ValueError("k and v have no key head, but attention needs one at least")
    if q.shape[-1] == 0:
        raise ValueError("q and k have a width of 0, but attention needs one of at least 1")
    _require("k", k.shape, (*q.shape[:-3], k.shape[-3], k.shape[-2], q.shape[-1]), "[.., kv_heads, m, d]")
    _require("v", v.shape, (*k.shape[:-1], v.shape[-1]), "[.., kv_heads, m, dv]")
    if q.shape[-3] % k.shape[-3] != 0:
        raise ValueError(f"{q.shape[-3]} query heads are not a multiple of {k.shape[-3]} key heads")
    if causal and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"causal attention needs as many queries as keys: {q.shape[-2]} and {k.shape[-2]}")
    if (near_q is None) != (near_k is None):
        raise ValueError("near_q and near_k are given together or not at all")
    if near_q is not None and near_k is not None:
        _require("near_q", near_q.shape, (*q.shape[:-1], near_k.shape[-1]), "[.., heads, n, near_d]")
        _require("near_k", near_k.shape, (*k.shape[:-1], near_q.shape[-1]), "[.., kv_heads, m, near_d]")
    if log_gate is not None:
        if not causal:
            raise ValueError("log_gate is of causal attention: a key after the query is never forgotten")
        _require("log_gate", log_gate.shape, k.shape[:-1], "[.., kv_heads, n]")
    _check_masks(q, k, mask, documents)


def _check_masks(q: Tensor, k: Tensor, mask: Tensor | None, documents: Tensor | None) -> None:
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}, expected torch.bool with True for a real token")
        _require("mask", mask.shape, (*k.shape[:-3], k.shape[-2]), "[.., m]")
    if documents is not None:
        if documents.dtype not in INTEGERS:
            raise ValueError(f"documents has dtype {documents.dtype}, expected integer ids")
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"documents are for attention of tokens to each other: {q.shape[-2]} queries, {k.shape[-2]} keys"
            )
        _require("documents", documents.shape, (*q.shape[:-3], q.shape[-2]), "[.., n]")


def _require(name: str, shape: torch.Size, expected: tuple[int, ...], form: str) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(shape)}, expected {form} = {list(expected)}")


def row_groups(batch: int, heads: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles (batch slice, head slice) of at most WORK_BYTES / row_bytes rows that cover [batch, heads]."""
    rows = max(1, WORK_BYTES // max(1, row_bytes))
    across = min(heads, rows)
    down = max(1, min(batch, rows // heads)) if across == heads else 1
    for first in range(0, batch, down):
        for head in range(0, heads, across):
            yield slice(first, min(first + down, batch)), slice(head, min(head + across, heads))


def plan_tiles(
    tile: int, groups: int, window: int, per_query: int, per_row: int, itemsize: int
) -> tuple[int, int]:
    """The tile, halved until the work buffers of a row fit, and their bytes.

    A token has `groups` queries, and each meets `window` keys one by one.
    """
    while True:
        queries = groups * tile
        size = itemsize * (queries * (per_query + SCORE_BUFFERS * window) + per_row)
        if size <= WORK_BYTES or tile % 2 or tile <= LEAST_TILE:
            return tile, size
        tile //= 2
