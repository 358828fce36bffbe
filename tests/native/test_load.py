"""Native operations in a process: one pool of threads, one warning where they cannot be had, off where asked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.native.compilers import NEEDS_COMPILER, Builder

pytestmark = pytest.mark.medium

OPERATIONS = (Path(__file__).parent / "operations.cpp").read_text(encoding="utf-8")
ATTENTION = """
import os, sys, warnings
import torch
from fastgrad_dsl.functional import polynomial_attention

warnings.simplefilter("always")
torch.manual_seed(0)
inputs = [torch.randn(2, 3, n, width, requires_grad=True) for n, width in ((20, 3), (20, 3), (20, 4))]

def run(target, dtype=torch.float32, **options):
    given = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = polynomial_attention(*given, target=target, **options)
    return [out, *torch.autograd.grad(out.square().sum(), given)]

def native_operations():
    return [name for name in dir(torch.ops.fastgrad) if "_float" in name]
"""


@NEEDS_COMPILER
def test_threads_are_those_of_pytorch(builder: Builder) -> None:
    code = f"""
import torch
from fastgrad_compiler.runtime.native import load

torch.set_num_threads(3)
load("attention_x", {OPERATIONS!r}, "float32")
x, empty = torch.zeros(2, 3, 9, 4), torch.zeros(0)
torch.zeros(10**6).add(1)  # the threads of PyTorch are up before those of the kernel
out = torch.empty(2, 3, 9, 4)
operation = torch.ops.fastgrad.attention_x_float32_forward.default
operation(x, x, x, *[None] * 5, out, empty, empty, torch.get_num_threads())
assert out.eq(3).all(), out
lines = open("/proc/self/maps").read().splitlines()
print(*{{line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line or "libiomp" in line}}, sep="\\n")
"""
    loaded = builder.run(code, environment={"OMP_NUM_THREADS": "3"}, with_torch=True).stdout.split()
    assert len(loaded) == 1, loaded
    assert "torch" in loaded[0]


FAILING: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({"CXX": "", "PATH": ""}, "install g++ (Debian and Ubuntu: apt install g++"),
    "CXX that is not there": (
        {"CXX": "/nonexistent/c++"},
        "CXX names, /nonexistent/c++, is not there",
    ),
    "a compiler that fails": ({}, "kernel.cpp:7:1: error: the compiler is on fire"),
}
WARNED = f"""{ATTENTION}
import fastgrad_dsl as fg

for environment in {[environment for environment, _ in FAILING.values()]!r}:
    if os.fork() == 0:  # a process that has warned of nothing yet
        os.environ.update(environment)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for dtype in (torch.float32, torch.float64):
                for options in ({{}}, {{"causal": True}}):
                    for a, b in zip(run("torch", dtype, **options), run("auto", dtype, **options), strict=True):
                        assert torch.equal(a, b)
            if "PATH" in environment:
                fg.compile(sys.argv[1], params={{"depth": 1}}).module()(torch.ones(1, 700, dtype=torch.long))
        print([(issubclass(w.category, RuntimeWarning), str(w.message)) for w in caught], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, environment
"""


def test_without_a_compiler_there_is_one_warning_and_the_same_results(builder: Builder) -> None:
    """Whichever kernels ask for it, in both passes, from copies of the runtime in several packages."""
    builder.write_compiler('echo "kernel.cpp:7:1: error: the compiler is on fire" >&2; exit 1')
    example = Path(__file__).parents[2] / "examples" / "bounded.tfg"
    lines = builder.run(WARNED, str(example), with_torch=True).stdout.splitlines()
    for line, (found, (_, expected)) in zip(lines, FAILING.items(), strict=True):
        ((is_warning, told),) = ast.literal_eval(line)
        assert is_warning, found
        assert told.startswith("attention runs without native kernels"), found
        assert expected in told, found


@NEEDS_COMPILER
def test_both_targets_of_one_kernel_live_in_one_process_and_none_where_switched_off(builder: Builder) -> None:
    code = f"""{ATTENTION}
if os.fork() == 0:
    os.environ["FASTGRAD_NATIVE"] = "0"
    warnings.simplefilter("error")
    for a, b in zip(run("torch"), run("cpp"), strict=True):
        assert torch.equal(a, b)
    os._exit(0)
assert os.wait()[1] == 0
expected = run("torch")
assert native_operations() == []
assert not os.path.exists(os.environ["FASTGRAD_CACHE"])
for a, b in zip(expected, run("cpp"), strict=True):
    torch.testing.assert_close(a, b)
assert len(native_operations()) == 2
torch.ops.fastgrad.__dict__[native_operations()[0]] = None  # torch does not touch it
for a, b in zip(expected, run("torch"), strict=True):
    assert torch.equal(a, b)
"""
    builder.run(code, with_torch=True)
    assert len(builder.compilations) == 1
