"""Collecting diagnostics: each failed statement reports once, and what depends on it stays silent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from fastgrad_grammar.diagnostics import Diagnostic, Note, TfgError, nearest
from fastgrad_grammar.source import Span

MAX_DIAGNOSTICS = 20
_OF_THE_TEXT = frozenset({"FG201", "FG202", "FG215", "FG220", "FG223", "FG225", "FG228"})
"""Codes that no argument of a block's call can cause: where the block was called says nothing."""
_SHOWN_CALLS = 3


class Abort(Exception):
    """An expression has no value; why was reported before."""


class Reporter:
    """The diagnostics of one run, and the chain of block calls that leads to the place being elaborated."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []
        self.calls: list[tuple[str, Span]] = []
        self._seen: set[tuple[str, str, int]] = set()

    def __call__(
        self,
        code: str,
        message: str,
        span: Span | None,
        label: str = "",
        *,
        notes: Iterable[Note] = (),
        help_: Iterable[str | None] = (),
    ) -> Abort:
        """Note one thing that is wrong, once per place; above `MAX_DIAGNOSTICS` everything ends.

        Where an expression has no value for it, the caller raises the result.
        """
        place = (code, span.source.path if span else message, span.start if span else 0)
        if place in self._seen:
            return Abort()
        self._seen.add(place)
        trail: tuple[Note, ...] = ()
        if code not in _OF_THE_TEXT:
            trail = tuple(
                Note(f"in block {name}, called here", at) for name, at in reversed(self.calls[-_SHOWN_CALLS:])
            )
        help_lines = tuple(line for line in help_ if line)
        self.diagnostics.append(Diagnostic(code, message, span, label, (*notes, *trail), help_lines))
        if len(self.diagnostics) >= MAX_DIAGNOSTICS:
            self.stop()
        return Abort()

    def stop(self) -> NoReturn:
        """End the run with everything found so far.

        File by file as they were first met, each from its top; what has no place comes first.
        """
        paths = list(dict.fromkeys(found.span.source.path for found in self.diagnostics if found.span))

        def place(found: Diagnostic) -> tuple[int, int]:
            return (paths.index(found.span.source.path), found.span.start) if found.span else (-1, 0)

        raise TfgError(sorted(self.diagnostics, key=place))

    def check(self) -> None:
        """End the run if anything was found."""
        if self.diagnostics:
            self.stop()


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """`did you mean depth?`, or None where nothing is near."""
    near = nearest(name, known)
    return None if near is None or near == name else f"did you mean {near}?"
