"""Which kernel serves an attention: one with a polynomial, or one by softmax."""

from __future__ import annotations

from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.codegen.kernel import KernelSpec, kernel_name
from fastgrad_compiler.ir.graph import Graph, Node
from fastgrad_compiler.targets import Backends


def kernel_spec(graph: Graph, node: Node) -> KernelSpec:
    """The kernel that serves a node; ValueError where a width is known at run time only."""
    attention = Attention.of(node)
    shapes = attention.by_role([graph[name].tensor.shape for name in node.inputs])
    widths = {role: shapes[role][-1].constant for role in ("q", "v", "near_q") if role in shapes}
    if None in widths.values():
        raise ValueError(f"the widths of {node.name} are not known when it is compiled")
    sizes = {role: width for role, width in widths.items() if width is not None}
    return spec_of(attention, sizes["q"], sizes["v"], sizes.get("near_q", 0))


def has_softmax_kernel(attention: Attention, backends: Backends) -> bool:
    """Whether a kernel serves an exact attention: where masks or gates keep it from PyTorch's fused one."""
    mask = attention.mask
    unfused = mask.window is not None or mask.documents or mask.forget
    return unfused and backends.cpp and not (attention.near or attention.alibi)


def kernel_module(graph: Graph, node: Node, backends: Backends) -> str | None:
    """The generated module, without its suffix, that serves an attention; None where PyTorch does."""
    if node.op == "poly_attention" or has_softmax_kernel(Attention.of(node), backends):
        return kernel_name(kernel_spec(graph, node), backends)
    return None
