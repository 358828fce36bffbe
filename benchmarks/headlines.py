"""The sentences of the README, from the JSON of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.tables import SHARE_AT, Section, mebibytes, ratio


def _attention_headline(sections: Mapping[str, Section]) -> str | None:
    cells = sections.get("attention", {}).get("cells", [])
    at = {(c["name"], c["d"]): c["total_s"] for c in cells if c["n"] == SHARE_AT and c["measured"]}
    exact, own, near = (at.get((name, 16)) for name in ("SDPA", "degree 2", "degree 2, near 64"))
    if exact is None or own is None:
        return None
    also = "" if near is None else f" ({ratio(exact, near)} with an exact near field of 64)"
    return (
        f"attention at n = {SHARE_AT:,}, forward and backward, 8 heads, d = 16, degree 2: **{ratio(exact, own)} "
        f"times** faster than PyTorch's SDPA on its fast path{also}"
    )


def _memory_headline(sections: Mapping[str, Section]) -> str | None:
    memory = sections.get("attention", {}).get("memory", [])
    found = [m for m in memory if m["name"] == "degree 2" and m["total"] is not None]
    if not found:
        return None
    longest = max(found, key=lambda m: int(m["n"]))
    return (
        f"its peak memory beyond inputs, outputs and gradients: **{mebibytes(longest['total'])} MiB** at "
        f"n = {longest['n']:,}"
    )


def _training_headline(sections: Mapping[str, Section]) -> str | None:
    rows = {
        (r["model"], r["n"]): r["seconds"]
        for r in sections.get("training", {}).get("rows", [])
        if r["measured"]
    }
    exact, own = rows.get(("sdpa", SHARE_AT)), rows.get(("near", SHARE_AT))
    if exact is None or own is None:
        return None
    return (
        f"a training step of examples/bounded.tfg, 6 layers, at n = {SHARE_AT:,}: **{own:.2f} s**, {ratio(exact, own)} "
        "times faster than on SDPA"
    )


HEADLINES: tuple[Callable[[Mapping[str, Section]], str | None], ...] = (
    _attention_headline,
    _memory_headline,
    _training_headline,
)
"""The sentences of the README; None where the numbers are not there."""
