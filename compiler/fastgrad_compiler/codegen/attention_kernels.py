"""Which kernel serves a `poly_attention`, or an `attention` within a window."""

from __future__ import annotations

from fastgrad_compiler.codegen.kernel import KernelSpec, kernel_name
from fastgrad_compiler.ir.graph import Graph, Node
from fastgrad_compiler.targets import Backends


def kernel_spec(graph: Graph, node: Node) -> KernelSpec:
    """The kernel that serves a `poly_attention`, or an `attention` within a window."""
    roles = node["roles"]
    coefficients, near = node.get("coefficients") or (), node["near"]
    assert isinstance(roles, tuple)
    assert isinstance(coefficients, tuple)
    window, near_d = node.get("window"), None
    if "near_q" in roles:
        near_d = graph[node.inputs[3 + roles.index("near_q")]].tensor.shape[-1].constant
    d, dv = (graph[node.inputs[i]].tensor.shape[-1].constant for i in (0, 2))
    scale = node["scale"]
    assert d is not None
    assert dv is not None
    assert isinstance(scale, int | float)
    return KernelSpec(
        d=d,
        dv=dv,
        coefficients=tuple(float(c) for c in coefficients if isinstance(c, int | float)),
        causal=bool(node["causal"]),
        padding="padding" in roles,
        near=near if isinstance(near, int) else None,
        near_d=near_d,
        scale=float(scale),
        documents="documents" in roles,
        window=window if isinstance(window, int) else None,
        precision=str(node.get("precision") or "float32"),
    )


def has_window_kernel(node: Node, backends: Backends) -> bool:
    """Whether a kernel serves an attention within a window; PyTorch does otherwise."""
    return node.get("window") is not None and backends.cpp and not (node["near"] or node.get("alibi"))


def kernel_module(graph: Graph, node: Node, backends: Backends) -> str | None:
    """The generated module, without its suffix, that serves an attention; None where PyTorch does."""
    if node.op == "poly_attention" or has_window_kernel(node, backends):
        return kernel_name(kernel_spec(graph, node), backends)
    return None
