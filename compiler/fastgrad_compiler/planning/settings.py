"""What the budget's `at` rules say of each attention, and what is wrong with the rules themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from fastgrad_compiler.approximation.polynomial import FAMILIES, MAX_DEGREE
from fastgrad_compiler.ir.graph import Budget, BudgetRule
from fastgrad_grammar.diagnostics import Diagnostic, nearest


@dataclass(frozen=True)
class Settings:
    """The rule in force of each kind, None where there is none."""

    relative: BudgetRule | None = None
    exact: BudgetRule | None = None
    degree: BudgetRule | None = None
    family: BudgetRule | None = None
    near: BudgetRule | None = None

    @property
    def asked(self) -> BudgetRule | None:
        """A rule that asks for a polynomial: what it says cannot be had from an exact attention."""
        return self.degree or self.near or self.family

    @property
    def kind(self) -> str:
        """That of this rule; empty where there is none."""
        return self.asked.kind if self.asked else ""

    def with_rule(self, rule: BudgetRule) -> Settings:
        """A later rule overrides: `exact` all that pins a rewrite, a pin `exact`, and each kind itself."""
        if rule.kind == "exact":
            return Settings(relative=self.relative, exact=rule)
        changed = replace(self, **{rule.kind: rule})
        return changed if rule.kind == "relative" else replace(changed, exact=None)


def settings_of(full_path: str, rules: Iterable[BudgetRule]) -> Settings:
    """The rules in force for the attention at a path, later ones overriding."""
    settings = Settings()
    for rule in rules:
        if matches(rule.pattern, full_path):
            settings = settings.with_rule(rule)
    return settings


def matches(pattern: str, full_path: str) -> bool:
    """Whether a shell pattern matches a path or what it lies in: `layers.0` and `layers.*` match
    `layers.0.attention.y`.
    """
    parts = full_path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def check_budget(budget: Budget, paths: Sequence[tuple[str, str]]) -> list[Diagnostic]:
    """FG302 for patterns that match nothing, FG303 for values out of range; `paths` are (shown, full) ones."""
    found = [_value(rule) for rule in budget.rules]
    found += [_pattern(rule, paths) for rule in budget.rules]
    found += [_limit(budget, name) for name in ("output", "gradient", "near")]
    return [diagnostic for diagnostic in found if diagnostic is not None]


def _pattern(rule: BudgetRule, paths: Sequence[tuple[str, str]]) -> Diagnostic | None:
    if any(matches(rule.pattern, full) for _, full in paths):
        return None
    shown = [path for path, _ in paths]
    help_ = []
    near = nearest(rule.pattern, dict.fromkeys(path for pair in paths for path in pair))
    if near is not None:
        help_.append(f'did you mean "{near}"?')
    if shown:
        help_.append(f"the attentions are {_some(shown)}")
    else:
        help_.append("no attention was found in this model: an attention is softmax(scores) @ values")
    message = f'"{rule.pattern}" matches no attention'
    return Diagnostic("FG302", message, rule.span, "nothing has this path", help=tuple(help_))


def _some(paths: Sequence[str]) -> str:
    listed = [f'"{path}"' for path in paths]
    if len(listed) <= 4:
        return ", ".join(listed)
    return f"{', '.join(listed[:2])} .. {listed[-1]} ({len(listed)})"


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "relative": (lambda x: type(x) in (int, float) and 0 < x < 1, "a number between 0 and 1"),
    "exact": (lambda x: x is None, "nothing"),
    "degree": (lambda x: type(x) is int and 1 <= x <= MAX_DEGREE, f"an int from 1 to {MAX_DEGREE}"),
    "family": (lambda x: x in FAMILIES, f"one of {', '.join(FAMILIES)}"),
    "near": (lambda x: type(x) is int and x >= 1, "an int of at least 1"),
}


def _value(rule: BudgetRule) -> Diagnostic | None:
    allowed, wanted = _VALUES[rule.kind]
    if allowed(rule.value):
        return None
    family = nearest(str(rule.value), FAMILIES) if rule.kind == "family" else None
    return Diagnostic(
        "FG303",
        f"{rule.kind} takes {wanted}, not {_shown(rule.value)}",
        rule.span,
        help=(f'did you mean "{family}"?',) if family else (),
    )


def _limit(budget: Budget, name: str) -> Diagnostic | None:
    value, wanted = getattr(budget, name), "an int of at least 1" if name == "near" else "a number above 0"
    wrong = value is not None and not value > 0
    return Diagnostic("FG303", f"{name} takes {wanted}, not {_shown(value)}", budget.span) if wrong else None


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else str(value)
