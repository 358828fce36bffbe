"""Mutations of texts and of bytes: what a slip of the hand, a bad disk or an enemy makes of a good file."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from fastgrad_compiler.ir.ops import OPS
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parent.parent
TOKEN = re.compile(r"\s+|#[^\n]*|\"[^\"\n]*\"|[\d.]+(?:e[+-]?\d+)?|\w+|->|[<>=!]=|\.\.|.")
NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "0.0", "-0.0", "0.5", "1e-300", "1e300", "1e308", "5e-324", "1e12", "1e999",
    "65536", "2147483648", "1000000000", "1000000000000", "4611686018427387904", "9223372036854775807",
    "9223372036854775808", "99999999999999999999999999", "none", "true", "false", '""',
)  # fmt: skip
"""What stands in the place of a number, and the extremes of each type."""
SIGNS = ("+", "-", "*", "/", "//", "%", "@", "<", "<=", ">", ">=", "==", "!=", "and", "or")
OPERATIONS = tuple(sorted(OPS))
LARGEST = 6000  # characters of a seed: a larger one says nothing that a smaller one does not, in more time
MODEL = re.compile(r"^\s*model \w+\s*\(", re.MULTILINE)


LIBRARY_MODEL = """
dim b
dim n <= 256
model whole(tokens: int[b, n]) -> float[b, n, 256] {
    return gpt(tokens; vocab = 256, context = 256, depth = 2, width = 32, heads = 2, qk_dim = 4, gain = 1.0)
}
budget {
    output <= 1e-2
    at "*" degree = 2
}
"""
"""Behind all files of the standard library, so that their blocks are instantiated."""


@lru_cache(maxsize=1)
def sound_specs() -> tuple[str, ...]:
    """The texts to start from: examples, findings of `make attack`, specs in tests, and the library with a model."""
    found = _texts("examples") + _texts("tests/attack/regressions")
    for file in sorted((ROOT / "tests").glob("**/*.py")):
        found += _embedded(file)
    library = "\n".join(_texts("grammar/fastgrad_grammar/std")).replace("std.", "")
    return (*dict.fromkeys(text for text in found if len(text) <= LARGEST), library + LIBRARY_MODEL)


@lru_cache(maxsize=1)
def wrong_specs() -> tuple[str, ...]:
    """Files of which each shows one mistake."""
    return tuple(_texts("tests/golden/errors"))


def a_spec(chance: random.Random) -> str:
    """A text to start from; mostly one that is sound, since others are refused early."""
    if chance.random() < 0.1:
        return chance.choice(wrong_specs())
    found = min(chance.choices(sound_specs(), k=2), key=len)  # short ones say as much in less time
    return found if len(found) <= LARGEST or chance.random() < 0.2 else a_spec(chance)


def _texts(folder: str) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted((ROOT / folder).glob("*.tfg"))]


def _embedded(file: Path) -> Iterable[str]:
    """The string constants of a Python file that hold a model."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and MODEL.search(text) and _parses(text):
            yield text


def _parses(text: str) -> bool:
    try:
        parse(Source("<seed>", text))
    except TfgError:
        return False
    return True


@lru_cache(maxsize=1)
def pieces() -> tuple[str, ...]:
    """Every token of the seeds, for insertion."""
    return tuple(
        sorted({token for text in sound_specs() for token in TOKEN.findall(text) if len(token) < 24})
    )


def mutated_spec(chance: random.Random) -> bytes:
    """A spec with one to four mutations, of tokens, of lines or of bytes."""
    text = a_spec(chance)
    for _ in range(1 if chance.random() < 0.6 else chance.randint(2, 4)):
        text = _of_lines(chance, text) if chance.random() < 0.15 else _of_tokens(chance, text)
    data = text.encode("utf-8", errors="surrogatepass")
    return mutated_bytes(chance, data) if chance.random() < 0.05 else data


def _of_tokens(chance: random.Random, text: str) -> str:
    tokens: list[str] = TOKEN.findall(text) or [""]
    place = chance.randrange(len(tokens))
    match chance.randrange(16):
        case 0:
            del tokens[place]
        case 1:
            tokens.insert(place, chance.choice(pieces()))
        case 2:
            tokens[place:place] = tokens[place : place + chance.randint(1, 30)]
        case 3:
            other = chance.randrange(len(tokens))
            tokens[place], tokens[other] = tokens[other], tokens[place]
        case 4:
            tokens[place] = chance.choice(pieces())
        case 5:
            del tokens[place : place + chance.randint(1, 30)]
        case kind:
            _replace(chance, tokens, *_KINDS[kind % len(_KINDS)])
    return "".join(tokens)


def _is_number(token: str) -> bool:
    return token[:1].isdigit()


_KINDS: tuple[tuple[Callable[[str], bool], tuple[str, ...]], ...] = (
    (_is_number, NUMBERS),
    (_is_number, NUMBERS),
    (SIGNS.__contains__, SIGNS),
    (str.isidentifier, ()),
    (str.isidentifier, OPERATIONS),
)
"""Which tokens are replaced, and by what (other such tokens of the text where it is empty): most texts still parse."""


def _replace(
    chance: random.Random, tokens: list[str], fits: Callable[[str], bool], by: tuple[str, ...]
) -> None:
    places = [index for index, token in enumerate(tokens) if fits(token)]
    if places:
        tokens[chance.choice(places)] = chance.choice(by or [tokens[index] for index in places])


def _of_lines(chance: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    place = chance.randrange(len(lines))
    match chance.randrange(5):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, chance.choice(lines))
        case 2:
            other = chance.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
        case 3:
            others = a_spec(chance).splitlines(keepends=True) or [""]
            start = chance.randrange(len(others))
            lines[place:place] = others[start : start + chance.randint(1, 6)]
        case _:
            del lines[place:]
    return "".join(lines)


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Data with one to eight bytes or stretches changed, doubled, dropped, or its end cut off."""
    found = bytearray(data or b"\0")
    for _ in range(min(chance.randint(1, 8), chance.randint(1, 8))):
        place = chance.randrange(len(found) or 1)
        length = min(chance.randint(1, 64), chance.randint(1, 64))
        match chance.randrange(6):
            case 0:
                found[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                found[place : place + 1] = bytes([(found[place] if found else 0) ^ 1 << chance.randrange(8)])
            case 2:
                found[place:place] = chance.randbytes(length)
            case 3:
                found[place:place] = found[place : place + length]
            case 4:
                del found[place : place + length]
            case _:
                if chance.random() < 0.1:
                    del found[place:]
    return bytes(found)
