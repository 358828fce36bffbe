"""Files are the same to the last bit on every processor, BLAS, numpy and libm (docs/architecture.md).

Other machines are had here through the variables that numpy, OpenBLAS, glibc and PyTorch read when they start: which
instructions they may use. A processor that lacks some compiles in fewer ways, and the comparison holds there too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from difflib import unified_diff
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest

import fastgrad_compiler
from tests.dsl.models import EXAMPLES, NAMES
from tests.grids import wide

# What no example has: numbers computed at compile time, bounds through many functions, scales that are no powers of
# two, wide ranges, high degrees, all families. glibc's variants of exp, log, tanh and pow differ at these arguments.
SPEC = """dim b
dim n <= 65536

block attend(x: float[b, n, 12]; factor: float) -> float[b, n, 12] {
    weight tau: float[1] = ones()
    weight w: float[12, 12] = normal(std = exp(0.4592) * tanh(0.7626) / log(1.6257))
    q = unit(split_heads(x @ w, 2)) * (sigmoid(tau) + softplus(0.3757 * tanh(tau)))
    k = unit(split_heads(x, 2)) * exp(0.5004 * erf(tau))
    return merge_heads(softmax(causal(factor * (q @ k.T))) @ split_heads(x, 2))
}

model spec(x: float[b, n, 12]) -> float[b, n, 12] {
    x = x + attend(x; factor = 0.4158) as narrow
    x = x + attend(x; factor = log(1.6257)) as middle
    x = x + attend(x; factor = tanh(0.7626)) as other
    return x + attend(x; factor = exp(0.1504)) as wide
}

budget {
    at "narrow" degree = 7
    at "middle" relative <= 1e-3
    at "other" family = minimax
    at "other" relative <= 1e-3
    at "wide" family = taylor
    at "wide" degree = 12
}
"""
REFUSED = SPEC.replace('at "wide" degree = 12', 'at "wide" relative <= 1e-12')
NOT_A_WEIGHT = """dim n

model refused(x: float[n, 4]) -> float[n, 4] {
    w = polynomial(x @ x.T; coefficients = (0.1, 0.37, -1.3, 0.21, 0.3))
    return normalize_rows(w) @ x
}
"""

PROGRAM = """
import json, sys
import fastgrad_dsl as fg

accepted, refused = json.load(sys.stdin)
found = {}
for name, source in accepted.items():
    found |= {f"{name}/{path}": text for path, text in fg.compile(source).files.items()}
for name, source in refused.items():
    try:
        fg.compile(source)
    except fg.TfgError as error:
        found[name] = "\\n".join(map(str, error.diagnostics))
assert "torch" not in sys.modules, "files are made without PyTorch, whose version they do not depend on"
json.dump(found, sys.stdout)
"""

Environment = dict[str, str]
FEW = ("bounded", "spelled_out")  # kernels of all backends, and attention that is recognised
SOME_OR_ALL = pytest.mark.parametrize("names", [FEW, pytest.param(NAMES, marks=pytest.mark.slow)], ids=len)


def dispatched() -> list[str]:
    """Features beyond its baseline that this numpy can use on this processor, the newest first."""
    umath = import_module("numpy._core._multiarray_umath")
    return [name for name in reversed(umath.__cpu_dispatch__) if umath.__cpu_features__[name]]


def without(features: list[str]) -> Environment:
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(features)} if features else {}


def machines() -> dict[str, Environment]:
    """Environments that stand for other machines; an instruction that this one lacks is missing in all of them."""
    found = dispatched()
    newest = [name for name in found if "AVX512" in name or name == "X86_V4"]
    no_fma = "-AVX512F,-AVX2,-FMA,-AVX2_Usable,-FMA_Usable"  # the last two are the names before glibc 2.33
    return {
        "AVX2": {**without(newest), "OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2"},
        "SSE": {
            **without(found),
            "OPENBLAS_CORETYPE": "Prescott",
            "ATEN_CPU_CAPABILITY": "default",
            "GLIBC_TUNABLES": f"glibc.cpu.hwcaps={no_fma}",
        },
        "Sandy Bridge": {"OPENBLAS_CORETYPE": "Sandybridge"},
    }


def compiled(environment: Environment, seed: int, names: Iterable[str]) -> dict[str, str]:
    """Every file of these examples and the text of refusals, made by a process of its own."""
    accepted = {name: str(EXAMPLES / f"{name}.tfg") for name in names} | {"spec": SPEC}
    kept = {name: value for name, value in os.environ.items() if name not in KNOBS}
    root = Path(fastgrad_compiler.__file__).parents[2]
    paths = os.pathsep.join(str(root / folder) for folder in ("", "compiler", "grammar"))
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([accepted, {"refused": REFUSED, "no weight": NOT_A_WEIGHT}]),
        env={**kept, **environment, "PYTHONHASHSEED": str(seed), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout)
    return found


KNOBS = frozenset().union(*machines().values())


MACHINES: dict[str, Environment] = {"this machine": {}, **machines()}


@cache
def compiled_on(machine: str, names: tuple[str, ...]) -> dict[str, str]:
    """What a machine compiles, each with another seed of hashes."""
    return compiled(MACHINES[machine], list(MACHINES).index(machine), names)


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """The first lines that differ of each file."""
    lines = [f"only one has {name}" for name in sorted(here.keys() ^ there.keys())]
    for name in sorted(here.keys() & there.keys()):
        changes = unified_diff(
            here[name].splitlines(), there[name].splitlines(), name, name, lineterm="", n=0
        )
        lines += islice(changes, 6)
    return lines


@pytest.mark.medium
@SOME_OR_ALL
@pytest.mark.parametrize("machine", wide(machines(), few=["SSE"]))  # which lacks all that the others lack
def test_files_are_the_same(machine: str, names: tuple[str, ...]) -> None:
    assert differences(compiled_on("this machine", names), compiled_on(machine, names)) == []


@pytest.mark.medium
@SOME_OR_ALL
def test_what_is_compared(names: tuple[str, ...]) -> None:
    """The comparison says something: files of every kind, kernels of several polynomials, and both refusals."""
    here = compiled_on("this machine", names)
    for name in (*names, "spec"):
        for file in ("model.py", "plan.json", "report.json", "report.html", "stages/06-lowrank.txt"):
            assert f"{name}/{file}" in here
    assert "|s| <=" in here["refused"]
    assert "not positive: it is" in here["no weight"]
    plan = json.loads(here["spec/plan.json"])["attentions"]
    assert [each["family"] for each in plan] == ["balanced", "balanced", "minimax", "taylor"]
    kernels = {name for name in here if name.startswith("spec/attention_") and name.endswith(".cpp")}
    assert len(kernels) == len(plan)
    assert any(name.endswith("_triton.py") for name in here)  # of examples: those of the spec are in float64
