"""From a calibration to decisions: the cheapest choice for all attentions that keeps the budget's two limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import inf, sqrt

from fastgrad_compiler.approximation.certificates import Certificate, certificate
from fastgrad_compiler.approximation.rounding import WIDEST_NEAR, Rounding, Run, Sizes, rounding
from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.table import Lengths
from fastgrad_compiler.ir.words import number
from fastgrad_compiler.planning.cost import EXACT, Shape, Way, break_even, shape_of
from fastgrad_compiler.planning.decision import PRECISIONS, Decision
from fastgrad_compiler.planning.knapsack import Option, choose
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.calibration.calibrate import Attention, Calibration
from fastgrad_dsl.calibration.candidates import Candidate
from fastgrad_dsl.documents.calibration import Limits, Planned
from fastgrad_dsl.documents.pairs import WHATS, What, of

ROUNDED = 0.1  # share of a candidate's own error above which rounding in float32 is a reason for float64
BYTES_A_SECOND = 5e9  # of copying heads that are served apart, there and back


@dataclass(frozen=True)
class Part:
    """Some heads of an attention and what serves them, in which precision; None is exact."""

    heads: tuple[int, ...]
    candidate: Candidate | None
    precision: str = "float32"

    @property
    def way(self) -> Way:
        """As models of cost take it."""
        if self.candidate is None:
            return EXACT
        return Way(self.candidate.polynomial.degree, self.candidate.near, self.precision)


@dataclass(frozen=True)
class Serving:
    """One way to serve an attention, with what it costs: seconds at the planned length, errors of the whole model."""

    parts: tuple[Part, ...]
    option: Option


@dataclass(frozen=True)
class Plan:
    """The way taken for each attention, in program order, and sums over all of them.

    Of `planned`, `exact_seconds` are those of PyTorch's fused softmax attention of the same shapes, masks left aside;
    `output` and `gradient` are estimates of the model's relative errors, or with `trust = certified` sums of proved
    worst cases with gains of at least 1.
    """

    ways: tuple[Serving, ...]
    planned: Planned


def make_plan(calibration: Calibration, limits: Limits) -> Plan | None:
    """The cheapest plan within the limits; None where no choice is."""
    ways = [list(ways_of(each, calibration)) for each in calibration.attentions]
    found = choose([[way.option for way in each] for each in ways], limits.output, limits.gradient)
    if found is None:
        return None
    taken = tuple(each[place] for each, place in zip(ways, found.places, strict=True))
    sized = [_Sized(each, calibration) for each in calibration.attentions]
    planned = Planned(
        length=max((each.lengths[0] for each in sized), default=0),
        seconds=sum(way.option.seconds for way in taken),
        exact_seconds=sum(each.fused() for each in sized),
        output=sum(way.option.output for way in taken),
        gradient=sum(way.option.gradient for way in taken),
        gap=found.gap,
    )
    return Plan(taken, planned)


def least_errors(calibration: Calibration) -> dict[What, float]:
    """The least output and the least gradient error that the rules of the budget allow at all, each for itself."""
    options = [[way.option for way in ways_of(each, calibration)] for each in calibration.attentions]
    return {w: sum(min((of(o, w) for o in each), default=inf) for each in options) for w in WHATS}


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class _Sized:
    """An attention at the lengths that the plan is for: the longest declared ones, else those of the calibration."""

    attention: Attention
    calibration: Calibration

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        lengths, entry, (n, m) = Lengths(self.calibration.program), self.attention.entry, self.attention.sizes
        return lengths.longest(entry.queries) or n, lengths.longest(entry.keys) or m

    def shape(self, heads: int) -> Shape:
        """Of so many of its heads."""
        entry = self.attention.entry
        return shape_of(entry.attention, *self.lengths, entry.d or 1, entry.dv or 1, heads)

    def seconds(self, part: Part) -> float:
        """Of some heads, as they are served."""
        return self.calibration.pace.seconds(self.shape(len(part.heads)), part.way)

    def fused(self) -> float:
        """Seconds of PyTorch's fused exact attention of all heads, masks left aside."""
        shape = replace(
            self.shape(self.attention.heads), near=None, documents=False, forget=False, window=None
        )
        return self.calibration.pace.seconds(shape, EXACT)

    def apart(self) -> float:
        """Seconds of taking heads apart and putting their results together, forward and backward."""
        entry = self.attention.entry
        widths = 2 * (entry.d or 1) + 3 * (entry.dv or 1)
        return 2 * 2 * 4 * self.attention.heads * self.lengths[0] * widths / BYTES_A_SECOND

    def rounding(self, candidate: Candidate, precision: str) -> Rounding:
        """What rounding adds to a candidate computed in `precision`, at the planned lengths, in float32 runs."""
        entry, polynomial = self.attention.entry, candidate.polynomial
        near = candidate.near if entry.attention.near is None else entry.attention.near
        kernel = entry.attention.served(polynomial, near, precision)
        spec = spec_of(kernel, entry.d or 1, entry.dv or 1, WIDEST_NEAR)
        served = self.attention.served[candidate.near].range
        norms = served.norms or served.heads
        reach = max(polynomial.bound, *(norms[head] for head in candidate.heads))
        sizes, backends = Sizes(*self.lengths, entry.groups), BACKENDS[self.calibration.pace.target]
        return rounding(spec, sizes, polynomial.bound, reach, backends, Run())

    def proved(self, candidate: Candidate, precision: str) -> Certificate:
        """Its certificate then."""
        polynomial = candidate.polynomial
        return certificate(polynomial.eps, polynomial.eps_prime, self.rounding(candidate, precision))

    def precisions(self, candidate: Candidate) -> tuple[str, ...]:
        """Those in which a candidate is worth a try: float64 where rounding in float32 is a share of its error.

        None in which it has no bound, or misses the rule of its attention.
        """
        single = self.proved(candidate, PRECISIONS[0])
        both = single.output_rounding > ROUNDED * candidate.output
        both = both or single.score_rounding > ROUNDED * candidate.gradient
        limit = self.attention.settings.relative
        most = 1.0 if limit is None else float(str(limit.value))
        tried = PRECISIONS if both else PRECISIONS[:1]
        totals = {each: candidate.polynomial.eps + self.rounding(candidate, each).weights for each in tried}
        return tuple(each for each, total in totals.items() if total < 1 and total <= most)


# ---------------------------------------------------------------- ways


def ways_of(each: Attention, calibration: Calibration) -> Iterator[Serving]:
    """Exact where no rule asks for a polynomial, candidates for all heads, and pairs of them for groups of heads."""
    sized = _Sized(each, calibration)
    everything = tuple(range(each.heads))
    if each.settings.asked is None or each.obstacle:
        part = Part(everything, None)
        yield Serving((part,), Option(sized.seconds(part), 0.0, 0.0))
    whole = [c for c in each.candidates if len(c.heads) == each.heads and _allowed(c, each)]
    for candidate in whole:
        for precision in sized.precisions(candidate):
            yield _way(sized, (Part(everything, candidate, precision),))
    low = [c for c in each.candidates if len(c.heads) < each.heads and _allowed(c, each)]
    for candidate in low:
        rest = tuple(head for head in everything if head not in candidate.heads)
        exact = [None] if each.settings.asked is None else []
        for other in (*exact, *(c for c in whole if c.near == candidate.near)):
            pairs = product(sized.precisions(candidate), sized.precisions(other) if other else PRECISIONS[:1])
            for one, two in pairs:
                yield _way(sized, (Part(candidate.heads, candidate, one), Part(rest, other, two)))


def _allowed(candidate: Candidate, each: Attention) -> bool:
    settings, polynomial = each.settings, candidate.polynomial
    if settings.degree is not None and polynomial.degree != settings.degree.value:
        return False
    return settings.relative is None or polynomial.eps <= float(str(settings.relative.value))


def _way(sized: _Sized, parts: tuple[Part, ...]) -> Serving:
    seconds = sum(map(sized.seconds, parts))
    seconds += sized.apart() if len(parts) > 1 else 0.0
    proved = [sized.proved(part.candidate, part.precision) for part in parts if part.candidate]
    certified, gains = sized.calibration.certified, sized.attention.gains
    local, least = (_proved(proved), 1.0) if certified else (_joint(parts, proved), 0.0)
    output, gradient = (
        error * max(1.0 if gain is None else gain.value, least)
        for error, gain in zip(local, (gains.output, gains.gradient), strict=True)
    )
    return Serving(parts, Option(seconds, output, gradient))


def _proved(proved: Sequence[Certificate]) -> tuple[float, float]:
    """Certificates of output and score gradient, with rounding: the worst of the polynomials that serve."""
    return max(each.whole_output for each in proved), max(each.whole_gradient for each in proved)


def _joint(parts: Sequence[Part], proved: Sequence[Certificate]) -> tuple[float, float]:
    """Local errors of output and gradient of heads that are served by several polynomials.

    Sampled rows are computed in float64: what the certificates say of rounding is added.
    """
    served = [(list(part.heads), part.candidate.errors) for part in parts if part.candidate]
    sizes = served[0][1]
    output = sum(float(errors.output[heads].sum()) for heads, errors in served)
    gradient = sum(float(errors.gradient[heads].sum()) for heads, errors in served)
    return (
        _root(output, float(sizes.output_size.sum())) + max(each.output_rounding for each in proved),
        _root(gradient, float(sizes.gradient_size.sum())) + max(each.score_rounding for each in proved),
    )


def _root(squares: float, size: float) -> float:
    return sqrt(squares / size) if size else 0.0


# ---------------------------------------------------------------- decisions


def decisions(plan: Plan, calibration: Calibration) -> Mapping[str, tuple[Decision, ...]]:
    """The plan as the plan pass takes it, by full path."""
    return {
        each.entry.full_path: tuple(_decision(_Sized(each, calibration), way, part) for part in way.parts)
        for each, way in zip(calibration.attentions, plan.ways, strict=True)
        if each.candidates
        or each.settings.asked is None  # what is asked for and cannot be had, the pass refuses
    }


def _decision(sized: _Sized, way: Serving, part: Part) -> Decision:
    each, candidate = sized.attention, part.candidate
    heads = part.heads if len(way.parts) > 1 else None
    if candidate is None:
        why = each.obstacle or "calibration: no polynomial within the budget is faster"
        return Decision(why if heads is None else f"{why}, for these heads", heads=heads)
    served = each.served[candidate.near]
    groups = each.heads // each.key_heads
    keys = dict.fromkeys(head // groups for head in part.heads)
    centre = served.range.centre
    used = replace(
        served.range,
        heads=tuple(served.range.heads[head] for head in part.heads),
        centre=None if centre is None else tuple(centre[key] for key in keys),
        norms=tuple(served.range.norms[head] for head in part.heads) if served.range.norms else None,
    )
    return Decision(
        _why(way, part, candidate, served.uncentred, sized.calibration.certified),
        candidate.polynomial,
        candidate.near if each.entry.attention.near is None else None,
        break_even(sized.calibration.pace, sized.shape(len(part.heads)), part.way),
        range=used,
        own_mean=served.mean,
        heads=heads,
        precision=part.precision,
    )


def _why(way: Serving, part: Part, candidate: Candidate, uncentred: float | None, certified: bool) -> str:
    polynomial = candidate.polynomial
    errors = f"{number(way.option.output)} of the output and {number(way.option.gradient)} of the gradient"
    kind = "at most (gains of at least 1)" if certified else "an estimated"
    text = f"{polynomial.family} {polynomial.degree} is a part of the fastest plan: {kind} {errors}"
    if part.precision == "float64":
        text += "; computed in float64, since float32 might round too much"
    if uncentred is not None:
        text += f"; centred keys narrow R from {number(uncentred)} to {number(polynomial.bound)}"
    if polynomial.positive_from is not None:
        text += f"; positive only for logits above {number(polynomial.positive_from)}"
    return text
