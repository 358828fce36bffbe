"""The spec of a converted model: calls of the standard library get `near` and `far_dim`, and the rest stays as it is.

    x = x + std.attention(x; heads, causal = true)
    x = x + std.attention(x; heads, causal = true, near = 64, far_dim = 16)

Where only some turns of a repeat are converted, a value says in which: `far_dim = 16 if linear else none`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from fastgrad_compiler.attention.table import LIBRARY, AttentionEntry, attention_table
from fastgrad_compiler.frontend.modules import standard_library
from fastgrad_compiler.planning.settings import matches
from fastgrad_dsl.api.compiled import Compiled, compile_source
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import format_source
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source, Span

NEAR, FAR = "near", "far_dim"
_Node = TypeVar("_Node", bound=ast.Node)
Turns = tuple[int, ...]
Occurrence = tuple[tuple[Span, Turns], ...]
"""Calls from the model on, each with its turns of the repeats around it."""


@dataclass(frozen=True)
class Form:
    """What takes the place of softmax: `near` tokens in a block of the near field, `far_dim` the width of the maps."""

    near: int = 64
    far_dim: int = 16


@dataclass(frozen=True)
class Left:
    """An attention that stays as it is, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ConvertedSpec:
    """A converted model, the attentions that were converted, by path, and those that were left."""

    compiled: Compiled
    converted: tuple[AttentionEntry, ...]
    left: tuple[Left, ...]


def convert_spec(compiled: Compiled, form: Form, patterns: Sequence[str] = ()) -> ConvertedSpec:
    """The spec in which each attention that a pattern matches, all without patterns, has `form`.

    Raises TfgError: FG302 for a pattern that matches no attention, FG606 where nothing is left to convert or the
    attentions that are picked cannot be told apart in the text, and what compiling the new spec finds wrong.
    """
    entries = attention_table(compiled.recognised)
    for pattern in patterns:
        if not any(matches(pattern, entry.full_path) for entry in entries):
            shown = ", ".join(entry.path for entry in entries[:8])
            raise TfgError.of(
                "FG302", f'--at "{pattern}" matches no attention', f"the attentions are {shown}"
            )
    planned = {entry.full_path: entry for entry in attention_table(compiled.program)}
    chosen, left = list[AttentionEntry](), list[Left]()
    for entry in entries:
        reason = _obstacle(entry, planned.get(entry.full_path, entry))
        if reason is None and patterns and not any(matches(each, entry.full_path) for each in patterns):
            reason = "no --at names it"
        if reason is None:
            chosen.append(entry)
        else:
            left.append(Left(entry.path, reason))
    if not chosen:
        reasons = sorted({f"{each.path}: {each.reason}" for each in left})[:4]
        raise TfgError.of(
            "FG606", f"no attention of model {compiled.program.name} is to be converted", *reasons
        )
    text = _changed(compiled.source, entries, {entry.full_path for entry in chosen}, form)
    source = replace(compiled.source, text=text)
    made = compile_source(
        source,
        params=compiled.params,
        model=compiled.program.name,
        target=compiled.target,
        dims=compiled.dims,
    )
    return ConvertedSpec(made, tuple(chosen), tuple(left))


def _obstacle(entry: AttentionEntry, planned: AttentionEntry) -> str | None:
    """Why an attention cannot be converted, or need not be; None where it can."""
    attention = entry.attention
    if attention.is_own:
        return "it is linear already: its weights are a polynomial of the model's own"
    if planned.attention.polynomial is not None:
        return "it is linear already: a polynomial serves it within the budget"
    if attention.mask.window is not None:
        return "it is linear already: its window is narrow"
    if attention.range.bound is not None or attention.near is not None:
        return "its logits are limited: a budget lets a polynomial serve it"
    if attention.mask.forget:
        return "it has forget gates"
    call = _call_of(entry)
    if call is None:
        return f"it is not made by a call of the standard library at {entry.place}: call std.attend there"
    if not _takes(call, FAR):
        return f"std.{call.function.text} does not take {FAR}"
    return None


# ---------------------------------------------------------------- calls in the text


def _own(entry: AttentionEntry) -> Occurrence:
    """The calls that lead to it in the spec's own text."""
    pairs = zip(entry.calls, entry.turns, strict=True)
    return tuple((span, turns) for span, turns in pairs if not span.source.path.startswith(LIBRARY))


def _call_of(entry: AttentionEntry) -> ast.Call | None:
    """The call of the library, in the spec's own text, that an attention comes from."""
    own = _own(entry)
    if not own or entry.node.span is None or not entry.node.span.source.path.startswith(LIBRARY):
        return None
    span = own[-1][0]
    if any(each.source != span.source for each, _ in own):
        return None  # it is in a file that the spec uses, which others may use too
    call = _calls(parse(span.source)).get((span.start, span.end))
    return call if call is not None and call.module is not None else None


def _takes(call: ast.Call, name: str) -> bool:
    block = standard_library().blocks.get(call.function.text)
    return block is not None and any(value.name.text == name for value in block.values)


def _calls(file: ast.File) -> dict[tuple[int, int], ast.Call]:
    """All calls of a file by where they begin and end."""
    return {(call.span.start, call.span.end): call for call in _nodes(file, ast.Call)}


def _nodes(root: ast.Node, kind: type[_Node]) -> Iterator[_Node]:
    if isinstance(root, kind):
        yield root
    for name in root.__dataclass_fields__:
        value = getattr(root, name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, ast.Node):
                yield from _nodes(each, kind)


# ---------------------------------------------------------------- the new text


def _changed(source: Source, entries: Iterable[AttentionEntry], chosen: set[str], form: Form) -> str:
    """The text in which the calls of the chosen attentions have `form`; formatted if it was before."""
    change = _Change(source, form)
    sites: dict[tuple[int, int], list[AttentionEntry]] = {}
    for entry in entries:
        own = _own(entry)
        if own:
            sites.setdefault((own[-1][0].start, own[-1][0].end), []).append(entry)
    for place, found in sites.items():
        if any(entry.full_path in chosen for entry in found):
            change.site(place, found, chosen)
    text = change.text()
    return format_source(text) if format_source(source) == source.text else text


class _Change:
    """Edits of a text, collected and made at once."""

    def __init__(self, source: Source, form: Form) -> None:
        self.source, self.form = source, form
        self.file = parse(source)
        self.calls = _calls(self.file)
        self.edits: list[tuple[int, int, str]] = []
        self.names = {each.text for each in _nodes(self.file, ast.Name)}

    def site(self, place: tuple[int, int], found: Sequence[AttentionEntry], chosen: set[str]) -> None:
        """One call of the library, in all its occurrences."""
        verdicts: dict[Occurrence, bool] = {}
        for entry in found:
            picked = entry.full_path in chosen
            if verdicts.setdefault(_own(entry), picked) != picked:
                raise self.inseparable(place, found, chosen)
        condition = None
        if not all(verdicts.values()):
            levels = range(len(next(iter(verdicts))) - 1, -1, -1)
            level = next((n for n in levels if _decides(verdicts, n)), None)
            if level is None or len({len(each) for each in verdicts}) > 1:
                raise self.inseparable(place, found, chosen)
            condition = self.conditions(verdicts, level)
        self.convert(self.calls[place], condition)

    def convert(self, call: ast.Call, condition: str | None) -> None:
        """Give a call its near field and its maps, where the condition holds; without maps it reads no near field."""
        far = str(self.form.far_dim) if condition is None else f"{self.form.far_dim} if {condition} else none"
        wanted = {
            name: text for name, text in {NEAR: str(self.form.near), FAR: far}.items() if _takes(call, name)
        }
        for argument in call.arguments:
            if argument.name is not None and argument.name.text in wanted:
                span = argument.value.span
                self.edits.append((span.start, span.end, wanted.pop(argument.name.text)))
        for name, text in wanted.items():
            self.argument(call.span, f"{name} = {text}")

    def conditions(self, verdicts: Mapping[Occurrence, bool], level: int) -> str:
        """Make the calls from `level` on say which way is meant; the condition at the innermost one."""
        innermost = len(next(iter(verdicts))) - 1
        where = {occurrence[level][0] for occurrence in verdicts}
        conditions = {}
        for span in where:
            of_call = {each[level][1]: picked for each, picked in verdicts.items() if each[level][0] == span}
            conditions[span] = self.condition(span, of_call)
        if level == innermost:
            return next(iter(conditions.values()))
        name = self.free_name("linear")
        for span, condition in conditions.items():
            self.argument(span, f"{name} = {condition}")
        for occurrence in verdicts:
            for span, _ in occurrence[level + 1 :]:
                self.parameter(span, f"{name}: bool")
            for span, _ in occurrence[level + 1 : innermost]:
                self.argument(span, f"{name} = {name}")
        return name

    def condition(self, span: Span, picked: Mapping[Turns, bool]) -> str:
        """In which turns of the repeats around it a call is meant."""
        if len(set(picked.values())) == 1:
            return "true" if all(picked.values()) else "false"
        indices = [each.index.text for each in _around(self.file, ast.Repeat, span)]
        turns = sorted(turn for turn, is_picked in picked.items() if is_picked)
        if len(indices) == 1:
            numbers, last = [turn[0] for turn in turns], max(picked)[0]
            if numbers == list(range(len(numbers))):
                return f"{indices[0]} < {len(numbers)}"
            if numbers == list(range(numbers[0], last + 1)):
                return f"{indices[0]} >= {numbers[0]}"
        each = (" and ".join(f"{i} == {n}" for i, n in zip(indices, turn, strict=True)) for turn in turns)
        return " or ".join(each)

    def free_name(self, wanted: str) -> str:
        """A name that the text does not have yet."""
        name = next(
            each
            for number in count(1)
            if (each := wanted if number == 1 else f"{wanted}_{number}") not in self.names
        )
        self.names.add(name)
        return name

    def argument(self, span: Span, text: str) -> None:
        """Add an argument to a call, once."""
        end = self.calls[span.start, span.end].arguments[-1].span.end
        self.once(end, f", {text}")

    def parameter(self, inside: Span, text: str) -> None:
        """Add a value to the signature of the block that a place lies in, once."""
        (block,) = _around(self.file, ast.BlockDecl, inside)
        last = (*block.tensors, *block.values)[-1]
        self.once(last.span.end, f"{',' if block.values else ';'} {text}")

    def once(self, place: int, text: str) -> None:
        """Insert a text at a place, where it is not there yet."""
        if (place, place, text) not in self.edits:
            self.edits.append((place, place, text))

    def text(self) -> str:
        """The text with all edits."""
        text, place = "", 0
        for start, end, new in sorted(self.edits, key=lambda edit: edit[:2]):
            text += self.source.text[place:start] + new
            place = end
        return text + self.source.text[place:]

    def inseparable(
        self, place: tuple[int, int], found: Sequence[AttentionEntry], chosen: set[str]
    ) -> TfgError:
        """FG606: attentions of one call, of which some are to be converted."""
        other = next(entry.path for entry in found if entry.full_path not in chosen)
        picked = next(entry.path for entry in found if entry.full_path in chosen)
        said = f"{picked} is to be converted and {other} is not, and the text makes them by one call"
        return TfgError.of("FG606", said, "pick both, or neither", span=Span(self.source, *place))


def _decides(verdicts: Mapping[Occurrence, bool], level: int) -> bool:
    """Whether the call at a level and its turns say what is converted."""
    found: dict[tuple[Span, Turns], bool] = {}
    return all(found.setdefault(each[level], picked) == picked for each, picked in verdicts.items())


def _around(root: ast.Node, kind: type[_Node], span: Span) -> list[_Node]:
    """The nodes of a kind that a place lies in, the outermost first."""
    return [
        each for each in _nodes(root, kind) if each.span.start <= span.start and span.end <= each.span.end
    ]
