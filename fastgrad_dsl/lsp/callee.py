"""What a call that is being written calls, and its parameters: a block of this file or another one, or an operation."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_compiler.frontend.modules import standard_library
from fastgrad_dsl.lsp.library import Views
from fastgrad_dsl.lsp.operations import operation_forms, operation_signature, parameter_text, rows
from fastgrad_dsl.lsp.view import STD, View
from fastgrad_dsl.lsp.words import comment_above, signature
from fastgrad_grammar import ast


@dataclass(frozen=True)
class Formal:
    """A parameter: its name, how it is declared, and whether it stands before the `;`."""

    name: str
    text: str
    tensor: bool


@dataclass(frozen=True)
class Callee:
    """What is called: on one line, its parameters as they stand there, and what is said of it."""

    name: str
    text: str
    formals: tuple[Formal, ...]
    documentation: str = ""


def callees(view: View, module: str | None, name: str, views: Views) -> tuple[Callee, ...]:
    """The forms of what a name calls, none where it is unknown."""
    blocks = blocks_of(view, module, views)
    block = blocks.get(name)
    if block is not None and not block.is_model:
        return (of_block(block, f"{module}." if module else ""),)
    if module is not None:
        return ()
    return tuple(
        Callee(
            name,
            operation_signature(form),
            tuple(Formal(each.name, parameter_text(each), each.is_tensor) for each in form.parameters),
            rows()[name].meaning if name in rows() else "",
        )
        for form in operation_forms(name)
    )


def of_block(block: ast.BlockDecl, qualifier: str = "") -> Callee:
    """A block as it is called."""
    tensors = [Formal(each.name.text, each.span.text, True) for each in block.tensors]
    given = [Formal(each.name.text, each.span.text, False) for each in block.values]
    text = signature(block, qualifier).removeprefix("block ")
    return Callee(block.name.text, text, (*tensors, *given), comment_above(block.span.source, block))


def blocks_of(view: View, module: str | None, views: Views) -> dict[str, ast.BlockDecl]:
    """The blocks that a qualifier leads to; without one, those of the file."""
    if module is None:
        return dict(view.index.blocks)
    path = view.used.get(module)
    if path == STD:
        return dict(standard_library().blocks)
    other = views(path) if path is not None else None
    return dict(other.index.blocks) if other is not None else {}
