"""`parse`: text to syntax tree, with every syntax error of the text in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lark
from lark.parsers.lalr_parser_state import ParserState

from fastgrad_grammar import ast
from fastgrad_grammar.build import Builder
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import Layout, lay_out
from fastgrad_grammar.read import MAX_BYTES, too_large
from fastgrad_grammar.source import Source
from fastgrad_grammar.syntax_errors import Situation, explain

MAX_DIAGNOSTICS = 20


def parse(source: Source, start: int = 0, end: int | None = None) -> ast.File:
    """The syntax tree of a text, or of its characters from `start` to `end`; an empty text is a File without items.

    Raises TfgError, and nothing else, with up to `MAX_DIAGNOSTICS` diagnostics in the order of the text:
    FG003 for a text that is too large, FG1xx for its syntax. After an error, parsing goes on at the next
    line of the same body.
    """
    file, diagnostics = parse_tolerant(source, start, end)
    if diagnostics or file is None:
        raise TfgError(diagnostics)
    return file


def parse_tolerant(
    source: Source, start: int = 0, end: int | None = None
) -> tuple[ast.File | None, list[Diagnostic]]:
    """What `parse` gives or raises, and for a text with errors the tree without what is wrong (None if little is left).

    A block with a broken head is in that tree by a head that stands in for it, whose names are not in the text.
    """
    if len(source.text) > MAX_BYTES:
        return None, [too_large(source.path)]
    grammar = load_grammar()
    layout = lay_out(source, grammar, start, end)
    diagnostics = list(layout.diagnostics)
    if layout.stopped:
        return None, _first(diagnostics + list(layout.broken.values()))
    tree, errors = _Driver(grammar, layout).run()
    diagnostics += errors
    if tree is None:
        return None, _first(diagnostics)
    builder = Builder(source)
    file = builder.file(tree)
    return file, _first(diagnostics + builder.diagnostics)


def _first(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    """The diagnostics in the order of the text, cut to what a reader can use."""
    distinct = {(found.code, found.span.start if found.span else 0): found for found in reversed(diagnostics)}
    in_order = sorted(distinct.values(), key=lambda found: found.span.start if found.span else 0)
    return in_order[:MAX_DIAGNOSTICS]


@dataclass
class _Frame:
    """The item, statement or entry being read: its first token, and the parser's stack below it."""

    start: int = 0
    height: int = 0


# A sound head for what a brace may follow, put in for a broken one: so the errors in the body are found too.
_HEADS: dict[str, tuple[str, ...]] = {
    "BLOCK": ("BLOCK", "NAME", "LPAR", "RPAR", "ARROW", "NAME", "LSQB", "RSQB"),
    "MODEL": ("MODEL", "NAME", "LPAR", "RPAR", "ARROW", "NAME", "LSQB", "RSQB"),
    "BUDGET": ("BUDGET",),
    "REPEAT": ("REPEAT", "NAME", "IN", "INT"),
    "IF": ("IF", "TRUE"),
}
_SAMPLE = {"NAME": "int", "INT": "1", "TRUE": "true"}


class _Driver:
    """Feeds tokens to the LALR automaton; after an error it drops the statement and continues after it."""

    def __init__(self, grammar: lark.Lark, layout: Layout) -> None:
        self.layout = layout
        self.state: ParserState[int] = grammar.parse_interactive().parser_state
        self.diagnostics: list[Diagnostic] = []
        self.frames = [_Frame()]  # one for the file and one for each open brace
        self.at_start = True

    def run(self) -> tuple[lark.Tree[lark.Token] | None, list[Diagnostic]]:
        """The parse tree without its broken statements (None if there are too many) and the errors."""
        tokens = self.layout.tokens
        index = 0
        while index < len(tokens):
            if self.at_start:
                self.frames[-1].start = index
            diagnostic = self.layout.broken.get(index)
            if diagnostic is None and self._shift(tokens[index]):
                index += 1
                continue
            if not _is_stand_in(tokens[index]):  # the bracket that it stands for was reported
                self.diagnostics.append(diagnostic or self._explain(index))
            if len(self.diagnostics) == MAX_DIAGNOSTICS:
                return None, self.diagnostics
            index = self._recover(index)
        tree: lark.Tree[lark.Token] = self.state.feed_token(lark.Token("$END", ""), is_end=True)
        return tree, self.diagnostics

    def _shift(self, token: lark.Token) -> bool:
        """Feed a token to the automaton; False if it does not fit."""
        try:
            self.state.feed_token(token)
        except lark.UnexpectedToken:
            return False
        if self.at_start:
            self.frames[-1].height = len(self.state.state_stack) - 1
            self.at_start = False
        if token.type == "LBRACE":
            self.frames.append(_Frame())
            self.at_start = True
        elif token.type == "RBRACE":
            self.frames.pop()
        elif token.type == "_NL":
            self.at_start = True
        return True

    def _explain(self, index: int) -> Diagnostic:
        start, level = self.frames[-1].start, len(self.frames) - 1
        return explain(Situation(self.layout, index, start, self._accepted(), level))

    def _recover(self, index: int) -> int:
        """Forget the broken statement; the index of the token at which parsing goes on."""
        if not self.at_start:
            height = self.frames[-1].height
            del self.state.state_stack[height:]
            del self.state.value_stack[height - 1 :]
            self.at_start = True
        place = self._body_of_broken_head(index)
        return place if place is not None else self._next_statement(index)

    def _body_of_broken_head(self, index: int) -> int | None:
        """The brace after a broken `block`, `repeat`, ... head, after a sound head was put in for it."""
        tokens, start = self.layout.tokens, self.frames[-1].start
        head = _HEADS.get(tokens[start].type, ())
        opened = any(token.type == "LBRACE" for token in tokens[start:index])
        if not head or opened or not _fits(self.state, head[0]):
            return None
        for place in range(index, len(tokens)):
            if tokens[place].type in ("_NL", "RBRACE"):
                return None
            if tokens[place].type == "LBRACE":
                first, end = tokens[start].start_pos, tokens[place].end_pos
                for kind in head:
                    self._shift(lark.Token(kind, _SAMPLE.get(kind, ""), first, end_pos=end))
                return place
        return None

    def _next_statement(self, index: int) -> int:
        depth = 0
        tokens = self.layout.tokens
        for place in range(index, len(tokens)):
            kind = tokens[place].type
            if kind == "_NL" and depth == 0:
                return place + 1
            if kind == "LBRACE":
                depth += 1
            elif kind == "RBRACE":
                if depth == 0 and len(self.frames) > 1:
                    return place
                depth = max(0, depth - 1)
        return len(tokens)

    def _accepted(self) -> frozenset[str]:
        """Which token types would fit here."""
        state = self.state
        candidates = [kind for kind in state.parse_conf.states[state.position] if kind.isupper()]
        return frozenset(kind for kind in candidates if _fits(state, kind))


def _is_stand_in(token: lark.Token) -> bool:
    """Whether `layout` put the token in for a bracket that was never closed."""
    return token.type in ("RPAR", "RSQB", "RBRACE") and token.start_pos == token.end_pos


def _fits(state: ParserState[int], kind: str) -> bool:
    """Whether a token of this type can be shifted, found on a stack of states alone."""
    states, stack = state.parse_conf.states, list(state.state_stack)
    while True:
        step = states[stack[-1]].get(kind)
        if step is None:
            return False
        action, argument = step
        if action.name == "Shift":
            return True
        size = len(argument.expansion)
        if size:
            del stack[-size:]
        stack.append(states[stack[-1]][argument.origin.name][1])
