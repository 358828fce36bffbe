"""The text of one sample while its tokens come: characters as they are complete, and an end at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastgrad_dsl.models.tokenizer import Tokenizer

Ended = Literal["tokens", "stop", "interrupt"]


class Continuation:
    """What a sample says: `text` so far, from `tokens` tokens; `ended` is why it goes on no longer, None while it does.

    A stop string ends the text before it. What may be the beginning of one is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.text = ""
        self.tokens = 0
        self.ended: Ended | None = None
        self._stream = tokenizer.stream()
        self._stops = stops
        self._held = ""  # which `text` does not have yet

    def push(self, token: int) -> str:
        """What one more token adds to the text; nothing once it has ended."""
        if self.ended is not None:
            return ""
        self.tokens += 1
        return self._add(self._stream.push(token))

    def finish(self, ended: Ended) -> str:
        """The rest of the text, unless it has ended before."""
        if self.ended is not None:
            return ""
        rest = self._add(self._stream.finish())
        if self.ended is None:
            self.ended = ended
            rest += self._told(self._held)
        return rest

    def _add(self, new: str) -> str:
        self._held += new
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended = "stop"
            return self._told(self._held[: min(places)])
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = len(self._held) - keep
        told, self._held = self._held[:certain], self._held[certain:]
        return self._told(told)

    def _told(self, text: str) -> str:
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string that goes on after it."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
