"""The model of many ranks: bytes are those that processes send, formulas keep their limits, faults agree with Daly."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks.scaling import page, section
from benchmarks.scaling.constants import CONSTANTS, FAILURES, MEMORY
from benchmarks.scaling.faults import Run, best_interval, lost
from benchmarks.scaling.here import SMALL, Request, Taken, compiled_of, taken
from benchmarks.scaling.sizes import Decoder, exchanged_by_all, halo_tokens, rounds, sent
from benchmarks.scaling.step import OURS, RING, ULYSSES, WAYS, bytes_per_token, largest, memory, step
from benchmarks.settings import ROOT, Settings

LENGTHS = (64, 203)  # the second is not divided by the ranks, nor by blocks
DECODER = Decoder()


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))]
)
def steps(request: pytest.FixtureRequest) -> tuple[int, list[Taken]]:
    """What that many processes sent."""
    return request.param, taken(request.param, Request(SMALL, LENGTHS, 1))[0]


@pytest.mark.medium
def test_bytes_are_those_that_processes_send(steps: tuple[int, list[Taken]]) -> None:
    """Exactly, of each rank, by what is sent."""
    ranks, found = steps
    assert len(found) == ranks * len(LENGTHS)
    for each in found:
        lengths = tuple(each.n // ranks + (rank < each.n % ranks) for rank in range(ranks))
        modelled = sent(SMALL, lengths, each.rank)
        by = {name: 0.0 for name in ("exchanged", "weights", "numbers")}
        kinds = {"all_to_all_single": "exchanged", "all_gather": "numbers", "all_reduce": "numbers"}
        for name, count in each.by.items():
            by[kinds.get(name, "weights")] += count
        assert by["exchanged"] == modelled.states + modelled.halos
        assert by["weights"] == pytest.approx(modelled.weights, rel=1e-12)
        assert by["numbers"] == pytest.approx(modelled.numbers, rel=1e-12)


def test_the_weights_are_those_of_the_model() -> None:
    entries = sum(weight.numel() for weight in compiled_of(SMALL).module().parameters())
    assert entries == SMALL.weights(softmax=False)


def test_the_goal_of_a_head() -> None:
    """At most two states each way for each head and rank of four, at any length; 80 KB each."""
    one = replace(DECODER, layers=1, heads=1, width=64)
    assert one.state_bytes == (153 * 65 + 1) * 8  # and what its gates leave
    for n in (1024, 1 << 20):
        for rank in range(4):
            assert sent(one, (n // 4,) * 4, rank).states <= (2 + 2) * one.state_bytes


def test_halos_of_short_pieces_come_from_several_ranks() -> None:
    """One token on each of four ranks, blocks of two: each needs all from where the block before its own begins."""
    asked = [
        0,
        1,
        2,
        1 + 2,
    ]  # by the ranks; ranks 2 and 3 are in the block of tokens 2 and 3, after tokens 0 and 1
    given = [halo_tokens((1,) * 4, rank, 2) - asked[rank] for rank in range(4)]
    assert sum(given) == sum(asked)
    assert given == [3, 2, 1, 0]


def test_all_together() -> None:
    for lengths in ((7,), (50, 51), (1, 1, 1), (20, 3, 40, 1, 9), (300,) * 8):
        each = [sent(SMALL, lengths, place, 2) for place in range(len(lengths))]
        assert exchanged_by_all(SMALL, lengths, 2) == sum(one.states + one.halos for one in each)


def test_without_others_nothing_is_sent() -> None:
    for way in WAYS:
        found = step(way, DECODER, 1, 10**5)
        assert found is not None
        assert found.exposed == pytest.approx(0, abs=1e-9 * found.seconds)
        assert bytes_per_token(way, DECODER, 1, 10**5) == 0


def test_what_grows_with_what() -> None:
    """Ours sends as much at any length; the others as much for a token; ring attention's with the ranks."""
    for ranks in (8, 32):
        short, long = (bytes_per_token(OURS, DECODER, ranks, n) * n for n in (1 << 17, 1 << 20))
        assert short == long
        for way in (RING, ULYSSES):
            a, b = (bytes_per_token(way, DECODER, ranks, n) for n in (1 << 17, 1 << 20))
            assert a == pytest.approx(b)
    fewer, more = (bytes_per_token(RING, DECODER, ranks, 1 << 20) for ranks in (8, 16))
    assert more / fewer == pytest.approx((4 * 15 + 1) / (4 * 7 + 1))
    for way, power in ((OURS, 1), (RING, 2)):
        once, tenfold = (step(way, DECODER, 8, n) for n in (10**7, 10**8))
        assert once is not None
        assert tenfold is not None
        assert math.log10(tenfold.seconds / once.seconds) == pytest.approx(power, abs=0.05)


def test_ulysses_has_no_more_ranks_than_heads() -> None:
    assert step(ULYSSES, DECODER, 32, 10**6) is not None
    assert step(ULYSSES, DECODER, 64, 10**6) is None
    assert largest(ULYSSES, DECODER, 64) is None


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_fits_and_the_next_does_not(way: str) -> None:
    for limit in (math.inf, 10.0):
        n = largest(way, DECODER, 8, limit)
        assert n is not None
        fits = []
        for tokens in (n, n + 8 * 1024):
            found = step(way, DECODER, 8, tokens)
            assert found is not None
            fits.append(memory(way, DECODER, 8, tokens) <= MEMORY.value and found.seconds <= limit)
        assert fits == [True, False]


def test_rounds() -> None:
    assert [rounds(each) for each in (1, 2, 3, 4, 5, 1024)] == [0, 1, 2, 2, 3, 10]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("interval", [100.0, 600.0, 3000.0])
def test_simulated_faults_are_what_daly_expects(interval: float) -> None:
    """Where training stops for a checkpoint: to three standard errors of 20,000 failures."""
    run = Run(between=20_000.0, copy=20.0, write=0.0, restart=300.0)
    assert lost(run, interval) == pytest.approx(run.lost_by_formula(interval), rel=0.04)
    assert lost(run, interval, failures=200_000) == pytest.approx(run.lost_by_formula(interval), rel=0.015)


def test_each_event_by_hand() -> None:
    """The same as a clock that goes from one event to the next, with writing in the background."""
    run, interval = Run(between=5000.0, copy=7.0, write=90.0, restart=60.0), 200.0
    assert lost(run, interval, failures=300) == pytest.approx(_by_events(run, interval, 300), abs=1e-12)
    assert lost(run, 50.0, failures=300) == pytest.approx(_by_events(run, 90.0, 300), abs=1e-12)


def _by_events(run: Run, interval: float, failures: int) -> float:
    import numpy as np

    kept = clock = 0.0
    for until in (np.random.default_rng(0).weibull(1.0, failures) * run.between).tolist():
        at, pending = run.restart, math.inf  # of this life; when what is being written is whole
        while True:
            done = min(pending, at + interval)
            if done > until:
                break
            if pending <= at + interval:
                kept, pending = kept + interval, math.inf
                continue
            at += interval + run.copy
            pending = at + run.write
        clock += until
    return 1 - kept / clock


def test_the_best_interval() -> None:
    """Near Daly's where training stops; longer than writing takes where it does not."""
    run = section.run_of(70e9, 1024, blocks=True)
    interval, share = best_interval(run)
    assert 0.5 < interval / run.daly < 2
    assert share <= lost(run, run.daly) * 1.02
    background = section.run_of(70e9, 1024, blocks=False)
    assert background.copy + background.write == pytest.approx(run.copy)
    assert best_interval(background)[1] < share
    assert 1 / FAILURES.value / 16_384 / 3600 == pytest.approx(54 * 24 / 419)


# ---------------------------------------------------------------- the page


def test_the_committed_numbers_are_those_of_the_model() -> None:
    document = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    found = document["sections"]["scaling"]
    assert found["constants"] == [asdict(each) for each in CONSTANTS]
    assert found["cells"] == list(section._cells(DECODER))
    assert found["largest"] == [row for ranks in section.RANKS for row in section._largest(DECODER, ranks)]
    for row in found["here"]["rows"]:
        assert row["counted_bytes"] == pytest.approx(row["modelled_bytes"], rel=1e-12)


def test_the_section_and_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the model and the simulation, with what is measured here made up, and every key documented."""
    row = {"n": 64, "modelled_bytes": 1.0, "counted_bytes": 1.0, "exchanged_bytes": 1, "modelled_s": 1.0}
    row |= {"ranks": 2, "measured_s": 1.0, "waiting": 0.5, "calls": 9}
    made = {
        "decoder": asdict(SMALL),
        "steps": 1,
        "fixed_s": 0.0,
        "token_s": 0.0,
        "bandwidth": 1e9,
        "latencies": [{"ranks": 2, "latency": 1.0}],
        "rows": [row],
    }
    monkeypatch.setattr(section, "_here", lambda request, ranks: made)
    both = [
        {"n": 256, "ranks": r, "base_bytes": 9, "peak_bytes": p, "seconds": 1.0} for r, p in ((1, 8), (4, 2))
    ]
    monkeypatch.setattr(section, "_memory", lambda n: both)
    monkeypatch.setattr(section, "best_interval", lambda run, shape=1.0: (run.young, 0.01))
    monkeypatch.setattr(section, "heading", lambda settings: {})
    found: Any = section.measure(Settings(quick=True))
    text = page.page(found)
    assert all(each.name in text for each in CONSTANTS)
    for cell in found["cells"]:
        assert cell["seconds"] == pytest.approx(cell["products"] + cell["attention"] + cell["exposed"])
    documented = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows = [
        found,
        *(found[name][0] for name in ("cells", "largest", "break_even", "faults", "intervals", "constants")),
    ]
    missing = {
        key for each in (*rows, found["here"], row, both[0]) for key in each if f"{key}" not in documented
    }
    assert not missing
    assert "25% over the base and 65% with it at 256 tokens" in text
    assert set(page.figures(found)) == {page.FIGURE, page.FAULTS}


def test_what_ours_loses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss in the numbers is a loss on the page."""
    ours = {"way": OURS, "ranks": 8, "n": 10**4, "seconds": 2.0, "bytes_per_token": 3.0, "memory": 1.0}
    other = {**ours, "way": RING, "seconds": 1.0, "bytes_per_token": 1.0, "memory": 2.0}
    degrees = [{"degree": 3, "ranks": ranks, "n_time": n} for ranks, n in ((8, 64), (16, 128), (32, 1))]
    monkeypatch.setattr(page, "_margins", lambda section: "")
    decoder = {"weights": {OURS: 9, RING: 10}}
    told = page._losses({"cells": [ours, other], "decoder": decoder, "break_even": degrees})
    assert "with degree 3 a step of ours takes longer below 128 tokens on 16 ranks" in told
    assert "ours loses 1: 10,000 tokens on 8 ranks against ring attention. The worst is 100.0% slower" in told
    assert "The worst is 200.0% more" in told
    assert "**memory**: ours loses none." in told
