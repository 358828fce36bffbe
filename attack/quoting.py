"""`python -m attack.quoting --count 100000 --seed 7`: hostile texts, written in each language and read back by it."""

from __future__ import annotations

import argparse
import ast
import io
import json
import random
import re
import shutil
import subprocess
import tokenize
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser

from fastgrad_grammar import quote

PARTS = (
    "gpt", "bob's.tfg", '"', "'", '"""', "'''", "\\", "\\\n", "\\ \n", "\n", "\r", "\r\n", "\t", "\0",
    "\x0b", "\x0c", "\x1a", "\x1b[2J", "\x1b]0;title\x07", "\x7f", "\x85", "\u2028", "\u2029", "\u202e",
    "\u2066", "\u200b", "\ufeff", "\xa0", "\ud800", "\udcff", "\U000e0041", "é", "漢", "😀", "/*", "*/", "*",
    "/", "//", "??/", "?", "??", "#", "<script>", "</script>", "]]>", "<!--", "-->", "<", ">", "&", "&lt;",
    "&amp", "=", "`", "{", "}", "{x}", "%s", "$(id)", "[red]", "[/]", "\\x1b", "\\n", "\\N{DASH}",
    "\\u0041", '"+__import__("os").system("id")+"', "');raise SystemExit#", "\nimport os\n",
    "# coding: utf-7", ":smile:", " ", "",
)  # fmt: skip
"""What texts are made of: all that means something in one of the languages, and what is shown as something else."""

ESCAPES = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")
DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "B"})


def texts(count: int, seed: int) -> Iterator[str]:
    """Texts of up to eight parts, each one of PARTS or a character of any code point."""
    source = random.Random(seed)
    for _ in range(count):
        pieces = source.randrange(9)
        yield "".join(source.choice(PARTS) if source.random() < 0.8 else _any(source) for _ in range(pieces))


def _any(source: random.Random) -> str:
    return chr(source.randrange(source.choice((0x100, 0x3000, 0x110000))))


def undone(text: str) -> str:
    """The text with escapes read: what a comment or a line of a terminal says."""
    return ESCAPES.sub(lambda found: str(ast.literal_eval(f'"{found[0]}"')), text)


def is_shown(text: str, kept: str = "") -> bool:
    """Whether a terminal does nothing but to show the text, from left to right."""
    return not any(
        unicodedata.category(char) in ("Cc", "Cs", "Cf", "Cn", "Zl", "Zp")
        or unicodedata.bidirectional(char) in DIRECTIONS
        for char in text
        if char not in kept
    )


# ---------------------------------------------------------------- one check for each language


def python_string(text: str) -> bool:
    """A literal of one line that gives the text back."""
    written = quote.python_string(text)
    return is_shown(written) and ast.literal_eval(written) == text


def python_docstring(text: str) -> bool:
    """The same between triple quotes."""
    written = f'"""{quote.python_docstring(text)}"""'
    return is_shown(written) and ast.literal_eval(written) == text


def comment(text: str) -> bool:
    """One token of Python; what stands on the next line stays there."""
    written = quote.comment(text)
    code = f"x = 1  # {written}\ny = 2\n"
    found = list(tokenize.generate_tokens(io.StringIO(code).readline))
    comments = [token.string for token in found if token.type == tokenize.COMMENT]
    names = [token.string for token in found if token.type == tokenize.NAME]
    assert len(ast.parse(code).body) == 2
    return comments == [f"# {written}"] and names == ["x", "y"] and undone(written) == undone(text)


def cpp_comment(text: str) -> bool:
    """A comment of both kinds that ends where it should, by the phases of translation of C++."""
    written = quote.cpp_comment(text)
    code = f"int x; // {written}\nint y; /* {written} */ int z;\n"
    code = re.sub(r"\?\?/", r"\\", code)  # trigraphs
    code = re.sub(r"\\[ \t]*\n", "", code)  # lines that go on
    left = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.DOTALL)
    words_are_kept = undone(undone(written)) == undone(undone(text))
    return left.split() == ["int", "x;", "int", "y;", "int", "z;"] and is_shown(written) and words_are_kept


class _Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.seen.append(tag)

    def handle_comment(self, data: str) -> None:
        self.seen.append(data)

    def handle_decl(self, decl: str) -> None:
        self.seen.append(decl)

    def handle_data(self, data: str) -> None:
        self.text += data


def html(text: str) -> bool:
    """One element with one attribute and one text, both the text."""
    written = quote.html(text)
    found = _Reader(f'<p title="{written}">{written}</p>')
    shown = found.text
    exact = shown == text if is_shown(text, "\t\n") else undone(shown) == undone(text)
    return exact and found.seen == [("p", [("title", shown)]), "p"] and is_shown(shown, "\t\n")


def json_text(text: str) -> bool:
    """A value and a key that are the text, in ASCII and on one line; JSON takes two halves of a pair for the whole."""
    written = quote.json_text({text: text})
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return written.isascii() and written.isprintable() and json.loads(written) == {text: text}


def terminal(text: str) -> bool:
    """One line that is shown and not obeyed."""
    written = quote.terminal(text)
    return is_shown(written) and undone(written) == undone(text) and (not is_shown(text) or written == text)


CHECKS: dict[str, Callable[[str], bool]] = {
    "Python string": python_string,
    "Python docstring": python_docstring,
    "comment": comment,
    "C++ comment": cpp_comment,
    "HTML": html,
    "JSON": json_text,
    "terminal": terminal,
}


def failures(found: Sequence[str]) -> list[tuple[str, str]]:
    """(language, text) of each text that a language did not read as it was."""
    return [(name, text) for text in found for name, check in CHECKS.items() if not check(text)]


def compiler_agrees(found: Sequence[str], compiler: str) -> bool:
    """Whether a C++ compiler counts the same lines, and sees no end of a comment but ours."""
    lines: list[str] = []
    for text in found:
        written = quote.cpp_comment(text)
        lines += [f"// {written}", f"static_assert(__LINE__ == {len(lines) + 2}); /* {written} */"]
    command = [compiler, "-std=c++17", "-trigraphs", "-Werror=comment", "-fsyntax-only", "-x", "c++", "-"]
    ended = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True, check=False)
    return ended.returncode == 0


def main() -> None:
    """Print what failed and how much was tried; status 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    tried = list(texts(options.count, options.seed))
    failed = failures(tried)
    for name, text in failed[:20]:
        print(f"{name}: {text!a}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    agreed = compiler is None or compiler_agrees(tried, compiler)
    said = "no C++ compiler" if compiler is None else f"C++ compiler {'agrees' if agreed else 'disagrees'}"
    counts = f"{len(tried)} texts ({len(set(tried))} different), {len(CHECKS)} languages"
    print(f"{counts}, {len(failed)} failures; {said}")
    raise SystemExit(bool(failed) or not agreed)


if __name__ == "__main__":
    main()
