"""Errors in the user's input as data; rendering lives in `render`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from fastgrad_grammar.codes import CODES
from fastgrad_grammar.source import Span


@dataclass(frozen=True)
class Note:
    """A related place, shown under the main one; without a span it is a line of text."""

    message: str
    span: Span | None = None


@dataclass(frozen=True)
class Diagnostic:
    """One thing that is wrong (or worth a warning) in the user's input.

    `code` is a key of `codes.CODES`; `message` is the headline; `label` is printed after the caret;
    `span` is None only where no text is at fault (a file that cannot be read, a command-line value).
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    notes: tuple[Note, ...] = ()
    help: tuple[str, ...] = ()
    severity: str = "error"  # "error" or "warning"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown diagnostic code {self.code}")


class TfgError(Exception):
    """The user's input is wrong: carries every diagnostic found in one run."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(f"[{d.code}] {d.message}" for d in self.diagnostics))

    @classmethod
    def of(cls, code: str, message: str, *help_: str, span: Span | None = None) -> TfgError:
        """The error of one diagnostic."""
        return cls([Diagnostic(code, message, span, help=help_)])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, for "did you mean" (None where nothing is near)."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def either(words: Sequence[str]) -> str:
    """`int, float or bool`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def short(text: str) -> str:
    """The first line of a text, cut where it is long."""
    line = text.split("\n", 1)[0]
    return line if len(line) <= 40 else f"{line[:37]}..."


def suggestions(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Help for a name that is not known: the nearest one, and all that are."""
    names = list(known)
    near = nearest(name, names)
    return (*([f"did you mean {near}?"] if near else []), f"known: {', '.join(names)}")
