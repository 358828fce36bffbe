"""What all tests share: thread limits, a deterministic hypothesis, and golden files.

A golden file holds an output exactly as it is expected. `pytest --update-golden` writes the files anew, to be
read in the diff before they are committed; under `CI` it is an error: no build blesses its own output.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read by torch when it is first imported, and inherited by the commands that tests start: two workers with
# two threads each would fight over two cores.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[_variable] = "1"  # whatever the process that started the worker has set for itself
    else:
        os.environ.setdefault(_variable, os.environ.get("OMP_NUM_THREADS", "2"))

# Threads that wait take no processor time: the other worker, or another process of the test, may need it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Triton decides when it is imported whether a process interprets kernels or compiles them, and one worker runs the
# tests of many files. So all of them interpret, those of torch.compile too (Inductor imports triton, but has no
# kernel for it on a CPU), and tests that compile kernels do so through benchmarks.ahead, in processes whose
# environment lacks the variable.
assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
os.environ["TRITON_INTERPRET"] = "1"

# PyTorch refuses operations that return one tensor twice only under `CI`; elsewhere it warns.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"

# Kernels run as PyTorch does them unless a test asks for the fixture `native`: a build takes seconds.
os.environ["FASTGRAD_NATIVE"] = "0"

settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")

LONGEST = (
    "native/test_step_kernel.py",
    "conversion/test_convert.py",
    "native/test_attention.py",
    "dsl/test_compiled.py",
    "native/test_kernels.py",
    "kernels/test_torch_features.py",
    "native/test_step_attention.py",
    "native/test_step.py",
    "native/test_forget.py",
    "calibration/test_refusal.py",
    "calibration/test_budgets.py",
    "native/test_load.py",
    "native/test_rows.py",
    "dsl/test_budget_watch.py",
    "dsl/test_distributed.py",
    "dsl/test_training_ranks.py",
    "dsl/test_training_run.py",
    "dsl/test_training_faults.py",
    "dsl/test_short_conv.py",
    "examples/test_stand_alone.py",
)
"""Files that take longest, in the order in which they begin: the first two are for two workers, one without builds."""

GOLDEN_RATIO = (5**0.5 - 1) / 2

Golden = Callable[[Path, str], None]
"""`golden(path, text)`: fail with a diff unless the file at `path` holds exactly `text`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files from the present output"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError(
            "--update-golden is refused under CI: golden files are updated and reviewed by hand"
        )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin, so that no worker waits for one at the end (the order is that of xdist)."""
    _sample(items)
    items.sort(
        key=lambda item: LONGEST.index(name) if (name := _name(item.path)) in LONGEST else len(LONGEST)
    )


def _sample(items: list[pytest.Item]) -> None:
    """Mark `medium` all but n cases of each test that is `sampled(n)`: those that lie where the multiples of the golden
    ratio fall, which are spread evenly over every stretch of the grid and in step with no argument."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in cases.values():
        marker = grid[0].get_closest_marker("sampled")
        assert marker is not None
        order = sorted(range(len(grid)), key=lambda place: place * GOLDEN_RATIO % 1)
        for place in order[marker.args[0] :]:
            grid[place].add_marker("medium")


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.fixture
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels, in a cache that lasts from one run of the tests to the next.

    Those of the slow set, and of tests that ask for the fixture `as_shipped`, are built as they are for users; the
    others are only compared with the dense reference, and g++ optimises them less, which takes half as long.
    """
    monkeypatch.setenv("FASTGRAD_NATIVE", "1")
    monkeypatch.setenv("FASTGRAD_QUIET", "1")
    assert request.config.cache is not None
    gcc = None if "CXX" in os.environ else shutil.which("g++")
    shipped = "as_shipped" in request.fixturenames or request.node.get_closest_marker("slow") is not None
    quick = gcc is not None and not shipped
    cache = request.config.cache.mkdir("native-quick" if quick else "native")
    monkeypatch.setenv("FASTGRAD_CACHE", str(cache))
    if gcc is not None and quick:
        monkeypatch.setenv("CXX", str(_quick_compiler(cache, gcc)))


@pytest.fixture
def as_shipped(native: None) -> None:
    """Native kernels as they are built for users; of a specification that no other test of the process builds."""


def _quick_compiler(folder: Path, gcc: str) -> Path:
    """g++ that optimises less than it is asked to, and has read PyTorch's headers before."""
    import torch

    from fastgrad_compiler.runtime.native import FLAGS, OPENMP_FLAGS, OPTIONAL_FLAGS

    path, header = folder / "g++-quick", folder / "torch.h"
    flags = [*FLAGS, *OPTIONAL_FLAGS, *OPENMP_FLAGS, f"-I{Path(torch.__file__).parent / 'include'}"]
    text = f"""#!/bin/sh
# PyTorch {torch.__version__}, {flags}
case " $* " in *" -c "*) set -- -include "{header}" "$@";; esac
exec "{gcc}" "$@" -O1
"""
    if not path.exists() or path.read_text() != text:
        header.write_text("#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n")
        made = header.with_name(f"{os.getpid()}.gch")
        command = [gcc, *flags, "-O1", "-x", "c++-header", str(header), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            made.replace(header.with_name(f"{header.name}.gch"))
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_text(text)
        made.chmod(0o755)
        made.replace(path)
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare with a golden file, or write it under `--update-golden`."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
            return
        if not path.exists():
            pytest.fail(f"no golden file {path}; write it with: pytest --update-golden", pytrace=False)
        expected = path.read_bytes().decode("utf-8")
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(keepends=True),
                text.splitlines(keepends=True),
                str(path),
                "the present output",
            )
            pytest.fail(f"output differs from its golden file\n{''.join(lines)}", pytrace=False)

    return compare
