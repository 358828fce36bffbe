"""`fastgrad bench` and what it measures with: times, peaks, extrapolations, the plot. No test depends on how fast."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.approximation.kernel_tiles import token_chunks
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_dsl.bench import memory, peak
from fastgrad_dsl.bench.cells import Cell, extrapolated
from fastgrad_dsl.bench.contenders import Contender, exact, make_inputs
from fastgrad_dsl.bench.timing import Timing, slope, time_together
from fastgrad_dsl.commands import bench as command
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.plots.panels import HEIGHT, WIDTH, Panel, Series, render

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs `fastgrad bench`; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgrad", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return int(ended.value.code or 0), output.out, output.err

    yield run
    torch.set_num_threads(threads)


def test_bench_prints_a_table_and_writes_json_and_a_plot(bench: Run) -> None:
    options = ["--quick", "--n", "64", "--n", "32", "--heads", "2", "--d", "4", "--dv", "8", "--threads", "1"]
    status, out, err = bench(*options, "--target", "torch", "--json", "bench.json", "--svg", "bench.svg")
    assert (status, err) == (0, "")
    assert "SDPA" in out
    assert "degree 2" in out
    assert "target torch" in out
    document = json.loads(Path("bench.json").read_text())
    section = document["sections"]["attention"]
    cells = section["cells"]
    assert [(cell["n"], cell["name"]) for cell in cells] == [
        (32, "degree 2"), (32, "SDPA"), (64, "degree 2"), (64, "SDPA"),
    ]  # fmt: skip
    assert all(cell["measured"] and cell["repeats"] == 5 and cell["total_s"] > 0 for cell in cells)
    assert section["machine"]["threads"] == 1
    assert 0 < section["output_error"]["relative_l2"] < 0.1
    assert all(0 < error < 2**-18 for error in section["output_error"]["rounding"])
    svg = Path("bench.svg").read_text()
    assert "extrapolated" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_bench_of_bfloat16(bench: Run) -> None:
    options = ["--quick", "--n", "32", "--heads", "1", "--d", "4", "--dv", "8", "--target", "torch"]
    status, out, err = bench(*options, "--dtype", "bfloat16", "--json", "bench.json")
    assert (status, err) == (0, "")
    assert "bfloat16, target torch" in out
    section = json.loads(Path("bench.json").read_text())["sections"]["attention"]
    assert {(cell["dtype"], cell["peak_share_total"]) for cell in section["cells"]} == {("bfloat16", None)}
    assert all(2**-12 < error < 2**-6 for error in section["output_error"]["rounding"])


def test_bench_extrapolates_a_pass_that_would_take_too_long(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LONGEST_EXACT", 0.0)
    options = ["--quick", "--n", "32", "--n", "64", "--heads", "1", "--d", "4", "--dv", "8", "--near", "8"]
    _, out, _ = bench(*options, "--json", "bench.json", "--svg", "bench.svg")
    assert "SDPA (extrapolated)" in out
    cells = json.loads(Path("bench.json").read_text())["sections"]["attention"]["cells"]
    measured, guessed = (cell for cell in cells if cell["degree"] is None)
    assert (measured["measured"], guessed["measured"], guessed["extrapolated_from"]) == (True, False, 32)
    assert guessed["total_s"] == pytest.approx(4 * measured["total_s"])
    assert guessed["peak_share_total"] is None
    assert "SDPA, extrapolated" in Path("bench.svg").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n", "0"], "--n"),
        (["--n", "many"], "--n"),
        (["--degree", "0"], "--degree"),
        (["--near", "0"], "--near"),
        (["--threads", "0"], "--threads"),
        (["--degree", "30", "--d", "1"], "[FG416]"),
        (["--degree", "8"], "[FG416]"),
        (["--n", "1000000000"], "[FG416]"),
        (["--n", "1000000000000"], "--n"),
        (["--target", "toorch"], "[FG420]"),
        (["--dtype", "float16"], "[FG416]"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_are_refused(bench: Run, options: list[str], words: str) -> None:
    status, _, err = bench("--quick", *options)
    assert status == 2
    assert words in err


def test_a_file_that_cannot_be_written_is_a_diagnostic(bench: Run) -> None:
    Path("taken").write_text("a file")
    status, out, err = bench("--quick", "--n", "8", "--heads", "1", "--json", "taken/bench.json")
    assert status == 2
    assert "[FG421]" in err
    assert out == "", "nothing was measured"


def counted(calls: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls[0] += 1
        return exact(q, k, v)

    return attention


def test_time_together_warms_up_and_counts_a_slow_first_pass() -> None:
    inputs = make_inputs(8, 1, 4, 4)
    calls = [0]
    times = time_together({"fast": counted(calls)}, inputs, repeats=3, seconds=1e6)
    assert (calls[0], times["fast"].repeats) == (4, 3)
    calls = [0]
    times = time_together({"slow": counted(calls)}, inputs, repeats=3, seconds=1e-9)
    assert (calls[0], times["slow"].repeats) == (1, 1)
    assert times["slow"].total == pytest.approx(times["slow"].forward + times["slow"].backward)


def test_slope_and_extrapolation() -> None:
    assert slope([(n, 3 * n**1.5) for n in (10, 20, 40)]) == pytest.approx(1.5)
    assert slope([(10, 1.0)]) is None
    cell = Cell(Contender(1, 4, 4), 100, Timing(1.0, 2.0, 3.0, 5))
    longer = extrapolated(cell, 300)
    assert longer.timing == Timing(9.0, 18.0, 27.0, 0)
    assert (longer.measured, longer.source) == (False, 100)


@pytest.mark.parametrize(("d", "dv"), [(4, 8), (8, 4), (4, 4)])
def test_exact_is_softmax_attention(d: int, dv: int) -> None:
    inputs = make_inputs(9, 2, d, dv, dtype=torch.float64)
    scores = (inputs.q @ inputs.k.mT).masked_fill(torch.ones(9, 9).triu(1) > 0, -math.inf)
    torch.testing.assert_close(exact(inputs.q, inputs.k, inputs.v), scores.softmax(-1) @ inputs.v)


def test_contenders_share_inputs_whose_logits_are_within_the_range() -> None:
    inputs = Contender(2, 4, 8, 2).inputs(64)
    assert (inputs.q @ inputs.k.mT).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(Contender(2, 4, 8).inputs(64).v, inputs.v)


def test_the_near_field_of_a_contender_is_exact() -> None:
    near, far = Contender(1, 4, 8, 2, near=16, target="torch"), Contender(1, 4, 8, 2, target="torch")
    inputs = near.inputs(32)
    expected = exact(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(near.ready()(inputs.q, inputs.k, inputs.v), expected)
    assert (far.ready()(inputs.q, inputs.k, inputs.v) - expected).abs().max() > 1e-3


def test_flops_are_those_of_the_mathematics() -> None:
    """docs/mathematics.md, section 4: forward 4 r (dv + 1) + 2 c (d + dv + 1) a token and head, and so on."""
    contender, n = Contender(8, 16, 64, 2, target="torch"), 1000
    chunk = contender.chunk
    assert chunk is not None
    work = contender.flops(n)
    assert contender.rank == 153
    assert work.forward == 8 * n * (4 * 153 * 65 + 2 * chunk * (16 + 65))
    assert work.backward == 8 * n * (10 * 153 * 65 + 2 * chunk * (3 * 16 + 2 * 65))
    timing = Timing(2.0, 3.0, 5.0, 1)
    document = Cell(contender, n, timing).document(1e9)
    assert document["peak_share_forward"] == pytest.approx(work.forward / 2e9)
    assert document["peak_share_total"] == pytest.approx(work.total / 5e9)


@pytest.mark.parametrize(("degree", "tokens"), [(2, 64), (3, 64), (4, 32)])
def test_the_chunk_that_is_counted_is_that_of_the_kernel(degree: int, tokens: int) -> None:
    """Rank 4,845 has chunks of half the tokens: its features would leave the cache next to a core."""
    spec = KernelSpec(16, 64, (1.0,) * (degree + 1), causal=True)
    assert Contender(8, 16, 64, degree).chunk == token_chunks(spec)[2] == tokens


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="the high-water mark is known on Linux only")
def test_peak_of_sees_what_was_freed() -> None:
    torch.ones(64 * 2**20)  # an earlier and higher peak

    def action() -> None:
        torch.ones(16 * 2**20)  # 64 MiB, freed at once

    found = memory.peak_of(action)
    assert found is not None
    assert 60 * 2**20 < found < 80 * 2**20


@pytest.mark.medium
def test_memory_of_a_pass_in_a_process_of_its_own() -> None:
    peaks = memory.attention_peaks(Contender(8, 16, 64), 2048, 1)
    if memory.CLEAR.exists():
        padded = 4 * 8 * 2048 * 64  # bytes of one padded tensor, which SDPA's fast path makes of q and k
        assert all(value is not None and padded <= value for value in peaks.values())
    with pytest.raises(RuntimeError, match="ended with"):
        memory.run_child("fastgrad_dsl.bench.memory", {"contender": {}, "n": 1, "threads": 1})


@pytest.mark.skipif(peak.compiler_command() is None, reason="the loop needs a C++ compiler")
def test_peak_is_measured_where_there_is_a_compiler() -> None:
    found = peak.peak_flops(1)
    assert found is not None
    assert 1e8 < found < 1e13


@pytest.mark.skipif(peak.compiler_command() is None, reason="the loop needs a C++ compiler")
def test_peak_is_of_processor_time() -> None:
    """A thread beside it that takes half of the processor, or more, does not make the peak lower by half."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be bound to one processor here")
    alone = peak.peak_flops(1)
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        beside = peak.peak_flops(1)
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, processors)
    assert alone is not None
    assert beside is not None
    assert beside > 0.6 * alone


def test_the_peak_is_the_largest_of_several_between_the_passes(
    bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([2e15, 3e15, 1e15])
    monkeypatch.setattr(command, "peak_flops", lambda threads: next(found))
    options = [
        "--quick",
        "--n",
        "32",
        "--n",
        "64",
        "--heads",
        "1",
        "--d",
        "4",
        "--dv",
        "8",
        "--target",
        "torch",
    ]
    _, out, _ = bench(*options, "--json", "bench.json")
    assert json.loads(Path("bench.json").read_text())["sections"]["attention"]["peak_flops"] == 3e15
    assert next(found, None) is None
    assert "error of the measurement" not in out


def test_a_share_above_the_peak_is_said_to_be_an_error(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "peak_flops", lambda threads: 1.0)
    options = ["--quick", "--n", "32", "--heads", "1", "--d", "4", "--dv", "8", "--target", "torch"]
    _, out, _ = bench(*options)
    assert "of the peak is an error of the measurement" in " ".join(out.split())


def test_highest_of_peaks_and_what_is_said_of_shares() -> None:
    assert peak.highest([None, 2.0, 3.0, 1.0]) == 3.0
    assert peak.highest([None, None]) is None
    assert peak.error_of_shares([None, 0.5, 1.0]) == ""
    assert peak.error_of_shares([None, 0.5, 1.034]).startswith("103% of the peak is an error")


def test_peak_is_unknown_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peak.peak_flops(1) is None


def test_plot_has_words_for_readers_who_do_not_see_it_and_labels_apart() -> None:
    crowd = tuple(Series(f"number {i}", ((100.0, 0.01),), i) for i in range(8))
    line = Series("a <line>", ((1.0, 1e-5), (1000.0, 1.0)), 1, line=True, dashed=True)
    text = render(
        [Panel("one", "x", "y", crowd), Panel("two", "x", "y", (line,))], "Title & more", "What it shows"
    )
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    assert root.attrib["role"] == "img"
    assert (root.findtext(f"{name}title"), root.findtext(f"{name}desc")) == ("Title & more", "What it shows")
    assert "prefers-color-scheme:dark" in text
    labels = [t for t in root.iter(f"{name}text") if (t.text or "").startswith("number")]
    heights = sorted(float(t.attrib["y"]) for t in labels)
    assert len(labels) == 8
    assert all(b - a >= 12.9 for a, b in pairwise(heights))
    assert all(0 <= float(t.attrib["x"]) < WIDTH and 0 < float(t.attrib["y"]) < HEIGHT for t in labels)
    dashed = [p for p in root.iter(f"{name}path") if "stroke-dasharray" in p.attrib]
    assert len(dashed) == 1
