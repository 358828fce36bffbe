"""The kernel that an attention asks for."""

from __future__ import annotations

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.runtime.kernel_spec import EVERY_TOKEN, KernelSpec


def spec_of(attention: Attention, d: int, dv: int, near_d: int) -> KernelSpec:
    """The kernel that serves an attention of these widths; `near_d` counts where near pairs have their own logits."""
    mask, polynomial = attention.mask, attention.polynomial
    window = EVERY_TOKEN if polynomial is None and mask.window is None else mask.window
    return KernelSpec(
        d=d,
        dv=dv,
        coefficients=() if polynomial is None else polynomial.coefficients,
        causal=mask.causal,
        padding=mask.padding,
        near=attention.near,
        near_d=near_d if attention.own_near else None,
        scale=attention.scale,
        documents=mask.documents,
        window=window,
        forget=mask.forget,
        own=attention.is_own,
        precision="float32" if polynomial is None else polynomial.precision,
    )
