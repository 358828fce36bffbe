"""Estimates of time and memory from the cost model, at the longest declared lengths and against the length.

A time is flops divided by what the target's kernels do of them beside exact attention
(`fastgrad_compiler.planning.cost.Pace`), so that it is relative: in units of one flop of exact attention at great
lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgrad_compiler.approximation.elementary import power
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_compiler.planning.cost import EXACT, PACE, Pace, Shape, Way, state_bytes
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.entries import Entry

LONGEST = 65536  # of a dim for which the file declares no limit
SHORTEST, POINTS = 64, 25  # of the curves of cost against the length
NUMBER = 4  # bytes of a float32


def pace_of(plan: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> tuple[Pace, str]:
    """The pace of the plan's target, and whether it was measured on this machine or is the default."""
    found = (calibration or {}).get("pace") or {}
    if "speed" in found and "keys" in found:
        return Pace(float(found["speed"]), int(found["keys"])), str(found["kind"])
    return PACE[plan["target"]], "default"


def longest_sizes(plan: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Sizes of the dims that lengths of attentions are made of, and those among them that the file leaves open."""
    names = {
        name
        for entry in plan["attentions"]
        for key in ("queries", "keys")
        for name in parse_dim(entry[key]).names
    }
    sizes, undeclared = {}, []
    for dim in plan["dims"]:
        if dim["name"] in names:
            multiple = dim["multiple_of"] or 1
            sizes[dim["name"]] = dim["at_most"] or max(LONGEST // multiple, 1) * multiple
            undeclared += [dim["name"]] if dim["at_most"] is None else []
    return sizes, undeclared


def lengths_of(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Queries and keys of an attention at these sizes of dims."""
    n, m = (max(parse_dim(entry[key]).evaluate(sizes), 1) for key in ("queries", "keys"))
    return n, m


def shape_of(entry: Entry, n: int, m: int) -> Shape:
    """One head of an attention at a length."""
    return Shape(
        n=n,
        m=m,
        d=entry["d"],
        dv=entry["dv"],
        causal=entry["causal"],
        documents="documents" in entry["roles"],
        window=entry["window"] if entry["decision"] == "exact" else None,  # whatever a file says
    )


def own_way(entry: Entry) -> Way:
    """The polynomial that serves an attention."""
    return Way(entry["degree"], entry["near"], entry["precision"])


def predict(
    plan: Mapping[str, Any], pace: Pace, kind: str, calibration: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """`prediction` of the headline: speed-up and memory of all attentions together; None where there are none."""
    sizes, undeclared = longest_sizes(plan)
    counted = [entry for entry in plan["attentions"] if _is_counted(entry)]
    if not counted:
        return None
    totals = {"exact": [0.0, 0.0], "compiled": [0.0, 0.0]}
    memory = {"exact": 0, "compiled": 0, "scores": 0}
    for entry in counted:
        n, m = lengths_of(entry, sizes)
        shape, served = shape_of(entry, n, m), _served(entry, m)
        exact = pace.time(shape, EXACT)
        compiled = pace.time(shape, own_way(entry)) if served else exact
        for name, time in (("exact", exact), ("compiled", compiled)):
            totals[name][0] += entry["query_heads"] * time.forward
            totals[name][1] += entry["query_heads"] * time.backward
        for name, value in _memory(entry, n, m, served).items():
            memory[name] += value
    (forward, backward), (own_forward, own_backward) = totals["exact"], totals["compiled"]
    return {
        "kind": "estimate",
        "n": max(max(lengths_of(entry, sizes)) for entry in counted),
        "sizes": sizes,
        "undeclared": undeclared,
        "attentions": len(counted),
        "pace": {"target": plan["target"], "kind": kind, "speed": pace.speed, "keys": pace.keys},
        "speed_up": {
            "forward": forward / own_forward,
            "backward": backward / own_backward,
            "total": (forward + backward) / (own_forward + own_backward),
        },
        "calibrated": _calibrated(calibration),
        "memory": memory,
    }


def cost_key(entry: Entry) -> object:
    """What the cost of an attention depends on."""
    keys = (
        "d",
        "dv",
        "decision",
        "family",
        "degree",
        "near",
        "causal",
        "window",
        "break_even",
        "queries",
        "keys",
        "precision",
    )
    return (*(entry[key] for key in keys), "documents" in entry["roles"])


def cost_curve(entry: Entry, sizes: Mapping[str, int], pace: Pace) -> dict[str, Any] | None:
    """Time against the length, with as many keys as queries; 1 is exact attention, both passes, at the longest length.

    `speed_up`: how many times as fast as exact attention it runs at the longest lengths of queries and keys.

    None where the widths are known at run time only.
    """
    if not _is_counted(entry):
        return None
    served = entry["decision"] == "polynomial"
    n, m = lengths_of(entry, sizes)
    longest, shape = max(n, m), shape_of(entry, n, m)
    own = own_way(entry) if _served(entry, m) else EXACT
    last = max(longest, 2 * (entry["break_even"] or 0), 2 * SHORTEST)
    lengths = sorted({round(SHORTEST * power(last / SHORTEST, i / (POINTS - 1))) for i in range(POINTS)})
    unit = pace.seconds(shape_of(entry, longest, longest), EXACT)
    ways = {"exact": EXACT} | ({"polynomial": own_way(entry)} if served else {})
    curves: dict[str, Any] = {"exact": None, "polynomial": None}
    for name, way in ways.items():
        times = [pace.time(shape_of(entry, n, n), way) for n in lengths]
        curves[name] = {
            "forward": [_digits(time.forward / unit) for time in times],
            "total": [_digits(time.total / unit) for time in times],
        }
    return {
        "longest": longest,
        "speed_up": pace.seconds(shape, EXACT) / pace.seconds(shape, own),
        "lengths": lengths,
        **curves,
        "break_even": entry["break_even"] if served else None,
    }


def _calibrated(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Seconds of all attentions, both passes, by the pace and at the length of a calibration."""
    planned = (calibration or {}).get("planned")
    if calibration is None or planned is None or not planned["seconds"]:
        return None
    return {
        "n": planned.get("length"),
        "exact_seconds": planned["exact_seconds"],
        "seconds": planned["seconds"],
        "speed_up": planned["exact_seconds"] / planned["seconds"],
        "pace": {key: calibration["pace"][key] for key in ("target", "machine", "threads", "kind")},
    }


def _is_counted(entry: Entry) -> bool:
    return entry["d"] is not None and entry["dv"] is not None


def _served(entry: Entry, m: int) -> bool:
    """Whether a polynomial runs at this length; an attention that stands in for exp is exact below its break-even."""
    if not is_approximated(entry):
        return bool(entry["decision"] == "polynomial")
    return m >= (entry["break_even"] or 0)


def _memory(entry: Entry, n: int, m: int, served: bool) -> dict[str, int]:
    """Bytes of one sequence in float32: q, k, v, the output and their gradients, and what each way adds.

    Fused exact attention adds one normaliser a row, a polynomial the states of both passes; `scores` is what exact
    attention that keeps its score matrix adds.
    """
    heads, width = entry["query_heads"], entry["d"] + entry["dv"]
    tensors = 2 * NUMBER * width * (heads * n + entry["key_heads"] * m)
    exact = tensors + NUMBER * heads * n
    states = 2 * heads * state_bytes(d=entry["d"], dv=entry["dv"], degree=entry["degree"]) if served else 0
    return {
        "exact": exact,
        "compiled": tensors + states if served else exact,
        "scores": NUMBER * heads * n * m,
    }


def _digits(value: float) -> float:
    """Five digits: a curve is drawn."""
    return float(f"{value:.5g}")
