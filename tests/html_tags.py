"""The elements of a page that must show text from outside as text."""

from __future__ import annotations

from html.parser import HTMLParser


class Tags(HTMLParser):
    """The names of the elements of an HTML text, none of which has an event handler."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
