"""What attention kernels share: checks of their inputs, registration with torch.library, a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

NAMESPACE = "fastgrad"
WORK_BYTES = (
    20 * 2**20
)  # what the work buffers of one call may take, whatever the batch, the heads and the rank
LEAST_TILE = 16
SCORE_BUFFERS = 4  # tensors (queries, window) that a kernel's backward holds
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k, Tensor? mask, Tensor? documents"
SAVED = "Tensor out, Tensor denominator, Tensor maximum"
Flag = Callable[[Tensor, str], Tensor]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SECOND_DERIVATIVE = (
    "second derivatives of {name} are not available: its backward pass is itself a custom operation "
    "without a derivative; differentiate the exact reference model instead"
)


def register_attention(
    name: str,
    attributes: str,
    forward: Callable[..., object],
    backward: Callable[..., object],
    maximum: bool,
    flag: Flag | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register `fastgrad::name` and `fastgrad::name_backward` once a process and return the operation.

    forward(q, k, v, near_q, near_k, mask, documents, *attributes) -> (out, denominator, maximum)
    backward(gradient, q, k, v, near_q, near_k, mask, documents, out, denominator, maximum, *attributes)
        -> 5 gradients

    The inputs have four dimensions, [batch, heads, tokens, width], mask and documents two. `attributes` is the tail
    of the schema (", int exact_below"). `maximum` says whether a row maximum is saved; without one it has no elements.
    With `flag` the forward operation has one more result, `exact`, saved too and like flag(q, the last attribute).
    A name that another copy of this file registered before is kept as it is: the name holds a hash of the content.
    """
    registered = getattr(torch.ops, NAMESPACE)
    if not hasattr(registered, name):
        _register(name, attributes, forward, backward, maximum, flag)
    operation: Callable[..., tuple[Tensor, ...]] = getattr(registered, name).default
    return operation


def _register(
    name: str,
    attributes: str,
    forward: Callable[..., object],
    backward: Callable[..., object],
    maximum: bool,
    flag: Flag | None,
) -> None:
    full, full_backward = f"{NAMESPACE}::{name}", f"{NAMESPACE}::{name}_backward"

    def run_forward(*inputs: object) -> object:
        with torch.autocast(_device(inputs[0]), enabled=False):
            return forward(*inputs)

    def run_backward(*inputs: object) -> object:
        with torch.autocast(_device(inputs[0]), enabled=False):
            return backward(*inputs)

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
        rows = q.shape[:-1]
        dtype = compute_dtype(q, k, v)
        saved = q.new_empty(rows if maximum else (0,), dtype=dtype)
        out = v.new_empty((*rows, v.shape[-1]))
        more = () if flag is None else (flag(q, str(rest[-1])),)
        return out, q.new_empty(rows, dtype=dtype), saved, *more

    def fake_backward(gradient: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(
            gradient.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape)
            for tensor in inputs[:5]
        )

    def setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
        ctx.save_for_backward(*inputs[:7], *output)  # type: ignore[misc, arg-type]
        ctx.attributes = inputs[7:]  # type: ignore[attr-defined]

    def differentiate(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, *_: object
    ) -> tuple[object, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        operation = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        gradients = operation(gradient, *saved, *ctx.attributes)  # type: ignore[attr-defined]
        given = [None if tensor is None else g for tensor, g in zip(saved[:5], gradients, strict=True)]
        return (*given, None, None, *(None for _ in ctx.attributes))  # type: ignore[attr-defined]

    def decline(ctx: object, *gradients: object) -> object:
        raise RuntimeError(SECOND_DERIVATIVE.format(name=f"polynomial attention ({full})"))

    results = SAVED if flag is None else f"{SAVED}, Tensor exact"
    outputs = "(" + ", ".join("Tensor" for _ in results.split(",")) + ")"
    first = torch.library.custom_op(
        full, run_forward, mutates_args=(), schema=f"({INPUTS}{attributes}) -> {outputs}"
    )
    first.register_fake(fake_forward)
    first.register_autograd(differentiate, setup_context=setup)
    second = torch.library.custom_op(
        full_backward,
        run_backward,
        mutates_args=(),
        schema=f"(Tensor gradient, {INPUTS}, {results}{attributes}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    second.register_fake(fake_backward)
    second.register_autograd(decline)


def _device(tensor: object) -> str:
    assert isinstance(tensor, Tensor)
    return tensor.device.type


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: the precision of scores, features and states."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def call_attention(
    operation: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    *attributes: object,
) -> Tensor:
    """Flatten the leading dimensions to one batch, run the operation and give `out` its leading dimensions back."""
    leading = q.shape[:-3]
    inputs = [None if tensor is None else _one_batch(tensor, 3) for tensor in (q, k, v, near_q, near_k)]
    tokens = [None if tensor is None else _one_batch(tensor, 1) for tensor in (mask, documents)]
    out = operation(*inputs, *tokens, *attributes)[0]
    return out.squeeze(0) if not leading else out.unflatten(0, leading) if len(leading) > 1 else out


def _one_batch(tensor: Tensor, inner: int) -> Tensor:
    if tensor.ndim == inner:
        return tensor.unsqueeze(0)
    return tensor.flatten(0, tensor.ndim - inner - 1)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    causal: bool,
) -> None:
    """Raise ValueError unless q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv] and the rest fit together."""
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


def check_widths(
    q: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    expected: dict[str, int | None],
) -> None:
    """Raise ValueError unless the inputs have the widths, and are present or absent, as a kernel was made for.

    expected: d, dv, near_d (None: no near_q), padding and documents (1: a mask, ids of documents are needed).
    """
    found = {
        "d": q.shape[-1],
        "dv": v.shape[-1],
        "near_d": None if near_q is None else near_q.shape[-1],
        "padding": int(mask is not None),
        "documents": int(documents is not None),
    }
    for name, value in found.items():
        if value != expected[name]:
            raise ValueError(f"this attention kernel was made for {name} = {expected[name]}, not {value}")


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
