"""Files and what they declare: `use std`, `use "path.tfg" as name`, cycles, duplicate names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fastgrad_compiler.elaborate.reporter import Reporter, did_you_mean
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note, TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source, Span


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
    return _Loader(reporter).module("", source, parse(source), ())


class _Loader:
    """Loads each file once; `chain` are the `use` items that lead to the file being loaded."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self._loaded: dict[Path, Module] = {}

    def module(
        self, name: str, source: Source, file: ast.File, chain: tuple[tuple[Path, ast.Use | None], ...]
    ) -> Module:
        module = Module(name, file.items)
        _declare(module, self.reporter)
        path = Path(source.path).resolve() if not source.path.startswith("<") else None
        here = (*chain, (path or Path(source.path), None))
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
        shown = (
            str(Path(source.path).parent / (use.path or ""))
            if not source.path.startswith("<")
            else use.path or ""
        )
        path = Path(shown).resolve()
        places = [place for place, _ in chain]
        if path in places:
            self._cycle(use, chain, places.index(path), path)
            return None
        if path in self._loaded:
            return self._loaded[path]
        try:
            text = read_source(shown)
        except TfgError as error:
            first = error.diagnostics[0]
            self.reporter.error("FG235", first.message, use.span, "used here", help_=first.help)
            return None
        try:
            tree = parse(text)
        except TfgError as error:
            self.reporter.adopt(error.diagnostics)
            return None
        within = (*chain[:-1], (chain[-1][0], use))
        found = self.module(use.name.text, text, tree, within)
        self._loaded[path] = found
        return found

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
