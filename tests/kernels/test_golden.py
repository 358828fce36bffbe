"""A kernel of each back end as it is rendered: a change of what is emitted is read in the diff."""

from __future__ import annotations

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


def test_triton(golden: Golden) -> None:
    golden(GOLDEN / "attention_triton.py.txt", rendered(SPEC, TRITON))


@pytest.mark.parametrize(("file", "spec"), [("attention", SPEC), ("window", WINDOW), ("forget", FORGET)])
def test_cpp(file: str, spec: KernelSpec, golden: Golden) -> None:
    """The constants; what follows them is the same text for every kernel."""
    text = rendered(spec, CPP)
    assert text.endswith(headers())
    golden(GOLDEN / f"{file}.cpp.txt", text.removesuffix(headers()))
