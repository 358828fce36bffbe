"""Tile sizes, warps and stages of Triton kernels."""

from __future__ import annotations

from fastgrad_compiler.codegen.kernel import KernelSpec

DEFAULT = (64, 64, 64, 4, 2)
KERNELS = ("state_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel", *("fused_" + x for x in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = ("float32", "float16", "bfloat16")


def configurations(spec: KernelSpec) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """ROWS, KEYS, FEATURES, warps and stages by architecture, type of the inputs and kernel."""
    return {a: {t: dict.fromkeys(KERNELS, DEFAULT) for t in TYPES} for a in ARCHITECTURES}
