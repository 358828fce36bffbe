"""(a), in few programs: the modules of the targets cpp and triton beside that of torch, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attack.cases import Case, Finding, Point, built, run_module
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.runtime import triton_kernels

TARGETS = {"triton": 40, "cpp": 240}
"""Each with how many programs there are to one that it is tried on: Triton is interpreted, and C++ is built."""
FACTOR = 64.0  # by how much more than PyTorch's float32 another order of float32 operations may lose
FLOOR = 1e-5  # of the largest entry
LARGEST = 1e6  # beyond it float32 is not looked at


def check_targets(case: Case) -> None:
    """Results and gradients of every target against float64. Raises Finding where one is far off."""
    program, chosen = case.served, [target for target, share in TARGETS.items() if case.seed % share == 0]
    if not chosen or not _served_by_kernels(program):
        return
    precise = _both(built(program, case.point.weights), case.point, torch.float64)
    single = _both(built(program, case.point.weights), case.point, torch.float32)
    for target in chosen:
        if target == "triton" and not _interprets():
            continue
        found = _both(built(program, case.point.weights, target), case.point, torch.float32)
        largest = max((float(exact.abs().max()) for exact in precise if exact.numel()), default=0.0)
        for place, (one, plain, exact) in enumerate(zip(found, single, precise, strict=True)):
            size = (
                float(exact.abs().max()) if exact.numel() else 0.0
            ) or largest  # 0 where all has cancelled
            if not bool(exact.isfinite().all()) or size > LARGEST or exact.numel() == 0:
                return
            off, usual = (float((x.double() - exact).abs().max()) for x in (one, plain))
            if not off <= FACTOR * usual + FLOOR * size + FLOOR * FLOOR:
                words = f"tensor {place} is off by {off:.3g}; torch's by {usual:.3g}"
                raise Finding("a", f"the target {target}", words)


def _served_by_kernels(program: Program) -> bool:
    """Whether anything of a program is served by kernels."""
    nodes = [node for graph in program.graphs for node in graph.nodes]
    return any(node.op == "poly_attention" or node.get("window") is not None for node in nodes)


def _interprets() -> bool:
    """Whether Triton's interpreter serves this process, and is made faithful."""
    from tests.gpu.interpreter import install

    if triton_kernels.refusal(torch.zeros(1)):
        return False
    install()
    return True


def _both(model: nn.Module, point: Point, dtype: torch.dtype) -> list[Tensor]:
    """Float results, then gradients of their sum, weighted, by the float inputs and all weights."""
    model = model.to(dtype)
    inputs = [
        x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in point.tensors()[0]
    ]
    results = [each for each in run_module(model, inputs) if each.is_floating_point()]
    return [x.detach() for x in results] + _gradients(model, inputs, results)


def _gradients(model: nn.Module, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    leaves = [*(x for x in inputs if x.requires_grad), *model.parameters()]
    generator = torch.Generator().manual_seed(0)
    weighted = [(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in results]
    scalar = torch.stack(weighted).sum() if weighted else torch.zeros(())
    if not scalar.requires_grad:
        return []
    found = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
