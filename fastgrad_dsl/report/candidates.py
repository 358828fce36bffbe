"""What an attention could have been: every candidate with its time and error, the chosen one marked.

With a calibration these are its candidates, with times of this machine and their estimated parts in the model's error.
Without one, the polynomials of all families on the same range, with times from the cost model and with certificates.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.approximation.rounding import Rounding, Run, Sizes, rounding
from fastgrad_compiler.attention.value import OWN
from fastgrad_compiler.planning.candidates import Policy, polynomials
from fastgrad_compiler.planning.cost import EXACT, Pace, Way
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents.base import Trust, picked
from fastgrad_dsl.documents.calibration import CalibratedAttention
from fastgrad_dsl.documents.plan import Attention, lengths_of
from fastgrad_dsl.documents.report import Candidates, Point
from fastgrad_dsl.report.prediction import shape_of, widths


def calibrated(found: CalibratedAttention, trust: Trust) -> Candidates:
    """The candidates of one attention of a calibration document, whose budget is `certified` or `calibrated`."""
    return Candidates(
        attentions=(),
        error_kind="bound" if trust == "certified" else "estimate",
        errors="certificates times gains of at least 1"
        if trust == "certified"
        else "parts in the model's error: the attention's own, measured on sampled rows, times its gain",
        time_kind="estimate",
        time_unit="seconds, forward and backward",
        points=tuple(picked(Point, each, range=each.bound, time=each.seconds) for each in found.candidates),
    )


def candidates_key(entry: Attention) -> object:
    """What the candidates of an attention depend on, where there is no calibration."""
    plan = (entry.decision, entry.family, entry.degree, entry.near, entry.precision)
    shape = (entry.d, entry.dv, entry.queries, entry.keys)
    masks = (entry.causal, entry.window, entry.alibi, "documents" in entry.roles, "forget" in entry.roles)
    return plan, shape, masks, entry.bound, entry.reach, entry.asserted, entry.range_source


def certified(entry: Attention, sizes: Mapping[str, int], pace: Pace, target: str) -> Candidates | None:
    """The candidates on the range of the plan; None where no polynomial could serve."""
    if not entry.bound or entry.family == OWN or entry.window or entry.alibi:
        return None
    if entry.d is None or entry.dv is None:
        return None
    n, m = lengths_of(entry, sizes)
    shape = shape_of(entry, n, m)
    unit = pace.seconds(shape, EXACT)
    exact = entry.decision != "polynomial"
    points = [Point("exact", None, None, None, False, None, 1.0, 0.0, 0.0, proved=True, chosen=exact)]
    lengths = Sizes(n, m, max(1, entry.query_heads // entry.key_heads))
    policy = Policy(entry.d, entry.range_source == "program")
    for polynomial in polynomials(entry.bound, policy):
        for near in dict.fromkeys((None, entry.near)):
            for precision in ("float32", "float64"):
                added = _rounding(entry, polynomial, near, precision, lengths, target)
                if polynomial.eps + added.weights >= 1:
                    continue
                time = pace.seconds(shape, Way(polynomial.degree, near, precision)) / unit
                points.append(_point(entry, polynomial, near, float(f"{time:.5g}"), precision, added))
                if added.weights <= polynomial.eps:
                    break
    return Candidates(
        attentions=(),
        error_kind="bound",
        errors="certificates with rounding: of the output as a share of the values' range, of the scores' gradient "
        "as a share of omega",
        time_kind="estimate",
        time_unit=f"share of exact attention's time at n = {n:,}, forward and backward",
        points=tuple(points),
    )


def _rounding(
    entry: Attention, polynomial: Polynomial, near: int | None, precision: str, sizes: Sizes, target: str
) -> Rounding:
    d, dv = widths(entry)
    spec = KernelSpec(
        d=d,
        dv=dv,
        coefficients=polynomial.coefficients,
        causal=entry.causal,
        near=near,
        documents="documents" in entry.roles,
        forget="forget" in entry.roles,
        precision=precision,
    )
    reach = polynomial.bound if entry.reach is None else entry.reach
    return rounding(spec, sizes, polynomial.bound, reach, BACKENDS[target], Run())


def _point(
    entry: Attention,
    polynomial: Polynomial,
    near: int | None,
    time: float,
    precision: str,
    added: Rounding,
) -> Point:
    name = f"{polynomial.family} {polynomial.degree}" + ("" if near is None else f", near {near}")
    proved = certificate(polynomial.eps, polynomial.eps_prime, added)
    return Point(
        name=name + (", float64" if precision == "float64" else ""),
        family=polynomial.family,
        degree=polynomial.degree,
        near=near,
        centred=False,
        range=entry.bound,
        time=time,
        output=proved.whole_output,
        gradient=proved.whole_gradient,
        proved=not entry.asserted,
        chosen=(entry.family, entry.degree, entry.near, entry.precision)
        == (polynomial.family, polynomial.degree, near, precision),
    )
