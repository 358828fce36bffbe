"""Quick fixes: the help of a diagnostic, where it says exactly what to write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from lsprotocol import types

from fastgrad_dsl.lsp.view import View
from fastgrad_grammar import ast

Edit = Callable[[View, types.Range, str], types.TextEdit | None]


def fixes(view: View, uri: str, diagnostics: Iterable[types.Diagnostic]) -> list[types.CodeAction]:
    """The fixes of diagnostics that the editor shows in a document."""
    return [
        types.CodeAction(
            title=title,
            kind=types.CodeActionKind.QuickFix,
            diagnostics=[diagnostic],
            edit=types.WorkspaceEdit(changes={uri: [edit]}),
            is_preferred=True,
        )
        for diagnostic in diagnostics
        for title, edit in _of(view, diagnostic)
    ]


def _of(view: View, diagnostic: types.Diagnostic) -> Iterator[tuple[str, types.TextEdit]]:
    for line in _help(diagnostic):
        for pattern, codes, edit in _RULES:
            found = re.fullmatch(pattern, line)
            if found is not None and (not codes or diagnostic.code in codes):
                made = edit(view, diagnostic.range, found[1])
                if made is not None:
                    yield _title(line), made
    if diagnostic.code == "FG108":
        found = re.search(r"expected `(=|==)`", diagnostic.message)
        if found is not None:
            yield f"write `{found[1]}`", types.TextEdit(diagnostic.range, found[1])


def _help(diagnostic: types.Diagnostic) -> list[str]:
    """The help as the server sent it: an editor gives `data` back, one that does not has it in the message."""
    data = diagnostic.data
    if isinstance(data, dict) and isinstance(data.get("help"), list):
        return [str(line) for line in data["help"]]
    lines = diagnostic.message.split("\n")
    return [line.removeprefix("help: ") for line in lines if line.startswith("help: ")]


def _title(line: str) -> str:
    near = re.fullmatch(r"did you mean ([\w.]+)\?", line)
    return f"change to {near[1]}" if near else line


def _in_its_place(view: View, place: types.Range, text: str) -> types.TextEdit | None:
    """A name in place of another; what stands there may be more than a name, and is left alone then."""
    start, end = view.lines.offset(place.start), view.lines.offset(place.end)
    if re.fullmatch(r'"?\w+"?', view.lines.text[start:end]) is None:
        return None
    quoted = view.lines.text[start:end].startswith('"')
    return types.TextEdit(place, f'"{text}"' if quoted else text)


def _whole(view: View, place: types.Range, text: str) -> types.TextEdit | None:
    return types.TextEdit(place, text)


def _declare(view: View, place: types.Range, text: str) -> types.TextEdit | None:
    """A dim below the declarations of the file, at its top if it has none."""
    above = [item for item in view.items() if isinstance(item, ast.DimDecl | ast.Param | ast.Use)]
    if not above:
        start = types.Position(0, 0)
        return types.TextEdit(types.Range(start, start), f"{text}\n\n")
    at = types.Position(view.range(above[-1].span).end.line + 1, 0)
    return types.TextEdit(types.Range(at, at), f"{text}\n")


def _use(view: View, place: types.Range, text: str) -> types.TextEdit | None:
    first = view.items()[0] if view.items() else None
    at = view.range(first.span).start if first is not None else types.Position(0, 0)
    return types.TextEdit(types.Range(at, at), f"{text}\n\n")


_RULES: tuple[tuple[str, frozenset[str], Edit], ...] = (
    (r"did you mean ([\w.]+)\?", frozenset(), _in_its_place),
    (r"write (\w+ (?:<=|=) .+)", frozenset({"FG232"}), _whole),
    (r"declare it: (dim \w+)", frozenset(), _declare),
    (r"add `(use std)` to the file", frozenset(), _use),
)
