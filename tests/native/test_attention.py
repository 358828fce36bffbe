"""Attention kernels that C++ serves: the values of PyTorch's, and the same behaviour within PyTorch."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.kernel import KernelSpec, kernel_name, load_kernel
from fastgrad_compiler.runtime.native_attention import NativeAttention, Operations
from fastgrad_compiler.targets import PYTORCH
from fastgrad_dsl.api.loader import load_package
from tests.dsl.models import EXAMPLES, SIZES
from tests.kernels.inputs import CPP, Inputs, make_inputs, worst_error
from tests.native.compilers import NEEDS_COMPILER
from tests.native.test_kernels import specification

pytestmark = [NEEDS_COMPILER, pytest.mark.usefixtures("native"), pytest.mark.medium]

CAUSAL, NEAR, UNMASKED = map(specification, ("causal", "causal, near", "unmasked"))
SPECS = pytest.mark.parametrize("spec", [CAUSAL, NEAR, UNMASKED], ids=["causal", "near", "unmasked"])
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def run(spec: KernelSpec, inputs: Inputs, native: bool, exact_below: int = 0) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    out = load_kernel(spec, CPP if native else PYTORCH)(
        *inputs.tensors[:3], **inputs.named, mask=inputs.mask, exact_below=exact_below
    )
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent.to(out.dtype))]


def served(spec: KernelSpec, variant: str) -> bool:
    """Whether the native operations of a kernel are there."""
    return hasattr(torch.ops.fastgrad, f"{kernel_name(spec, CPP)}_{variant}_backward")


SLOW = {(CAUSAL, torch.bfloat16)} | {(UNMASKED, dtype) for dtype in ROUNDING if dtype != torch.float64}
KINDS = [
    pytest.param(spec, dtype, marks=[pytest.mark.slow] if (spec, dtype) in SLOW else [], id=f"{name}-{dtype}")
    for name, spec in (("causal", CAUSAL), ("near", NEAR), ("unmasked", UNMASKED))
    for dtype in ROUNDING
]


@pytest.mark.parametrize(("spec", "dtype"), KINDS)
def test_values_and_dtypes_are_those_of_the_torch_target(spec: KernelSpec, dtype: torch.dtype) -> None:
    inputs = make_inputs(spec, 37, groups=2).to(dtype)
    found, expected = run(spec, inputs, True), run(spec, inputs, False)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert [x.stride() for x in found] == [x.stride() for x in expected]
    assert worst_error(found, expected) <= ROUNDING[dtype]
    variant = "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
    assert served(spec, variant)


def test_mixed_dtypes_are_those_of_the_torch_target() -> None:
    q, k, v = make_inputs(CAUSAL, 9).tensors
    for dtypes in (
        (torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ):
        given = [x.detach().to(dtype).requires_grad_() for x, dtype in zip((q, k, v), dtypes, strict=True)]
        results = []
        for native in (True, False):
            out = load_kernel(CAUSAL, CPP if native else PYTORCH)(*given)
            results.append([out, *torch.autograd.grad(out.square().sum(), given)])
        assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
        assert worst_error(*results) <= ROUNDING[torch.bfloat16]


def test_any_strides() -> None:
    """Heads split from a projection, a width that is not dense, keys that all heads share, and a gradient of ones."""
    inputs = make_inputs(NEAR, 12, heads=3)
    q, k, v, near_q, near_k = (x.detach() for x in inputs.tensors)
    given = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k[:, :1].expand_as(k),
        v.mT.contiguous().mT,
        torch.cat([near_q, near_q], -1)[..., ::2],
        near_k.transpose(0, 2).contiguous().transpose(0, 2),
    ]
    assert inputs.mask is not None
    mask = torch.stack([inputs.mask, inputs.mask], -1)[..., 0]
    results = []
    for native in (True, False):
        leaves = [x.detach().requires_grad_() for x in given]
        out = load_kernel(NEAR, CPP if native else PYTORCH)(*leaves, mask=mask)
        results.append([out, *torch.autograd.grad(out.sum() + out.square().sum(), leaves)])
    assert worst_error(*results) <= ROUNDING[torch.float64]


def test_both_passes_take_the_threads_that_pytorch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def operation(*arguments: object) -> None:
        asked.append(arguments[-1])

    monkeypatch.setattr(NativeAttention, "_serve", lambda *_: Operations(operation, operation, *[None] * 5))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    q, v = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4)
    kernel = NativeAttention("attention_x", None, KernelSpec(3, 4, (1.0, 1.0)))
    saved = kernel.forward(q, q, v, None, None, None, None, None)
    assert saved is not None
    kernel.backward(saved[0], q, q, v, None, None, None, None, None, *saved)
    assert asked == [5, 5]


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)], ids=str)
def test_inputs_without_elements_are_for_pytorch(shape: tuple[int, ...]) -> None:
    q, v = torch.zeros(*shape, CAUSAL.d, requires_grad=True), torch.zeros(*shape, CAUSAL.dv)
    assert load_kernel(CAUSAL, CPP)(q, q, v).shape == v.shape


def test_exact_below_the_break_even_length() -> None:
    inputs = make_inputs(NEAR, 11)
    expected = run(NEAR, inputs, False, exact_below=12)
    assert all(torch.equal(a, b) for a, b in zip(run(NEAR, inputs, True, 12), expected, strict=True))
    assert worst_error(run(NEAR, inputs, True, 11), expected) > 1e-4


@SPECS
@pytest.mark.parametrize("exact_below", [0, 100])
def test_opcheck(spec: KernelSpec, exact_below: int) -> None:
    inputs = make_inputs(spec, 9)
    load_kernel(spec, CPP)
    arguments = (*inputs.arguments, exact_below, "")
    torch.library.opcheck(getattr(torch.ops.fastgrad, kernel_name(spec, CPP)), arguments)
    assert exact_below or served(spec, "float64")


@SPECS
def test_gradcheck(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, 5 if spec is CAUSAL else 9, batch=1, heads=1)

    def attend(q: Tensor, k: Tensor, v: Tensor, *near: Tensor) -> Tensor:
        names = dict(zip(("near_q", "near_k"), near, strict=False))
        return load_kernel(spec, CPP)(q, k, v, **names, mask=inputs.mask)

    assert torch.autograd.gradcheck(attend, inputs.tensors)


class Layer(nn.Module):
    """Projections and a kernel, as a compiled model has them."""

    def __init__(self, native: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(12, 2 * (2 * CAUSAL.d + CAUSAL.dv))
        self.attend = load_kernel(CAUSAL, CPP if native else PYTORCH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).unflatten(-1, (2, -1)).transpose(-2, -3)
        q, k, v = split.split((CAUSAL.d, CAUSAL.d, CAUSAL.dv), -1)
        unit = torch.nn.functional.normalize
        return self.attend(unit(q, dim=-1), unit(k, dim=-1), v).transpose(-2, -3).flatten(-2)


def test_compile_and_export() -> None:
    layer, plain = Layer(), Layer(native=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(2, 10, 12),), dynamic_shapes=({1: n},))
    for length in (7, 19):
        x = torch.randn(2, length, 12)
        expected = plain(x)
        for function in (compiled, program.module(), copy.deepcopy(layer)):
            torch.testing.assert_close(function(x), expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), module.project.weight)[0]
            for y, module in ((expected, plain), (compiled(x), layer))
        ]
        torch.testing.assert_close(*gradients)


def test_checkpoint() -> None:
    inputs = make_inputs(CAUSAL, 21)
    expected = run(CAUSAL, inputs, True)
    out = checkpoint(load_kernel(CAUSAL, CPP), *inputs.tensors, use_reentrant=False)
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out, inputs.tensors, inputs.cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


def test_autocast() -> None:
    """Projections run in bfloat16; the output follows v; the weights and their gradients stay float32."""
    layer, x = Layer(), torch.randn(2, 21, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), Layer(native=False)(x), atol=5e-2, rtol=5e-2)
    out.float().square().sum().backward()
    assert layer.project.weight.grad is not None
    assert layer.project.weight.grad.dtype == torch.float32
    inputs = make_inputs(CAUSAL, 40).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(CAUSAL, inputs, True)
    assert all(torch.equal(a, b) for a, b in zip(found, run(CAUSAL, inputs, True), strict=True))


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("fastgrad", "lark", "scipy", "rich", "typer", "platformdirs")):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
import torch
sys.path.insert(0, sys.argv[1])
from gpt import MODEL
out = MODEL(seed=5)(torch.load(sys.argv[2]))
out.square().mean().backward()
built = {name.rpartition("_float32_")[2] for name in dir(torch.ops.fastgrad)}
assert {"forward", "backward", "step", "absorb"} <= built
torch.save(out, sys.argv[2])
"""


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["folder", "archive"]
)
def test_a_generated_package_stands_alone(packed: bool, tmp_path: Path) -> None:
    """In a folder, in an archive, and loaded here from memory."""
    compiled = fg.compile(EXAMPLES / "bounded.tfg", params=SIZES["bounded"], out=tmp_path / "gpt")
    tokens = torch.randint(11, (1, 700), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    where = tmp_path
    if packed:
        where = tmp_path / "gpt.zip"
        with zipfile.ZipFile(where, "w") as archive:
            for name, text in compiled.files.items():
                archive.writestr(f"gpt/{name}", text)
    command = [sys.executable, "-I", "-c", ALONE, str(where), str(tmp_path / "tokens.pt")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    out = torch.load(tmp_path / "tokens.pt")
    models = [load_package(tmp_path / "gpt").MODEL(seed=5), compiled.module(seed=5)]
    plain = fg.compile(EXAMPLES / "bounded.tfg", params=SIZES["bounded"], target="torch")
    assert not [name for name in plain.modules if "native" in name or name.endswith(".cpp")]
    for model in (*models, plain.module(seed=5)):
        torch.testing.assert_close(model(tokens), out)
        assert list(model.state_dict()) == list(models[0].state_dict())
