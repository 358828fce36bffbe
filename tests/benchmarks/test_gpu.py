"""The benchmark of GPUs as far as it runs without one: model, refusal, and the JSON with a stand-in for a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import document, gpu, gpu_contenders, gpu_model, gpu_tables
from benchmarks.gpu_contenders import Case, contestants
from benchmarks.run import SECTIONS
from benchmarks.settings import ROOT, Settings
from fastgrad_compiler.planning.roofline import shape_of
from fastgrad_compiler.runtime.triton_schedule import DEVICES
from fastgrad_dsl.functional import polynomial_attention

SETTINGS = Settings(target="torch", repeats=2, seconds=60.0, quick=True)
GRID = gpu.Grid(
    {torch.float32: (Case(8, 16, 2), Case(8, 16, 2, 16)), torch.bfloat16: (Case(8, 16, 2),)},
    lengths=(32, 64),
    checked_n=40,
    errors_n=48,
)
SMALL = replace(GRID, cases={torch.float32: (Case(8, 16, 2),)})
DOCUMENTED = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
LIBRARY = {"Based, degree 2", "Based, degree 2, quadratic", "retention"}


def clock(run: Callable[[], Any]) -> tuple[Any, float]:
    """A device on which everything takes a quarter of a second."""
    return run(), 0.25


def peak(run: Callable[[], object]) -> int:
    run()
    return 2**20


SETUP = gpu.Setup("cpu", "a device", "sm_90", clock, peak)


@pytest.fixture(autouse=True)
def kernels_that_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention of bfloat16 needs a GPU; the polynomial's bfloat16 is checked against its rounding as there."""

    def sdpa(heads: int, widths: Case, dtype: torch.dtype) -> gpu_contenders.Contestant:
        return original(heads, widths, torch.float32)

    original = gpu_contenders._sdpa
    monkeypatch.setattr(gpu_contenders, "_sdpa", sdpa)


def documented(keys: set[str]) -> None:
    """Every key of the JSON stands in docs/benchmark.md."""
    missing = {key for key in keys if not re.search(rf"\b{key}\b", DOCUMENTED)}
    assert not missing


@cache
def measured() -> Any:
    """The section as it is where nothing goes wrong."""
    return gpu.measure(SETTINGS, GRID, SETUP)


@cache
def modelled() -> Any:
    return gpu_model.measure(SETTINGS)


def test_the_section_has_every_contender_at_every_length() -> None:
    section = measured()
    cells = {(c["name"], c["dtype"], c["n"]) for c in section["cells"]}
    skipped = {(s["name"], s["dtype"], s["n"]) for s in section["skipped"]}
    wanted = {("degree 2", d, n) for d in ("float32", "bfloat16") for n in (32, 64)}
    wanted |= {("SDPA", d, n) for d in ("float32", "bfloat16") for n in (32, 64)}
    wanted |= {("degree 2, near 16", "float32", n) for n in (32, 64)}
    library = {(name, d, n) for name in LIBRARY for d in ("float32", "bfloat16") for n in (32, 64)}
    assert cells - library == wanted
    assert cells | skipped == wanted | library
    assert all(s["reason"] for s in section["skipped"])
    own = next(c for c in section["cells"] if c["name"] == "degree 2" and c["dtype"] == "float32")
    assert (own["forward_s"], own["backward_s"], own["total_s"], own["repeats"]) == (0.25, 0.25, 0.5, 2)
    assert own["peak_bytes"] == 2**20
    assert own["peak_share_total"] == pytest.approx(own["flops_total"] / 0.5 / DEVICES["sm_90"].single)
    half = next(c for c in section["cells"] if c["name"] == "degree 2" and c["dtype"] == "bfloat16")
    assert half["peak_share_total"] == pytest.approx(half["flops_total"] / 0.5 / DEVICES["sm_90"].half)
    for entry in (
        section,
        section["device"],
        *(section[key][0] for key in ("cells", "checks", "errors", "skipped")),
    ):
        documented(set(entry))
    json.dumps(section, allow_nan=False)


def test_cells_have_what_those_of_the_cpu_have() -> None:
    """One reader serves both."""
    committed = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    cpu = committed["sections"]["attention"]["cells"][0]
    assert set(cpu) < set(measured()["cells"][0])


def test_errors_are_against_softmax_and_checks_against_the_polynomial() -> None:
    section = measured()
    errors = {(e["name"], e["dtype"]): e for e in section["errors"]}
    assert errors["SDPA", "float32"]["output_error"] < 1e-6
    assert 1e-3 < errors["degree 2", "float32"]["output_error"] < 0.05
    assert {name for name, _ in errors} <= {"SDPA", "degree 2", "degree 2, near 16"} | LIBRARY - {"retention"}
    exact = [c for c in section["checks"] if c["dtype"] == "float32"]
    assert len(section["checks"]) == 2 * len(gpu.ROUNDING) * 2
    assert all(c["output_error"] < 1e-6 and c["allowed"] == 8 * 2.0**-20 for c in exact)


def test_wrong_results_stop_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return right(q, k, v, **options) * (1.0 if q.dtype == torch.float64 else 1.1)

    def timed(*arguments: object) -> None:
        pytest.fail("timed")

    right = polynomial_attention
    monkeypatch.setattr(gpu, "polynomial_attention", wrong)
    monkeypatch.setattr(gpu, "_together", timed)
    with pytest.raises(SystemExit) as ended:
        gpu.measure(SETTINGS, GRID, SETUP)
    assert ended.value.code == 1
    assert "wrong" in capsys.readouterr().err


def test_not_a_number_is_an_infinite_error() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert gpu.relative_errors([good, bad], [good, good]) == (0.0, float("inf"))


def test_a_target_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.measure(replace(SETTINGS, target="none"), GRID, SETUP)
    assert ended.value.code == 2
    assert "unknown target none" in capsys.readouterr().err


@pytest.mark.medium
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *filter(None, sys.path))))}
    written = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PyTorch finds no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not written.exists()


def test_what_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s at 32 tokens is 1 s at 64 for a polynomial, and 2 s for SDPA."""
    monkeypatch.setattr(gpu, "LONGEST", 1.5)
    section: Any = gpu.measure(SETTINGS, SMALL, SETUP)
    names = {c["name"] for c in section["cells"] if c["n"] == 64}
    assert "degree 2" in names
    assert "SDPA" not in names
    reasons = {s["reason"] for s in section["skipped"] if s["name"] == "SDPA"}
    assert reasons == {"a pass would take 2 s"}


def test_one_that_fails_is_named_and_not_tried_at_longer_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory\nand more")

    def with_a_broken_one(*arguments: Any) -> list[gpu_contenders.Contestant]:
        return [replace(c, run=broken) if c.name == "SDPA" else c for c in contestants(*arguments)]

    monkeypatch.setattr(gpu, "contestants", with_a_broken_one)
    section: Any = gpu.measure(SETTINGS, SMALL, SETUP)
    reasons = [s["reason"] for s in section["skipped"] if s["name"] == "SDPA" and s["dtype"] == "float32"]
    assert reasons == ["OutOfMemoryError: out of memory", "a shorter length was left out"]
    assert "SDPA" not in {e["name"] for e in section["errors"]}


def test_a_token_major_library_gets_its_layout() -> None:
    def library(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert [x.shape for x in (q, k, v)] == [(1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 4)]
        assert scale == 1.0
        return v, q

    q, v = torch.rand(1, 2, 5, 3), torch.rand(1, 2, 5, 4)
    assert torch.equal(gpu_contenders._token_major(library, q, q, v), v)


def test_the_page_shows_what_was_measured() -> None:
    section = measured()
    page = gpu_tables.gpu(section)
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("|")]
    assert ["d = 8, dv = 16, degree 2", "float32", "64", "250", "500 (1.0)", "1.0"] in rows
    assert "is left out" in page
    assert "these numbers mean nothing" in page


def test_the_committed_model_is_what_the_model_says_now() -> None:
    """Otherwise: `python -m benchmarks.run --section gpu_model` and `python -m benchmarks.document`."""
    committed = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))["sections"]
    now = modelled()
    for key in ("shape", "devices", "kernels", "times", "break_even", "fused_from"):
        assert committed["gpu_model"][key] == json.loads(json.dumps(now[key])), key
        documented({key} if key == "shape" else set(now[key][0]))
    documented(set(now["kernels"][0]["on"]["sm_90"]))


def test_every_table_of_the_model_says_that_it_is_one() -> None:
    page = gpu_tables.gpu_model(modelled())
    blocks = page.split("\n\n")
    tables = [index for index, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) == 5
    assert all(blocks[index - 1].endswith(gpu_tables.MODEL) for index in tables)


def test_kernels_that_leave_multiprocessors_idle_are_marked() -> None:
    page = gpu_tables.gpu_model(modelled())
    row = next(line for line in page.splitlines() if "fused_forward_kernel" in line)
    assert re.search(r"\| 8 \| [\d,]+ \w+\* \| [\d,]+ \w+\* \| [\d,]+ \w+\* \|", row)
    assert "*" not in next(line for line in page.splitlines() if "| forward_kernel" in line)


def test_resources_are_looked_up_or_shown_as_unknown() -> None:
    shape = shape_of(heads=1, n=64, d=16, dv=64, degree=2)
    known = {"registers": 128, "occupancy": 0.25}
    golden = {"sm_90": {"bfloat16": {"d16 dv64 degree2": {"state_kernel": known}}}}
    assert gpu_model.resources(golden, "sm_90", shape, "state_kernel") == known
    unknown = gpu_model.resources(golden, "sm_90", shape, "scan_kernel")
    assert unknown == {"registers": None, "occupancy": None}
    assert gpu_tables._resources(known) == "128/25%"
    assert gpu_tables._resources(unknown) == "-"


def test_every_section_has_a_writer() -> None:
    assert set(SECTIONS) == {*document.WRITERS, "scaling"}  # which has a page of its own
