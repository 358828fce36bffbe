"""calibration.json: what calibration measured and what the planner made of it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.calibration.calibrate import Attention, Calibration, Gain
from fastgrad_dsl.calibration.plan import Plan, Serving, candidates_of

FORMAT = "fastgrad-calibration-2"


def calibration_document(
    calibration: Calibration, plan: Plan, program: Program, verification: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The document (docs/calibration.md gives its fields)."""
    return {
        "format": FORMAT,
        "data": calibration.data,
        "weights": calibration.weights,
        "batches": calibration.batches,
        "dims": dict(calibration.dims),
        "seed": calibration.seed,
        "trust": "certified" if calibration.certified else "calibrated",
        "pace": calibration.pace.document,
        "attentions": [
            _attention(each, way, calibration, program)
            for each, way in zip(calibration.attentions, plan.ways, strict=True)
        ],
        "planned": {
            "length": plan.length,
            "seconds": plan.seconds,
            "exact_seconds": plan.exact_seconds,
            "output": plan.output,
            "gradient": plan.gradient,
            "gap": plan.gap,
        },
        "verification": verification,
    }


def _attention(each: Attention, taken: Serving, calibration: Calibration, program: Program) -> dict[str, Any]:
    gains = {"output": _gain(each.output_gain), "gradient": _gain(each.gradient_gain)}
    ways = candidates_of(each, calibration, program)
    return {
        "path": each.entry.path,
        "full_path": each.entry.full_path,
        "obstacle": each.obstacle or None,
        "heads": _heads(each),
        "gains": gains,
        "candidates": [
            _candidate(way, way.parts == taken.parts, each, calibration.certified) for way in ways
        ],
    }


def _heads(each: Attention) -> list[dict[str, Any]]:
    logits = next(iter(each.logits.values()), None)
    if logits is None:
        return []
    return [
        {
            "head": head,
            "least": logits.least[head],
            "largest": logits.largest[head],
            "centred": None if logits.centred is None else logits.centred[head],
            "histogram": {"edges": list(logits.edges), "counts": list(logits.counts[head])},
        }
        for head in range(each.heads)
    ]


def _gain(gain: Gain | None) -> dict[str, float] | None:
    return None if gain is None else {"value": gain.value, "low": gain.low, "high": gain.high}


def _candidate(way: Serving, chosen: bool, each: Attention, proved: bool) -> dict[str, Any]:
    served = [part.candidate for part in way.parts if part.candidate]
    first = served[0] if served else None
    return {
        "name": _name(way),
        "family": first.polynomial.family if first else None,
        "degree": max((c.polynomial.degree for c in served), default=None),
        "near": first.near if first else None,
        "centred": first is not None and _centred(each, first.near),
        "bound": max((c.polynomial.bound for c in served), default=None),
        "source": each.served[first.near].range.source if first else None,
        "seconds": way.option.seconds,
        "output": way.option.output,
        "gradient": way.option.gradient,
        "proved": proved,
        "chosen": chosen,
    }


def _centred(each: Attention, near: int | None) -> bool:
    served = each.served[near]
    return served.mean or served.range.centre is not None


def _name(way: Serving) -> str:
    texts = []
    for part in way.parts:
        c = part.candidate
        text = "exact" if c is None else f"{c.polynomial.family} {c.polynomial.degree}"
        if c is not None and c.near is not None:
            text += f", near {c.near}"
        if part.precision == "float64":
            text += ", float64"
        texts.append(text if len(way.parts) == 1 else f"{len(part.heads)} heads {text}")
    return "; ".join(texts)
