"""Lines above a model and a budget: how many parameters it has, and what it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from lsprotocol import types

from fastgrad_compiler.ir.flatten import weights
from fastgrad_dsl.lsp.analysis import ModelFacts
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.words import decisions
from fastgrad_dsl.report.words import counted
from fastgrad_grammar import ast


def lenses(view: View) -> list[types.CodeLens]:
    """The lenses of a document."""
    return list(_lenses(view))


def _lenses(view: View) -> Iterator[types.CodeLens]:
    models = {model.name: model for model in view.models}
    for item in view.items():
        if isinstance(item, ast.BlockDecl) and item.is_model and item.name.text in models:
            yield _lens(view, item, _parameters(models[item.name.text]))
        if isinstance(item, ast.Budget):
            named = [item.model.text] if item.model is not None else _without_own(view, models)
            shown = [name for name in named if name in models]
            for name in shown:
                said = _plan(models[name])
                yield _lens(view, item, f"{name}: {said}" if len(models) > 1 else said)


def _without_own(view: View, models: dict[str, ModelFacts]) -> list[str]:
    """The models that the budget of the whole file is for."""
    own = {
        item.model.text for item in view.items() if isinstance(item, ast.Budget) and item.model is not None
    }
    return [name for name in models if name not in own]


def _parameters(model: ModelFacts) -> str:
    if model.program is None:
        return "not known: the model has errors"
    sizes = [
        prod(dim.constant or 0 for dim in node.tensor.shape)
        for _, node in weights(model.program)
        if node.op == "weight"
    ]
    return f"{sum(sizes):,} parameters in {counted(len(sizes), 'weight')}"


def _plan(model: ModelFacts) -> str:
    """What the attentions of a model will be, and from which length on polynomials serve."""
    entries = model.attentions
    if any(entry.attention.verdict is None for entry in entries):
        return "cannot be met"
    if not entries:
        return "no attention"
    said = "; ".join(f"{len(same)} {text}" for text, same in decisions(entries))
    verdicts = [e.attention.verdict for e in entries if e.attention.polynomial is not None]
    lengths = [verdict.break_even for verdict in verdicts if verdict and verdict.break_even is not None]
    return f"{said}; from n = {min(lengths):,} on" if lengths else said


def _lens(view: View, item: ast.Item, title: str) -> types.CodeLens:
    start = view.range(item.span).start
    return types.CodeLens(types.Range(start, start), types.Command(title, ""))
