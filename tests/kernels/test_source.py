"""The emitted text: stable under the formatter, deterministic, and imported once whatever its package."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgrad_compiler.codegen import kernel
from fastgrad_compiler.codegen.kernel import (
    CPP_RUNTIME_FILES,
    RUNTIME_FILES,
    TRITON_RUNTIME_FILES,
    KernelSpec,
    emit_kernel,
    kernel_name,
    load_kernel,
)
from fastgrad_compiler.runtime import exact_attention
from fastgrad_compiler.runtime.kernel_spec import choose_chunk
from fastgrad_compiler.targets import BACKENDS
from tests.kernels.inputs import COEFFICIENTS, make_inputs

CASES = [
    KernelSpec(8, 16, COEFFICIENTS[2], causal, padding, near, near_d, scale=0.25)
    for causal, padding in itertools.product((False, True), repeat=2)
    for near, near_d in ((None, None), (64, None), (64, 5), (7, None), (7, 5))
]
CASES += [
    KernelSpec(8, 16, COEFFICIENTS[2], causal, padding, near, near_d, documents=True)
    for causal, padding in itertools.product((False, True), repeat=2)
    for near, near_d in ((None, None), (64, None), (7, 5))
]
CASES += [
    KernelSpec(8, 16, COEFFICIENTS[2], True, padding, near, near_d, forget=True)
    for padding in (False, True)
    for near, near_d in ((None, None), (7, 5))
]
CASES += [
    KernelSpec(4, 16, tuple(0.3**j for j in range(9))),
    KernelSpec(4, 16, (1.0, 0.5)),
    KernelSpec(200, 8, COEFFICIENTS[2], causal=True),
]
LINE_LENGTH = "110"


def test_formatter_leaves_the_text_unchanged(tmp_path: Path) -> None:
    for spec in CASES:
        (tmp_path / f"{kernel_name(spec)}.py").write_text(emit_kernel(spec))
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--diff",
        "--isolated",
        "--line-length",
        LINE_LENGTH,
        ".",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W,UP,B,SIM", "."]
    result = subprocess.run(
        [*lint, "--line-length", LINE_LENGTH], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("spec", CASES)
def test_text_is_bounded(spec: KernelSpec) -> None:
    assert len(emit_kernel(spec).splitlines()) <= 80


def test_text_does_not_depend_on_the_process() -> None:
    spec = CASES[4]
    code = (
        "from fastgrad_compiler.codegen.kernel import *;"
        f"spec = {spec!r}; import hashlib;"
        "print(kernel_name(spec), hashlib.sha256(emit_kernel(spec).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(RUNTIME_FILES[0].parents[2]), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert kernel_name(spec) in runs.pop()


def test_names_tell_functions_and_schedules_apart() -> None:
    assert len({kernel_name(spec) for spec in CASES}) == len(CASES)
    name = kernel_name(CASES[0])
    assert name == kernel_name(KernelSpec(**{f: getattr(CASES[0], f) for f in KernelSpec.__slots__}))
    assert name in emit_kernel(CASES[0])
    assert len(name) == len("attention_") + 12


RELEASED = (*RUNTIME_FILES, *CPP_RUNTIME_FILES, *TRITON_RUNTIME_FILES)


@pytest.mark.parametrize("file", RELEASED, ids=lambda path: path.stem)
def test_names_tell_releases_of_each_runtime_file_apart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel depends on the files that are copied beside it; the ends of their lines do not count."""
    spec, backends, named = CASES[0], BACKENDS["auto"], kernel_name.__wrapped__
    read, before = kernel._content, named(spec, backends)
    monkeypatch.setattr(kernel, "_content", lambda path: read(path).replace(b"\n", b"\r\n"))
    assert named(spec, backends) == before
    monkeypatch.setattr(kernel, "_content", lambda path: read(path) + b"#" * (path == file))
    assert named(spec, backends) != before


def test_the_name_of_exact_attention_hashes_all_that_it_imports() -> None:
    found, left = set(), ["exact_attention"]
    while left:
        found.add(f"{(name := left.pop())}.py")
        tree = ast.parse((RUNTIME_FILES[0].parent / f"{name}.py").read_text(encoding="utf-8"))
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
        left += [str(node.module) for node in imports if f"{node.module}.py" not in found]
    assert sorted(found) == sorted(exact_attention.FILES)


def test_two_releases_of_exact_attention_live_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that another release wrote computes what its own files say, and not what was registered before."""
    folder = tmp_path / "another_release"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for file in RUNTIME_FILES:
        shutil.copy(file, folder)
    own = folder / "exact_attention.py"
    text = own.read_text(encoding="utf-8")
    assert text.count("].to(v.dtype).contiguous()") == 1
    own.write_text(text.replace("].to(v.dtype).contiguous()", "].to(v.dtype).contiguous().neg()"))
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module("another_release.exact_attention")
    q, k, v = make_inputs(KernelSpec(3, 2, COEFFICIENTS[2]), 20).tensors
    assert torch.equal(other.exact_attention(q, k, v), -exact_attention.exact_attention(q, k, v))
    assert str(exact_attention.OPERATION) != str(other.OPERATION)


def test_copies_in_two_packages_share_their_operations(tmp_path: Path) -> None:
    """Generated folders are packages of their own; the second one that is loaded finds the operations registered."""
    spec = KernelSpec(3, 2, COEFFICIENTS[2], near=8, chunk=5)
    q, k, v = make_inputs(spec, 20).tensors
    expected = load_kernel(spec)(q, k, v)
    for package in ("first_copy", "second_copy"):
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / f"{kernel_name(spec)}.py").write_text(emit_kernel(spec))
        for file in RUNTIME_FILES:
            shutil.copy(file, folder)
        name = f"{package}.{kernel_name(spec)}"
        for part, path in ((package, folder / "__init__.py"), (name, folder / f"{kernel_name(spec)}.py")):
            found = importlib.util.spec_from_file_location(part, path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[part] = module
            found.loader.exec_module(module)
        assert torch.equal(sys.modules[name].attention(q, k, v), expected)


@pytest.mark.parametrize(
    "options",
    [{"d": 0}, {"dv": 0}, {"near": 0}, {"chunk": 0}, {"coefficients": (1.0,)}, {"near_d": 3}],
    ids=str,
)
def test_impossible_specifications(options: dict) -> None:
    with pytest.raises(ValueError, match=r"an attention kernel needs|near_d"):
        KernelSpec(**{"d": 2, "dv": 2, "coefficients": COEFFICIENTS[2], **options})


@pytest.mark.parametrize("near", [1, 16, 31, 48, 64, 97, 128, 256, 4096])
def test_chunk_divides_the_near_block_or_is_a_multiple(near: int) -> None:
    chunk = choose_chunk(KernelSpec(16, 64, COEFFICIENTS[2], causal=True, near=near))
    assert near % chunk == 0 or chunk % near == 0 or near > chunk
    assert chunk <= 256
