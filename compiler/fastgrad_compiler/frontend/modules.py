"""Files and what they declare: `use std`, `use "path.tfg" as name`, cycles, duplicate names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fastgrad_compiler.frontend.reporter import Reporter, did_you_mean
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note, TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.read import MAX_BYTES, read_source
from fastgrad_grammar.source import Source, Span

MAX_CHAIN = 32
"""Files that use each other in a row."""


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

    def of(self, kind: type[ast.Item]) -> list[ast.Item]:
        """The items of one kind, in order."""
        return [item for item in self.items if isinstance(item, kind)]

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


def load(source: Source, reporter: Reporter) -> Module:
    """The main file and all that it uses. Raises TfgError for its syntax; the rest goes to `reporter`."""
    return _Loader(source, reporter).module("", source, parse(source), ())


class _Loader:
    """Loads each file once; `chain` are the `use` items that lead to the file being loaded.

    A file lies in the folder of the main file, the current one for a text, or in one that `include` names, with all
    links followed: a spec from a stranger shows no other file.
    """

    def __init__(self, main: Source, reporter: Reporter) -> None:
        self.reporter = reporter
        self.include = main.include
        self.roots = [Path(os.path.realpath(folder)) for folder in (_folder(main), *main.include)]
        self.characters = len(main.text)
        self._loaded: dict[Path, Module | None] = {}

    def module(
        self, name: str, source: Source, file: ast.File, chain: tuple[tuple[Path, ast.Use | None], ...]
    ) -> Module:
        module = Module(name, file.items)
        _declare(module, self.reporter)
        here = (*chain, (Path(source.path).resolve(), None))
        for use in file.items:
            if not isinstance(use, ast.Use):
                continue
            if use.name.text in module.uses:
                self.reporter.error("FG202", f"`{use.name.text}` is used twice", use.name.span, "used again")
                continue
            found = self._library(use) if use.path is None else self._file(use, source, here)
            if found is None:
                module.broken.add(use.name.text)
            else:
                module.uses[use.name.text] = found
        return module

    def _library(self, use: ast.Use) -> Module | None:
        if use.name.text == "std":
            return standard_library()
        self.reporter.error(
            "FG235",
            f"unknown library `{use.name.text}`",
            use.name.span,
            "the only library is std",
            help_=(f'for a file write use "{use.name.text}.tfg" as {use.name.text}',),
        )
        return None

    def _file(
        self, use: ast.Use, source: Source, chain: tuple[tuple[Path, ast.Use | None], ...]
    ) -> Module | None:
        shown, path = self._find(use, source)
        if path is None:
            self._refuse(
                use, f"{shown} lies outside of the folder of the spec",
                "a folder that is trusted is named by --include DIR, or fg.compile(..., include=[DIR])",
            )  # fmt: skip
            return None
        places = [place for place, _ in chain]
        if path in places:
            self._cycle(use, chain, places.index(path), path)
            return None
        if path not in self._loaded:
            self._loaded[path] = None  # one that fails is reported once
            self._loaded[path] = self._load(use, shown, path, chain)
        return self._loaded[path]

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

    def _load(
        self, use: ast.Use, shown: str, path: Path, chain: tuple[tuple[Path, ast.Use | None], ...]
    ) -> Module | None:
        if len(chain) >= MAX_CHAIN:
            self._refuse(
                use, f"more than {MAX_CHAIN} files use each other in a row", "use fewer, longer files"
            )
            return None
        try:
            text = read_source(shown, place=str(path))
        except TfgError as error:
            first = error.diagnostics[0]
            self._refuse(use, first.message, *first.help)
            return None
        self.characters += len(text.text)
        if self.characters > MAX_BYTES:
            size = f"{MAX_BYTES >> 10} KiB"
            self._refuse(use, f"with {shown} the files are too large together", f"they may have {size}")
            return None
        try:
            tree = parse(text)
        except TfgError as error:
            self.reporter.adopt(error.diagnostics)
            return None
        within = (*chain[:-1], (chain[-1][0], use))
        return self.module(use.name.text, text, tree, within)

    def _refuse(self, use: ast.Use, message: str, *help_: str) -> None:
        self.reporter.error("FG235", message, use.span, "used here", help_=help_)

    def _cycle(
        self, use: ast.Use, chain: tuple[tuple[Path, ast.Use | None], ...], start: int, path: Path
    ) -> None:
        names = [place.name for place, _ in chain[start:]] + [path.name]
        notes = [
            Note(f"{place.name} is on the cycle by this use", each.span)
            for place, each in chain[start:]
            if each
        ]
        self.reporter.error(
            "FG234", f"files use each other in a cycle: {' -> '.join(names)}", use.span, "closes the cycle",
            notes=notes, help_=("move what both need into a third file",),
        )  # fmt: skip


def _folder(source: Source) -> str:
    """The folder of a file, the current one (an empty name) for a text, whose path is `<text>`."""
    return os.path.dirname(source.path)


def _candidates(name: str, source: Source, include: Iterable[str]) -> Iterator[str]:
    """Where a used file may lie: relative to the file that uses it, then to each folder that is included."""
    for folder in (_folder(source), *include):
        yield str(Path(folder) / name)


def _declare(module: Module, reporter: Reporter) -> None:
    """Enter the blocks; FG202 for every name that is declared twice."""
    seen: dict[tuple[str, str], Span] = {}
    blocks: dict[str, ast.BlockDecl] = {}
    for item in module.items:
        if isinstance(item, ast.BlockDecl):
            blocks.setdefault(item.name.text, item)
            check_names([*(p.name for p in item.tensors), *(p.name for p in item.values)], reporter)
        kind = "block" if isinstance(item, ast.BlockDecl) else _VALUE_KINDS.get(type(item))
        if kind is None:
            continue
        name: ast.Name = item.name  # type: ignore[union-attr]  # every kind of the table has a name
        first = seen.setdefault((kind, name.text), name.span)
        if first is not name.span:
            _twice(reporter, name, first)
    module.blocks = blocks


_VALUE_KINDS: dict[type, str] = {ast.Param: "value", ast.DimDecl: "value"}


def _twice(reporter: Reporter, name: ast.Name, first: Span) -> None:
    reporter.error(
        "FG202",
        f"`{name.text}` is declared twice",
        name.span,
        "declared again",
        notes=(Note("first here", first),),
    )


def check_names(names: Iterable[ast.Name], reporter: Reporter) -> None:
    """FG202 for a name that a signature declares twice."""
    seen: dict[str, Span] = {}
    for name in names:
        first = seen.setdefault(name.text, name.span)
        if first is not name.span:
            _twice(reporter, name, first)


def suggest_block(module: Module, name: str) -> str | None:
    """The help for an unknown block: the nearest block of the module, or of a module that it uses."""
    near = did_you_mean(name, module.blocks)
    if near:
        return near
    for qualifier, other in module.uses.items():
        if name in other.blocks:
            return f"did you mean {qualifier}.{name}?"
    return None
