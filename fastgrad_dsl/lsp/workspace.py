"""The documents that are open, the files beside them, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock

from fastgrad_compiler.frontend.modules import Reader
from fastgrad_dsl.lsp.analysis import Analysis, analyse
from fastgrad_dsl.lsp.items import ItemParser, Parsed
from fastgrad_dsl.lsp.positions import Lines, path_of, plain_text, uri_of
from fastgrad_dsl.lsp.view import STD, View
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source

MOST_FILES = 500
"""Files of the folders of a workspace that are searched for names."""


@dataclass(frozen=True)
class Document:
    """An open text; `version` is the editor's."""

    uri: str
    path: str
    version: int
    lines: Lines

    @property
    def text(self) -> str:
        """The text, with LF line ends."""
        return self.lines.text

    @cached_property
    def source(self) -> Source:
        """The text as the parser takes it."""
        return Source(self.path, self.text)


@dataclass
class Workspace:
    """What the server knows. `encoding` is the unit of columns, `roots` are the folders that the editor has open.

    An analysis may run in another thread; only the parsers are shared with it, under a lock.
    """

    encoding: str = "utf-16"
    roots: tuple[str, ...] = ()
    documents: dict[str, Document] = field(default_factory=dict)
    analyses: dict[str, Analysis] = field(default_factory=dict)
    good: dict[str, Analysis] = field(default_factory=dict)
    _trees: dict[str, Parsed] = field(default_factory=dict)
    _parsers: dict[str, ItemParser] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    # ------------------------------------------------------------ documents

    def put(self, uri: str, version: int, text: str) -> Document:
        """A document that was opened or changed."""
        document = Document(uri, path_of(uri), version, Lines(plain_text(text), self.encoding))
        self.documents[document.path] = document
        return document

    def close(self, uri: str) -> str:
        """Forget a document; its path."""
        path = path_of(uri)
        for known in (self.documents, self.analyses, self.good, self._trees):
            known.pop(path, None)
        with self._lock:
            used = {file for analysis in self.analyses.values() for file in analysis.files}
            for each in set(self._parsers) - used - set(self.documents):
                del self._parsers[each]
        return path

    def uri(self, path: str) -> str:
        """The URI of a path, as the editor writes it if the document is open."""
        document = self.documents.get(path)
        return document.uri if document is not None else uri_of(path)

    # ------------------------------------------------------------ reading

    def parse(self, source: Source) -> Parsed:
        """The tree of a text; what did not change since its last version is not read again."""
        with self._lock:
            return self._parsers.setdefault(source.path, ItemParser()).parse(source)

    def read(self, shown: str, path: Path) -> Source:
        """A used file: the text of the editor if it is open there, else that of the disk. Raises TfgError."""
        document = self.documents.get(str(path))
        if document is not None:
            return document.source
        return Source(str(path), read_source(shown, place=str(path)).text)

    @property
    def reader(self) -> Reader:
        """How the elaborator reads."""
        return Reader(self.read, lambda source: self.parse(source).whole())

    # ------------------------------------------------------------ analyses

    def analyse(self, path: str) -> Analysis:
        """Check a document as it is now; nothing is kept yet. KeyError for one that is not open."""
        return analyse(self.parse(self.documents[path].source), self.reader)

    def settle(self, path: str, analysis: Analysis) -> bool:
        """Keep an analysis; False where the document has changed meanwhile, or was closed."""
        document = self.documents.get(path)
        if document is None or document.text != analysis.source.text:
            return False
        self.analyses[path] = analysis
        if not analysis.diagnostics or path not in self.good:
            self.good[path] = analysis
        return True

    def check(self, path: str) -> Analysis:
        """Analyse and keep."""
        analysis = self.analyse(path)
        self.settle(path, analysis)
        return analysis

    def affected(self, path: str) -> list[str]:
        """The open documents whose analysis a change of a file concerns, itself first."""
        users = (each for each, analysis in self.analyses.items() if path in analysis.files and each != path)
        return [each for each in (path, *users) if each in self.documents]

    # ------------------------------------------------------------ views

    def view(self, path: str) -> View | None:
        """What is known of a document as it is now, or of a file on the disk; None where it cannot be read."""
        document = self.documents.get(path)
        try:
            source = document.source if document is not None else self.read(path, Path(path))
        except TfgError:
            return None
        parsed = self.parse(source)
        if parsed.tree is not None and document is not None:
            self._trees[path] = parsed
        known = parsed if parsed.tree is not None else self._trees.get(path, parsed)
        lines = document.lines if document is not None else Lines(source.text, self.encoding)
        return View(path, lines, known, self._used(path, known.tree), tuple(self._analyses_of(path)))

    def _analyses_of(self, path: str) -> Iterator[tuple[str, Analysis]]:
        """(text, analysis) of what knows something of a file, the latest first."""
        for known in (self.analyses, self.good):
            if path in known:
                yield known[path].source.text, known[path]
        for other, analysis in self.analyses.items():
            if other != path and path in analysis.files:
                yield analysis.files[path], analysis

    def _used(self, path: str, tree: ast.File | None) -> dict[str, str]:
        """The paths of the files that a file uses, by the names that it has for them."""
        folder = "" if path.startswith("<") else os.path.dirname(path)
        found = {}
        for item in tree.items if tree is not None else ():
            if isinstance(item, ast.Use):
                found[item.name.text] = STD if item.path is None else _real(os.path.join(folder, item.path))
        return found

    def files(self, path: str) -> list[str]:
        """The `.tfg` files in which a name of `path` may stand: open documents, and those of the folders."""
        folders = [root for root in self.roots if _within(path, root)] or [os.path.dirname(path)]
        found = dict.fromkeys([path, *self.documents])
        for folder in folders if not path.startswith("<") else ():
            for here, inner, names in os.walk(folder):
                inner[:] = [each for each in inner if not each.startswith(".")]
                found.update(dict.fromkeys(_real(os.path.join(here, n)) for n in names if n.endswith(".tfg")))
                if len(found) > MOST_FILES:
                    return list(found)[:MOST_FILES]
        return list(found)


def _real(path: str) -> str:
    return os.path.realpath(path.replace("\0", "_"))


def _within(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)
