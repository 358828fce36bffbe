"""Expressions: from lark's parse tree to `ast`, with the checks that a grammar words badly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import lark

from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Diagnostic, Note
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.source import Source, Span

Tree: TypeAlias = lark.Tree[lark.Token]
Child: TypeAlias = Tree | lark.Token | None
Built = TypeVar("Built")

COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
MAX_INT = 2**63 - 1


class ExpressionBuilder:
    """Converts the trees of expressions; what is wrong goes to `diagnostics`, and a stand-in takes its place."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.diagnostics: list[Diagnostic] = []
        self._too_deep = False

    # ------------------------------------------------------------ small parts

    def error(
        self,
        code: str,
        message: str,
        span: Span,
        label: str = "",
        *,
        notes: tuple[Note, ...] = (),
        help_: tuple[str, ...] = (),
    ) -> None:
        """Note one thing that is wrong."""
        self.diagnostics.append(Diagnostic(code, message, span, label, notes, help_))

    def span(self, tree: Tree | lark.Token) -> Span:
        """Where a tree or a token stands."""
        meta = tree.meta if isinstance(tree, lark.Tree) else tree
        return Span(self.source, meta.start_pos or 0, meta.end_pos or 0)

    def name(self, child: Child, depth: int = 0) -> ast.Name:
        """A `name` tree."""
        tree = tree_of(child)
        return ast.Name(self.span(tree), str(tree.children[0]))

    # ------------------------------------------------------------ expressions

    def expr(self, child: Child, depth: int = 0) -> ast.Expr:
        """An expression, `depth` levels down; below `MAX_NESTING` it is reported and cut off."""
        tree = tree_of(child)
        if depth > MAX_NESTING:
            self.report_depth(self.span(tree))
            return ast.Literal(self.span(tree), None)
        found: ast.Expr = _EXPRESSIONS[tree.data](self, tree, depth)
        return found

    def report_depth(self, span: Span) -> None:
        if self._too_deep:
            return
        self._too_deep = True
        self.error(
            "FG106",
            f"nested too deeply: more than {MAX_NESTING} levels",
            Span(span.source, span.start, min(span.end, span.start + 1)),
            help_=(
                "a chain such as a + b + ... counts one level for each operator: bind parts of it to names",
            ),
        )

    def _chain(self, tree: Tree, depth: int) -> ast.Expr:
        operands, operators = tree.children[0::2], [token_of(token) for token in tree.children[1::2]]
        if operators[0].value in COMPARISONS and len(operators) > 1:
            self.error(
                "FG115",
                "comparisons do not chain",
                self.span(operators[1]),
                "a second comparison",
                help_=("join two comparisons with `and`",),
            )
            operators, operands = operators[:1], operands[:2]
        left_depth = depth + len(operators)
        if left_depth > MAX_NESTING:
            self.report_depth(self.span(operators[MAX_NESTING - depth]))
            return ast.Literal(self.span(tree), None)
        left = self.expr(operands[0], left_depth)
        start = _start(operands[0])
        for index, (operator, operand) in enumerate(zip(operators, operands[1:], strict=True)):
            right = self.expr(operand, left_depth - index)
            span = Span(self.source, start, _end(operand))
            left = ast.Binary(span, operator.value, left, right)
        return left

    def _index(self, tree: Tree, depth: int) -> ast.Expr:
        operand, *slices = tree.children
        parts = tuple(self._slice(part, depth + 1) for part in trees_of(slices))
        return ast.Index(self.span(tree), self.expr(operand, depth + 1), parts)

    def _slice(self, tree: Tree, depth: int) -> ast.Slice:
        span = self.span(tree)
        if tree.data == "ellipsis":
            return ast.Slice(span, ellipsis=True)
        if tree.data == "at_index":
            return ast.Slice(span, index=self.expr(tree.children[0], depth))
        start, stop = (None if part is None else self.expr(part, depth) for part in tree.children)
        return ast.Slice(span, start, stop)

    def _number(self, tree: Tree, depth: int) -> ast.Expr:
        token, span = token_of(tree.children[0]), self.span(tree)
        if token.type == "FLOAT":
            value: int | float = float(token.replace("_", ""))
            too_large = math.isinf(value)
        else:
            digits = token.replace("_", "").lstrip("0") or "0"
            too_large = len(digits) > 19 or int(digits) > MAX_INT
            value = 0 if too_large else int(digits)
        if too_large:
            self.error(
                "FG120", "number is too large", span, f"at most {MAX_INT} and, with a point, about 1.8e308"
            )
            value = 0
        return ast.Literal(span, value)

    def string(self, child: Child, depth: int = 0) -> str:
        """The value of a STRING token; FG119 for an unknown escape."""
        token = token_of(child)
        start = (token.start_pos or 0) + 1

        def unescaped(found: re.Match[str]) -> str:
            escape, place = found[1], start + found.start()
            if escape not in _ESCAPES:
                span = Span(self.source, place, place + 2)
                message, help_ = f"unknown escape `\\{escape}` in a string", ("write `\\\\` for a backslash",)
                self.error("FG119", message, span, 'known: \\" \\\\ \\n \\t', help_=help_)
            return _ESCAPES.get(escape, escape)

        return re.sub(r"\\(.)", unescaped, token[1:-1])

    def _tuple(self, tree: Tree, depth: int) -> ast.Expr:
        items = tuple(self.expr(item, depth + 1) for item in tree.children if item is not None)
        return ast.Tuple(self.span(tree), items)

    def _call(self, tree: Tree, depth: int) -> ast.Expr:
        module, function, arguments, label = tree.children
        return ast.Call(
            self.span(tree),
            None if module is None else self.name(module).text,
            self.name(function),
            self._arguments(tree_of(arguments), depth + 1),
            None if label is None else self.name(label),
        )

    def _arguments(self, tree: Tree, depth: int) -> tuple[ast.Argument, ...]:
        behind = False
        arguments: list[ast.Argument] = []
        for part in tree.children:
            if isinstance(part, lark.Token):
                behind = True
            elif part is not None:
                name, value = part.children
                given, keyword = self.expr(value, depth), None if name is None else self.name(name)
                arguments.append(ast.Argument(self.span(part), given, keyword, behind))
        self._check_order(arguments)
        self._check_twice(arguments)
        return tuple(arguments)

    def _check_order(self, arguments: Sequence[ast.Argument]) -> None:
        for before, argument in pairwise(arguments):
            if before.name is not None and argument.name is None:
                self.error(
                    "FG112",
                    "a positional argument after a keyword argument",
                    argument.span,
                    "has no name",
                    notes=(Note("the keyword argument", before.span),),
                    help_=("give it a name, or move it before the first keyword argument",),
                )

    def _check_twice(self, arguments: Sequence[ast.Argument]) -> None:
        seen: dict[str, ast.Name] = {}
        for argument in arguments:
            if argument.name is None:
                continue
            first = seen.setdefault(argument.name.text, argument.name)
            if first is not argument.name:
                self.error(
                    "FG113",
                    f"`{first.text}` is given twice",
                    argument.name.span,
                    "given again",
                    notes=(Note("first given here", first.span),),
                )


def node(kind: Callable[..., Built], *parts: Callable[..., Any], deeper: int = 0) -> Callable[..., Built]:
    """The rule of a tree whose first children are the parts of a node, in order; `deeper` levels down."""

    def build(builder: ExpressionBuilder, tree: Tree, depth: int = 0) -> Built:
        pairs = zip(parts, tree.children, strict=False)
        found = (None if child is None else part(builder, child, depth + deeper) for part, child in pairs)
        return kind(builder.span(tree), *found)

    return build


_EXPRESSIONS: dict[str, Callable[..., ast.Expr]] = {
    "conditional": node(ast.Conditional, *[ExpressionBuilder.expr] * 3, deeper=1),
    "chain": ExpressionBuilder._chain,
    "unary": node(ast.Unary, lambda builder, child, depth: str(child), ExpressionBuilder.expr, deeper=1),
    "transpose": node(ast.Transpose, ExpressionBuilder.expr, deeper=1),
    "index": ExpressionBuilder._index,
    "number": ExpressionBuilder._number,
    "string": node(ast.Literal, ExpressionBuilder.string),
    "constant": node(ast.Literal, lambda builder, child, depth: _CONSTANTS[child]),
    "reference": node(ast.Ref, lambda builder, child, depth: builder.name(child).text),
    "tuple": ExpressionBuilder._tuple,
    "call": ExpressionBuilder._call,
}


def trees_of(children: Iterable[Child]) -> list[Tree]:
    return [child for child in children if isinstance(child, lark.Tree)]


def tree_of(child: Child) -> Tree:
    if not isinstance(child, lark.Tree):
        raise TypeError(f"expected a tree, not {child!r}")
    return child


def token_of(child: Child) -> lark.Token:
    if not isinstance(child, lark.Token):
        raise TypeError(f"expected a token, not {child!r}")
    return child


def _start(child: Child) -> int:
    """Where an operand begins, its parentheses included."""
    meta = tree_of(child).meta
    return int(getattr(meta, "container_start_pos", meta.start_pos))


def _end(child: Child) -> int:
    meta = tree_of(child).meta
    return int(getattr(meta, "container_end_pos", meta.end_pos))
