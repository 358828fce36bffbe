"""Refusals as diagnostics: where, why, and what would make the budget feasible, with numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.attention.table import LIBRARY, AttentionEntry
from fastgrad_compiler.ir.graph import BudgetRule
from fastgrad_compiler.ir.words import number
from fastgrad_compiler.planning.candidates import USEFUL, fits, polynomials, widest
from fastgrad_compiler.planning.decision import Caps, Case, Refusal, search, with_bound
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_grammar.diagnostics import Diagnostic, Note

_HALVINGS = 24  # of the interval in which the largest feasible bound is sought


def diagnose(refusal: Refusal, case: Case, entries: Sequence[AttentionEntry]) -> Diagnostic:
    """The diagnostic of one refusal for all attentions that it concerns."""
    rule: BudgetRule | None = getattr(case.settings, refusal.rule, None)
    notes = places(entries[0])
    if case.attention.range.bound is not None and refusal.code not in ("FG308", "FG309"):
        notes += _range(case)
    return Diagnostic(
        refusal.code,
        f"{named(entries)}: {refusal.message}",
        rule.span if rule is not None and rule.span is not None else case.node.span,
        notes=tuple(notes),
        help=(*_REMEDIES[refusal.code](case), f'leave it exact: at "{entries[0].path}" exact'),
    )


def named(entries: Sequence[AttentionEntry]) -> str:
    """Attentions that have something in common, in words."""
    more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
    return f'attention "{entries[0].path}"{more}'


def narrower(degree: int, max_rank: int, d: int) -> list[str]:
    """The width less than `d` at which the rank is within the limit, where there is one."""
    width = widest(degree, max_rank, below=d)
    return (
        [] if width is None else [f"a qk_dim of {width} has rank {rank(width, degree):,} at degree {degree}"]
    )


def places(entry: AttentionEntry) -> list[Note]:
    """Where the attention stands and, where that is in the library, the call in the user's file that leads
    there.
    """
    notes = [] if entry.node.span is None else [Note("the attention is here", entry.node.span)]
    own = [span for span in entry.calls if not span.source.path.startswith(LIBRARY)]
    if own and entry.node.span is not None and entry.node.span.source.path.startswith(LIBRARY):
        notes.append(Note("which is called from here", own[-1]))
    return notes


def _range(case: Case) -> list[Note]:
    known = case.attention.range
    word = "asserted" if known.asserted else "proved"
    return [Note(line) for line in (f"|s| <= {number(case.bound)} is {word}", *known.proof)]


def _unbounded(case: Case) -> list[str]:
    word = [] if case.certified else ["or assert a limit that you know: assume_bound(scores, R)"]
    return [
        "limit the logits: gain * (unit(q) @ unit(k).T) never exceeds the gain; std.attention(gain = 1.0) does it",
        "limit only distant ones: near_far(q @ k.T, gain * (unit(q) @ unit(k).T); 64); "
        "std.attention(gain = 1.0, near = 64) does it",
        *word,
    ]


def _better_degree(case: Case) -> list[str]:
    """A higher degree, or a smaller range at the pinned one."""
    degree = _degree(case)
    caps = Caps(relative=case.caps.relative or USEFUL)
    remedies: list[str] = []
    for option in (case, replace(case, settings=replace(case.settings, family=None), family="balanced")):
        evaluated = search(replace(option, caps=caps))[0] if not remedies else None
        found = evaluated.polynomial if evaluated is not None else None
        if found is not None and (found.family, found.degree) != (case.chosen_family, degree):
            found_rank = rank(case.d or 1, found.degree)
            family = "" if found.family == case.chosen_family else f" of family {found.family}"
            remedies.append(
                f"degree {found.degree}{family} does it: eps {number(found.eps)}, rank {found_rank:,}"
            )
    if degree is not None:
        remedies += _smaller_range(case, degree, lambda p: not caps.missed(p))
    return remedies


def _positive_degree(case: Case) -> list[str]:
    """The next higher degree that is positive and says something, or a range on which the pinned one is."""
    degree = _degree(case) or 1
    remedies = []
    useful = polynomials(
        case.bound, replace(case.policy, max_eps=USEFUL), (case.chosen_family,), above=degree
    )
    for polynomial in islice(useful, 1):
        higher, found_rank = polynomial.degree, rank(case.d or 1, polynomial.degree)
        eps = number(polynomial.eps)
        remedies.append(f"degree {higher} is positive there: eps {eps}, rank {found_rank:,}")
    return remedies + _smaller_range(case, degree, lambda p: p.eps <= USEFUL)


def _smaller_rank(case: Case) -> list[str]:
    degree = _degree(case)
    if degree is None:
        return []
    remedies = narrower(degree, case.max_rank, case.d or 1)
    lower = min(degree - 1, case.policy.highest_degree)
    polynomial = _fit(case, lower, case.bound) if lower else None
    if polynomial is not None and case.policy.is_positive(polynomial):
        found_rank = rank(case.d or 1, polynomial.degree)
        remedies.append(
            f"degree {polynomial.degree} has rank {found_rank:,} and eps {number(polynomial.eps)}"
        )
    return remedies


def _feasible(case: Case) -> list[str]:
    """A smaller range or narrower heads, with which some degree meets all caps."""
    if case.d is None or case.dv is None:
        return ["declare the widths of heads as constants"]
    remedies = []
    halves = [case.d >> shift for shift in range(1, case.d.bit_length())]
    width = next((d for d in halves if search(replace(case, d=d))[0] is not None), None)
    if width is not None:
        remedies.append(f"a qk_dim of {width} affords a degree that meets the limits")
    largest = _largest(case.bound, lambda bound: search(with_bound(case, bound))[0] is not None)
    return remedies + _gain(case, largest, "meets the limits")


def _smaller_range(case: Case, degree: int, suits: Callable[[Polynomial], bool]) -> list[str]:
    def serves(bound: float) -> bool:
        polynomial = _fit(case, degree, bound)
        return polynomial is not None and case.policy.is_positive(polynomial) and suits(polynomial)

    return _gain(case, _largest(case.bound, serves), f"serves at degree {degree}")


def _gain(case: Case, largest: float | None, what: str) -> list[str]:
    if largest is None:
        return []
    return [f"a smaller gain: |s| <= {largest:.3g} instead of {number(case.bound)} {what}"]


def _largest(bound: float, serves: Callable[[float], bool]) -> float | None:
    """The largest bound below `bound` that serves, rounded down to three digits."""
    low, high = 0.0, bound
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    rounded = float(f"{low * 0.995:.3g}")
    return rounded if rounded > 0.01 * bound and serves(rounded) else None


def _fit(case: Case, degree: int, bound: float) -> Polynomial | None:
    (found,) = fits(case.chosen_family, bound, (degree,))
    return found if isinstance(found, Polynomial) else None


def _degree(case: Case) -> int | None:
    return int(str(case.settings.degree.value)) if case.settings.degree else None


_REMEDIES: dict[str, Callable[[Case], list[str]]] = {
    "FG301": _unbounded,
    "FG304": _positive_degree,
    "FG305": _better_degree,
    "FG306": _better_degree,
    "FG307": _smaller_rank,
    "FG308": lambda case: [
        "change the block of near_far in the model instead" if case.attention.near else "remove this rule"
    ],
    "FG309": lambda case: ["windows and alibi stay exact: remove the mask, or this rule"],
    "FG310": _feasible,
}
