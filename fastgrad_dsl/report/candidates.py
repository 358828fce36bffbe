"""What an attention could have been: every candidate with its time and error, the chosen one marked.

With a calibration these are its candidates, with times of this machine and their estimated parts in the model's error.
Without one, the polynomials of all families on the same range, with times from the cost model and with certificates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.approximation.rounding import EXACT as UNROUNDED
from fastgrad_compiler.approximation.rounding import Rounding, Run, Sizes, rounding
from fastgrad_compiler.codegen.kernel import KernelSpec
from fastgrad_compiler.planning.candidates import Limits, polynomials
from fastgrad_compiler.planning.cost import EXACT, Pace, Way
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.entries import Entry
from fastgrad_dsl.report.prediction import lengths_of, shape_of


def calibrated(found: Mapping[str, Any], trust: str) -> dict[str, Any]:
    """The candidates of one attention of a calibration document, whose budget is `certified` or `calibrated`."""
    points = [
        {
            key: candidate[key]
            for key in (
                "name",
                "family",
                "degree",
                "near",
                "centred",
                "output",
                "gradient",
                "proved",
                "chosen",
            )
        }
        | {"time": candidate["seconds"], "range": candidate["bound"]}
        for candidate in found["candidates"]
    ]
    return {
        "error_kind": "bound" if trust == "certified" else "estimate",
        "errors": "certificates times gains of at least 1"
        if trust == "certified"
        else "parts in the model's error: the attention's own, measured on sampled rows, times its gain",
        "time_kind": "estimate",
        "time_unit": "seconds, forward and backward",
        "points": points,
    }


def candidates_key(entry: Entry) -> object:
    """What the candidates of an attention depend on, where there is no calibration."""
    keys = (
        "d",
        "dv",
        "bound",
        "near",
        "causal",
        "family",
        "degree",
        "decision",
        "queries",
        "keys",
        "window",
        "alibi",
        "precision",
        "reach",
    )
    return (
        *(entry[key] for key in keys),
        entry["asserted"],
        entry["range_source"],
        "documents" in entry["roles"],
    )


def certified(entry: Entry, sizes: Mapping[str, int], pace: Pace, target: str) -> dict[str, Any] | None:
    """The candidates on the range of the plan; None where no polynomial could serve."""
    own = entry["decision"] == "polynomial" and not is_approximated(entry)
    if (
        own
        or not entry["bound"]
        or entry["d"] is None
        or entry["dv"] is None
        or entry["window"]
        or entry["alibi"]
    ):
        return None
    n, m = lengths_of(entry, sizes)
    shape = shape_of(entry, n, m)
    unit = pace.seconds(shape, EXACT)
    points = [_point(entry, None, None, 1.0)]
    lengths = Sizes(n, m, max(1, entry["query_heads"] // entry["key_heads"]))
    limits = Limits(entry["d"], entry["range_source"] == "program")
    for polynomial in polynomials(entry["bound"], limits):
        for near in dict.fromkeys((None, entry["near"])):
            for precision in ("float32", "float64"):
                added = _rounding(entry, polynomial, near, precision, lengths, target)
                if polynomial.eps + added.weights >= 1:
                    continue
                time = pace.seconds(shape, Way(polynomial.degree, near, precision)) / unit
                points.append(
                    _point(entry, polynomial, near, float(f"{time:.5g}"), precision=precision, added=added)
                )
                if added.weights <= polynomial.eps:
                    break
    return {
        "error_kind": "bound",
        "errors": "certificates with rounding: of the output as a share of the values' range, of the scores' gradient "
        "as a share of omega",
        "time_kind": "estimate",
        "time_unit": f"share of exact attention's time at n = {n:,}, forward and backward",
        "points": points,
    }


def _rounding(
    entry: Entry, polynomial: Polynomial, near: int | None, precision: str, sizes: Sizes, target: str
) -> Rounding:
    spec = KernelSpec(
        d=entry["d"],
        dv=entry["dv"],
        coefficients=polynomial.coefficients,
        causal=entry["causal"],
        near=near,
        documents="documents" in entry["roles"],
        precision=precision,
    )
    return rounding(spec, sizes, entry["bound"], entry["reach"], BACKENDS[target], Run())


def _point(
    entry: Entry,
    polynomial: Polynomial | None,
    near: int | None,
    time: float,
    *,
    precision: str = "float32",
    added: Rounding = UNROUNDED,
) -> dict[str, Any]:
    chosen = entry["decision"] != "polynomial"
    name, proved = "exact", None
    if polynomial is not None:
        chosen = tuple(entry[key] for key in ("family", "degree", "near", "precision")) == (
            polynomial.family,
            polynomial.degree,
            near,
            precision,
        )
        name = f"{polynomial.family} {polynomial.degree}" + ("" if near is None else f", near {near}")
        name += ", float64" if precision == "float64" else ""
        proved = certificate(polynomial.eps, polynomial.eps_prime, added)
    return {
        "name": name,
        "family": polynomial.family if polynomial else None,
        "degree": polynomial.degree if polynomial else None,
        "near": near,
        "centred": False,
        "range": entry["bound"] if polynomial else None,
        "time": time,
        "output": proved.whole_output if proved else 0.0,
        "gradient": proved.whole_gradient if proved else 0.0,
        "proved": polynomial is None or not entry["asserted"],
        "chosen": chosen,
    }
