"""The parameters of the call that is being written."""

from __future__ import annotations

from lsprotocol import types

from fastgrad_dsl.lsp.callee import Callee, callees
from fastgrad_dsl.lsp.cursor import OpenCall, cursor_at
from fastgrad_dsl.lsp.library import Views
from fastgrad_dsl.lsp.view import View
from fastgrad_grammar.source import Source


def signature_help(view: View, position: types.Position, views: Views) -> types.SignatureHelp | None:
    """The signature of the innermost call around a place, and which parameter is being given."""
    text = view.lines.text
    call = cursor_at(Source(view.path, text), view.lines.offset(position)).call
    found = callees(view, call.module, call.name, views) if call is not None else ()
    if call is None or not found:
        return None
    return types.SignatureHelp([_information(each, call) for each in found], 0, _active(found[0], call))


def _information(callee: Callee, call: OpenCall) -> types.SignatureInformation:
    documentation = types.MarkupContent(types.MarkupKind.PlainText, callee.documentation)
    parameters = [types.ParameterInformation(formal.text) for formal in callee.formals]
    active = _active(callee, call)
    return types.SignatureInformation(callee.text, documentation, parameters, active)


def _active(callee: Callee, call: OpenCall) -> int | None:
    """The index of the parameter that the argument at the place is for."""
    if call.keyword is not None:
        return next((i for i, each in enumerate(callee.formals) if each.name == call.keyword), None)
    if call.behind is None:
        return call.argument if call.argument < len(callee.formals) else None
    values = [place for place, formal in enumerate(callee.formals) if not formal.tensor]
    place = call.argument - call.behind
    return values[place] if place < len(values) else None
