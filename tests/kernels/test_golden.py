"""A kernel of each back end as it is rendered: a change of what is emitted is read in the diff."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrad_compiler.codegen.cpp import headers
from fastgrad_compiler.codegen.kernel import (
    CPP,
    NAME_PLACEHOLDER,
    TRITON,
    KernelSpec,
    kernel_files,
    kernel_name,
)
from fastgrad_compiler.codegen.triton import parts
from fastgrad_compiler.codegen.triton.configurations import FUSED_KERNELS, KERNELS
from fastgrad_compiler.targets import BACKENDS
from tests.conftest import Golden

GOLDEN = Path(__file__).parents[1] / "golden" / "kernels"
AUTO = BACKENDS["auto"]
SPEC = KernelSpec(
    8, 16, (1.0, 0.9, 0.55), causal=True, padding=True, near=64, near_d=5, scale=0.25
)  # every branch but those of documents, of windows and of far keys on both sides
WINDOW = KernelSpec(8, 16, (), documents=True, window=7)
FORGET = KernelSpec(8, 16, (1.0, 0.9, 0.55), causal=True, forget=True)


def rendered(spec: KernelSpec, ending: str) -> str:
    """A file of a kernel without the hash in its name, which any change of a file of `runtime` changes."""
    name = kernel_name(spec, AUTO)
    return kernel_files(spec, AUTO)[f"{name}{ending}"].replace(name, NAME_PLACEHOLDER)


@pytest.mark.parametrize(("file", "spec"), [("attention", SPEC), ("window", WINDOW), ("forget", FORGET)])
def test_pytorch(file: str, spec: KernelSpec, golden: Golden) -> None:
    golden(GOLDEN / f"{file}.py.txt", rendered(spec, ".py"))


@pytest.mark.parametrize(("file", "spec"), [("attention", SPEC), ("forget", FORGET)])
def test_triton(file: str, spec: KernelSpec, golden: Golden) -> None:
    """The constants; what follows them is the same text for every kernel."""
    text = rendered(spec, TRITON)
    assert text.endswith(parts())
    golden(GOLDEN / f"{file}_triton.py.txt", text.removesuffix(parts()))


def test_triton_kernels_of_two_specifications_differ_in_an_argument() -> None:
    """The cache of Triton 3.2 tells kernels of the same text apart by their arguments alone."""
    trees = [ast.parse(rendered(spec, TRITON)) for spec in (FORGET, replace(FORGET, dv=24))]
    keys = {node.value.value for tree in trees for node in tree.body if _assigns(node, "SPECIFICATION")}  # type: ignore[attr-defined]
    assert len(keys) == 2
    kernels = [n for n in trees[0].body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")]
    assert {kernel.name for kernel in kernels} == {*KERNELS, *FUSED_KERNELS, "scan_kernel", "delta_kernel"}
    assert {ast.unparse(kernel.args.defaults[-1]) for kernel in kernels} == {"SPECIFICATION"}


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


@pytest.mark.parametrize(("file", "spec"), [("attention", SPEC), ("window", WINDOW), ("forget", FORGET)])
def test_cpp(file: str, spec: KernelSpec, golden: Golden) -> None:
    """The constants; what follows them is the same text for every kernel."""
    text = rendered(spec, CPP)
    assert text.endswith(headers())
    golden(GOLDEN / f"{file}.cpp.txt", text.removesuffix(headers()))
