"""The call of a kernel's operation, whose inputs are checked against its specification."""

from __future__ import annotations

from torch import Tensor

from .attention_op import Inputs, call_attention, check_inputs
from .kernel_spec import KernelSpec
from .operation import Operation


def call_kernel(
    operation: Operation,
    spec: KernelSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    log_gate: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    *attributes: object,
) -> Tensor:
    """The output [.., H, n, dv] of the operation; ValueError where the inputs do not fit each other or the kernel."""
    inputs = Inputs(q, k, v, near_q, near_k, log_gate, mask, documents)
    check_inputs(inputs, spec.causal)
    found = {
        "d": (spec.d, q.shape[-1]),
        "dv": (spec.dv, v.shape[-1]),
        "near_d": (spec.near_d, None if near_q is None else near_q.shape[-1]),
        "forget": (int(spec.forget), int(log_gate is not None)),
        "padding": (int(spec.padding), int(mask is not None)),
        "documents": (int(spec.documents), int(documents is not None)),
    }
    for name, (expected, value) in found.items():
        if value != expected:
            raise ValueError(f"this attention kernel was made for {name} = {expected}, not {value}")
    return call_attention(operation, inputs, *attributes)
