"""Files and what they declare: `use std`, `use "path.tfg" as name`, cycles, duplicate names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, TypeVar

from fastgrad_compiler.frontend.reporter import Abort, Reporter, did_you_mean
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note, TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.read import MAX_BYTES, read_source
from fastgrad_grammar.source import Source, Span

MAX_CHAIN = 32
"""Files that use each other in a row."""


_Item = TypeVar("_Item")


@dataclass(eq=False, slots=True)
class Module:
    """One namespace: a file, or the whole standard library.

    `name` qualifies its graphs (empty for the main file); `broken` are the uses that could not be loaded.
    """

    name: str
    items: tuple[ast.Item, ...]
    blocks: Mapping[str, ast.BlockDecl] = field(default_factory=dict)
    uses: dict[str, Module] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def of(self, kind: type[_Item]) -> Sequence[_Item]:
        """The items of one kind, in order."""
        return [item for item in self.items if isinstance(item, kind)]

    def qualified(self, block: ast.BlockDecl) -> str:
        """The name of a block of this module, as graphs have it."""
        return f"{self.name}.{block.name.text}" if self.name else block.name.text

    @property
    def models(self) -> dict[str, ast.BlockDecl]:
        """The models of the file."""
        return {name: block for name, block in self.blocks.items() if block.is_model}


_HEAD = re.compile(r"^block (\w+)", re.MULTILINE)


class _Library(Mapping[str, ast.BlockDecl]):
    """The blocks of the standard library by name, each parsed when it is first asked for.

    Its files declare nothing but blocks, whose heads alone stand at the left edge (a test holds both).
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Source, int, int]] = {}
        self._parsed: dict[str, ast.BlockDecl] = {}
        for file in sorted(folder.glob("*.tfg")):
            source = Source(f"std/{file.name}", file.read_text(encoding="utf-8"))
            heads = list(_HEAD.finditer(source.text))
            ends = [head.start() for head in heads[1:]] + [len(source.text)]
            for head, end in zip(heads, ends, strict=True):
                self._places[head[1]] = source, head.start(), end

    def __getitem__(self, name: str) -> ast.BlockDecl:
        if name not in self._parsed:
            source, start, end = self._places[name]
            self._parsed[name] = parse(source, start, end).items[0]  # type: ignore[assignment]
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@lru_cache(maxsize=1)
def standard_library() -> Module:
    """The namespace `std`: the blocks of every `.tfg` file of the library."""
    module = Module("std", (), _Library(Path(ast.__file__).with_name("std")))
    module.uses["std"] = module
    return module


def _from_disk(shown: str, path: Path) -> Source:
    return read_source(shown, place=str(path))


@dataclass(frozen=True, slots=True)
class Reader:
    """How the loader gets at texts: `read` a used file, by what to call it and where it lies, and `parse` a text.

    An editor has texts that are not saved, and trees of what did not change. Both raise TfgError.
    """

    read: Callable[[str, Path], Source] = _from_disk
    parse: Callable[[Source], ast.File] = parse


DISK = Reader()


def load(source: Source, report: Reporter, reader: Reader = DISK) -> Module:
    """The main file and all that it uses. Raises TfgError for its syntax; the rest goes to `report`."""
    return _Loader(source, report, reader).module("", source, reader.parse(source), ())


_Chain: TypeAlias = "tuple[tuple[Path, ast.Use | None], ...]"


class _Loader:
    """Loads each file once; `chain` are the `use` items that lead to the file being loaded.

    A file lies in the folder of the main file, the current one for a text, or in one that `include` names, with all
    links followed: a spec from a stranger shows no other file.
    """

    def __init__(self, main: Source, report: Reporter, reader: Reader) -> None:
        self.report = report
        self.reader = reader
        self.include = main.include
        self.roots = [Path(os.path.realpath(folder)) for folder in (_folder(main), *main.include)]
        self.characters = len(main.text)
        self._loaded: dict[Path, Module | None] = {}

    def module(self, name: str, source: Source, file: ast.File, chain: _Chain) -> Module:
        module = Module(name, file.items)
        _declare(module, self.report)
        here = (*chain, (Path(source.path).resolve(), None))
        for use in module.of(ast.Use):
            if use.name.text in module.uses:
                self.report("FG202", f"`{use.name.text}` is used twice", use.name.span, "used again")
                continue
            try:
                found = self._library(use) if use.path is None else self._file(use, source, here)
            except Abort:
                module.broken.add(use.name.text)
            else:
                module.uses[use.name.text] = found
        return module

    def _library(self, use: ast.Use) -> Module:
        if use.name.text == "std":
            return standard_library()
        help_ = f'for a file write use "{use.name.text}.tfg" as {use.name.text}'
        message = f"unknown library `{use.name.text}`"
        raise self.report("FG235", message, use.name.span, "the only library is std", help_=(help_,))

    def _file(self, use: ast.Use, source: Source, chain: _Chain) -> Module:
        shown, path = self._find(use, source)
        if path is None:
            trusted = "a folder that is trusted is named by --include DIR, or fg.compile(..., include=[DIR])"
            raise self._refuse(use, f"{shown} lies outside of the folder of the spec", trusted)
        places = [place for place, _ in chain]
        if path in places:
            raise self._cycle(use, chain[places.index(path) :], path)
        if path not in self._loaded:
            self._loaded[path] = None  # one that fails is reported once
            self._loaded[path] = self._load(use, shown, path, chain)
        found = self._loaded[path]
        if found is None:
            raise Abort
        return found

    def _find(self, use: ast.Use, source: Source) -> tuple[str, Path | None]:
        """What to call a used file, and where it lies, without links; None for a place that may not be read."""
        names = list(_candidates(use.path or "", source, self.include))
        places = [(name, path) for name in names if (path := self._allowed(name)) is not None]
        there = (each for each in places if os.path.exists(each[1]))
        return next(there, places[0] if places else (names[0], None))

    def _allowed(self, name: str) -> Path | None:
        try:
            path = Path(os.path.realpath(name))
        except (OSError, ValueError):  # no path at all: reading it says why
            return Path(name)
        return path if any(path.is_relative_to(root) for root in self.roots) else None

    def _load(self, use: ast.Use, shown: str, path: Path, chain: _Chain) -> Module:
        if len(chain) >= MAX_CHAIN:
            message = f"more than {MAX_CHAIN} files use each other in a row"
            raise self._refuse(use, message, "use fewer, longer files")
        try:
            text = self.reader.read(shown, path)
        except TfgError as error:
            first = error.diagnostics[0]
            raise self._refuse(use, first.message, *first.help) from None
        self.characters += len(text.text)
        if self.characters > MAX_BYTES:
            size = f"{MAX_BYTES >> 10} KiB"
            raise self._refuse(use, f"with {shown} the files are too large together", f"they may have {size}")
        try:
            tree = self.reader.parse(text)
        except TfgError as error:
            self.report.diagnostics.extend(error.diagnostics)
            raise Abort from None
        within = (*chain[:-1], (chain[-1][0], use))
        return self.module(use.name.text, text, tree, within)

    def _refuse(self, use: ast.Use, message: str, *help_: str) -> Abort:
        return self.report("FG235", message, use.span, "used here", help_=help_)

    def _cycle(self, use: ast.Use, chain: _Chain, path: Path) -> Abort:
        names = [place.name for place, _ in chain] + [path.name]
        notes = [
            Note(f"{place.name} is on the cycle by this use", each.span) for place, each in chain if each
        ]
        message = f"files use each other in a cycle: {' -> '.join(names)}"
        help_ = "move what both need into a third file"
        return self.report("FG234", message, use.span, "closes the cycle", notes=notes, help_=(help_,))


def _folder(source: Source) -> str:
    """The folder of a file, the current one (an empty name) for a text, whose path is `<text>`."""
    return os.path.dirname(source.path)


def _candidates(name: str, source: Source, include: Iterable[str]) -> Iterator[str]:
    """Where a used file may lie: relative to the file that uses it, then to each folder that is included."""
    for folder in (_folder(source), *include):
        yield str(Path(folder) / name)


def _declare(module: Module, report: Reporter) -> None:
    """Enter the blocks; FG202 for every name that is declared twice."""
    blocks: dict[str, ast.BlockDecl] = {}
    for block in module.of(ast.BlockDecl):
        blocks.setdefault(block.name.text, block)
        check_names([each.name for each in block.tensors] + [each.name for each in block.values], report)
    check_names((block.name for block in module.of(ast.BlockDecl)), report)
    check_names((each.name for each in module.items if isinstance(each, ast.Param | ast.DimDecl)), report)
    module.blocks = blocks


def check_names(names: Iterable[ast.Name], report: Reporter) -> None:
    """FG202 for a name that is declared twice."""
    seen: dict[str, Span] = {}
    for name in names:
        first = seen.setdefault(name.text, name.span)
        if first is not name.span:
            report("FG202", f"`{name.text}` is declared twice", name.span, "declared again",
                   notes=(Note("first here", first),))  # fmt: skip


def suggest_block(module: Module, name: str) -> str | None:
    """The help for an unknown block: the nearest block of the module, or of a module that it uses."""
    if near := did_you_mean(name, module.blocks):
        return near
    for qualifier, other in module.uses.items():
        if name in other.blocks:
            return f"did you mean {qualifier}.{name}?"
    return None
