"""Calibration of a model: ranges of logits, local errors of every candidate, gains, on batches of data.

What is measured is measured on the exact model. Errors of candidates are of sampled rows in float64, gains are
estimates with a 95 % interval (docs/calibration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import cast

import torch
from torch import Tensor

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.analysis.weights.ranges import weight_ranges
from fastgrad_compiler.approximation.polynomial import FAMILIES, Family
from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.attention.value import Range
from fastgrad_compiler.ir.graph import Budget, Program
from fastgrad_compiler.ir.words import number
from fastgrad_compiler.planning.candidates import MOST_EPS, Policy, polynomials
from fastgrad_compiler.planning.decision import LEFT_EXACT
from fastgrad_compiler.planning.settings import Settings, settings_of
from fastgrad_dsl.calibration.candidates import Candidate, whole_errors
from fastgrad_dsl.calibration.capture import Call, Errors, Probe, Subject, capture, probe
from fastgrad_dsl.calibration.logits import Logits, measure_logits
from fastgrad_dsl.calibration.pace import MachinePace
from fastgrad_dsl.calibration.samples import Sample, exact_rows, polynomial_errors, sample
from fastgrad_dsl.documents.calibration import Gain, Gains, UsedCalibration
from fastgrad_dsl.documents.pairs import WHATS, of

MARGIN = 1.25  # a measured range times this is R: new data may go beyond what was seen
CLOSE = 1.25  # a proved R is taken where it is at most this many times the measured one with its margin
STRETCH = 1.1  # errors are measured with logits so many times as large: new data is not quite like the old
APART = 1.3  # heads whose ranges differ by this factor may be served apart
TYPICAL = 0.02  # local error at which gains are estimated: small enough for first order, far above rounding
PROBES = 6
LEAST_RANGE = 1e-3
UNKNOWN = Gains(None, None)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """The range on which polynomials of an attention are fitted.

    `mean`: keys are centred by each sequence's own mean. `uncentred`: R without centring, where that is wider.
    """

    range: LogitRange
    mean: bool = False
    uncentred: float | None = None


@dataclass(frozen=True)
class Attention:
    """What calibration found of one attention; `obstacle` says in words why no polynomial can serve it.

    `key_heads`: heads of keys; `sizes`: (queries, keys) of a batch; `logits`, `served` by the block of the rewrite's
    near field.
    """

    entry: AttentionEntry
    settings: Settings
    heads: int
    key_heads: int
    sizes: tuple[int, int]
    logits: Mapping[int | None, Logits] = field(default_factory=dict)
    served: Mapping[int | None, Served] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    gains: Gains = UNKNOWN
    obstacle: str = ""


@dataclass(frozen=True)
class Calibration:
    """The attentions of a program after recognition, in its order, and what they were measured on."""

    program: Program
    attentions: tuple[Attention, ...]
    pace: MachinePace
    used: UsedCalibration

    @property
    def certified(self) -> bool:
        """Whether ranges and errors are the proved ones alone."""
        return self.program.trust == "certified"


def calibrate(
    subject: Subject,
    batches: Sequence[Sequence[Tensor]],
    used: UsedCalibration,
    pace: MachinePace,
    tell: Tell = lambda what: None,
    probes: int = PROBES,
) -> Calibration:
    """Measure everything that the planner asks for on batches of inputs, then targets, which `used` describes.

    With `trust = certified` ranges are the proved ones alone, of the program or of the weights.
    """
    runs = []
    for place, batch in enumerate(batches):
        tell(f"exact run {place + 1} of {len(batches)}")
        runs.append(capture(subject, batch))
    proved = weight_ranges(subject.program, subject.weights)
    attentions = []
    for entry in attention_table(subject.program):
        if not entry.attention.is_own:
            tell(entry.path)
            calls = [run.calls[entry.full_path] for run in runs]
            attentions.append(_attention(entry, calls, proved.get(entry.full_path), subject.program))
    errors, local = _typical(attentions, runs[0].calls)
    found = probe(subject, batches[0], runs[0], errors, range(probes), tell) if errors else {}
    attentions = [_with_gains(each, found, local) for each in attentions]
    return Calibration(subject.program, tuple(attentions), pace, used)


def within(calibration: Calibration, scores: float) -> Calibration:
    """The calibration without candidates whose gradients of queries and keys are off by more than `scores`.

    An attention with a pinned degree keeps all of them, and one for which a rule asks for a polynomial if no other is
    left.
    """
    return replace(calibration, attentions=tuple(_within(each, scores) for each in calibration.attentions))


def _within(each: Attention, scores: float) -> Attention:
    kept = tuple(candidate for candidate in each.candidates if candidate.scores <= scores)
    served = any(len(candidate.heads) == each.heads for candidate in kept)
    if each.settings.degree is not None or (each.settings.asked is not None and not served):
        return each
    reason = f"no polynomial that can be afforded has gradients of queries and keys within {number(scores)}"
    return replace(each, candidates=kept, obstacle=each.obstacle or ("" if kept else reason))


# ---------------------------------------------------------------- one attention


def _attention(
    entry: AttentionEntry, calls: Sequence[Call], proved: LogitRange | None, program: Program
) -> Attention:
    budget, certified = program.budget or Budget(), program.trust == "certified"
    settings = settings_of(entry.full_path, budget.rules)
    q, k = calls[0].inputs[:2]
    found = Attention(entry, settings, q.shape[1], k.shape[1], (q.shape[-2], k.shape[-2]))
    mask = entry.attention.unservable
    if mask:
        return replace(found, obstacle=f"a polynomial cannot serve the mask `{mask}`")
    if settings.exact is not None:
        return replace(found, obstacle=LEFT_EXACT)
    limits = (budget.output, budget.gradient, settings.relative, settings.asked)
    if all(limit is None for limit in limits):
        reason = "no budget asks for an approximation: it sets neither a limit nor a degree"
        return replace(found, obstacle=reason)
    blocks = _blocks(entry, settings, budget)
    logits = {near: measure_logits(calls, near) for near in blocks}
    served = {}
    for near in blocks:
        if not certified and max(logits[near].magnitudes) < LEAST_RANGE:
            continue  # no far pair was seen: errors on such data say nothing
        use = _range(entry.attention.range, proved, logits[near], certified)
        if use is not None:
            served[near] = use
    if not served:
        reason = (
            "no bound of its logits is proved"
            if certified
            else "its logits on the data are 0, or it has no pair beyond a near field there: calibrate on longer, "
            "typical sequences"
        )
        return replace(found, logits=logits, obstacle=reason)
    candidates = _candidates(replace(found, logits=logits, served=served), calls)
    reason = "" if candidates else "no polynomial that can be afforded is positive on its range"
    return replace(found, logits=logits, served=served, candidates=candidates, obstacle=reason)


def _blocks(entry: AttentionEntry, settings: Settings, budget: Budget) -> list[int | None]:
    """Blocks of a near field that the rewrite may have: none, and the budget's. None beside the model's own."""
    if entry.attention.near is not None or entry.queries != entry.keys:
        return [None]
    if settings.near is not None:
        return [int(str(settings.near.value))]
    return [None] if budget.near is None else [None, budget.near]


def _range(known: Range, proved: LogitRange | None, logits: Logits, certified: bool) -> Served | None:
    """The best range: a proved one unless the measured one is much narrower; None where there is none."""
    options = []
    if known.bound is not None and not known.asserted:
        options.append(LogitRange("program", (known.limit,) * len(logits.least), known.proof))
    if proved is not None and proved.source == "weights":
        options.append(_with_room(proved))
    finite = [option for option in options if min(option.heads) < inf]
    best = min(finite, key=lambda option: option.bound, default=None)
    measured = None if certified else _measured(logits)
    if best is not None and (measured is None or best.bound <= CLOSE * measured.range.bound):
        return Served(best)
    return measured


def _with_room(proved: LogitRange) -> LogitRange:
    """What is proved of weights, with room for what training makes of them."""
    room = f"{MARGIN:g} times that is R: weights may grow"
    heads, norms = (tuple(MARGIN * each for each in found) for found in (proved.heads, proved.norms or ()))
    return replace(proved, heads=heads, reasons=(*proved.reasons, room), norms=norms or None)


def _measured(logits: Logits) -> Served:
    """The measured range with its margin."""
    seen = logits.magnitudes
    centring, sizes = logits.centring, seen
    if centring and logits.centred is not None:
        sizes = logits.centred
    bounds = tuple(MARGIN * max(size, LEAST_RANGE) for size in sizes)
    reasons = [f"|s| <= {max(sizes):.3g} was measured, and {MARGIN:g} times that is R"]
    if centring:
        reasons.append(f"keys are centred, which softmax does not see: without, |s| <= {max(seen):.3g}")
    norms = tuple(MARGIN * max(size, LEAST_RANGE) for size in logits.norms)
    served = LogitRange("data", bounds, tuple(reasons), logits.centre if centring else None, norms)
    return Served(served, logits.mean and centring, MARGIN * max(seen) if centring else None)


def _levels(served: LogitRange, heads: int, key_heads: int) -> list[tuple[tuple[int, ...], float]]:
    """(heads, R): all of them, and those of small ranges apart, where ranges differ enough."""
    groups = heads // key_heads
    by_key = [max(served.heads[k * groups : (k + 1) * groups]) for k in range(key_heads)]
    levels = [(tuple(range(heads)), max(by_key))] if isfinite(max(by_key)) else []
    order = sorted(range(key_heads), key=lambda key: by_key[key])
    steps = [
        (by_key[after] / by_key[before], place)
        for place, (before, after) in enumerate(pairwise(order))
        if by_key[before] > 0
    ]
    widest, place = max(steps, default=(0.0, 0))
    if widest >= APART:
        low = sorted(order[: place + 1])
        chosen = tuple(head for key in low for head in range(key * groups, (key + 1) * groups))
        levels.append((chosen, by_key[order[place]]))
    return levels


def _candidates(found: Attention, calls: Sequence[Call]) -> tuple[Candidate, ...]:
    settings = found.settings
    families = FAMILIES if settings.family is None else (cast("Family", settings.family.value),)
    rows = [sample(call, stretch=STRETCH) for call in calls]
    references = [exact_rows(each) for each in rows]
    candidates = []
    for near, served in found.served.items():
        centres = [_centre(served, each) for each in rows]
        for heads, bound in _levels(served.range, found.heads, found.key_heads):
            proved = served.range.source == "program"
            policy = Policy(found.entry.d or 1, proved, max_eps=MOST_EPS)
            for polynomial in polynomials(bound, policy, families):
                errors = [
                    polynomial_errors(each, reference, polynomial.coefficients, near=near, centre=centre)
                    for each, reference, centre in zip(rows, references, centres, strict=True)
                ]
                candidates.append(Candidate(polynomial, near, heads, sum(errors[1:], errors[0])))
    return tuple(candidates)


def _centre(served: Served, rows: Sample) -> Tensor | None:
    """What is taken from the keys of a sample: [b or 1, H, 1, d]."""
    if served.mean:
        return rows.k.mean(2, keepdim=True)
    if served.range.centre is None:
        return None
    centre = torch.tensor(served.range.centre, dtype=torch.float64)
    return centre.repeat_interleave(rows.k.shape[1] // len(centre), 0)[None, :, None]


# ---------------------------------------------------------------- gains


def _typical(
    attentions: Sequence[Attention], calls: Mapping[str, Call]
) -> tuple[dict[str, Errors], dict[str, tuple[float, float]]]:
    """Errors of one candidate of each attention on the first batch, that of about the TYPICAL size, and their sizes."""
    errors, local = {}, {}
    for each in attentions:
        whole = [c for c in each.candidates if len(c.heads) == each.heads and c.output > 0]
        if not whole:
            continue
        candidate = min(whole, key=lambda c: max(c.output / TYPICAL, TYPICAL / c.output))
        served, call = each.served[candidate.near], calls[each.entry.full_path]
        centre = _centre(served, sample(call))
        found = whole_errors(call, candidate.polynomial.coefficients, candidate.near, centre)
        errors[each.entry.full_path], *sizes = found
        local[each.entry.full_path] = (sizes[0], sizes[1])
    return errors, local


def _with_gains(
    each: Attention, probes: Mapping[str, Sequence[Probe]], local: Mapping[str, tuple[float, float]]
) -> Attention:
    path = each.entry.full_path
    if path not in local or not probes.get(path):
        return each
    pairs = zip(WHATS, local[path], strict=True)
    gains = Gains(*(_gain([of(p, what) for p in probes[path]], error) for what, error in pairs))
    return replace(each, gains=gains)


def _gain(squares: Sequence[float], local: float) -> Gain:
    """The root of the mean square over the local error; squares of normal variables: an interval by chi squared."""
    from scipy.stats import chi2

    count = len(squares)
    value = sqrt(sum(squares) / count) / local if local else 0.0
    low, high = (sqrt(count / float(chi2.ppf(p, count))) for p in (0.975, 0.025))
    return Gain(value, low * value, high * value)
