"""What is being written at a place, by the tokens before it: a text that is being written is seldom whole."""

from __future__ import annotations

from dataclasses import dataclass

import lark

from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import lex
from fastgrad_grammar.source import Source

_OPENS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_NAMES = frozenset({"NAME", "AT", "EXACT"})


@dataclass(frozen=True)
class OpenCall:
    """A call whose `(` is open: what is called, how many arguments are whole, and what was written in this one.

    `behind`: after a `;`. `names` are the keywords that are given already; `keyword` that of the argument at the place.
    """

    module: str | None
    name: str
    argument: int
    behind: int | None
    names: frozenset[str]
    keyword: str | None
    fresh: bool


@dataclass(frozen=True)
class Cursor:
    """`body` is the keyword of the innermost body that is open, None at the top level. `line` are the tokens of the
    item or statement so far without the word that is being written; `string` is what is in a string that is open.
    """

    body: str | None
    line: tuple[lark.Token, ...]
    word: str
    call: OpenCall | None
    string: str | None
    comment: bool

    @property
    def before(self) -> tuple[str, ...]:
        """The types of the tokens of the line."""
        return tuple(token.type for token in self.line)


def cursor_at(source: Source, offset: int) -> Cursor:
    """What is being written at an offset."""
    start = _start(source.text, offset)
    text = source.text[start:offset]
    part = Source(source.path, text)
    raw, _ = lex(part, load_grammar())
    line_start = text.rfind("\n") + 1
    string = _open_string(text[line_start:])
    comment = string is None and "#" in _without_strings(text[line_start:])
    if string is not None:
        raw = [token for token in raw if (token.start_pos or 0) < len(text) - len(string) - 1]
    word = ""
    if string is None and raw and raw[-1].end_pos == len(text) and (text[-1].isalnum() or text[-1] == "_"):
        word = str(raw.pop())
    stack = _stack(raw)
    heads = [head for kind, head in stack if kind == "LBRACE"]
    brackets = [place for place, (kind, _) in enumerate(stack) if kind != "LBRACE"]
    call = _open_call(raw, stack[-1][1]) if brackets and stack[-1][0] == "LPAR" else None
    return Cursor(_keyword(raw, heads), tuple(_line(raw, stack)), word, call, string, comment)


def _start(text: str, offset: int) -> int:
    """The beginning of the item at an offset: the last line before it that begins at the left edge with a word."""
    place = offset
    while place > 0:
        place = text.rfind("\n", 0, place) + 1
        if text[place : place + 1].isalpha() and place < offset:
            return place
        if place == 0:
            return 0
        place -= 1
    return 0


def _open_string(line: str) -> str | None:
    """What is in a string that is not closed, None outside of one."""
    opened: int | None = None
    place = 0
    while place < len(line):
        char = line[place]
        if char == "#" and opened is None:
            return None
        if char == '"':
            opened = place + 1 if opened is None else None
        place += 2 if char == "\\" and opened is not None else 1
    return line[opened:] if opened is not None else None


def _without_strings(line: str) -> str:
    return "".join(line.split('"')[::2])


def _stack(tokens: list[lark.Token]) -> list[tuple[str, int]]:
    """(type, index) of the brackets that are open."""
    stack: list[tuple[str, int]] = []
    for place, token in enumerate(tokens):
        if token.type in _OPENS:
            stack.append((token.type, place))
        elif stack and token.type == _OPENS[stack[-1][0]]:
            stack.pop()
    return stack


def _keyword(tokens: list[lark.Token], braces: list[int]) -> str | None:
    """What the innermost open brace belongs to: BLOCK, MODEL, REPEAT, IF or BUDGET."""
    if not braces:
        return None
    words = ("BLOCK", "MODEL", "REPEAT", "IF", "ELSE", "BUDGET")
    return next((t.type for t in reversed(tokens[: braces[-1]]) if t.type in words), None)


def _line(tokens: list[lark.Token], stack: list[tuple[str, int]]) -> list[lark.Token]:
    """The tokens since the last line end that is not inside of parentheses, or since the last brace."""
    inner = [place for kind, place in stack if kind != "LBRACE" and not _brace_after(stack, place)]
    begin = inner[0] if inner else len(tokens)
    found = [token for token in tokens[begin:] if token.type != "_NL"]
    depth = 0
    for token in reversed(tokens[:begin]):
        depth += (token.type in ("RPAR", "RSQB")) - (token.type in ("LPAR", "LSQB"))
        if (token.type == "_NL" and depth == 0) or token.type in ("LBRACE", "RBRACE"):
            break
        if token.type != "_NL":
            found.insert(0, token)
    return found


def _brace_after(stack: list[tuple[str, int]], place: int) -> bool:
    return any(kind == "LBRACE" and other > place for kind, other in stack)


def _open_call(tokens: list[lark.Token], opening: int) -> OpenCall | None:
    """The call whose parenthesis stands at an index; None if no name stands before it."""
    if opening == 0 or tokens[opening - 1].type not in _NAMES:
        return None
    if opening > 1 and tokens[opening - 2].type in ("BLOCK", "MODEL", "OBJECTIVE"):
        return None
    name = str(tokens[opening - 1])
    qualified = opening > 2 and tokens[opening - 2].type == "DOT"
    argument, behind, depth = 0, None, 0
    names: set[str] = set()
    current: list[lark.Token] = []
    for token in (each for each in tokens[opening + 1 :] if each.type != "_NL"):
        if depth == 0 and token.type in ("COMMA", "SEMICOLON"):
            argument += 1
            behind = argument if token.type == "SEMICOLON" else behind
            current = []
            continue
        depth += (token.type in _OPENS) - (token.type in _OPENS.values())
        current.append(token)
        if depth == 0 and token.type == "ASSIGN" and len(current) == 2:
            names.add(str(current[0]))
    keyword = str(current[0]) if len(current) > 1 and current[1].type == "ASSIGN" else None
    module = str(tokens[opening - 3]) if qualified else None
    return OpenCall(module, name, argument, behind, frozenset(names), keyword, not current)
