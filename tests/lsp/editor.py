"""An editor in this process: documents with a mark where the cursor is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lsprotocol import types

from fastgrad_dsl.lsp.positions import Lines
from fastgrad_dsl.lsp.problems import Problems, problems_of
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.workspace import Document, Workspace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.tfg"))
MARK = "¦"

SPEC = """\
use std

param depth = 2
param heads = 4

dim b
dim n <= 16384

block layer(x: float[b, n, d]; heads: int) -> float[b, n, d] {
    weight wq: float[d, 8 * heads]
    q = split_heads(x @ wq, heads)
    scores = 1.5 * (unit(q) @ unit(q).T)
    y = merge_heads(softmax(causal(scores)) @ split_heads(x, heads))
    return x + std.swiglu(std.rms_norm(y); hidden = 4 * d)
}

model tiny(tokens: int[b, n]) -> float[b, n, 64] {
    weight table: float[64, 64]
    x = embedding(table, tokens)
    repeat i in depth {
        x = layer(x; heads) as layers
    }
    return x @ table.T
}

objective loss(logits: float[b, n, 64], targets: int[b, n]) = cross_entropy(logits, targets)

budget {
    output <= 0.1
    at "layers.0" relative <= 0.02
}
"""


@dataclass
class Editor:
    """Documents in a folder; `shown` is what is published of a file."""

    folder: Path
    known: Workspace = field(default_factory=Workspace)
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self.known.roots = (str(self.folder.resolve()),)

    def open(self, text: str, name: str = "spec.tfg") -> Document:
        """Give a document a text and check it, and those that use it, as the server does."""
        uri = (self.folder / name).as_uri()
        before = self.known.documents.get(str((self.folder / name).resolve()))
        document = self.known.put(uri, before.version + 1 if before else 1, text)
        for path in self.known.affected(document.path):
            found = self.known.analyse(path)
            if self.known.settle(path, found):
                self.problems.replace(path, problems_of(found, self.known.uri, self.known.encoding))
        return document

    def shown(self, name: str = "spec.tfg") -> list[types.Diagnostic]:
        """What is shown in a file."""
        return self.problems.of(str((self.folder / name).resolve()))

    def codes(self, name: str = "spec.tfg") -> list[str]:
        """The codes of what is shown in a file."""
        return [str(each.code) for each in self.shown(name)]

    def at(self, text: str, name: str = "spec.tfg") -> tuple[View, types.Position]:
        """Open a text without its mark; the view, and the place of the mark."""
        assert text.count(MARK) == 1, text
        document = self.open(text.replace(MARK, ""), name)
        view = self.known.view(document.path)
        assert view is not None
        return view, document.lines.position(text.index(MARK))


def marked(place: str, text: str = SPEC) -> str:
    """A text with the mark where it is in `place`, a part of the text that occurs once without it."""
    plain = place.replace(MARK, "")
    assert text.count(plain) == 1, plain
    return text.replace(plain, place)


def applied(text: str, edits: list[types.TextEdit], known: Workspace) -> str:
    """A text after edits that do not overlap."""
    lines = Lines(text, known.encoding)
    for edit in sorted(edits, key=lambda each: lines.offset(each.range.start), reverse=True):
        text = text[: lines.offset(edit.range.start)] + edit.new_text + text[lines.offset(edit.range.end) :]
    return text
