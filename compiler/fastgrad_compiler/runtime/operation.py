"""Attention kernels as operations of PyTorch: schemas, fake tensors, derivatives of both modes, a batching rule.

torch.library.register_autograd has no forward mode: a tangent through such an operation is dropped without a word. So
the kernels of the key Autograd are made here, from autograd functions of one level, as PyTorch makes its own for
torch.func: each level of jvp, grad or vmap, and each dual number of torch.autograd.forward_ad, meets them in its turn.
What has no rule, a derivative of a derivative, raises in either mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from .attention_op import FLOATS, INPUTS, NAMESPACE, compute_dtype

GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k, Tensor? log_gate, "
    "Tensor? mask, Tensor? documents"
)
TANGENTS = (
    "Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor? near_q_tangent, Tensor? near_k_tangent, "
    "Tensor? log_gate_tangent"
)
SAVED = "Tensor out, Tensor denominator, Tensor maximum"
SECOND_DERIVATIVE = (
    "second derivatives of {name} are not available: its backward pass and its tangent are themselves custom "
    "operations without a derivative; those of the exact reference model are, where it has no near field, window or "
    "documents, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)
Pass = Callable[..., Any]
Flag = Callable[[Tensor, str], Tensor]
Operation = Callable[..., tuple[Tensor, ...]]


def register_attention(
    name: str,
    attributes: str,
    forward: Pass,
    backward: Pass,
    tangent: Pass,
    maximum: bool,
    flag: Flag | None = None,
) -> Operation:
    """Register `fastgrad::name`, `name_backward` and `name_tangent` once a process and return the first.

    forward(*inputs, *attributes) -> (out, denominator, maximum)
    backward(gradient, *inputs, out, denominator, maximum, *attributes) -> 6 gradients
    tangent(6 tangents or None, *inputs, out, denominator, maximum, *attributes) -> the tangent of out

    The inputs are those of `attention_op.Inputs`, where the first five have four dimensions, [batch, heads, tokens,
    width]. `attributes` is the tail
    of the schema (", int exact_below"). `maximum` says whether a row maximum is saved; without one it has no elements.
    With `flag` the forward operation has one more result, `exact`, saved too and like flag(q, the last attribute).
    A name that another copy of this file registered before is kept as it is: the name holds a hash of the content.
    """
    registered = getattr(torch.ops, NAMESPACE)
    if not hasattr(registered, name):
        _register(name, attributes, (forward, backward, tangent), maximum, flag)
    operation: Operation = getattr(registered, name).default
    return operation


def _register(
    name: str, attributes: str, passes: tuple[Pass, Pass, Pass], maximum: bool, flag: Flag | None
) -> None:
    forward, backward, tangent = passes
    saved = SAVED if flag is None else f"{SAVED}, Tensor exact"
    outputs = ", ".join("Tensor" for _ in saved.split(","))
    gradients = ", ".join("Tensor" for _ in range(FLOATS))

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
        rows = q.shape[:-1]
        dtype = compute_dtype(q, k, v)
        largest = q.new_empty(rows if maximum else (0,), dtype=dtype)
        out = v.new_empty((*rows, v.shape[-1]))
        more = () if flag is None else (flag(q, str(rest[-1])),)
        return out, q.new_empty(rows, dtype=dtype), largest, *more

    derivatives = (
        define(
            f"{name}_backward(Tensor gradient, {GIVEN}, {saved}{attributes}) -> ({gradients})",
            backward,
            _fake_backward,
        ),
        define(f"{name}_tangent({TANGENTS}, {GIVEN}, {saved}{attributes}) -> Tensor", tangent, _fake_tangent),
    )
    operation = define(f"{name}({GIVEN}{attributes}) -> ({outputs})", forward, fake_forward)
    differentiate(operation, *_rules(*derivatives))
    for derivative in derivatives:
        differentiate(
            derivative,
            *refusals(SECOND_DERIVATIVE.format(name=f"polynomial attention ({NAMESPACE}::{name})")),
        )


def _fake_backward(gradient: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(gradient.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in inputs[:FLOATS])


def _fake_tangent(*inputs: Any) -> Tensor:
    out: Tensor = inputs[FLOATS + INPUTS]
    return torch.empty_like(out, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- registration


def _library() -> torch.library.Library:
    """The one of this process: what it registered goes when it does, and copies of this file share it."""
    shared = vars(getattr(torch.ops, NAMESPACE))
    if "library" not in shared:
        shared["library"] = torch.library.Library(NAMESPACE, "FRAGMENT")
    library: torch.library.Library = shared["library"]
    return library


def define(
    schema: str,
    run: Pass,
    fake: Callable[..., object],
    batching_rule: Callable[[Operation], Callable[..., object]] | None = None,
) -> Any:
    """An operation for all devices, which torch.compile does not look into, without derivatives so far.

    batching_rule(operation) is its rule for vmap; without one, what is mapped joins the batch.
    """
    library, name = _library(), schema.partition("(")[0]

    def kernel(*inputs: Any) -> object:
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return run(*inputs)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _out_of_sight(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(
        f"{NAMESPACE}::{name}", (batching_rule or _batching_rule)(operation), lib=library
    )
    return operation


def _out_of_sight(kernel: Pass) -> Pass:
    """torch.compiler.disable(kernel) where Dynamo is loaded; that takes seconds, and nothing is compiled without it."""
    disabled: list[Pass] = []

    def run(*inputs: Any) -> object:
        if "torch._dynamo" not in sys.modules:
            return kernel(*inputs)
        if not disabled:
            disabled.append(torch.compiler.disable(kernel))
        return disabled[0](*inputs)

    return run


def _batching_rule(operation: Operation) -> Callable[..., object]:
    """vmap: what it maps over joins the batch, and what it does not is repeated there.

    Tensors of one dimension (what is absent, and the flag of a guard, which decides for all at once) have no batch.
    """

    def rule(info: Any, places: tuple[int | None, ...], *inputs: Any) -> object:
        size = info.batch_size

        def folded(x: Any, place: int | None) -> Any:
            if not isinstance(x, Tensor) or (place is None and x.ndim < 2):
                return x
            if place is not None and x.ndim < 3:
                raise RuntimeError(f"{operation} is not mapped over a tensor of shape {list(x.shape)}")
            whole = x.expand(size, *x.shape) if place is None else x.movedim(place, 0)
            return whole.flatten(0, 1)

        results = operation(*map(folded, inputs, places))
        several = results if isinstance(results, tuple | list) else (results,)
        found = tuple(x if x.ndim < 2 else x.unflatten(0, (size, -1)) for x in several)
        batched = tuple(None if x.ndim < 2 else 0 for x in several)
        return (found, batched) if isinstance(results, tuple | list) else (found[0], batched[0])

    return rule


# ---------------------------------------------------------------- derivatives


def differentiate(operation: Any, setup: Pass, backward: Pass, jvp: Pass) -> None:
    """Give an operation its derivatives: setup(ctx, inputs, results), backward(ctx, gradient), jvp(ctx, *tangents).

    A function's forward turns both modes off, also for the levels of torch.func below: they are turned on again.
    """

    def forward(ctx: Any, keys: Any, *inputs: Any) -> object:
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
            results = operation.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, results)
        return results

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: (None, *backward(ctx, *gradients))),
        "jvp": staticmethod(lambda ctx, _, *tangents: jvp(ctx, *tangents)),
    }
    function: Any = type(operation._opname, (_SingleLevelFunction,), members)

    def kernel(keys: Any, *inputs: Any) -> object:
        with enable_single_level_autograd_function():
            return function.apply(keys, *inputs)

    _library().impl(operation._opname, kernel, "Autograd", with_keyset=True)


def _rules(backward_operation: Operation, tangent_operation: Operation) -> tuple[Pass, Pass, Pass]:
    """The rules of a forward operation, by the operations of its two derivatives. Only `out` is differentiable."""

    def setup(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*results[1:])
        kept = (*inputs[:INPUTS], *results)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.attributes = inputs[INPUTS:]

    def backward(ctx: Any, gradient: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        others = (None,) * (INPUTS - FLOATS + len(ctx.attributes))
        if gradient is None:
            return (None,) * FLOATS + others
        kept = ctx.saved_tensors
        gradients = backward_operation(gradient, *kept, *ctx.attributes)
        given = (None if x is None else g for x, g in zip(kept[:FLOATS], gradients, strict=True))
        return (*given, *others)

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[object, ...]:
        kept = ctx.saved_tensors
        tangent = tangent_operation(*tangents[:FLOATS], *kept, *ctx.attributes)
        return (tangent, *(None for _ in kept[INPUTS + 1 :]))

    return setup, backward, jvp


def refusals(message: str) -> tuple[Pass, Pass, Pass]:
    """The rules of an operation without derivatives: RuntimeError with the message where one is asked for."""

    def refuse(*_: object) -> object:
        raise RuntimeError(message)

    return (lambda ctx, inputs, results: None), refuse, refuse
