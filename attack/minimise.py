"""Makes a failing case smaller while it fails in the same way: statements, expressions, results, inputs, sizes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from attack.cases import Case
from fastgrad_compiler.frontend import elaborate
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source, Span

Fails = Callable[[Case], bool]
_RETURNS = re.compile(r"`(\w+)` returns (.+), not the declared (.+)$")
_STATEMENTS = (ast.Assign, ast.Weight, ast.Buffer, ast.Repeat, ast.If)
_ITEMS = (ast.Use, ast.Param, ast.DimDecl, ast.Budget, ast.Objective)
_EXPRESSIONS = (ast.Unary, ast.Binary, ast.Conditional, ast.Transpose, ast.Index, ast.Call)
_LEAVES = (*_EXPRESSIONS, ast.Ref, ast.Literal)


def minimise(case: Case, fails: Fails, seconds: float) -> Case:
    """A case that fails, and from which no single edit can be taken; or what was reached in the time."""
    deadline = time.monotonic() + seconds
    place = since = 0
    edits = list(_smaller(case))
    while since < len(edits) and time.monotonic() < deadline:
        smaller = edits[place % len(edits)]()
        if smaller is not None and smaller != case and fails(smaller):
            case, edits, since = smaller, list(_smaller(smaller)), 0
            place = 0 if place < _FIRST else place
        else:
            place, since = place + 1, since + 1
    return case


_FIRST = 12  # edits that take much away, and are tried again after each success among them


def _smaller(case: Case) -> Iterator[Callable[[], Case | None]]:
    for text in _texts(case.text):
        yield partial(_with_text, case, text)
    for name, size in case.sizes.items():
        for less in (1, 2, 3, size // 2, size - 1):
            if 0 < less < size:
                yield partial(replace, case, sizes={**case.sizes, name: less})


def _with_text(case: Case, text: str) -> Case | None:
    fitted = _well_typed(text)
    return None if fitted is None else replace(case, text=fitted)


def _texts(text: str) -> Iterator[str]:
    """Texts with one thing less, the largest pieces first; not all of them are well typed."""
    tree = parse(Source("<attack>", text))
    for block in _nodes(tree, (ast.BlockDecl,)):
        yield from _fewer_results(text, block)
    yield _pruned(text)
    for node in _nodes(tree, (ast.Assign,)):
        if isinstance(node.value, ast.Ref) and len(node.targets) == 1:
            rest = re.sub(rf"\b{node.targets[0].text}\b", node.value.name, text[node.span.end :])
            yield _edited(text[: node.span.end] + rest, [(node.span, "")])
    edits = sorted(set(_edits(tree)), key=lambda edit: len(edit[1]) - (edit[0].end - edit[0].start))
    for span, new in edits:
        yield _edited(text, [(span, new)])


def _pruned(text: str) -> str:
    """Without what binds a name that nothing reads."""
    while True:
        tree = parse(Source("<attack>", text))
        unread = [
            (node.span, "")
            for node in _nodes(tree, (ast.Assign, ast.Weight, ast.Buffer, ast.Param, ast.BlockDecl))
            if len(re.findall(rf"\b{_bound_name(node)}\b", text)) == 1
            and not (isinstance(node, ast.BlockDecl) and node.is_model)
        ]
        if not unread:
            return text
        outer = [edit for edit in unread if not any(_inside(edit[0], other) for other, _ in unread)]
        text = _edited(text, outer)


def _inside(one: Span, other: Span) -> bool:
    return one != other and other.start <= one.start and one.end <= other.end


def _bound_name(node: object) -> str:
    name = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "name", None)
    return name.text if isinstance(name, ast.Name) else ""


def _edited(text: str, edits: list[tuple[Span, str]]) -> str:
    for span, new in sorted(edits, key=lambda edit: -edit[0].start):
        text = text[: span.start] + new + text[span.end :]
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def _edits(tree: ast.File) -> Iterator[tuple[Span, str]]:
    for node in _nodes(tree, (object,)):
        if isinstance(node, (*_STATEMENTS, *_ITEMS, ast.At, ast.Limit, ast.Setting)):
            yield node.span, ""
        if isinstance(node, ast.BlockDecl):
            if not node.is_model:
                yield node.span, ""
            yield from (_without(node.tensors, tensor) for tensor in node.tensors)
        if isinstance(node, (ast.Repeat, ast.If)):
            body = node.body if isinstance(node, ast.Repeat) else node.then
            yield node.span, "\n".join(each.span.text for each in body)
        if isinstance(node, _EXPRESSIONS):
            yield from ((node.span, inner.span.text) for inner in _nodes(node, _LEAVES) if inner is not node)
        if isinstance(node, ast.Literal) and type(node.value) is float and node.value not in (0, 1):
            yield node.span, "1.0"


def _without(tensors: tuple[ast.TensorParam, ...], tensor: ast.TensorParam) -> tuple[Span, str]:
    """The signature's tensors less one."""
    whole = tensors[0].span.to(tensors[-1].span)
    return whole, ", ".join(each.span.text for each in tensors if each is not tensor)


def _fewer_results(text: str, block: ast.BlockDecl) -> Iterator[str]:
    """Each of several results alone."""
    last = block.body[-1]
    if len(block.results) < 2 or not isinstance(last, ast.Return) or not isinstance(last.value, ast.Tuple):
        return
    types = block.results[0].span.to(block.results[-1].span)
    start, end = text.rindex("(", 0, types.start), text.index(")", types.end) + 1
    for result, item in zip(block.results, last.value.items, strict=True):
        whole = Span(types.source, start, end)
        yield _edited(text, [(whole, result.span.text), (last.value.span, item.span.text)])


def _nodes(node: object, kinds: tuple[type, ...]) -> Iterator[Any]:
    """A node and what is below it, of these kinds."""
    if isinstance(node, tuple):
        for each in node:
            yield from _nodes(each, kinds)
    elif is_dataclass(node) and not isinstance(node, Span):
        if isinstance(node, kinds):
            yield node
        for each in fields(node):
            yield from _nodes(getattr(node, each.name), kinds)


def _well_typed(text: str) -> str | None:
    """The text with the result types that its returns have; None where it is not well typed."""
    for _ in range(4):
        try:
            elaborate(Source("<attack>", text))
            return text
        except TfgError as error:
            found = _RETURNS.search(error.diagnostics[0].message)
            if found is None or "value" in found[2]:
                return None
            declared = rf"((?:block|model) {found[1]}\([^{{]*\) -> )[^{{]*( \{{)"
            text = re.sub(declared, rf"\g<1>{found[2]}\g<2>", text)
        except Exception:  # a crash of the compiler may be what is looked for
            return text
    return None
