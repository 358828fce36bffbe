"""From characters to the tokens that the grammar reads: lexing, line ends, brackets.

Brackets are matched here, in one linear scan, so that the parser's stack is bounded, a bracket that is never
closed is reported at its opening, and one forgotten brace does not spoil the rest of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import lark
from lark.lexer import Lexer, LexerThread

from fastgrad_grammar.diagnostics import Diagnostic, Note
from fastgrad_grammar.lexical_errors import explain_character
from fastgrad_grammar.source import Source, Span

MAX_NESTING = 100
"""How deep brackets, and the syntax tree, may nest."""
MAX_LEXICAL_ERRORS = 20

BROKEN = "BROKEN"
"""Type of a token that stands for something already found wrong; no rule accepts it."""

ITEM_KEYWORDS = frozenset({"USE", "PARAM", "DIM", "BLOCK", "MODEL", "OBJECTIVE", "BUDGET"})
STATEMENT_KEYWORDS = frozenset({"WEIGHT", "BUFFER", "REPEAT", "RETURN"})
OPERATORS = frozenset(
    {"PLUS", "MINUS", "STAR", "SLASH", "FLOOR", "PERCENT", "MATMUL", "AND", "OR", "NOT"}
    | {"EQUAL", "UNEQUAL", "LESS", "AT_MOST", "GREATER", "AT_LEAST", "ASSIGN", "ARROW", "COMMA"}
)
_OPENS_NO_LINE = OPERATORS | {"LBRACE", "LPAR", "LSQB"}
_CONTINUES_LINE = frozenset({"ELSE", "ARROW", "LBRACE"})
_CLOSERS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_TEXT = {"LPAR": "(", "RPAR": ")", "LSQB": "[", "RSQB": "]", "LBRACE": "{", "RBRACE": "}"}


@dataclass
class Layout:
    """The tokens of a text; `broken` holds the diagnostic of each BROKEN token by its index.

    `stopped`: reading further would not help, for too much is wrong or nested too deeply.
    """

    source: Source
    tokens: list[lark.Token] = field(default_factory=list)
    broken: dict[int, Diagnostic] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    stopped: bool = False

    def span(self, token: lark.Token) -> Span:
        """Where a token stands."""
        return Span(self.source, token.start_pos or 0, token.end_pos or 0)


def lex(
    source: Source, grammar: lark.Lark, start: int = 0, stop: int | None = None
) -> tuple[list[lark.Token], dict[int, Diagnostic]]:
    """Every token from `start` to `stop` but blanks and comments, line ends included.

    What no token matches becomes a BROKEN one.
    """
    lexer: Lexer = grammar.parser.lexer
    text = source.text
    tokens: list[lark.Token] = []
    broken: dict[int, Diagnostic] = {}
    while len(broken) < MAX_LEXICAL_ERRORS:
        part = lark.TextSlice(text, start, len(text) if stop is None else stop)
        thread = LexerThread.from_text(lexer, part)
        try:
            tokens.extend(thread.lex(None))
        except lark.UnexpectedCharacters as error:
            diagnostic, end = explain_character(source, error.pos_in_stream or 0)
            broken[len(tokens)] = diagnostic
            tokens.append(_token(BROKEN, error.pos_in_stream or 0, end, text))
            start = end
        else:
            break
    return tokens, broken


def lay_out(source: Source, grammar: lark.Lark, start: int = 0, stop: int | None = None) -> Layout:
    """Lex from `start` to `stop`, match brackets and keep the line ends that end something."""
    raw, broken = lex(source, grammar, start, stop)
    return _LayoutBuilder(source, raw, broken).run()


def _token(kind: str, start: int, end: int, text: str) -> lark.Token:
    return lark.Token(kind, text[start:end], start, end_pos=end)


class _LayoutBuilder:
    """One scan over the raw tokens; `open` is the stack of brackets not closed yet."""

    def __init__(self, source: Source, raw: list[lark.Token], broken: dict[int, Diagnostic]) -> None:
        self.layout = Layout(source)
        self.raw = raw
        self.raw_broken = broken
        self.open: list[lark.Token] = []
        self.line_ended = False
        kinds = [token.type for token in raw]
        self.missing_braces = kinds.count("LBRACE") - kinds.count("RBRACE")
        self.suspect: lark.Token | None = None

    def run(self) -> Layout:
        first_on_line = True
        for index, token in enumerate(self.raw):
            if token.type == "_NL":
                first_on_line = True
                self.line_ended = self.line_ended or not self._in_parentheses()
                continue
            if first_on_line and self._starts_declaration(index):
                self._keyword_at_line_start(token)
            self._bracket_or_other(token, self.raw_broken.get(index), first_on_line)
            first_on_line = False
            if len(self.open) > MAX_NESTING:
                self._too_deep(token)
                return self.layout
            if len(self.layout.broken) >= MAX_LEXICAL_ERRORS:
                self.layout.stopped = True
                return self.layout
        self._end_of_file()
        return self.layout

    def _starts_declaration(self, index: int) -> bool:
        """Whether a line begins with a keyword that is used as one (`param = 3` is a name gone wrong)."""
        follower = self.raw[index + 1].type if index + 1 < len(self.raw) else ""
        keyword = self.raw[index].type in ITEM_KEYWORDS | STATEMENT_KEYWORDS
        return keyword and follower not in ("ASSIGN", "COLON")

    def _in_parentheses(self) -> bool:
        return bool(self.open) and self.open[-1].type != "LBRACE"

    def _bracket_or_other(
        self, token: lark.Token, diagnostic: Diagnostic | None, first_on_line: bool
    ) -> None:
        if diagnostic is not None:
            self._emit_broken(token, diagnostic)
        elif token.type in _CLOSERS:
            if token.type == "LBRACE":
                self._close_parentheses(token)
            self._emit(token)
            self.open.append(token)
        elif token.type in _CLOSERS.values():
            self._close(token, first_on_line)
        else:
            if token.type == "ARROW":
                self._close_parentheses(token)
            self._emit(token)

    # ------------------------------------------------------------ tokens out

    def _emit(self, token: lark.Token) -> None:
        if self.line_ended and token.type not in _CONTINUES_LINE:
            self._end_line(drop_behind=_OPENS_NO_LINE)
        self.line_ended = False
        self.layout.tokens.append(token)

    def _end_line(self, drop_behind: frozenset[str]) -> None:
        tokens = self.layout.tokens
        if tokens and tokens[-1].type != "_NL" and tokens[-1].type not in drop_behind:
            end = tokens[-1].end_pos or 0
            tokens.append(_token("_NL", end, end, ""))

    def _last_end(self) -> int:
        return (self.layout.tokens[-1].end_pos or 0) if self.layout.tokens else 0

    def _emit_broken(self, token: lark.Token, diagnostic: Diagnostic) -> None:
        self._emit(_token(BROKEN, token.start_pos or 0, token.end_pos or 0, self.layout.source.text))
        self.layout.broken[len(self.layout.tokens) - 1] = diagnostic

    # ------------------------------------------------------------ brackets

    def _close(self, token: lark.Token, first_on_line: bool) -> None:
        if token.type == "RBRACE":
            self._close_parentheses(token)
        if not self.open or (self._in_parentheses() is (token.type == "RBRACE")):
            self._emit_broken(token, self._unmatched(token))
            return
        opening = self.open.pop()
        if _CLOSERS[opening.type] != token.type:
            self._emit_broken(token, self._mismatched(token, opening))
            return
        if token.type == "RBRACE":
            self._end_line(drop_behind=frozenset({"LBRACE"}))
            self.line_ended = False
            if first_on_line and self._indent(token) < self._indent(opening) and self.suspect is None:
                self.suspect = opening
        self._emit(token)

    def _close_parentheses(self, token: lark.Token) -> None:
        """Braces, `->` and a keyword at the start of a line end parentheses: those were not closed."""
        if not self._in_parentheses():
            return
        self.layout.diagnostics.append(self._unclosed(self.open[-1], token))
        place = self._last_end()
        while self._in_parentheses():
            self.layout.tokens.append(_token(_CLOSERS[self.open.pop().type], place, place, ""))
        self.line_ended = token.type not in ("LBRACE", "ARROW")

    def _keyword_at_line_start(self, token: lark.Token) -> None:
        self._close_parentheses(token)
        self._end_line(drop_behind=frozenset({"LBRACE"}))
        if token.type in ITEM_KEYWORDS and self.open and self.missing_braces > 0:
            self._close_braces(token)

    def _close_braces(self, token: lark.Token | None) -> None:
        """Report the brace that is not closed, and close all that are open: parsing continues after them."""
        opening = self.suspect if self.suspect is not None else self.open[-1]
        self.layout.diagnostics.append(self._unclosed(opening, token))
        place = self._last_end()
        while self.open:
            self.open.pop()
            self.missing_braces -= 1
            self._end_line(drop_behind=frozenset({"LBRACE"}))
            self.layout.tokens.append(_token("RBRACE", place, place, ""))
        self.suspect = None
        self.line_ended = True

    def _end_of_file(self) -> None:
        if self._in_parentheses():
            end = len(self.layout.source.text)
            self._close_parentheses(_token("$END", end, end, ""))
        if self.open:
            self._close_braces(None)
        self._end_line(drop_behind=frozenset())

    def _too_deep(self, token: lark.Token) -> None:
        self.layout.stopped = True
        message = f"nested too deeply: more than {MAX_NESTING} brackets are open here"
        help_ = "bind parts of it to names, or move them into blocks"
        found = Diagnostic("FG106", message, self.layout.span(token), "the innermost", help=(help_,))
        self.layout.diagnostics.append(found)

    # ------------------------------------------------------------ messages

    def _indent(self, token: lark.Token) -> int:
        line, _ = self.layout.source.position(token.start_pos or 0)
        text = self.layout.source.line(line)
        return len(text) - len(text.lstrip())

    def _unclosed(self, opening: lark.Token, found: lark.Token | None) -> Diagnostic:
        bracket, closing = _TEXT[opening.type], _TEXT[_CLOSERS[opening.type]]
        note = Note("the file ends before it is closed")
        if found is not None and found.type != "$END":
            note = Note(f"`{closing}` is missing before this", self.layout.span(found))
        return Diagnostic(
            "FG102",
            f"`{bracket}` is never closed",
            self.layout.span(opening),
            "opened here",
            (note,),
            (f"add the missing `{closing}`",),
        )

    def _unmatched(self, token: lark.Token) -> Diagnostic:
        innermost = self.open[-1:]
        notes = tuple(Note("the innermost open bracket", self.layout.span(each)) for each in innermost)
        return Diagnostic(
            "FG103",
            f"`{token}` closes nothing",
            self.layout.span(token),
            "no bracket of this kind is open",
            notes,
            ("remove it, or add the bracket that it should close",),
        )

    def _mismatched(self, token: lark.Token, opening: lark.Token) -> Diagnostic:
        wanted = _TEXT[_CLOSERS[opening.type]]
        return Diagnostic(
            "FG103",
            f"`{token}` where `{wanted}` is needed to close `{opening}`",
            self.layout.span(token),
            f"expected `{wanted}`",
            (Note("opened here", self.layout.span(opening)),),
        )
