"""One attention's decision: exact or a polynomial, and why; or what forbids what the budget asks for.

A degree meets its caps where eps is at most `relative`, and where the certificates (docs/mathematics.md,
section 7) of output and score gradient are at most the attention's shares of the budget, all of them with what rounding
adds at the longest declared length (section 10). Where it adds too much in float32, a polynomial is computed in
float64, at twice the cost. Odd degrees serve
only where positivity on the range is proved and the range itself is not the user's word: beyond it they
turn negative, and what `bounds.py` proves of an attention's result would be false. A rule that pins one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from math import inf
from typing import TypeAlias, cast

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import MAX_DEGREE, Family, Polynomial, PrecisionError, fit
from fastgrad_compiler.approximation.rounding import EXACT as UNROUNDED
from fastgrad_compiler.approximation.rounding import (
    USUAL_LENGTH,
    WIDEST_NEAR,
    Rounding,
    Run,
    Sizes,
    rounding,
)
from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.words import number
from fastgrad_compiler.planning.candidates import Policy, fits, over_rank
from fastgrad_compiler.planning.cost import DOUBLE, EXACT, Shape, Way, shape_of
from fastgrad_compiler.planning.settings import Settings
from fastgrad_compiler.planning.target_cost import cost_of, target_break_even
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.targets import BACKENDS


@dataclass(frozen=True)
class Caps:
    """What one attention may be off by: `relative` caps eps, the others its shares of the budget; None is
    no cap.
    """

    relative: float | None = None
    output: float | None = None
    gradient: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return (self.relative, self.output, self.gradient) != (None, None, None)

    def missed(self, polynomial: Polynomial, rounded: Rounding = UNROUNDED) -> str:
        """The first cap that a polynomial misses, in words; empty where it meets all."""
        proved = certificate(polynomial.eps, polynomial.eps_prime, rounded)
        share = "the {}'s certificate {{}} exceeds its share {{}} of the budget"
        output, gradient = share.format("output"), share.format("gradient")
        for value, added, cap, what in (
            (polynomial.eps, rounded.weights, self.relative, "eps {} exceeds relative <= {}"),
            (proved.output, proved.output_rounding, self.output, output),
            (proved.score_gradient, proved.score_rounding, self.gradient, gradient),
        ):
            if cap is not None and value + added > cap:
                note = f" with {number(added)} of rounding" if value <= cap else ""
                return what.format(number(value) + note, number(cap))
        return ""

    def __str__(self) -> str:
        parts = (
            ("relative", self.relative),
            ("output share", self.output),
            ("gradient share", self.gradient),
        )
        return ", ".join(f"{name} <= {number(cap)}" for name, cap in parts if cap is not None)


@dataclass(frozen=True)
class Case:
    """An attention with all that its decision depends on: equal cases are decided alike.

    `longest` are the largest numbers of queries and keys that the file allows; `budget_near` is the
    budget's near field; `groups` query heads share a key head. `certified`: ranges must be proved.
    """

    node: Node
    settings: Settings
    caps: Caps
    family: Family
    max_rank: int
    d: int | None
    dv: int | None
    longest: tuple[int | None, int | None]
    same_length: bool
    budget_near: int | None
    target: str = "torch"
    certified: bool = False
    groups: int = 1

    @cached_property
    def attention(self) -> Attention:
        """What the node says of it."""
        return Attention.of(self.node)

    @property
    def chosen_family(self) -> Family:
        """The family of the rule, or the default."""
        rule = self.settings.family
        return cast("Family", rule.value) if rule else self.family

    @property
    def bound(self) -> float:
        """R; infinite where nothing is known."""
        return self.attention.range.limit

    @property
    def reach(self) -> float:
        """Bound of |scale| sum_a |q_a k_a|: R, where nothing else is known."""
        reach = self.attention.range.reach
        return self.bound if reach is None else reach

    @property
    def policy(self) -> Policy:
        """What a polynomial must keep to."""
        return Policy(self.d or 1, not self.attention.range.asserted, self.max_rank)

    @property
    def shape(self) -> Shape:
        """At the longest declared lengths, USUAL_LENGTH where none is."""
        sizes = self.sizes
        return shape_of(self.attention, sizes.queries, sizes.keys, self.d or 1, self.dv or 1)

    def way(self, evaluated: Evaluated) -> Way:
        """How a polynomial serves it."""
        return Way(evaluated.polynomial.degree, self.near, evaluated.precision)

    @property
    def sizes(self) -> Sizes:
        """Those for which rounding is stated: the longest declared ones, USUAL_LENGTH where none is."""
        n, m = (length or USUAL_LENGTH for length in self.longest)
        return Sizes(n, m, self.groups)

    def rounding(self, polynomial: Polynomial, precision: str) -> Rounding:
        """What rounding adds to a polynomial that is computed in `precision`, in a float32 run on a CPU."""
        served = self.attention.served(polynomial, self.near, precision)
        spec = spec_of(served, self.d or 1, self.dv or 1, WIDEST_NEAR)
        return rounding(spec, self.sizes, polynomial.bound, self.reach, BACKENDS[self.target], Run())

    def evaluated(self, polynomial: Polynomial) -> tuple[Evaluated, Evaluated]:
        """A polynomial in either of PRECISIONS."""
        single, double = (Evaluated(polynomial, each, self.rounding(polynomial, each)) for each in PRECISIONS)
        return single, double

    @property
    def near(self) -> int | None:
        """The block of the near field: the model's own, a pinned one, or the budget's."""
        if self.attention.near is not None:
            return self.attention.near
        if self.settings.near is not None:
            return int(str(self.settings.near.value))
        return self.budget_near if self.same_length else None


def with_bound(case: Case, bound: float) -> Case:
    """The case with another R."""
    known = replace(case.attention.range, bound=bound)
    return replace(case, node=replace(case.attention, range=known).on(case.node))


@dataclass(frozen=True)
class Decision:
    """Exact (`polynomial` None) or a polynomial, with the reason; `near` is set on the node where it is not
    None.

    `range` is what the polynomial rests on where that is not the bound of the node; `own_mean`: each sequence's mean is
    taken from its keys. `heads` are the query heads that it is for, in order, None for all. `precision` is that of the
    arithmetic. Attention is exact below `break_even` tokens on the device that the target is for, and on a GPU below
    `break_even_gpu`.
    """

    why: str
    polynomial: Polynomial | None = None
    near: int | None = None
    break_even: int | None = None
    break_even_gpu: int | None = None
    range: LogitRange | None = None
    own_mean: bool = False
    heads: tuple[int, ...] | None = None
    precision: str = "float32"


@dataclass(frozen=True)
class Evaluated:
    """A polynomial with the precision of its arithmetic, and what rounding then adds to its errors."""

    polynomial: Polynomial
    precision: str
    rounding: Rounding


@dataclass(frozen=True)
class Refusal:
    """A rule that cannot be obeyed: the code, and what is wrong. `rule` names the kind of the rule at
    fault.
    """

    code: str
    message: str
    rule: str
    polynomial: Polynomial | None = None


Outcome: TypeAlias = Decision | Refusal
LEFT_EXACT = "the budget leaves it exact"  # because a rule says so


def decide(case: Case) -> Outcome:
    """The decision for a case whose rules have valid values."""
    settings = case.settings
    if settings.exact is not None:
        return Decision(LEFT_EXACT)
    if settings.degree is None and not case.caps.given:
        return Decision("no budget asks for an approximation: it sets neither a limit nor a degree")
    blocked = _blocked(case)
    if blocked is not None:
        return blocked
    if settings.degree is not None:
        return _pinned(case, int(str(settings.degree.value)))
    return _planned(case)


def _blocked(case: Case) -> Outcome | None:
    """What rules a polynomial out before its degree is thought of."""
    attention, settings = case.attention, case.settings
    asked = settings.kind
    mask = attention.unservable
    if mask:
        text = f"a polynomial cannot serve the mask `{mask}`"
        if asked:
            return Refusal("FG309", text, asked)
        banded = mask == "window" and not attention.alibi
        band = f": O(n w), w = {attention.mask.window}" if banded else ""
        return Decision(f"{text}, which stays exact{band}")
    if settings.near is not None and attention.near is not None:
        return Refusal("FG308", f"it has a near field of its own, of block {attention.near}", "near")
    if settings.near is not None and not case.same_length:
        return Refusal(
            "FG308", "queries and keys are of different sequences, so none of them are neighbours", "near"
        )
    if case.d is None or case.dv is None:
        text = "the width of its queries or values is known at run time only"
        return Refusal("FG310", text, asked) if asked else Decision(text)
    if attention.range.bound is None:
        reasons = "; ".join(attention.range.proof) or "nothing limits its logits"
        text = f"no bound of its logits is proved: {reasons}"
        return Refusal("FG301", text, asked) if asked else Decision(text)
    return None


def _pinned(case: Case, degree: int) -> Outcome:
    """The pinned degree, if it is a polynomial that can be trusted at all and meets an explicit `relative`."""
    family, bound = case.chosen_family, case.bound

    def refused(code: str, text: str, polynomial: Polynomial | None = None) -> Refusal:
        return Refusal(code, text, "degree", polynomial)

    if rank(case.d or 1, degree) > case.max_rank:
        return refused("FG307", over_rank(case.d or 1, degree, case.max_rank))
    try:
        polynomial = fit(family, degree, bound)
    except PrecisionError as error:
        return refused("FG306", str(error))
    what = f"the {family} polynomial of degree {degree}"
    if not polynomial.positive:
        text = f"{what} is not positive on [-{number(bound)}, {number(bound)}]"
        return refused("FG304", text, polynomial)
    if not case.policy.is_positive(polynomial):
        least = number(polynomial.positive_from or 0.0)
        known = f"|s| <= {number(bound)} is asserted, not proved"
        return refused("FG304", f"{what} is negative for logits below {least}, and {known}", polynomial)
    if polynomial.eps >= 1:
        found = f"with |s| <= {number(bound)} {what} has eps {number(polynomial.eps)}"
        return refused("FG306", f"{found}: weights may be off by their own size", polynomial)
    if case.caps.relative is not None and polynomial.eps > case.caps.relative:
        found = f"degree {degree} has eps {number(polynomial.eps)}"
        return refused("FG305", f"{found}, over relative <= {number(case.caps.relative)}", polynomial)
    evaluated = _evaluated(case, polynomial)
    lost = vanishing(polynomial, evaluated.rounding)
    if lost:
        return refused("FG306", f"at degree {degree} {lost}", polynomial)
    relative = replace(case.caps, output=None, gradient=None).missed(polynomial, evaluated.rounding)
    if relative:
        return refused("FG305", f"at degree {degree} {relative}", polynomial)
    missed = case.caps.missed(polynomial, evaluated.rounding)
    note = f"; {missed}: the report's measurement decides" if missed else ""
    return _polynomial(case, evaluated, f"degree {degree} is pinned by the budget{note}")


def _evaluated(case: Case, polynomial: Polynomial) -> Evaluated:
    """In float32 where rounding adds less than the polynomial's own eps and misses no cap that float64 meets."""
    single, double = case.evaluated(polynomial)
    rules = single.rounding.weights > polynomial.eps
    missed = case.caps.missed(polynomial, single.rounding)
    return double if rules or (missed and not case.caps.missed(polynomial, double.rounding)) else single


# Who chooses among them asks different questions, so there is no one rule. The search takes the first that meets the
# caps, and compares costs of degrees. A pinned degree has no other one to make room for rounding: float64 also where
# rounding rules its error. Advice prices a degree as it is, in float64 where only that meets the limits.
# Calibration and report choose nothing here: they list both where rounding matters, and times decide, or the reader.
PRECISIONS = ("float32", "float64")


def vanishing(polynomial: Polynomial, rounded: Rounding) -> str:
    """Why weights may vanish, in words; empty where they cannot."""
    if polynomial.eps >= 1:
        return "weights may vanish"
    if polynomial.eps + rounded.weights >= 1:
        return f"rounding may be {number(rounded.weights)} of a weight"
    return ""


def _planned(case: Case) -> Outcome:
    """The cheapest polynomial that meets the caps, or exact where none does or where that is cheaper."""
    evaluated, obstacle = search(case)
    asked = case.settings.kind
    if evaluated is None:
        return Refusal("FG310", obstacle, asked) if asked else Decision(f"no degree serves it: {obstacle}")
    degree = evaluated.polynomial.degree
    decision = _polynomial(case, evaluated, f"degree {degree} is the least that meets {case.caps}")
    cheaper = "" if asked else _cheaper_exact(case, evaluated)
    return Decision(cheaper, break_even=decision.break_even) if cheaper else decision


def search(case: Case) -> tuple[Evaluated | None, str]:
    """(the cheapest polynomial that meets the caps within the rank limit, else what the last one tried lacks).

    That is the one of least degree, unless float32 rounds it too much: it costs twice as much in float64, and a higher
    degree may leave more room for rounding.
    """
    best: Evaluated | None = None
    least = inf
    obstacle = "no degree is positive on its range"
    policy, d = case.policy, case.d or 1
    highest = policy.highest_degree
    cheaper = takewhile(lambda degree: rank(d, degree) < least, range(1, highest + 1))
    for found in fits(case.chosen_family, case.bound, cheaper):
        evaluated, missed = _candidate(case, found)
        obstacle = missed or obstacle
        if evaluated is None:
            continue
        cost = rank(d, evaluated.polynomial.degree) / (DOUBLE if evaluated.precision == "float64" else 1.0)
        if cost < least:
            best, least = evaluated, cost
    if best is None and highest < MAX_DEGREE:
        over = f"degree {highest + 1} has rank {rank(d, highest + 1):,}, over the limit of {case.max_rank:,}"
        obstacle = f"{obstacle}, and {over}"
    return best, "" if best else obstacle


def _candidate(case: Case, found: Polynomial | PrecisionError) -> tuple[Evaluated | None, str]:
    """(a polynomial in the precision that meets the caps, else what it lacks)."""
    if isinstance(found, PrecisionError):
        return None, str(found)
    if not case.policy.is_positive(found):
        return None, ""
    missed = ""
    for evaluated in case.evaluated(found):
        missed = case.caps.missed(found, evaluated.rounding) or vanishing(found, evaluated.rounding)
        if not missed:
            return evaluated, ""
    return None, f"at degree {found.degree} {missed}"


def _polynomial(case: Case, evaluated: Evaluated, why: str) -> Decision:
    near, polynomial = case.near, evaluated.polynomial
    even = target_break_even(case.target, case.shape, case.way(evaluated))
    if evaluated.precision == "float64":
        added = case.rounding(polynomial, "float32").weights
        why += f"; computed in float64: in float32 rounding might add {number(added)} to eps"
    if case.attention.range.asserted:
        why += f"; |s| <= {number(case.bound)} is asserted, not proved"
    if polynomial.positive_from is not None:
        why += f"; positive only for logits above {number(polynomial.positive_from)}"
    own = near if case.attention.near is None else None
    return Decision(why, polynomial, own, even, precision=evaluated.precision)


def _cheaper_exact(case: Case, evaluated: Evaluated) -> str:
    """Why exact is cheaper at every allowed length; empty where it is not, or where lengths have no limit."""
    if None in case.longest:
        return ""
    shape, way = case.shape, case.way(evaluated)
    even, cost = target_break_even(case.target, shape, way), cost_of(case.target, shape, way)
    longest = max(shape.n, shape.m)
    if longest >= even and cost.seconds(shape, way) <= cost.seconds(shape, EXACT):
        return ""
    return f"exact is cheaper below n = {even:,} at degree {way.degree}, and the file allows no more than {longest:,}"


def with_gpu(decision: Decision, case: Case) -> Decision:
    """The decision with the break-even of a run on a GPU, by the model: nothing is measured there."""
    if decision.polynomial is None:
        return decision
    near = decision.near if decision.near is not None else case.attention.near
    way = Way(decision.polynomial.degree, near, decision.precision)
    even = target_break_even(case.target, case.shape, way, on_gpu=True)
    return replace(decision, break_even_gpu=even)
