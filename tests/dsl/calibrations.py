"""A calibration document as a calibration of a plan would give it, with made-up numbers of the usual sizes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.form import built

BINS = 24


def calibration_of(plan: Any, **changes: object) -> Calibration:
    """For every attention of a plan that a polynomial serves; `changes` replace entries of the document."""
    served = [entry for entry in plan["attentions"] if entry["decision"] == "polynomial" and entry["bound"]]
    document = {
        "format": "fastgrad-calibration-2",
        "data": "held-out text of emma.txt",
        "weights": "the given weights",
        "batches": 2,
        "dims": {"b": 1, "n": 2048},
        "seed": 0,
        "trust": "calibrated",
        "pace": {
            "speed": 1.9,
            "keys": 40,
            "target": "cpp",
            "machine": "a machine",
            "threads": 2,
            "kind": "measured",
        },
        "attentions": [_attention(place, entry) for place, entry in enumerate(served)],
        "planned": {
            "length": 2048,
            "seconds": 0.1,
            "exact_seconds": 1.0,
            "output": 0.02,
            "gradient": 0.1,
            "gap": 0.0,
        },
        "verification": {
            "batches": 2,
            "tokens": 4096,
            "output": 0.015,
            "gradient": 0.06,
            "violations": 0,
            "rounds": [{"output": 0.015, "gradient": 0.06, "violations": 0}],
        },
    }
    made: Calibration = built(Calibration, {**document, **changes})
    return made


def _attention(place: int, entry: Any) -> dict[str, Any]:
    interval = {"value": 0.4, "low": 0.3, "high": 0.5}
    return {
        "path": entry["path"],
        "full_path": f"{entry['path']}._attention",
        "obstacle": None,
        "heads": [_head(place, head, entry["bound"]) for head in range(entry["query_heads"])],
        "gains": {"output": interval, "gradient": interval},
        "candidates": [
            {
                "name": "exact",
                "family": None,
                "degree": None,
                "near": None,
                "centred": False,
                "bound": None,
                "source": None,
                "seconds": 0.4,
                "output": 0.0,
                "gradient": 0.0,
                "proved": True,
                "chosen": False,
            },
            *(_candidate(entry, degree, near) for degree in range(1, 7) for near in {None, entry["near"]}),
        ],
    }


def _head(place: int, head: int, bound: float) -> dict[str, Any]:
    """Logits about a mean near 0, wider in later heads."""
    edges = [1.2 * bound * (2 * i / BINS - 1) for i in range(BINS + 1)]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    width = bound * (0.15 + 0.03 * (head % 8))
    counts = [
        round(10_000 * math.exp(-(((m - 0.05 * bound * (place % 3)) / width) ** 2) / 2)) for m in middles
    ]
    return {
        "head": head,
        "least": -3 * width,
        "largest": 3 * width,
        "centred": 2.5 * width,
        "histogram": {"edges": edges, "counts": counts},
    }


def _candidate(entry: Any, degree: int, near: int | None) -> dict[str, Any]:
    error = entry["bound"] ** (degree + 1) / math.factorial(degree + 1) / (8 if near is None else 16)
    return {
        "name": f"balanced {degree}" + ("" if near is None else f", near {near}"),
        "family": "balanced",
        "degree": degree,
        "near": near,
        "centred": False,
        "bound": entry["bound"],
        "source": "program",
        "seconds": 1e-4 * math.comb(entry["d"] + degree, degree) + (0 if near is None else 0.002),
        "output": error,
        "gradient": 4 * error,
        "proved": True,
        "chosen": (degree, near) == (entry["degree"], entry["near"]),
    }
