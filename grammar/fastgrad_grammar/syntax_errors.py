"""What to say where the parser meets a token that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import lark

from fastgrad_grammar.diagnostics import Diagnostic, Note, nearest, short
from fastgrad_grammar.expected import describe_expected
from fastgrad_grammar.layout import ITEM_KEYWORDS, OPERATORS, STATEMENT_KEYWORDS, Layout
from fastgrad_grammar.source import Span

KEYWORDS = (
    ITEM_KEYWORDS
    | STATEMENT_KEYWORDS
    | {"AS", "IN", "IF", "ELSE", "AND", "OR", "NOT", "TRUE", "FALSE", "NONE"}
)

_ITEM_WORDS = ("use", "param", "dim", "block", "model", "objective", "budget")
_STATEMENT_WORDS = ("weight", "buffer", "repeat", "if", "return")

_FOREIGN = {
    **dict.fromkeys(
        ("def", "fn", "func", "class"),
        "a reusable part is `block name(x: float[b, n]; size: int) -> float[b, n] { ... }`",
    ),
    "let": "write x = ..., without `let`",
    "var": "write x = ..., without `var`",
    "const": "a compile-time constant is `param name = value`",
    **dict.fromkeys(
        ("for", "while"),
        "a repetition is `repeat i in count { ... }`, with a count known at compile time",
    ),
    **dict.fromkeys(("import", "from"), 'write `use std`, or `use "path.tfg" as name`'),
    "elif": "write `else if`",
    "lambda": "there are no functions as values; declare a `block`",
    **dict.fromkeys(("with", "assert", "print"), ""),
    "pass": "an empty body is `{ }`",
}
_UNITS = {
    "%": 0.01,
    **{f"{prefix}B": 1000.0**power for power, prefix in enumerate(("k", "M", "G", "T"), 1)},
    "KB": 1000.0,
    **{f"{prefix}iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
_COMPOUND = frozenset({"PLUS", "MINUS", "STAR", "SLASH", "FLOOR", "PERCENT", "MATMUL"})


@dataclass(frozen=True)
class Situation:
    """An unexpected token: where it is, what would have been accepted, and what it stands in."""

    layout: Layout
    index: int
    start: int  # index of the first token of the item, statement or entry
    accepted: frozenset[str]
    level: int  # how many braces are open

    @property
    def token(self) -> lark.Token:
        """The token that does not fit."""
        return self.layout.tokens[self.index]

    def near(self, offset: int) -> lark.Token | None:
        """The token `offset` places from the unexpected one, if it belongs to the same text."""
        place = self.index + offset
        return self.layout.tokens[place] if 0 <= place < len(self.layout.tokens) else None

    def kind(self, offset: int) -> str:
        """The type of that token, "" beyond the ends."""
        token = self.near(offset)
        return token.type if token is not None else ""

    def word(self, offset: int) -> str:
        """The text of that token, "" beyond the ends."""
        token = self.near(offset)
        return str(token) if token is not None else ""

    @property
    def at_start(self) -> bool:
        """Whether the token is the first of its item, statement or entry."""
        return self.index == self.start

    @cached_property
    def head(self) -> str:
        """The type of the first token of the item, statement or entry."""
        return self.layout.tokens[self.start].type

    @property
    def span(self) -> Span:
        """Where the token stands; a line end is the place after the last token."""
        return self.layout.span(self.token)

    @cached_property
    def opening(self) -> lark.Token | None:
        """The innermost parenthesis or square bracket of this statement that is still open."""
        stack: list[lark.Token] = []
        for token in self.layout.tokens[self.start : self.index]:
            if token.type in ("LPAR", "LSQB", "LBRACE"):
                stack.append(token)
            elif token.type in ("RPAR", "RSQB", "RBRACE") and stack:
                stack.pop()
        return stack[-1] if stack and stack[-1].type != "LBRACE" else None


def explain(case: Situation) -> Diagnostic:
    """The diagnostic of the first rule that knows the mistake, else what was found and what was expected."""
    for rule in _RULES:
        diagnostic = rule(case)
        if diagnostic is not None:
            return diagnostic
    return _unexpected(case)


# ---------------------------------------------------------------- rules, most specific first


def _item_inside(case: Situation) -> Diagnostic | None:
    if not (case.at_start and case.level and case.token.type in ITEM_KEYWORDS) or case.kind(1) == "ASSIGN":
        return None
    return Diagnostic(
        "FG111",
        f"`{case.token}` inside braces",
        case.span,
        "belongs at the top level of the file",
        help=("move it out of the braces",),
    )


def _statement_outside(case: Situation) -> Diagnostic | None:
    if not case.at_start or case.level:
        return None
    span, token = case.span, case.token
    if token.type in STATEMENT_KEYWORDS | {"IF"}:
        return Diagnostic(
            "FG111", f"`{token}` outside a block", span, "belongs in the body of a `block` or a `model`"
        )
    if token.type == "NAME" and case.kind(1) == "ASSIGN":
        return Diagnostic(
            "FG111",
            f"`{token} = ...` outside a block",
            span,
            "belongs in the body of a `block` or a `model`",
            help=(f"a compile-time constant of the file is `param {token} = ...`",),
        )
    return None


def _foreign_word(case: Situation) -> Diagnostic | None:
    """`def`, `for`, `let x = ...`: a word at the start of a line that is not a name here."""
    for offset in (0, -1):
        word = case.word(offset)
        if word in _FOREIGN and case.index + offset == case.start and case.kind(offset + 1) != "ASSIGN":
            token = case.layout.tokens[case.index + offset]
            hint = _FOREIGN[word]
            return Diagnostic(
                "FG118",
                f"`{word}` is not a word of this language",
                case.layout.span(token),
                help=(hint,) if hint else (),
            )
    return None


def _foreign_operator(case: Situation) -> Diagnostic | None:
    """`x ** 2`, `x += y`, `x[...]`: two tokens that touch."""
    for first in (case.index - 1, case.index):
        pair = case.layout.tokens[max(first, 0) : first + 2]
        if first < case.start or len(pair) < 2 or pair[0].end_pos != pair[1].start_pos:
            continue
        span = case.layout.span(pair[0]).to(case.layout.span(pair[1]))
        help_ = _operator_help(pair[0], pair[1], str(case.layout.tokens[max(first - 1, 0)]))
        if help_ is not None:
            return Diagnostic(
                "FG118", f"`{span.text}` is not an operator of this language", span, help=(help_,)
            )
    return None


def _operator_help(first: lark.Token, second: lark.Token, target: str) -> str | None:
    if (first.type, second.type) == ("STAR", "STAR"):
        return "write a product, such as x * x"
    if first.type in _COMPOUND and second.type == "ASSIGN":
        return f"write {target} = {target} {first} ..."
    if (first.type, second.type) == ("ELLIPSIS", "DOT"):
        return "all leading dimensions are written `..`"
    return None


def _number_and_point(case: Situation) -> Diagnostic | None:
    """`1.` and `.5`."""
    if case.token.type != "DOT":
        return None
    for first, zero in ((case.index, "0{}"), (case.index - 1, "{}0")):
        pair = case.layout.tokens[max(first, 0) : first + 2]
        if len(pair) == 2 and "INT" in (pair[0].type, pair[1].type) and pair[0].end_pos == pair[1].start_pos:
            span = case.layout.span(pair[0]).to(case.layout.span(pair[1]))
            help_ = f"write {zero.format(span.text)}"
            return Diagnostic("FG120", f"malformed number `{span.text}`", span, help=(help_,))
    return None


def _unit(case: Situation) -> Diagnostic | None:
    """`output <= 1%` and `memory <= 10 MB`."""
    tokens = case.layout.tokens[case.start : case.index + 1]
    if "AT_MOST" not in [token.type for token in tokens[1:2]] and case.head != "AT":
        return None  # no entry of a budget
    for sign, number, unit in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if sign.type == "AT_MOST" and number.type in ("INT", "FLOAT") and str(unit) in _UNITS:
            at, help_ = case.layout.span(unit), f"write {float(number) * _UNITS[unit]:g}"
            return Diagnostic("FG101", f"unexpected `{unit}`", at, "numbers have no units", help=(help_,))
    return None


def _attribute(case: Situation) -> Diagnostic | None:
    """`x.shape`; only `.T` exists."""
    if case.token.type == "DOT" and case.kind(1) == "NAME":
        name, first = case.near(1), case.token
    elif case.kind(-1) == "NAME" and case.kind(-2) == "DOT":
        name, first = case.near(-1), case.layout.tokens[case.index - 2]
    else:
        return None
    assert name is not None
    span = case.layout.span(first).to(case.layout.span(name))
    hint = (
        "write `.T` for the transpose"
        if name.lower() in ("t", "mt", "transpose")
        else (f"operations are called as functions: {name}(x, ...)")
    )
    return Diagnostic(
        "FG117",
        f"unknown attribute `.{name}`",
        span,
        "the only attribute is `.T`; `a.b(...)` calls block b of module a",
        help=(hint,),
    )


def _keyword_as_name(case: Situation) -> Diagnostic | None:
    token = case.token
    if token.type not in KEYWORDS or "NAME" not in case.accepted:
        return None
    if case.at_start and case.kind(1) != "ASSIGN":
        return None
    stands_as_name = case.kind(1) in ("ASSIGN", "COLON", "COMMA", "RPAR", "LPAR", "AT_MOST", "IN") or (
        not {"INT", "STRING"} & case.accepted
    )
    return _reserved(case, token) if stands_as_name else None


def _keyword_statement_name(case: Situation) -> Diagnostic | None:
    """`model = 3` or `weight = x`: the keyword was accepted, the `=` after it was not."""
    before = case.near(-1)
    if before is None or before.type not in KEYWORDS or case.index - 1 != case.start:
        return None
    if case.token.type not in ("ASSIGN", "COLON", "AT_MOST") or "NAME" not in case.accepted:
        return None
    return _reserved(case, before)


def _reserved(case: Situation, token: lark.Token) -> Diagnostic:
    return Diagnostic(
        "FG107",
        f"`{token}` is a keyword and cannot be a name",
        case.layout.span(token),
        "expected a name",
        help=(f"choose another name, such as {token}_",),
    )


def _equals(case: Situation) -> Diagnostic | None:
    if case.token.type == "EQUAL" and "ASSIGN" in case.accepted and not {"EQUAL"} & case.accepted:
        return Diagnostic("FG108", "`==` compares; a value is given with `=`", case.span, "expected `=`")
    if case.token.type == "ASSIGN" and "EQUAL" in case.accepted:
        return Diagnostic(
            "FG108", "`=` gives a value; values are compared with `==`", case.span, "expected `==`"
        )
    return None


def _missing_arrow(case: Situation) -> Diagnostic | None:
    if case.accepted != {"ARROW"}:
        return None
    found = f", not `{case.token}`" if case.token.type != "_NL" and case.token else ""
    return Diagnostic(
        "FG116",
        f"a `{case.layout.tokens[case.start]}` must say what it returns",
        case.span,
        f"expected `->`{found}",
        help=("write `-> float[...]` between `)` and `{`",),
    )


def _missing_use_name(case: Situation) -> Diagnostic | None:
    if case.head != "USE" or case.accepted != {"AS"}:
        return None
    return Diagnostic(
        "FG122",
        "`use` of a file needs a name",
        case.layout.span(case.layout.tokens[case.index - 1]),
        "expected `as NAME` after the path",
        help=(f"write use {case.word(-1)} as name",),
    )


def _bare_expression(case: Situation) -> Diagnostic | None:
    """`f(x)` or `a, b = f(x)` where a statement is expected."""
    tokens = case.layout.tokens
    if not case.level or case.index != case.start + 1 or case.head not in ("NAME", "AT", "EXACT"):
        return None
    if "ASSIGN" not in case.accepted or "AT_MOST" in case.accepted:
        return None
    name = tokens[case.start]
    if case.token.type == "COMMA":
        return Diagnostic(
            "FG101",
            "several names need parentheses",
            case.layout.span(name).to(case.span),
            "expected `(`",
            help=(f"write ({name}, ...) = f(x)",),
        )
    if case.token.type not in OPERATORS | {"LPAR", "DOT", "_NL", "LSQB", "TRANSPOSE"}:
        return None
    return Diagnostic(
        "FG121",
        "a statement that gives no name to its value has no effect",
        case.layout.span(name),
        "expected `name = ...` or `return ...`",
        help=(f"write x = {name}... or return {name}...",),
    )


def _colon_for_brace(case: Situation) -> Diagnostic | None:
    if case.token.type != "COLON" or "LBRACE" not in case.accepted:
        return None
    return Diagnostic(
        "FG118", "a body is in braces, not after `:`", case.span, "expected `{`", help=("write { ... }",)
    )


def _unclosed_line(case: Situation) -> Diagnostic | None:
    """A new line begins inside parentheses where only `,` or `)` fits: the parenthesis was forgotten."""
    opening = case.opening
    if opening is None or case.token.type not in ("NAME", "IF", "BROKEN"):
        return None
    before = case.near(-1)
    text = case.layout.source.text
    if before is None or "\n" not in text[before.end_pos : case.token.start_pos]:
        return None
    closing = ")" if opening.type == "LPAR" else "]"
    return Diagnostic(
        "FG102",
        f"`{opening}` is never closed",
        case.layout.span(opening),
        "opened here",
        (Note(f"`{closing}` is missing before this", case.span),),
        (f"add the missing `{closing}`, or a `,`",),
    )


def _misspelt_keyword(case: Situation) -> Diagnostic | None:
    """`blok f(...)` and `retrun x`."""
    words = _STATEMENT_WORDS if case.level else _ITEM_WORDS
    if not case.level and case.at_start and case.token.type == "NAME":
        token = case.token
    elif (
        case.level
        and case.index == case.start + 1
        and case.head == "NAME"
        and case.token.type in ("NAME", "LPAR")
    ):
        token = case.layout.tokens[case.start]
    else:
        return None
    near = nearest(str(token), words)
    if near is None or "AT_MOST" in case.accepted:
        return None
    return Diagnostic(
        "FG101",
        f"unexpected `{short(token)}`",
        case.layout.span(token),
        "not a keyword",
        help=(f"did you mean {near}?",),
    )


_RULES: tuple[Callable[[Situation], Diagnostic | None], ...] = (
    _item_inside,
    _foreign_word,
    _statement_outside,
    _misspelt_keyword,
    _foreign_operator,
    _number_and_point,
    _unit,
    _attribute,
    _keyword_as_name,
    _keyword_statement_name,
    _equals,
    _missing_arrow,
    _missing_use_name,
    _bare_expression,
    _colon_for_brace,
    _unclosed_line,
)


# ---------------------------------------------------------------- the general message


def _unexpected(case: Situation) -> Diagnostic:
    found = _describe_found(case)
    expected = describe_expected(case.accepted)
    notes: tuple[Note, ...] = ()
    opening = case.opening
    if opening is not None and opening is not case.near(-1) and {"RPAR", "RSQB"} & case.accepted:
        notes = (Note(f"inside this `{opening}`", case.layout.span(opening)),)
    help_: tuple[str, ...] = ()
    if case.at_start and case.token.type in OPERATORS:
        help_ = (
            "an expression continues after an operator: end the line before with it, or use parentheses",
        )
    return Diagnostic("FG101", f"unexpected {found}", case.span, f"expected {expected}", notes, help_)


def _describe_found(case: Situation) -> str:
    token = case.token
    if token.type == "_NL":
        return "end of line" if case.index + 1 < len(case.layout.tokens) else "end of file"
    if token.type == "RBRACE" and token.start_pos == token.end_pos:
        return "end of file"
    if token.type in KEYWORDS:
        return f"keyword `{token}`"
    return f"string {short(token)}" if token.type == "STRING" else f"`{short(token)}`"
