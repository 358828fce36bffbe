"""What the formatter knows about names: which blocks take which tensors, and which names are tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fastgrad_grammar import ast
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source

Signatures = dict[tuple[str | None, str], tuple[str, ...]]
"""The names of a block's tensors, by its module and name."""


@dataclass(frozen=True)
class Scope:
    """What decides where `;` stands in a call: the tensors of known blocks, and which names are tensors."""

    signatures: Mapping[tuple[str | None, str], tuple[str, ...]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


def tensor_names(block: ast.BlockDecl) -> frozenset[str]:
    """Names of a block that may stand for tensors."""
    inside = (name for statement in ast.walk(block.body) for name in ast.bound(statement))
    return frozenset(name.text for name in (*(param.name for param in block.tensors), *inside))


def signatures(file: ast.File) -> Signatures:
    """The names of the tensors of each block that the file declares or, with `use std`, may call."""
    known: Signatures = {(None, name): tensors for name, tensors in _blocks(file).items()}
    if any(
        isinstance(item, ast.Use) and item.path is None and item.name.text == "std" for item in file.items
    ):
        known |= {("std", name): tensors for name, tensors in _standard_library().items()}
    return known


def _blocks(file: ast.File) -> dict[str, tuple[str, ...]]:
    blocks = [item for item in file.items if isinstance(item, ast.BlockDecl)]
    return {block.name.text: tuple(param.name.text for param in block.tensors) for block in blocks}


@lru_cache(maxsize=1)
def _standard_library() -> dict[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {}
    for path in sorted((Path(__file__).parent / "std").glob("*.tfg")):
        known |= _blocks(parse(Source(path.name, path.read_text(encoding="utf-8"))))
    return known
