"""`fastgrad fmt`: one way to lay out a `.tfg` text, with every comment kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fastgrad_grammar import ast, unparse
from fastgrad_grammar.comments import Comment, CommentQueue
from fastgrad_grammar.parser import parse
from fastgrad_grammar.scope import Scope, signatures, tensor_names
from fastgrad_grammar.source import Source

MAX_COLUMNS = 100
"""Longer calls, signatures and expressions go over several lines."""

_Line: TypeAlias = ast.Statement | ast.Limit | ast.Setting | ast.At

_INDENT = "    "
_USE_PATH = re.compile(r'use\s*("(?:\\.|[^"\\\n])*")')
_ELSE = re.compile(r"else\b")
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")


def format_source(source: Source | str) -> str:
    """The text in its one layout: formatting it again changes nothing, and it parses to an equal tree.

    Raises TfgError for a text with syntax errors.
    """
    if isinstance(source, str):
        source = Source("<text>", source)
    source = Source(source.path, source.text.replace("\r\n", "\n"))
    file = parse(source)
    return _Printer(source, file).run()


class _Printer:
    """Writes items and statements line by line, taking comments from the queue as their places come up."""

    def __init__(self, source: Source, file: ast.File) -> None:
        self.source = source
        self.tree = file
        self.comments = CommentQueue(source)
        self.scope = Scope(signatures(file))
        self.lines: list[str] = []
        self.level = 0
        self.last_line = 0  # the line of the source up to which everything is written
        self.fresh = True  # nothing written yet in this body

    def run(self) -> str:
        for item in self.tree.items:
            self.item(item)
        self.comments_before(len(self.source.text) + 1)
        return "".join(f"{line}\n" for line in self.lines)

    # ------------------------------------------------------------ lines, comments, blank lines

    @property
    def indent(self) -> str:
        return _INDENT * self.level

    def line_of(self, offset: int) -> int:
        return self.source.position(offset)[0]

    def gap(self, offset: int) -> None:
        """Keep one blank line where the author left some before `offset`."""
        if not self.fresh and self.line_of(offset) - self.last_line > 1:
            self.lines.append("")
        self.fresh = False

    def comments_before(self, offset: int) -> None:
        for comment in self.comments.take_before(offset):
            self.gap(comment.offset)
            self.lines.append(self.indent + comment.text)
            self.last_line = comment.line

    def trailing_comment(self, end: int) -> None:
        """Put the comment that stands after `end` on its line after the last line written."""
        comment = self.comments.take_behind(end)
        if comment is not None:
            self.lines[-1] += f"  {comment.text}"
        self.last_line = self.line_of(max(0, end - 1))

    def write(self, start: int, end: int, lines: Callable[[], Sequence[str]]) -> None:
        """Write what stands from `start` to `end`; comments in it that no line took go before it."""
        self.comments_before(start)
        self.gap(start)
        inside = self.comments.before(end)
        laid_out = lines()
        left = self.comments.take_before(end)
        if left:  # lay out once more, as the text will be read without them
            self.comments.put_back([comment for comment in inside if comment not in left])
            laid_out = lines()
            left = [
                comment for comment in inside if comment in left or comment in self.comments.take_before(end)
            ]
        self.lines.extend(self.indent + comment.text for comment in left)
        self.lines.extend(laid_out)

    def simple(self, node: ast.Item | _Line, lines: Callable[[], Sequence[str]]) -> None:
        self.write(node.span.start, node.span.end, lines)
        self.trailing_comment(node.span.end)

    def skip_blank(self, offset: int) -> int:
        """The offset of the next character that is neither blank nor comment."""
        match = _BLANK.match(self.source.text, offset)
        return match.end() if match else offset

    def body(self, header_end: int, statements: Sequence[_Line], moved: Sequence[Comment] = ()) -> int:
        """Write the braces after `header_end` with what stands between them; the offset after them.

        `moved` are comments of the head that go to the beginning of the body.
        """
        opening = self.skip_blank(header_end)
        moved = [*moved, *self.comments.take_before(opening)]
        last = statements[-1].span.end if statements else opening + 1
        closing = self.skip_blank(last)
        if not statements and not moved and not self.comments.before(closing):
            self.lines[-1] += "}"
            self.last_line = self.line_of(closing)
            return closing + 1
        self.trailing_comment(opening + 1)
        self.level += 1
        self.lines.extend(self.indent + comment.text for comment in moved)
        self.fresh = not moved
        for statement in statements:
            self.statement(statement)
        self.comments_before(closing)
        self.level -= 1
        self.lines.append(f"{self.indent}}}")
        self.fresh = False
        self.last_line = self.line_of(closing)
        return closing + 1

    # ------------------------------------------------------------ items

    def item(self, item: ast.Item) -> None:
        match item:
            case ast.BlockDecl():
                self.block(item)
            case ast.Objective():
                self.simple(item, lambda: self.objective(item))
            case ast.Budget():
                self.budget(item)
            case ast.Param():
                self.simple(item, lambda: self.lay(item.value, self.param_head(item), ""))
            case ast.DimDecl():
                self.simple(item, lambda: [self.dim(item)])
            case ast.Use():
                self.simple(item, lambda: [_use(item)])

    def param_head(self, item: ast.Param) -> str:
        kind = "" if item.type is None else f": {unparse.value_type(item.type)}"
        return f"param {item.name.text}{kind} = "

    def dim(self, item: ast.DimDecl) -> str:
        at_most = "" if item.at_most is None else f" <= {self.bound(item.at_most)}"
        multiple = "" if item.multiple_of is None else f" % {self.bound(item.multiple_of)}"
        return f"dim {item.name.text}{at_most}{multiple}"

    def bound(self, expr: ast.Expr) -> str:
        """A bound of a `dim`: names, numbers and products stand bare, anything else in parentheses."""
        text = unparse.text(expr, self.scope)
        return text if _is_bare_product(expr) else f"({text})"

    def objective(self, item: ast.Objective) -> list[str]:
        head = f"objective {item.name.text}("
        flat = f"{head}{', '.join(unparse.parameter(one, self.scope) for one in item.tensors)}) = "
        if self.fits(flat + unparse.text(item.value, self.scope)) and not self.comments.before(item.span.end):
            return [flat + unparse.text(item.value, self.scope)]
        lines = self.signature(head, item.tensors, (), ") = ")
        return lines[:-1] + self.lay(item.value, lines[-1], "")

    def block(self, item: ast.BlockDecl) -> None:
        head = f"{'model' if item.is_model else 'block'} {item.name.text}("
        tail = f") -> {unparse.results(item.results, self.scope)} {{"
        header_end = self.skip_results(item)
        self.write(item.span.start, header_end, lambda: self.signature(head, item.tensors, item.values, tail))
        outer = self.scope
        # A block cannot call itself: the same name in its body is an operation's.
        others = {key: names for key, names in outer.signatures.items() if key != (None, item.name.text)}
        self.scope = Scope(others, tensor_names(item))
        end = self.body(header_end, item.body)
        self.scope = outer
        self.trailing_comment(end)

    def skip_results(self, item: ast.BlockDecl) -> int:
        """The offset after the result types, a closing parenthesis and a trailing comma included."""
        end = item.results[-1].span.end
        while self.source.text[self.skip_blank(end)] in ",)":
            end = self.skip_blank(end) + 1
        return end

    def signature(self, head: str, tensors: Sequence[ast.TensorParam], values: Sequence[ast.ValueParam],
                  tail: str) -> list[str]:  # fmt: skip
        params: list[ast.TensorParam | ast.ValueParam] = [*tensors, *values]
        texts = [unparse.parameter(one, self.scope) for one in params]
        values_from = len(tensors) if values else None
        flat = f"{self.indent}{head}{unparse.join_sides(texts, values_from)}{tail}"
        if not params or (len(flat) <= MAX_COLUMNS and not self.comments.before(params[-1].span.end)):
            return [flat]
        lines = [self.indent + head + (";" if values_from == 0 else "")]
        self.level += 1
        for index, (param, text) in enumerate(zip(params, texts, strict=True)):
            lines += self.comment_lines(param.span.start)
            lines.append(f"{self.indent}{text}{';' if index + 1 == values_from else ','}")
            lines[-1] += self.comment_behind(param.span.end, params[-1].span.end)
        self.level -= 1
        return [*lines, self.indent + tail]

    def budget(self, item: ast.Budget) -> None:
        name = "" if item.model is None else f" {item.model.text}"
        header_end = item.span.start + len("budget") if item.model is None else item.model.span.end
        self.write(item.span.start, header_end, lambda: [f"budget{name} {{"])
        self.trailing_comment(self.body(header_end, item.entries))

    # ------------------------------------------------------------ statements and budget entries

    def statement(self, node: _Line) -> None:
        match node:
            case ast.If():
                self.if_(node)
            case ast.Repeat():
                head = f"{self.indent}repeat {node.index.text} in "
                self.write(node.span.start, node.count.span.end, lambda: self.lay(node.count, head, " {"))
                self.trailing_comment(self.body(self.end_of(node.count), node.body))
            case ast.Assign():
                names = ", ".join(name.text for name in node.targets)
                target = names if len(node.targets) == 1 else f"({names})"
                self.simple(node, lambda: self.lay(node.value, f"{self.indent}{target} = ", ""))
            case ast.Weight() | ast.Buffer():
                self.simple(node, lambda: self.tensor_statement(node))
            case ast.Return():
                self.simple(node, lambda: self.lay(node.value, f"{self.indent}return ", ""))
            case ast.At():
                head = f"{self.indent}at {node.pattern.span.text} "
                self.simple(node, lambda: self.rule(node.rule, head))
            case ast.Limit() | ast.Setting():
                self.simple(node, lambda: self.rule(node, self.indent))

    def rule(self, rule: ast.Rule, head: str) -> list[str]:
        if isinstance(rule, ast.Exact):
            return [f"{head}exact"]
        sign = "<=" if isinstance(rule, ast.Limit) else "="
        return self.lay(rule.value, f"{head}{rule.name.text} {sign} ", "")

    def tensor_statement(self, node: ast.Weight | ast.Buffer) -> list[str]:
        word = "weight" if isinstance(node, ast.Weight) else "buffer"
        head = f"{self.indent}{word} {node.name.text}: {unparse.tensor_type(node.type, self.scope)}"
        return [head] if node.init is None else self.lay(node.init, f"{head} = ", "")

    def if_(self, node: ast.If) -> None:
        start, end = node.span.start, self.end_of(node.condition)
        self.write(start, end, lambda: self.lay(node.condition, f"{self.indent}if ", " {"))
        end = self.body(end, node.then)
        self.trailing_comment(self.else_(node, end))

    def else_(self, node: ast.If, end: int) -> int:
        """Write the `else` branches of an `if` whose body ends at `end`; the offset after them."""
        while _ELSE.match(self.source.text, self.skip_blank(end)):
            behind = self.skip_blank(end) + len("else")
            nested = node.otherwise[0] if node.otherwise else None
            if not isinstance(nested, ast.If) or self.skip_blank(behind) != nested.span.start:
                self.lines[-1] += " else {"
                return self.body(behind, node.otherwise)
            node = nested
            head_end = self.end_of(node.condition)
            moved = self.comments.take_before(head_end)
            self.lines.extend(self.lay(node.condition, f"{self.lines.pop()} else if ", " {"))
            end = self.body(head_end, node.then, moved)
        return end

    def end_of(self, expr: ast.Expr) -> int:
        """The offset after an expression and the parentheses around it."""
        end = expr.span.end
        while self.source.text[self.skip_blank(end)] == ")":
            end = self.skip_blank(end) + 1
        return end

    # ------------------------------------------------------------ expressions over several lines

    def fits(self, line: str) -> bool:
        return len(line) <= MAX_COLUMNS

    def comment_lines(self, offset: int) -> list[str]:
        return [self.indent + comment.text for comment in self.comments.take_before(offset)]

    def comment_behind(self, end: int, limit: int) -> str:
        """The comment on the line of a list's element, before the list ends at `limit`."""
        comment = self.comments.take_behind(end, skip=",;)", limit=limit)
        return f"  {comment.text}" if comment is not None else ""

    def lay(self, expr: ast.Expr, head: str, tail: str, place: int = unparse.CONDITIONAL) -> list[str]:
        """`head`, the expression and `tail` on one line, or broken at the outermost place that helps."""
        if unparse.binding(expr) < place:
            return self.lay(expr, f"{head}(", f"){tail}")
        flat = f"{head}{unparse.text(expr, self.scope)}{tail}"
        commented = self.comments.any_between(expr.span.start, expr.span.end)
        if not commented and self.fits(flat):
            return [flat]
        match expr:
            case ast.Call() if expr.arguments:
                close = f"){unparse.label(expr)}{tail}"
                return self.lay_list(self.arguments(expr), expr, f"{head}{unparse.call_head(expr)}(", close)
            case ast.Tuple():
                items = [(item, "", ",") for item in expr.items]
                return self.lay_list(items, expr, f"{head}(", f"){tail}")
            case ast.Binary():
                return self.lay_binary(expr, head, tail)
            case ast.Unary() | ast.Transpose():
                sign = (expr.op + " " * (expr.op == "not")) if isinstance(expr, ast.Unary) else ""
                tail = tail if isinstance(expr, ast.Unary) else f".T{tail}"
                return self.lay(expr.operand, head + sign, tail, unparse.binding(expr))
            case ast.Conditional():
                return self.lay_conditional(expr, head, tail)
            case _:
                return [flat]

    def arguments(self, call: ast.Call) -> list[tuple[ast.Expr, str, str]]:
        """The values of a call's arguments, with what stands before and after each."""
        values_from = unparse.first_value(call, self.scope)
        return [
            (one.value, unparse.argument_prefix(one), ";" if index + 1 == values_from else ",")
            for index, one in enumerate(call.arguments)
        ]

    def lay_list(
        self, items: Sequence[tuple[ast.Expr, str, str]], whole: ast.Expr, head: str, close: str
    ) -> list[str]:
        """Each element on a line of its own, with the comments before and after it."""
        end = whole.span.end
        lines = [head]
        self.level += 1
        for expr, prefix, separator in items:
            lines += self.comment_lines(expr.span.start)
            element = self.lay(expr, self.indent + prefix, separator)
            lines += [*self.comment_lines(expr.span.end), *element]
            lines[-1] += self.comment_behind(expr.span.end, end)
        lines += self.comment_lines(end)
        self.level -= 1
        return [*lines, self.indent + close]

    def lay_binary(self, expr: ast.Binary, head: str, tail: str) -> list[str]:
        left_place, right_place = unparse.operand_places(expr)
        left = f"{head}{unparse.text(expr.left, self.scope, left_place)} {expr.op} "
        if _can_break(expr.right) and self.fits(f"{left}{_opening(expr.right)}"):
            return self.lay(expr.right, left, tail, right_place)
        lines = self.lay(expr.left, head, f" {expr.op}", left_place)
        self.level += 1
        lines += self.lay(expr.right, self.indent, tail, right_place)
        self.level -= 1
        return lines

    def lay_conditional(self, expr: ast.Conditional, head: str, tail: str) -> list[str]:
        condition = unparse.text(expr.condition, self.scope, unparse.OR)
        lines = self.lay(expr.then, head, f" if {condition}", unparse.OR)
        self.level += 1
        lines += self.lay(expr.otherwise, f"{self.indent}else ", tail)
        self.level -= 1
        return lines


def _can_break(expr: ast.Expr) -> bool:
    return isinstance(expr, ast.Call) and bool(expr.arguments)


def _opening(expr: ast.Expr) -> str:
    return f"{unparse.call_head(expr)}(" if isinstance(expr, ast.Call) else "("


def _use(item: ast.Use) -> str:
    path = _USE_PATH.match(item.span.text)
    return f"use {item.name.text}" if path is None else f"use {path[1]} as {item.name.text}"


def _is_bare_product(expr: ast.Expr) -> bool:
    """Whether a bound can stand without parentheses: names and numbers joined by `*`."""
    match expr:
        case ast.Ref():
            return True
        case ast.Literal():
            return isinstance(expr.value, int | float) and not isinstance(expr.value, bool)
        case ast.Binary(op="*", right=ast.Literal() | ast.Ref() as right):
            return _is_bare_product(expr.left) and _is_bare_product(right)
        case _:
            return False
