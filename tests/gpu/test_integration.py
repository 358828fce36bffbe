"""The target triton from end to end, in the interpreter: files, operations, models, and where it cannot run."""

from __future__ import annotations

import ast
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad_dsl as fg
from benchmarks.launches import Recorder, load_kernels, write_kernels
from fastgrad_compiler.codegen.kernel import KernelSpec, emit_kernel, kernel_files, kernel_name, load_kernel
from fastgrad_compiler.runtime import triton_attention, triton_kernels, triton_tuned
from fastgrad_compiler.runtime.triton_attention import Launches, TritonAttention
from fastgrad_compiler.runtime.triton_kernels import cannot_build, refusal
from fastgrad_compiler.targets import BACKENDS, PYTORCH
from fastgrad_dsl.api.compiled import Compiled
from tests.dsl.models import EXAMPLES, INPUTS, SIZES, always_polynomial, disturbed
from tests.gpu.interpreter import install, launches
from tests.grids import wide
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, run_dense, worst_error

install()

ROOT = Path(__file__).parents[2]
TRITON, AUTO = BACKENDS["triton"], BACKENDS["auto"]
SINGLE = 2e-5  # of float32 beside float64, relative to the largest entry
CAUSAL = KernelSpec(3, 4, COEFFICIENTS[2], causal=True, padding=True)
NEAR = KernelSpec(4, 5, COEFFICIENTS[3], causal=True, near=16, near_d=3, scale=0.8)
CROSS = KernelSpec(4, 6, COEFFICIENTS[2])
FORGET = KernelSpec(4, 6, COEFFICIENTS[2], causal=True, padding=True, near=6, forget=True)
SPECS = pytest.mark.parametrize(
    "spec", [CAUSAL, NEAR, CROSS, FORGET], ids=["causal", "near", "cross", "forget"]
)
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache without tuned configurations."""
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "cache"))
    triton_tuned.chosen.cache_clear()
    yield
    triton_tuned.chosen.cache_clear()


def sample(spec: KernelSpec) -> Inputs:
    """float32 inputs of two query heads to a key head; the cross attention has more keys than queries."""
    m = 29 if spec is CROSS else None
    return make_inputs(spec, 23, m, batch=1, heads=1, groups=2).to(torch.float32)


def run(spec: KernelSpec, inputs: Inputs, exact_below: int = 0, backends: Any = TRITON) -> list[Tensor]:
    """Output and gradients."""
    out = load_kernel(spec, backends)(
        *inputs.tensors[:3], **inputs.named, mask=inputs.mask, exact_below=exact_below
    )
    return [out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)]


def module_of(spec: KernelSpec) -> Any:
    return sys.modules[load_kernel(spec, TRITON).__module__]


@pytest.mark.medium
@SPECS
def test_operations_run_on_triton(spec: KernelSpec) -> None:
    inputs = sample(spec)
    with launches() as ran:
        found = run(spec, inputs)
    assert {"forward_kernel", "key_gradient_kernel"} <= {x.kernel.removeprefix("fused_") for x in ran}
    assert worst_error(found, run_dense(spec, inputs.to(torch.float64))) < SINGLE


SAVED = [(NEAR, "forward"), (NEAR, "backward"), (CROSS, "forward"), (FORGET, "backward")]
EVERY = [(spec, other) for spec in (CAUSAL, NEAR, CROSS, FORGET) for other in ("forward", "backward")]


@pytest.mark.medium
@pytest.mark.parametrize(("spec", "other"), wide(EVERY, few=SAVED))
def test_each_pass_takes_what_the_other_targets_saved(
    spec: KernelSpec, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of(spec).TRITON, other, lambda *_: None)
    inputs = sample(spec)
    with launches() as ran:
        found = run(spec, inputs)
    assert ran
    assert worst_error(found, run_dense(spec, inputs.to(torch.float64))) < SINGLE


def test_mixed_types_and_strided_inputs() -> None:
    inputs = sample(NEAR)
    tensors = [x.detach().mT.contiguous().mT for x in inputs.tensors]
    tensors[2] = tensors[2].to(torch.float16)
    with launches() as ran:
        out = load_kernel(NEAR, TRITON)(*tensors[:3], tensors[3], tensors[4])
    assert ran
    assert out.dtype == torch.float16
    assert worst_error([out], run(NEAR, inputs, backends=PYTORCH)[:1]) < 2e-3


def test_exact_below_the_break_even_length() -> None:
    inputs = sample(NEAR)
    with launches() as ran:
        found = run(NEAR, inputs, exact_below=24)
    assert not ran
    assert all(torch.equal(a, b) for a, b in zip(found, run(NEAR, inputs, 24, PYTORCH), strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)], ids=str)
def test_inputs_without_elements_are_for_pytorch(shape: tuple[int, ...]) -> None:
    spec = KernelSpec(3, 4, COEFFICIENTS[2], causal=True)
    q, v = torch.zeros(*shape, 3, requires_grad=True), torch.zeros(*shape, 4)
    assert load_kernel(spec, TRITON)(q, q, v).shape == v.shape


@pytest.mark.medium
@pytest.mark.parametrize(
    "spec",
    [
        replace(FORGET, near_d=3),  # every input that there may be
        *(pytest.param(spec, marks=SLOW) for spec in (CAUSAL, NEAR, CROSS, FORGET)),
    ],
    ids=["all", "causal", "near", "cross", "forget"],
)
def test_opcheck(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, 9, batch=1, heads=1).to(torch.float32)
    load_kernel(spec, TRITON)
    arguments = (*inputs.arguments, 0, "")
    with launches() as ran:
        torch.library.opcheck(getattr(torch.ops.fastgrad, kernel_name(spec, TRITON)), arguments)
    assert ran


class Layer(nn.Module):
    """Projections and a kernel, as a compiled model has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(12, 3 + 3 + 4)
        self.attend = load_kernel(KernelSpec(3, 4, COEFFICIENTS[2], causal=True), TRITON)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).unflatten(-1, (1, 10)).transpose(-2, -3)
        q, k, v = split.split((3, 3, 4), -1)
        unit = torch.nn.functional.normalize
        return self.attend(unit(q, dim=-1), unit(k, dim=-1), v).transpose(-2, -3).flatten(-2)


@pytest.mark.medium
def test_compile_and_export() -> None:
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(1, 10, 12),), dynamic_shapes=({1: n},))
    for length in (7, 19):
        x = torch.randn(1, length, 12)
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), layer.project.weight)[0] for y in (expected, found)
        ]
        torch.testing.assert_close(gradients[0], gradients[1])
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected)


class Operations(TorchDispatchMode):
    """The names of what runs, and the shapes of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, object]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        assert not (named or {}).get("device") or torch.device((named or {})["device"]).type == "meta"
        made = result if isinstance(result, tuple) else (result,)
        self.seen.append((function.__name__, tuple(tuple(each.shape) for each in made)))
        return result


@SPECS
def test_launches_wait_for_nothing_and_allocate_by_shape(spec: KernelSpec, tmp_path: Path) -> None:
    """On tensors without storage a value cannot be read, and from the second call on no table is made or moved."""
    path = write_kernels(spec, tmp_path, "kernels")
    inputs = sample(spec)
    *given, _ = (x if x is None else x.detach().to("meta") for x in inputs.arguments)
    cotangent = inputs.cotangent.to("meta")
    runs = []
    for _ in range(3):
        with Operations() as operations:
            call = Launches(Recorder(load_kernels(path), path, "sm_90"), spec, *given)  # type: ignore[arg-type]
            call.backward(cotangent, *call.forward())
        runs.append(operations.seen)
    assert runs[1] == runs[2]
    allowed = {"empty", "new_empty", "view", "constant_pad_nd", "clone", "_to_copy", "slice", "detach"}
    allowed |= {
        "ne",
        "any",
        "arange",
        "scalar_tensor",
        "where",
        "amax",
    }  # the last query with a gradient, of each row
    names = {name.partition(".")[0] for name, _ in runs[1]}
    assert not names & {"_local_scalar_dense", "nonzero", "lift_fresh", "lift_fresh_copy"}
    assert spec.forget or names <= allowed  # sums of gates take many more, all of them on the device


# ---------------------------------------------------------------- models


@cache
def shallow(name: str, target: str) -> Compiled:
    """An example of one layer with two heads, or as many as it needs."""
    heads = {} if name == "llama" else {"heads": 2}
    params = {**SIZES[name], **heads, "depth": 1}
    return fg.compile(EXAMPLES / f"{name}.tfg", params=params, target=target, validate=False)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    ["bounded", pytest.param("llama", marks=SLOW), pytest.param("encoder_decoder", marks=SLOW), "bert"],
)
def test_a_model_equals_that_of_pytorch(name: str) -> None:
    """Near fields, grouped queries, cross attention, padding."""
    plain, compiled = (shallow(name, target) for target in ("torch", "triton"))
    weights = disturbed(plain.module(seed=1))
    results = []
    for one in (plain, compiled):
        model = always_polynomial(one, weights)
        with launches() as ran:
            out = model(*(x[1:] for x in INPUTS[name]))  # the row with padding
            out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert ran
    assert worst_error(results[1], results[0]) < 1e-4  # several layers of float32


def test_files_and_plan_of_a_model() -> None:
    compiled = shallow("bounded", "triton")
    kernels = {entry["kernel"] for entry in compiled.plan_document["attentions"]} - {None}
    assert kernels
    assert compiled.plan_document["target"] == "triton"
    for kernel in kernels:
        assert {f"{kernel}.py", f"{kernel}_triton.py"} <= compiled.files.keys()
    assert {"triton_attention.py", "triton_tables.py", "private_files.py"} <= compiled.files.keys()
    assert not [name for name in compiled.files if name.endswith(".cpp") or name == "native_attention.py"]
    assert not [name for name in shallow("bounded", "torch").files if "triton" in name]


@pytest.mark.parametrize(
    "options", [{"documents": True}, {"d": 65}, {"dv": 129}, {"near": 16, "near_d": 65}], ids=str
)
def test_what_triton_does_not_serve_says_so(options: dict[str, Any]) -> None:
    spec = KernelSpec(**{"d": 3, "dv": 4, "coefficients": COEFFICIENTS[2], "causal": True, **options})
    assert list(kernel_files(spec, TRITON)) == [f"{kernel_name(spec, TRITON)}.py"]
    assert "PyTorch serves it on a GPU too" in emit_kernel(spec, TRITON)
    assert "PyTorch serves it" not in emit_kernel(spec, AUTO)
    assert kernel_name(spec, AUTO) == kernel_name(spec, BACKENDS["cpp"])


def test_names_differ_by_target() -> None:
    assert len({kernel_name(CAUSAL, backends) for backends in BACKENDS.values()}) == len(BACKENDS)


WRITTEN = """
import os, sys, torch
import fastgrad_dsl as fg
folder, tokens = sys.argv[1:]
for how in ("from texts", "in place"):
    if os.fork() == 0:  # the first that registers a kernel is the only one in a process
        if how == "from texts":
            model = fg.load(folder, seed=5)
        else:
            sys.path.insert(0, folder.removesuffix("/gpt"))
            from gpt import MODEL
            model = MODEL(seed=5)
        torch.save(model(torch.load(tokens)), f"{tokens} {how}")
        kernels = [name for name in sys.modules if ".attention_" in name and name.endswith("_triton")]
        print(*(sys.modules[name].__file__ for name in kernels), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, how
"""


@pytest.mark.medium
def test_a_written_model_runs_in_another_process(tmp_path: Path) -> None:
    """Kernels are where the texts of a folder were written to, in the cache, or where the folder is."""
    shallow("bounded", "triton").write(tmp_path / "gpt")
    model = tmp_path / "gpt" / "model.py"
    model.write_text(model.read_text().replace("exact_below=", "exact_below=0 * "))
    tokens = INPUTS["bounded"][0]
    torch.save(tokens, tmp_path / "tokens.pt")
    result = in_another_process(WRITTEN, str(tmp_path / "gpt"), str(tmp_path / "tokens.pt"))
    assert (result.returncode, result.stderr) == (0, "")
    assert [Path(path).parent for path in result.stdout.split()] == [tmp_path / "cache", tmp_path / "gpt"]
    plain = shallow("bounded", "torch")
    expected = always_polynomial(plain, plain.module(seed=5))(tokens)
    for how in ("from texts", "in place"):
        torch.testing.assert_close(torch.load(tmp_path / f"tokens.pt {how}"), expected)


# ---------------------------------------------------------------- where it cannot run


def in_another_process(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/compiler:{ROOT}/grammar", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True, check=False
    )


FALLBACK = """
import os, sys, warnings
import torch
from fastgrad_compiler.codegen.kernel import load_kernel
from fastgrad_compiler.runtime import triton_attention
from fastgrad_compiler.targets import BACKENDS
from tests.kernels.inputs import COEFFICIENTS, KernelSpec, make_inputs

def compare(target, dtype):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for degree in (2, 3):
            spec = KernelSpec(3, 4, COEFFICIENTS[degree], causal=True)
            inputs = make_inputs(spec, 9).to(dtype)
            results = []
            for backends in (BACKENDS["torch"], BACKENDS[target]):
                out = load_kernel(spec, backends)(*inputs.tensors)
                results.append([out, *torch.autograd.grad(out, inputs.tensors, inputs.cotangent)])
            assert all(torch.equal(a, b) for a, b in zip(*results))
    return [f"{warning.category.__name__} {warning.message}" for warning in found]

assert "triton" not in sys.modules
for target, setting, dtype, environment in CASES:
    if os.fork() == 0:  # a process that has warned of nothing yet and has no Triton
        os.environ.update(environment)
        exec(setting)
        print([target, environment, compare(target, dtype)], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, (target, environment)
"""
BROKEN = """
def broken(*_): raise RuntimeError("PassManager::run failed")
triton_attention.Launches.forward = broken
"""
TAKES_OVER: list[tuple[str, str, torch.dtype, dict[str, str], str | None]] = [
    ("triton", "", torch.float32, {"TRITON_INTERPRET": "0"}, "they need a GPU"),
    ("triton", "", torch.float64, {}, "they are for float32, float16 and bfloat16, not for float64"),
    ("triton", 'sys.modules["triton"] = None', torch.float32, {}, "Triton is not installed"),
    ("triton", BROKEN, torch.float32, {}, "cannot be built for this device: PassManager::run failed"),
    # The target auto is by device, and FASTGRAD_TRITON=0 is the user's wish.
    ("auto", "", torch.float32, {"TRITON_INTERPRET": "0", "FASTGRAD_TRITON": "1"}, None),
    ("triton", "", torch.float32, {"TRITON_INTERPRET": "0", "FASTGRAD_TRITON": "0"}, None),
]


@pytest.mark.medium
def test_pytorch_takes_over_with_one_warning_or_none_where_triton_is_not_wanted() -> None:
    cases = [case[:-1] for case in TAKES_OVER]
    result = in_another_process(FALLBACK.replace("CASES", repr(cases)), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    told = [ast.literal_eval(line) for line in result.stdout.splitlines()]
    assert [each[:2] for each in told] == [
        [target, environment] for target, _, _, environment, _ in TAKES_OVER
    ]
    for (_, _, warnings), (*_, reason) in zip(told, TAKES_OVER, strict=True):
        assert len(warnings) == (reason is not None), (reason, warnings)
        for warning in warnings:
            assert warning.startswith("TritonWarning attention runs without Triton kernels, and slower: ")
            assert warning.endswith(reason)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert refusal(tensor) == "they need a GPU of compute capability 8.0 or higher, not 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert refusal(tensor) is None
    elsewhere: Any = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    assert refusal(elsewhere) == "they need a GPU"


def test_an_error_of_the_call_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Launches, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(CAUSAL, sample(CAUSAL))
    assert not cannot_build(ValueError("a shape"))
    assert cannot_build(RuntimeError("Failed to find C compiler"))


# ---------------------------------------------------------------- files of kernels


def imported(name: str, text: bytes | None) -> ModuleType:
    """A module of kernels from memory."""

    def data(path: str) -> bytes:
        if text is None:
            raise FileNotFoundError(path)
        return text

    spec: Any = SimpleNamespace(
        name="fastgrad_test.model", origin="<model>", loader=SimpleNamespace(get_data=data)
    )
    sys.modules.pop(f"fastgrad_test.{name}", None)
    return triton_kernels.import_kernels(name, spec)


def test_kernels_from_memory_are_written_whole(tmp_path: Path) -> None:
    first = imported("kernels", b"NUMBER = 1\n")
    path = Path(str(first.__file__))
    assert path.parent == tmp_path / "cache"
    path.write_bytes(b"NUM")  # as a crash would leave it, were it not renamed into place
    assert imported("kernels", b"NUMBER = 1\n").NUMBER == 1
    assert imported("kernels", b"NUMBER = 2\n").NUMBER == 2
    assert [file.suffix for file in path.parent.iterdir() if file.is_file()] == [".py", ".py"]


def test_kernels_without_a_cache_last_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "file" / "cache"))
    module = imported("kernels", b"NUMBER = 3\n")
    assert module.NUMBER == 3
    assert tmp_path not in Path(str(module.__file__)).parents


def test_a_missing_file_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"kernels\.py is missing: compile the model again"):
        imported("kernels", None)
    said: list[str] = []
    monkeypatch.setattr(triton_attention, "warn", said.append)
    attention = TritonAttention("attention_x", None, CAUSAL)
    q, k, v = (x.detach() for x in sample(CAUSAL).tensors)
    for _ in range(2):
        assert attention.forward(q, k, v, *[None] * 5) is None
    assert len(said) == 1
    assert said[0].endswith("attention_x_triton.py is missing: compile the model again")
