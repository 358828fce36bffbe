"""The section `scaling` of the JSON: the model of many ranks, faults at scale, and what a few processes take here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import linear_regression

from benchmarks.scaling.constants import CONSTANTS, FAILURES, HOST_LINK, RESTART, STORAGE
from benchmarks.scaling.faults import INTERVALS, Run, best_interval, lost
from benchmarks.scaling.here import SMALL, Request, taken
from benchmarks.scaling.sizes import Decoder, sent
from benchmarks.scaling.step import OURS, RING, ULYSSES, WAYS, bytes_per_token, largest, memory, step
from benchmarks.settings import Settings, heading, say

DECODER = Decoder()
RANKS = tuple(2**k for k in range(11))
LENGTHS = (*(m * 10**k for k in range(4, 8) for m in (1, 3)), 10**8)
MINUTE = 60.0  # seconds of a step that is worth waiting for
DEGREES = (2, 3, 4)
TRIED = tuple(2**k for k in range(10, 28))  # tokens, for break-even
FAULT_RANKS = tuple(2**k for k in range(3, 11))
SAVED_BYTES = 12  # of a weight: itself and two moments, in float32
FAULT_WEIGHTS = {1.5e9: 8, 70e9: 64}  # the number of weights, and from how many ranks on they fit
GROUPED = 0.7  # Weibull's shape of failures that come in groups: Schroeder and Gibson 2006 found 0.7 to 0.8
WIDER = Decoder(layers=4, width=96, heads=4, hidden=384, vocab=256)
MEMORY_LENGTHS = (16_384, 65_536)
HERE_RANKS, HERE_LENGTHS, HERE_STEPS = (1, 2, 4), (512, 1024, 2048, 4096), 5


def measure(settings: Settings) -> dict[str, object]:
    """The section; a quick run has fewer and shorter sequences here, and the same model."""
    say("the model of many ranks")
    cells = list(_cells(DECODER))
    found = {
        **heading(settings),
        "constants": [asdict(each) for each in CONSTANTS],
        "decoder": {
            **asdict(DECODER), "dv": DECODER.dv, "state_bytes": DECODER.state_bytes,
            "weights": {way: DECODER.weights(softmax=way != OURS) for way in (OURS, RING)},
        },
        "cells": cells,
        "largest": [row for ranks in RANKS for row in _largest(DECODER, ranks)],
        "break_even": [row for degree in DEGREES for row in _break_even(replace(DECODER, degree=degree))],
    }  # fmt: skip
    say("simulated faults")
    found["faults"] = [row for weights, least in FAULT_WEIGHTS.items() for row in _faults(weights, least)]
    found["intervals"] = list(_intervals())
    say("what a few processes here send and take")
    lengths, steps = ((64, 128), 1) if settings.quick else (HERE_LENGTHS, HERE_STEPS)
    found["here"] = _here(Request(SMALL, lengths, steps), HERE_RANKS)
    longer = (256,) if settings.quick else MEMORY_LENGTHS
    found["memory"] = [row for n in longer for row in _memory(n)]
    return found


def _cells(decoder: Decoder) -> Iterator[dict[str, object]]:
    for ranks in RANKS:
        for n in LENGTHS:
            for way in WAYS:
                taken = step(way, decoder, ranks, n)
                if taken is not None:
                    more = {
                        "bytes_per_token": bytes_per_token(way, decoder, ranks, n),
                        "memory": memory(way, decoder, ranks, n),
                    }
                    yield {"way": way, "ranks": ranks, "n": n, **asdict(taken), **more}


def _largest(decoder: Decoder, ranks: int) -> Iterator[dict[str, object]]:
    for way in WAYS:
        row = {"way": way, "ranks": ranks, "n": largest(way, decoder, ranks)}
        yield {**row, "n_minute": largest(way, decoder, ranks, MINUTE)}


def _break_even(decoder: Decoder) -> Iterator[dict[str, object]]:
    """The least tried length from which ours is always faster, and sends less, than the better of the other two."""

    def seconds(way: str, ranks: int, n: int) -> float:
        found = step(way, decoder, ranks, n)
        return float("inf") if found is None else found.seconds

    def bytes_(way: str, ranks: int, n: int) -> float:
        return bytes_per_token(way, decoder, ranks, n) if step(way, decoder, ranks, n) else float("inf")

    for ranks in RANKS:
        row: dict[str, object] = {
            "degree": decoder.degree,
            "state_bytes": decoder.state_bytes,
            "ranks": ranks,
        }
        yield {**row, "n_time": _from(ranks, seconds), "n_bytes": _from(ranks, bytes_) if ranks > 1 else None}


def _from(ranks: int, cost: Callable[[str, int, int], float]) -> int | None:
    least = None
    for n in reversed([n for n in TRIED if n >= ranks]):
        if cost(OURS, ranks, n) > min(cost(way, ranks, n) for way in (RING, ULYSSES)):
            return least
        least = n
    return least


# ---------------------------------------------------------------- faults


def run_of(weights: float, ranks: int, *, blocks: bool) -> Run:
    """What the failures of so many ranks meet; `blocks`: a checkpoint stops training until it is written."""
    part = SAVED_BYTES * weights / ranks
    copy, write = part / HOST_LINK.value, part / STORAGE.value
    between = 1 / (FAILURES.value * ranks)
    return Run(between, copy + write if blocks else copy, 0.0 if blocks else write, RESTART.value)


def _faults(weights: float, least: int) -> Iterator[dict[str, object]]:
    for ranks in (each for each in FAULT_RANKS if each >= least):
        for blocks in (True, False):
            run = run_of(weights, ranks, blocks=blocks)
            interval, share = best_interval(run)
            yield {
                "weights": weights,
                "ranks": ranks,
                "blocks": blocks,
                **asdict(run),
                "interval": interval,
                "lost": share,
                "young": run.young,
                "daly": run.daly,
                "lost_by_formula": run.lost_by_formula(run.daly) if blocks else None,
                "lost_in_groups": best_interval(run, shape=GROUPED)[1],
            }


def _intervals() -> Iterator[dict[str, object]]:
    """The share lost over the interval, for the most ranks and the larger model."""
    weights, ranks = max(FAULT_WEIGHTS), max(FAULT_RANKS)
    for blocks in (True, False):
        run = run_of(weights, ranks, blocks=blocks)
        young = run_of(weights, ranks, blocks=True).young
        for interval in (INTERVALS[::4] * young).tolist():
            yield {
                "blocks": blocks,
                "interval": interval,
                "lost": lost(run, interval),
                "lost_by_formula": run.lost_by_formula(interval) if blocks else None,
            }


# ---------------------------------------------------------------- here


def _memory(n: int) -> Iterator[dict[str, object]]:
    """The most memory of a process, over what it has before the first step, with all tokens and with a quarter."""
    for ranks in (1, 4):
        found, _ = taken(ranks, Request(WIDER, (n,), 0))
        peaks = [each.peak for each in found if each.peak is not None]
        row = {"ranks": ranks, "n": n, "base_bytes": max(each.base for each in found)}
        yield {**row, "peak_bytes": max(peaks, default=None), "seconds": max(each.seconds for each in found)}


def _here(request: Request, ranks: Sequence[int]) -> dict[str, object]:
    """Bytes by the model and as counted, of all ranks together; seconds by the model and as measured.

    The model of this machine: seconds = fixed + pace x tokens / processes that run at once + calls x latency + bytes /
    bandwidth. The first two are fitted to one process, the others measured: between as many as there are, and two.
    """
    found = {count: taken(count, request) for count in ranks}
    one = {each.n: each.seconds for each in found[1][0]}
    slope, fixed = linear_regression(list(one), list(one.values()))
    bandwidth = found[2][1].bandwidth  # more processes than cores hide it
    rows = []
    for count, (steps, wire) in found.items():
        for n in request.lengths:
            own = [each for each in steps if each.n == n]
            lengths = tuple(n // count + (rank < n % count) for rank in range(count))
            modelled = [sent(request.decoder, lengths, rank) for rank in range(count)]
            most = max(each.total for each in modelled)
            rows.append(
                {
                    "ranks": count,
                    "n": n,
                    "modelled_bytes": sum(each.total for each in modelled),
                    "counted_bytes": sum(sum(each.by.values()) for each in own),
                    "exchanged_bytes": sum(each.states + each.halos for each in modelled),
                    "modelled_s": fixed
                    + slope * n / min(count, os.cpu_count() or 1)
                    + own[0].calls * wire.latency
                    + most / bandwidth,
                    "calls": own[0].calls,
                    "measured_s": max(each.seconds for each in own),
                    "waiting": sum(each.waiting for each in own) / count,
                }
            )
    return {
        "decoder": asdict(request.decoder),
        "steps": request.steps,
        "fixed_s": fixed,
        "token_s": slope,
        "bandwidth": bandwidth,
        "latencies": [{"ranks": count, "latency": wire.latency} for count, (_, wire) in found.items()],
        "rows": rows,
    }
