"""What is known of values, ranges and attentions, in words, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.rounding import EXACT
from fastgrad_compiler.attention.table import AttentionEntry
from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.values import Several, Tensor, Value
from fastgrad_compiler.ir.graph import Bound
from fastgrad_dsl.report.words import SOURCES, decided, folded, number
from fastgrad_grammar import ast
from fastgrad_grammar.comments import find_comments
from fastgrad_grammar.source import Source

MOST_REASONS = 12


def code(text: str) -> str:
    """A line of the language in a block of its own."""
    return f"```tfg\n{text.replace('```', '')}\n```"


def described(value: Value) -> str:
    """A value as the language writes it: a type for a tensor."""
    if isinstance(value, Tensor):
        return str(value.type)
    if isinstance(value, Several):
        return f"({', '.join(map(described, value.items))})"
    return values.show(value)


def joined(found: Iterable[Value]) -> str:
    """What a name is in each instance of its block."""
    return " or ".join(dict.fromkeys(map(described, found)))


def range_text(bounds: Sequence[Bound]) -> str:
    """What is proved of a tensor in all instances of its block, with the chain of reasons of the widest."""
    if not bounds:
        return ""
    low, high = min(each.low for each in bounds), max(each.high for each in bounds)
    norm = max(each.norm for each in bounds)
    widest = max(bounds, key=lambda each: (each.magnitude, each.norm))
    said = []
    if (low, high) != (-inf, inf):
        said.append(f"entries in [{_end(low)}, {_end(high)}]")
    if norm != inf:
        said.append(f"rows of norm at most {_end(norm)}")
    if not said:
        return ""
    sure = "**asserted**" if any(each.asserted for each in bounds) else "**proved**"
    return "\n".join([f"{sure}: {', '.join(said)}", "", *_reasons(widest.proof)])


def _reasons(proof: Sequence[str]) -> list[str]:
    shown = list(proof[-MOST_REASONS:])
    left = len(proof) - len(shown)
    return [*([f"* ... {left} steps before"] if left else []), *(f"* {plain(line)}" for line in shown)]


def _end(value: float) -> str:
    return {inf: "∞", -inf: "-∞"}.get(value, f"{value:.4g}")


def plain(text: str) -> str:
    """A text that is shown as it is: nothing in it is Markdown but what is in backticks."""
    pieces = text.replace("\n", " ").split("`")
    escaped = [_escaped(piece) if place % 2 == 0 else piece for place, piece in enumerate(pieces)]
    return "`".join(escaped)


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "\\*_{}[]<>#|~" else char for char in text)


# ---------------------------------------------------------------- attentions


def decisions(entries: Sequence[AttentionEntry]) -> list[tuple[str, list[AttentionEntry]]]:
    """Equal decisions together, each with its attentions."""
    found: dict[str, list[AttentionEntry]] = {}
    for entry in entries:
        found.setdefault(decided(entry), []).append(entry)
    return list(found.items())


def attention_text(entries: Sequence[AttentionEntry]) -> str:
    """All that the plan has of the attentions at a place; equal ones are folded."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        told.setdefault("\n".join(_attention(entry)), []).append(entry.path)
    return "\n\n".join(f"**attention** {plain(folded(paths))}: {text}" for text, paths in told.items())


def _attention(entry: AttentionEntry) -> list[str]:
    attention, polynomial, verdict = entry.attention, entry.attention.polynomial, entry.attention.verdict
    lines = [decided(entry) if verdict is not None else "not decided", ""]
    if verdict is not None:
        lines.append(f"* why: {plain(verdict.why)}")
    if polynomial is not None and polynomial.eps is not None and polynomial.eps_prime is not None:
        worst = certificate(polynomial.eps, polynomial.eps_prime, EXACT)
        lines.append(f"* error of a weight: at most {number(polynomial.eps)} of it (without rounding)")
        lines.append(f"* error of the output: at most {number(worst.output)} of the range of the values")
    elif polynomial is not None or verdict is not None:
        lines.append("* error: none")
    if verdict is not None and polynomial is not None and verdict.break_even is not None:
        gpu = verdict.break_even_gpu
        on_gpu = f", {gpu:,} on a GPU" if gpu is not None and gpu != verdict.break_even else ""
        below = "on all pairs" if attention.is_own else "exact"
        lines.append(f"* break-even: {below} below n = {verdict.break_even:,}{on_gpu}")
    origin = attention.range.origin
    if origin is None:
        lines.append("* logits: no bound is known")
    else:
        lines.append(f"* logits: within {attention.range.limit:.4g} ({SOURCES[origin]})")
        lines += [f"  {line}" for line in _reasons(attention.range.proof)]
    return lines


# ---------------------------------------------------------------- blocks


def signature(block: ast.BlockDecl, qualifier: str = "") -> str:
    """The head of a block on one line, as its author wrote its parts."""
    tensors = ", ".join(each.span.text for each in block.tensors)
    given = ", ".join(each.span.text for each in block.values)
    results = ", ".join(each.span.text for each in block.results)
    results = f"({results})" if len(block.results) > 1 else results
    inside = f"{tensors}; {given}" if given else tensors
    kind = "model" if block.is_model else "block"
    return f"{kind} {qualifier}{block.name.text}({inside}) -> {results}"


def comment_above(source: Source, node: ast.Node) -> str:
    """The lines of comments directly above an item, without their signs."""
    line = source.position(node.span.start)[0]
    lines: list[str] = []
    while line > 1:
        line -= 1
        text = source.line(line).strip()
        if not text.startswith("#"):
            break
        lines.append(text.lstrip("#").removeprefix(" "))
    return "\n".join(reversed(lines))


def comment_of_file(source: Source) -> str:
    """The comment at the head of a file."""
    lines: list[str] = []
    for comment in find_comments(source):
        if comment.line != len(lines) + 1:
            break
        lines.append(comment.text.lstrip("#").removeprefix(" "))
    return "\n".join(lines)
