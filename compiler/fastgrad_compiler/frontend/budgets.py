"""Budget blocks: limits on the whole, and rules for attentions whose path matches a pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastgrad_compiler.approximation.polynomial import FAMILIES
from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.expressions import bare_word, scalar
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.ir.graph import ON_VIOLATION, TRUST, Budget, BudgetRule
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span


@dataclass(frozen=True, slots=True)
class _Key:
    """What a name of a budget takes: with `<=` where `limit`, else with `=`.

    `words` are all that it takes, where they can be listed; they may be written without quotes.
    """

    limit: bool
    expected: str
    fits: Callable[[Any], bool]
    words: tuple[str, ...] = ()


def _one_of(*words: str) -> _Key:
    return _Key(False, f"one of {', '.join(words)}", lambda value: value in words, words)


_LIMIT = _Key(True, "a number above 0", lambda value: values.is_number(value) and value > 0)
_COUNT = _Key(False, "an int of at least 1", lambda value: values.is_int(value) and value >= 1)

WHOLE: dict[str, _Key] = {
    "output": _LIMIT,
    "gradient": _LIMIT,
    "memory": _LIMIT,
    "near": _COUNT,
    "trust": _one_of(*TRUST),
    "on_violation": _one_of(*ON_VIOLATION),
}
RULES: dict[str, _Key] = {
    "relative": _LIMIT,
    "degree": _COUNT,
    "near": _COUNT,
    "family": _one_of(*sorted(FAMILIES)),
}


def budget_for(scope: Scope, model: str) -> Budget | None:
    """The budget of a model: the block that names it, else the one for the whole file; None without either.

    Every block of the file is checked: FG232 for unknown names, FG233 for values, FG202 for a second block.
    """
    chosen: dict[str | None, tuple[ast.Budget, Budget]] = {}
    for item in scope.module.of(ast.Budget):
        name = item.model.text if item.model else None
        if item.model is not None and name not in scope.module.models:
            scope.report("FG232", f"budget for the unknown model `{name}`", item.model.span, "no such model",
                         help_=(did_you_mean(item.model.text, scope.module.models),))  # fmt: skip
        if name in chosen:
            start = item.span.start
            at = item.model.span if item.model else Span(item.span.source, start, start + len("budget"))
            scope.report("FG202", "a second budget for the same model", at, "declared again",
                         notes=(Note("first here", chosen[name][0].span),))  # fmt: skip
            continue
        chosen[name] = (item, _budget(scope, item))
    found = chosen.get(model) or chosen.get(None)
    return found[1] if found else None


def _budget(scope: Scope, item: ast.Budget) -> Budget:
    budget = Budget(span=item.span)
    seen: dict[str, Span] = {}
    for entry in item.entries:
        try:
            if isinstance(entry, ast.At):
                budget = replace(budget, rules=(*budget.rules, _rule(scope, entry)))
                continue
            first = seen.setdefault(entry.name.text, entry.name.span)
            if first is not entry.name.span:
                raise scope.report("FG202", f"`{entry.name.text}` is set twice", entry.name.span, "set again",
                                   notes=(Note("first here", first),))  # fmt: skip
            given: dict[str, Any] = {entry.name.text: _value(scope, entry, WHOLE, "a budget")}
            budget = replace(budget, **given)
        except Abort:
            continue
    return budget


def _rule(scope: Scope, at: ast.At) -> BudgetRule:
    pattern = str(at.pattern.value)
    if not pattern:
        raise scope.report("FG233", "an empty pattern matches nothing", at.pattern.span, "empty",
                           help_=('"*" matches every attention',))  # fmt: skip
    if isinstance(at.rule, ast.Exact):
        return BudgetRule(pattern, "exact", None, at.span)
    value = _value(scope, at.rule, RULES, "a rule of a budget")
    return BudgetRule(pattern, at.rule.name.text, value, at.span)


def _value(scope: Scope, entry: ast.Limit | ast.Setting, keys: dict[str, _Key], what: str) -> float | str:
    """The value, a float of a limit."""
    name = entry.name.text
    if name not in keys:
        help_ = did_you_mean(name, [*keys, "exact"])
        raise scope.report("FG232", f"{what} has no `{name}`", entry.name.span, f"it takes {', '.join(keys)}",
                           help_=(help_ or _misplaced(name, keys),))  # fmt: skip
    key = keys[name]
    if key.limit != isinstance(entry, ast.Limit):
        sign = "<=" if key.limit else "="
        raise scope.report("FG232", f"`{name}` is set with `{sign}`", entry.span, "the other sign",
                           help_=(f"write {name} {sign} {entry.value.span.text}",))  # fmt: skip
    word = bare_word(scope, entry.value) if key.words else None
    value: Any = word or scalar(scope, entry.value, f"`{name}`")
    if not key.fits(value):
        help_ = did_you_mean(value, key.words) if isinstance(value, str) else None
        found = word or values.describe(value)
        raise scope.report("FG233", f"`{name}` is {key.expected}, not {found}", entry.value.span,
                           f"{word or values.show(value)} here", help_=(help_,))  # fmt: skip
    return float(value) if key.limit else value


def _misplaced(name: str, keys: dict[str, _Key]) -> str | None:
    if keys is WHOLE and name in RULES:
        return f'it belongs to an attention: at "*" {name} {"<=" if RULES[name].limit else "="} ...'
    return None
