"""Under each code of errors.md, a bad file and what the compiler says about it: a golden pair of the tests."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from pygments import token

from fastgrad_grammar.highlight import TfgLexer

PAIRS = Path(__file__).parent.parent / "tests" / "golden" / "errors"
_SECTION = re.compile(r"^## (FG\d+): .*$", re.MULTILINE)


@cache
def examples() -> dict[str, tuple[str, str]]:
    """The shortest bad file in which a code comes first, and the output, by code."""
    found: dict[str, tuple[str, str]] = {}
    for out in sorted(PAIRS.glob("*.out")):
        output = out.read_text(encoding="utf-8")
        code = re.search(r"\[(FG\d+)\]", output)
        try:
            text = out.with_suffix(".tfg").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if code is not None and (code[1] not in found or len(text) < len(found[code[1]][0])):
            found[code[1]] = text, output
    return found


def with_examples(page: str) -> str:
    """errors.md with the example of each code at the end of its section."""
    sections = list(_SECTION.finditer(page))
    parts = [page[: sections[0].start()]]
    for place, section in enumerate(sections):
        end = sections[place + 1].start() if place + 1 < len(sections) else len(page)
        body = page[section.start() : end]
        group = re.search(r"^# ", body, re.MULTILINE)  # the title of the next group belongs after the example
        cut = group.start() if group else len(body)
        parts += [body[:cut], _shown(section[1]), body[cut:]]
    return "".join(parts)


def _shown(code: str) -> str:
    if code not in examples():
        return ""
    text, output = examples()[code]
    broken = any(kind is token.Error for kind, _ in TfgLexer().get_tokens(text))
    return (
        f"<details><summary>A file with this error, and what is said</summary>\n\n"
        f"{_fenced('text' if broken else 'tfg', text)}\n\n{_fenced('text', output)}\n\n</details>\n\n"
    )


def _fenced(language: str, text: str) -> str:
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=2))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
