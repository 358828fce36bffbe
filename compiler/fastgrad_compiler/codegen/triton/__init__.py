"""Triton kernels for attention: the text of a GPU kernel file, from a specification."""

from __future__ import annotations

from functools import cache

from fastgrad_compiler.approximation.kernel_tiles import has_triton, is_fused
from fastgrad_compiler.codegen.templates import render
from fastgrad_compiler.codegen.titles import kernel_title
from fastgrad_compiler.codegen.triton.configurations import configurations
from fastgrad_compiler.runtime.kernel_spec import KernelSpec, folded_coefficients
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import BLOCK
from fastgrad_compiler.runtime.triton_tables import TILE, padded_rank


@cache
def emit_triton(spec: KernelSpec) -> str:
    """The source of the file of GPU kernels; it imports triton alone. ValueError where `has_triton` is False."""
    if not has_triton(spec):
        raise ValueError("there are no Triton kernels for this attention")
    return render("triton/attention.py.j2", _context(spec))


def _context(spec: KernelSpec) -> dict[str, object]:
    padded, state_width = padded_rank(spec.d, spec.degree), _up(spec.dv, 16)
    folded = folded_coefficients(spec)
    total = not spec.causal and spec.near is None
    values = _power(spec.dv)
    return {
        "title": kernel_title(spec),
        "specification": f"d = {spec.d}, dv = {spec.dv}, degree {spec.degree}",
        "d": spec.d,
        "dv": spec.dv,
        "degree": spec.degree,
        "rank": rank(spec.d, spec.degree),
        "padded": padded,
        "wide": _power(spec.d),
        "values": values,
        "near": spec.near,
        "near_d": spec.near_d,
        "near_wide": _power(spec.near_d or 1),
        "separate": spec.near_d is not None,
        "local": "near_q.near_k" if spec.near_d else "SCALE q.k",
        "scale": float(spec.scale),
        "causal": spec.causal,
        "padding": spec.padding,
        "forget": spec.forget,
        "total": total,
        "after": spec.near is not None and not spec.causal,
        "whole": spec.d <= BLOCK,
        "fused": is_fused(spec),
        "block": BLOCK,
        "tile": TILE,
        "state_width": state_width,
        "state_size": padded * (state_width + 1),
        "d_loaded": _up(spec.d, 8),
        "dv_loaded": _up(spec.dv, 8),
        "near_loaded": _up(spec.near_d or 1, 8),
        "horner": _horner(folded),
        "horner_slope": _horner(tuple(power * c for power, c in enumerate(folded))[1:]),
        "configs": configurations(spec, is_fused(spec)),
    }


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power(size: int) -> int:
    """The next power of two, at least BLOCK."""
    return max(BLOCK, 1 << (size - 1).bit_length())


def _horner(coefficients: tuple[float, ...]) -> str:
    """An expression for the polynomial of `s`, a constant one as a tensor."""
    *rest, last = map(float, coefficients)
    if not rest:
        return f"s * 0.0 + {last!r}"
    text = f"{last!r}"
    for position, coefficient in enumerate(reversed(rest)):
        text = f"{text} * s + {coefficient!r}" if position == 0 else f"({text}) * s + {coefficient!r}"
    return text
