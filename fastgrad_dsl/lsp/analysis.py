"""What is known of one text: its tree, its errors, and of each model the values of expressions, bounds and the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.frontend.modules import Reader
from fastgrad_compiler.frontend.values import Tensor, Value
from fastgrad_compiler.ir.graph import Bound, Node, Program
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning.plan import plan_attention
from fastgrad_dsl.lsp.items import Parsed
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.source import Source, Span

MOST_VALUES = 8
"""Of one expression: a block has an instance for each signature that it is called with."""

Place = tuple[str, int, int]
"""A path, and the characters from a start to an end."""


def place_of(span: Span) -> Place:
    """The place of a span."""
    return span.source.path, span.start, span.end


@dataclass(frozen=True)
class ModelFacts:
    """What the elaborator and the passes found of one model: `program` has bounds, `planned` attentions and, if the
    budget can be met, decisions.
    """

    name: str
    values: Mapping[Place, tuple[Value, ...]]
    program: Program | None = None
    planned: Program | None = None

    @cached_property
    def _nodes(self) -> Mapping[Place, tuple[Node, ...]]:
        """The last node of each graph by its place."""
        found: dict[Place, list[Node]] = {}
        for graph in self.program.graphs if self.program else ():
            last = {place_of(node.span): node for node in graph.nodes if node.span is not None}
            for place, node in last.items():
                found.setdefault(place, []).append(node)
        return {place: tuple(nodes) for place, nodes in found.items()}

    def bounds(self, place: Place) -> tuple[Bound, ...]:
        """What is proved of the value of an expression, one entry for each instance of which something is known."""
        nodes = self._nodes.get(place, ())
        return tuple(dict.fromkeys(node.bound for node in nodes if node.bound is not None))

    @cached_property
    def attentions(self) -> tuple[AttentionEntry, ...]:
        """The attentions of the model, with decisions if the budget could be met."""
        return attention_table(self.planned) if self.planned is not None else ()

    @cached_property
    def attentions_at(self) -> Mapping[Place, tuple[AttentionEntry, ...]]:
        """The attentions by where the user wrote them, and by the calls that lead to them."""
        found: dict[Place, list[AttentionEntry]] = {}
        for entry in self.attentions:
            spans = [span for span in (entry.span, entry.node.span, *entry.calls) if span is not None]
            for place in dict.fromkeys(map(place_of, spans)):
                found.setdefault(place, []).append(entry)
        return {place: tuple(entries) for place, entries in found.items()}


@dataclass(frozen=True)
class Analysis:
    """All that is known of a text. `files` are the texts of the files that it uses, by path."""

    parsed: Parsed
    diagnostics: tuple[Diagnostic, ...] = ()
    models: tuple[ModelFacts, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The text."""
        return self.parsed.source

    def values(self, place: Place) -> tuple[Value, ...]:
        """What an expression was found to be, in all models."""
        return tuple(value for model in self.models for value in model.values.get(place, ()))

    def bounds(self, place: Place) -> tuple[Bound, ...]:
        """What is proved of it."""
        return tuple(dict.fromkeys(bound for model in self.models for bound in model.bounds(place)))

    def attentions(self, place: Place) -> tuple[AttentionEntry, ...]:
        """The attentions that stand there."""
        return tuple(entry for model in self.models for entry in model.attentions_at.get(place, ()))


@dataclass
class _Watch:
    """Keeps the first values of each place."""

    values: dict[Place, list[Value]] = field(default_factory=dict)

    def __call__(self, span: Span, value: Value) -> None:
        found = self.values.setdefault((span.source.path, span.start, span.end), [])
        if len(found) < MOST_VALUES and not any(_same(value, each) for each in found):
            found.append(value)


def _same(first: Value, second: Value) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.type == second.type
    return type(first) is type(second) and first == second


def analyse(parsed: Parsed, reader: Reader) -> Analysis:
    """Check a text as `fastgrad check` does, each of its models.

    A file of blocks alone is there to be used, and is no error. Raises nothing that a text can cause.
    """
    if parsed.diagnostics or parsed.tree is None:
        return Analysis(parsed, parsed.diagnostics)
    names: list[str | None] = [*dict.fromkeys(_models(parsed.tree))] or [None]
    found: list[Diagnostic] = []
    facts: list[ModelFacts] = []
    files: dict[str, str] = {}

    def read(shown: str, path: Path) -> Source:
        source = reader.read(shown, path)
        files[source.path] = source.text
        return source

    noting = Reader(read, reader.parse)
    for name in names:
        model, errors = _model(parsed.source, name, noting)
        facts.append(model)
        found += errors
    if names == [None] and any(isinstance(item, ast.BlockDecl) for item in parsed.tree.items):
        found = [each for each in found if each.code != "FG236"]
    return Analysis(parsed, tuple(_distinct(found)), tuple(facts), files)


def _models(tree: ast.File) -> Iterator[str]:
    return (item.name.text for item in tree.items if isinstance(item, ast.BlockDecl) and item.is_model)


def _model(source: Source, name: str | None, reader: Reader) -> tuple[ModelFacts, tuple[Diagnostic, ...]]:
    watch = _Watch()
    program = planned = None
    errors: tuple[Diagnostic, ...] = ()
    try:
        elaborated = elaborate(source, model=name, reader=reader, watch=watch)
        stages = {stage.name: stage.program for stage in run(elaborated, until="attention", validate=False)}
        program, planned = stages["bounds"], stages["attention"]
        planned = plan_attention(planned, target="auto")
    except TfgError as error:
        errors = error.diagnostics
    values = {place: tuple(found) for place, found in watch.values.items()}
    return ModelFacts(name or "", values, program, planned), errors


def _distinct(found: list[Diagnostic]) -> Iterator[Diagnostic]:
    """Errors that several models share are one."""
    seen = set()
    for each in found:
        key = (each.code, each.message, place_of(each.span) if each.span else None)
        if key not in seen:
            seen.add(key)
            yield each
