"""The comments of a text, in order, for the formatter to take one after the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import lex
from fastgrad_grammar.source import Source


@dataclass(frozen=True)
class Comment:
    """One comment: where its `#` stands, its line, and its text."""

    offset: int
    line: int
    text: str


def find_comments(source: Source) -> list[Comment]:
    """Every comment of a text without lexical errors: comments are what stands between its tokens."""
    tokens, _ = lex(source, load_grammar())
    text = source.text
    found: list[Comment] = []
    place = 0
    spans = [(token.start_pos or 0, token.end_pos or 0) for token in tokens]
    for start, end in [*spans, (len(text), len(text))]:
        hash_at = text.find("#", place, start)
        if hash_at >= 0:
            found.append(Comment(hash_at, source.position(hash_at)[0], text[hash_at:start].rstrip()))
        place = end
    return found


class CommentQueue:
    """The comments not written yet."""

    def __init__(self, source: Source) -> None:
        self._text = source.text
        self._comments = find_comments(source)

    def take_before(self, offset: int) -> list[Comment]:
        """Remove and return the comments that begin before `offset`."""
        taken = self.before(offset)
        del self._comments[: len(taken)]
        return taken

    def put_back(self, comments: Sequence[Comment]) -> None:
        """Undo taking: the comments come before all that are left."""
        self._comments[:0] = comments

    def before(self, offset: int) -> list[Comment]:
        """The comments that begin before `offset`, left where they are."""
        return self._comments[: bisect_left(self._comments, offset, key=attrgetter("offset"))]

    def any_between(self, start: int, end: int) -> bool:
        """Whether a comment is left that begins at or after `start` and before `end`."""
        return len(self.before(start)) < len(self.before(end))

    def take_behind(self, end: int, *, skip: str = "", limit: int | None = None) -> Comment | None:
        """Remove and return the next comment if only blanks and `skip` stand between `end` and it."""
        comment = self._comments[0] if self._comments else None
        if comment is None or comment.offset < end or (limit is not None and comment.offset >= limit):
            return None
        if self._text[end : comment.offset].strip(" \t\f" + skip):
            return None
        return self._comments.pop(0)
