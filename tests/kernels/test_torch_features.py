"""Kernels within PyTorch: operator checks, gradients, compile, export, checkpoint, autocast, deepcopy, DDP."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgrad_compiler.codegen.kernel import KernelSpec, emit_kernel, kernel_name, load_kernel
from fastgrad_compiler.runtime.exact_attention import OPERATION as EXACT
from fastgrad_compiler.runtime.exact_attention import exact_attention
from tests.kernels.inputs import COEFFICIENTS, make_inputs, named, run_kernel

CAUSAL = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, chunk=4)
NEAR = KernelSpec(3, 4, COEFFICIENTS[2], True, True, near=4, near_d=2, chunk=4)
UNMASKED = KernelSpec(3, 4, COEFFICIENTS[3], near=5, chunk=8)
PACKED = KernelSpec(3, 4, COEFFICIENTS[2], near=4, near_d=2, chunk=4, documents=True)
FORGET = replace(NEAR, forget=True, documents=True)
SPECS = pytest.mark.parametrize(
    "spec",
    [CAUSAL, NEAR, UNMASKED, PACKED, FORGET],
    ids=["causal", "near", "unmasked", "packed", "forget"],
)


class Layer(nn.Module):
    """Projections and a kernel, as a compiled model has them."""

    def __init__(self, exact_below: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(12, 2 * (3 + 3 + 4))
        self.exact_below = exact_below
        self.attend = load_kernel(CAUSAL)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).unflatten(-1, (2, 10)).transpose(-2, -3)
        q, k, v = split.split((3, 3, 4), -1)
        unit = torch.nn.functional.normalize
        out = self.attend(unit(q, dim=-1), unit(k, dim=-1), v, exact_below=self.exact_below)
        return out.transpose(-2, -3).flatten(-2)


@pytest.mark.medium
@SPECS
@pytest.mark.parametrize("exact_below", [0, 100])
def test_opcheck(spec: KernelSpec, exact_below: int) -> None:
    operation = getattr(torch.ops.fastgrad, load_and_name(spec))
    torch.library.opcheck(operation, (*make_inputs(spec, 9).arguments, exact_below, ""))


@pytest.mark.medium
@pytest.mark.parametrize("exact_below", [0, 100])
def test_opcheck_of_transposed_inputs(exact_below: int) -> None:
    """Heads split from a projection arrive as [B, n, H, d].transpose(1, 2); the results are contiguous all the same."""
    q, k, v, near_q, near_k = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in make_inputs(NEAR, 9).tensors
    )
    for spec, rest in (
        (CAUSAL, (None, None, None, None, None)),
        (NEAR, (near_q, near_k, None, torch.ones(2, 9) > 0, None)),
    ):
        operation = getattr(torch.ops.fastgrad, load_and_name(spec))
        torch.library.opcheck(operation, (q, k, v, *rest, exact_below, ""))


class _Arguments(TorchDispatchMode):
    """Keeps the arguments of the kernel's operation."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname == kernel_name(CAUSAL):
            self.met.append(args)
        return func(*args, **(kwargs or {}))


def test_exact_below_is_decided_by_device() -> None:
    """Of a tensor that is not on a CPU the length is the GPU's, where there is one."""
    attend, (q, k, v) = load_kernel(CAUSAL), (x.detach() for x in make_inputs(CAUSAL, 9).tensors)
    with _Arguments() as kept:
        for device, of_gpu in (("cpu", None), ("cpu", 9), ("meta", None), ("meta", 9)):
            attend(*(x.to(device) for x in (q, k, v)), exact_below=5, exact_below_gpu=of_gpu)
    assert [arguments[-2] for arguments in kept.met] == [5, 5, 5, 9]


@pytest.mark.medium
def test_opcheck_of_exact_attention() -> None:
    operation: Any = EXACT
    for spec, window in ((NEAR, 0), (PACKED, 3), (FORGET, 3)):
        inputs = make_inputs(spec, 9).arguments
        torch.library.opcheck(operation, (*inputs, 0.5, spec.causal, 4, window))


def load_and_name(spec: KernelSpec) -> str:
    load_kernel(spec)
    return kernel_name(spec)


@pytest.mark.medium
@SPECS
@pytest.mark.parametrize("exact_below", [0, 100])
def test_gradcheck(spec: KernelSpec, exact_below: int) -> None:
    inputs = make_inputs(spec, 11, batch=1, heads=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        masks = {"mask": inputs.mask, "documents": inputs.documents}
        return load_kernel(spec)(q, k, v, **named(more), **masks, exact_below=exact_below)

    assert torch.autograd.gradcheck(attend, inputs.tensors)


@pytest.mark.medium
def test_gradcheck_of_exact_attention() -> None:
    inputs = make_inputs(NEAR, 11, batch=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        return exact_attention(q, k, v, near_q, near_k, inputs.mask, causal=True, near=4)

    assert torch.autograd.gradcheck(attend, inputs.tensors)


def test_second_derivatives_are_declined() -> None:
    inputs = make_inputs(CAUSAL, 5, batch=1)
    with pytest.raises(RuntimeError, match="second derivatives of polynomial attention"):
        torch.autograd.gradgradcheck(load_kernel(CAUSAL), inputs.tensors)


@pytest.mark.medium
@pytest.mark.parametrize("exact_below", [0, 100])
def test_compile_without_graph_breaks(exact_below: int) -> None:
    layer = Layer(exact_below)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 19):
        x = torch.randn(2, n, 12)
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), layer.project.weight)[0] for y in (expected, found)
        ]
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.medium
@pytest.mark.parametrize("exact_below", [0, 100])
def test_compile_with_documents_without_graph_breaks(exact_below: int) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, documents=True)
    attend = load_kernel(spec)

    def loss(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        out = attend(q, k, v, documents=documents, exact_below=exact_below)
        return (out + exact_attention(q, k, v, documents=documents, window=3)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 19):
        inputs = make_inputs(spec, n)
        assert inputs.documents is not None
        q, k, v = inputs.tensors
        found, expected = (
            torch.autograd.grad(f(q, k, v, inputs.documents), inputs.tensors) for f in (compiled, loss)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    layer = Layer()
    x = torch.randn(2, 19, 12)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("exact_below", [0, 16])
def test_export_with_dynamic_length(exact_below: int) -> None:
    """Which way a length goes is decided at run time, not when the model is exported."""
    layer = Layer(exact_below)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(2, 10, 12),), dynamic_shapes=({1: n},))
    for length in (2, 10, 33):
        x = torch.randn(2, length, 12)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    inputs = make_inputs(CAUSAL, 21)
    expected = run_kernel(CAUSAL, inputs)
    out = checkpoint(load_kernel(CAUSAL), *inputs.tensors, use_reentrant=reentrant)
    assert isinstance(out, Tensor)
    out.backward(inputs.cotangent)
    for tensor, gradient in zip(inputs.tensors, expected[1:], strict=True):
        assert torch.equal(tensor.grad if tensor.grad is not None else torch.empty(0), gradient)


def test_autocast() -> None:
    """Projections run in bfloat16; the output follows v; the weights and their gradients stay float32."""
    layer, x = Layer(), torch.randn(2, 21, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=5e-2, rtol=5e-2)
    out.float().square().sum().backward()
    assert layer.project.weight.grad is not None
    assert layer.project.weight.grad.dtype == torch.float32


def test_autocast_does_not_round_the_state() -> None:
    inputs = make_inputs(CAUSAL, 40).to(torch.float32)
    expected = run_kernel(CAUSAL, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_kernel(CAUSAL, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_deepcopy() -> None:
    layer, x = Layer(), torch.randn(2, 9, 12)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        layer, x = Layer(), torch.randn(2, 9, 12)
        expected = torch.autograd.grad(layer(x).square().sum(), layer.project.weight)[0]
        wrapped = nn.parallel.DistributedDataParallel(
            layer
        )  # must outlive the backward pass, which it synchronises
        wrapped(x).square().sum().backward()
        torch.testing.assert_close(layer.project.weight.grad, expected)
    finally:
        torch.distributed.destroy_process_group()


def _train_half(rank: int, store: str, result: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layer = Layer()
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(1))
    half = x[2 * rank : 2 * rank + 2]
    wrapped = nn.parallel.DistributedDataParallel(layer)
    wrapped(half).square().mean().backward()
    if rank == 0:
        torch.save(layer.project.weight.grad, result)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_of_two(tmp_path: Path) -> None:
    store, result = str(tmp_path / "store"), str(tmp_path / "gradient.pt")
    spawn(_train_half, (store, result), nprocs=2)
    layer = Layer()
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(1))
    layer(x).square().mean().backward()
    torch.testing.assert_close(torch.load(result), layer.project.weight.grad)


def test_source_is_visible() -> None:
    function = load_kernel(CAUSAL)
    assert inspect.getsource(function) in emit_kernel(CAUSAL)
    module = inspect.getmodule(function)
    assert module is not None
    assert module.__name__.endswith(kernel_name(CAUSAL))


def test_leading_dimensions() -> None:
    q, k, v = (x.detach() for x in make_inputs(CAUSAL, 9, batch=6).tensors)
    attend = load_kernel(CAUSAL)
    expected = attend(q, k, v)
    assert torch.equal(attend(q[2], k[2], v[2]), expected[2])
    several = attend(*(x.unflatten(0, (2, 1, 3)) for x in (q, k, v)))
    assert torch.equal(several, expected.unflatten(0, (2, 1, 3)))


def test_wrong_inputs_are_value_errors() -> None:
    q, k, v = make_inputs(CAUSAL, 9).tensors
    attend = load_kernel(CAUSAL)
    mask = torch.ones(2, 9, dtype=torch.bool)
    cases: list[tuple[str, tuple[Tensor, ...], dict[str, Tensor]]] = [
        ("as many queries as keys", (q[:, :, :5], k, v), {}),
        ("d = 3, not 2", (q[..., :2], k[..., :2], v), {}),
        ("dv = 4, not 3", (q, k, v[..., :3]), {}),
        ("k has shape", (q, k[..., :2], v), {}),
        ("v has shape", (q, k, v[:, :, :4]), {}),
        ("not a multiple", (q[:, :1], k, v), {}),
        ("three dimensions", (q[0, 0], k[0, 0], v[0, 0]), {}),
        ("together", (q, k, v), {"near_q": q}),
        ("near_d = None", (q, k, v), {"near_q": q, "near_k": k}),
        ("padding = 0", (q, k, v), {"mask": mask}),
        ("torch.bool", (q, k, v), {"mask": mask.float()}),
        ("mask has shape", (q, k, v), {"mask": mask[:, :4]}),
    ]
    for message, tensors, options in cases:
        with pytest.raises(ValueError, match=message):
            attend(*tensors, **options)
