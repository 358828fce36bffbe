"""The functions of a generated module that stand for groups of operations on rows, and their C++ kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastgrad_compiler.codegen.cpp.rows import emit_rows, kinds
from fastgrad_compiler.codegen.kernel import RUNTIME
from fastgrad_compiler.codegen.names import variable
from fastgrad_compiler.ir.graph import Graph, Program
from fastgrad_compiler.ir.names import unique
from fastgrad_compiler.runtime.content_name import content_name

if TYPE_CHECKING:
    from fastgrad_compiler.codegen.block import Module

RUNTIME_FILES = ("content_name.py", "native.py", "private_files.py", "row_kernel.py")


@dataclass(frozen=True)
class RowFunction:
    """A function, the group that it computes, its kernel's file and text, and the letters of its inputs' kinds."""

    name: str
    body: Graph
    kernel: str
    text: str
    kinds: str


def row_function(module: Module, graph: str) -> str:
    """The name of the function of a group; groups whose kernels are the same share one."""
    program, functions = module.program, module.imports.rows
    kernel, text, letters = _kernel(program, graph)
    if kernel not in functions:
        stem = variable(graph.partition("@")[0].rpartition(".")[2])
        # no variable of a block begins with an underscore
        name = unique(f"_{stem}_rows", [known.name for known in functions.values()])
        functions[kernel] = RowFunction(name, program[graph], kernel, text, letters)
    return functions[kernel].name


def _kernel(program: Program, graph: str) -> tuple[str, str, str]:
    body, backward = program[graph], program[f"{graph}.backward"]
    shape = body[body.outputs[0]].tensor.shape
    text = emit_rows(body, backward)
    letters = "".join(kind[0] for kind in kinds(body, shape, tuple(node.name for node in body.inputs)))
    return (
        content_name("rows", [text.encode(), letters.encode(), *map(_runtime, RUNTIME_FILES)]),
        text,
        letters,
    )


@cache
def _runtime(name: str) -> bytes:
    return (RUNTIME / name).read_bytes()
