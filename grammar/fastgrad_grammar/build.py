"""From lark's parse tree to the syntax tree of `ast`, with the checks that a grammar words badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import lark

from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Diagnostic, Note, nearest
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.source import Source, Span

Tree: TypeAlias = lark.Tree[lark.Token]
Child: TypeAlias = Tree | lark.Token | None

VALUE_TYPES = ("int", "float", "bool", "str")
TENSOR_TYPES = ("float", "int", "bool")
COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
MAX_INT = 2**63 - 1


class Builder:
    """Converts one parse tree; what is wrong goes to `diagnostics`, and a stand-in takes its place."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.diagnostics: list[Diagnostic] = []
        self._too_deep = False

    def file(self, tree: Tree) -> ast.File:
        """The whole file."""
        items = tuple(_ITEMS[item.data](self, item) for item in _trees(tree.children))
        return ast.File(items, Span(self.source, 0, len(self.source.text)))

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

    def name(self, child: Child) -> ast.Name:
        """A `name` tree."""
        tree = _tree(child)
        return ast.Name(str(tree.children[0]), self.span(tree))

    def optional_name(self, child: Child) -> ast.Name | None:
        """A `name` tree, or None where there is none."""
        return None if child is None else self.name(child)

    def optional_expr(self, child: Child, depth: int = 0) -> ast.Expr | None:
        """An expression, or None where there is none."""
        return None if child is None else self.expr(child, depth)

    # ------------------------------------------------------------ types

    def value_type(self, child: Child) -> ast.ValueType:
        """`int`, `float?`; anything else is FG110."""
        tree = _tree(child)
        if tree.data != "value_type":
            span = self.span(tree)
            self.error(
                "FG110",
                "a tensor type where a compile-time type is needed",
                span,
                f"expected one of {_or(VALUE_TYPES)}",
            )
            return ast.ValueType("int", False, span)
        name, optional = self.name(tree.children[0]), tree.children[1] is not None
        if name.text not in VALUE_TYPES:
            self._unknown_type(name, VALUE_TYPES)
        return ast.ValueType(name.text, optional, self.span(tree))

    def tensor_type(self, child: Child) -> ast.TensorType:
        """`float[b, n]`; anything else is FG110."""
        tree = _tree(child)
        if tree.data != "tensor_type":
            span = self.span(tree)
            self.error(
                "FG110",
                f"`{_short(span.text)}` is not the type of a tensor",
                span,
                "expected dimensions in brackets",
                help_=(f"write {span.text.rstrip('?')}[b, n], or {span.text.rstrip('?')}[] for a scalar",),
            )
            return ast.TensorType(span.text, (), span)
        name = self.name(tree.children[0])
        if name.text not in TENSOR_TYPES:
            self._unknown_type(name, TENSOR_TYPES)
        dims = tuple(self.expr(dim, 1) for dim in tree.children[1:] if dim is not None)
        return ast.TensorType(name.text, dims, self.span(tree))

    def _unknown_type(self, name: ast.Name, known: tuple[str, ...]) -> None:
        near = _TYPE_SPELLINGS.get(name.text) or nearest(name.text, known)
        help_ = (f"did you mean {near}?",) if near in known else ()
        self.error("FG110", f"unknown type `{name.text}`", name.span, f"expected {_or(known)}", help_=help_)

    # ------------------------------------------------------------ signatures

    def parameters(self, child: Child) -> tuple[tuple[ast.TensorParam, ...], tuple[ast.ValueParam, ...]]:
        """The tensors before `;` and the compile-time values behind it."""
        tensors: list[ast.TensorParam] = []
        values: list[ast.ValueParam] = []
        behind = False
        for part in _tree(child).children:
            if isinstance(part, lark.Token):
                behind = True
            elif part is not None:
                self._parameter(part, behind, tensors, values)
        return tuple(tensors), tuple(values)

    def _parameter(
        self, tree: Tree, behind: bool, tensors: list[ast.TensorParam], values: list[ast.ValueParam]
    ) -> None:
        name, span = self.name(tree.children[0]), self.span(tree)
        type_tree, default = _tree(tree.children[1]), self.optional_expr(tree.children[2])
        if type_tree.data == "tensor_type":
            if behind:
                self.error(
                    "FG109",
                    f"the tensor `{name.text}` stands behind `;`",
                    span,
                    "tensors come first",
                    help_=("move it before the `;`",),
                )
            if default is not None:
                self.error(
                    "FG109",
                    f"the tensor `{name.text}` has a default",
                    default.span,
                    "only compile-time values have defaults",
                )
            tensors.append(ast.TensorParam(name, self.tensor_type(type_tree), span))
            return
        if not behind:
            self._value_before_semicolon(name, self.span(type_tree), span)
        values.append(ast.ValueParam(name, self.value_type(type_tree), default, span))

    def _value_before_semicolon(self, name: ast.Name, type_span: Span, span: Span) -> None:
        kind = type_span.text
        self.error(
            "FG109",
            f"the compile-time value `{name.text}` stands before `;`",
            span,
            "tensors stand before `;`, compile-time values behind it",
            help_=(
                f"write `;` instead of `,` before {name.text}, "
                f"or {name.text}: {kind.rstrip('?')}[...] if it is a tensor",
            ),
        )

    # ------------------------------------------------------------ items

    def _use_library(self, tree: Tree) -> ast.Item:
        return ast.Use(self.name(tree.children[0]), None, self.span(tree))

    def _use_file(self, tree: Tree) -> ast.Item:
        return ast.Use(self.name(tree.children[1]), self.string(tree.children[0]), self.span(tree))

    def _param(self, tree: Tree) -> ast.Item:
        name, kind, value = tree.children
        value_type = None if kind is None else self.value_type(kind)
        return ast.Param(self.name(name), value_type, self.expr(value), self.span(tree))

    def _dim(self, tree: Tree) -> ast.Item:
        name, at_most, multiple_of = tree.children
        return ast.DimDecl(
            self.name(name), self.optional_expr(at_most), self.optional_expr(multiple_of), self.span(tree)
        )

    def _block(self, tree: Tree) -> ast.Item:
        name, parameters, results, body = tree.children
        tensors, values = self.parameters(parameters)
        types = tuple(self.tensor_type(result) for result in _tree(results).children)
        statements = self.body(body, 0)
        return ast.BlockDecl(
            tree.data == "model", self.name(name), tensors, values, types, statements, self.span(tree)
        )

    def _objective(self, tree: Tree) -> ast.Item:
        name, parameters, value = tree.children
        tensors, values = self.parameters(parameters)
        for extra in values[:1]:
            self.error(
                "FG109",
                "an objective takes tensors only",
                extra.span,
                "a compile-time value",
                help_=("use a `param` of the file instead",),
            )
        return ast.Objective(self.name(name), tensors, self.expr(value), self.span(tree))

    def _budget(self, tree: Tree) -> ast.Item:
        entries = tuple(_ENTRIES[entry.data](self, entry) for entry in _trees(tree.children[1:]))
        return ast.Budget(self.optional_name(tree.children[0]), entries, self.span(tree))

    def _limit(self, tree: Tree) -> ast.Limit:
        return ast.Limit(self.name(tree.children[0]), self.expr(tree.children[1]), self.span(tree))

    def _setting(self, tree: Tree) -> ast.Setting:
        return ast.Setting(self.name(tree.children[0]), self.expr(tree.children[1]), self.span(tree))

    def _at(self, tree: Tree) -> ast.At:
        pattern, rule = tree.children[-2:]
        literal = ast.Literal(self.string(pattern), self.span(_token(pattern)))
        return ast.At(literal, self._rule(_tree(rule)), self.span(tree))

    def _rule(self, tree: Tree) -> ast.Rule:
        if tree.data == "exact":
            return ast.Exact(self.span(tree))
        return self._limit(tree) if tree.data == "limit" else self._setting(tree)

    # ------------------------------------------------------------ statements

    def body(self, child: Child, depth: int) -> tuple[ast.Statement, ...]:
        """The statements between braces."""
        return tuple(_STATEMENTS[tree.data](self, tree, depth + 1) for tree in _trees(_tree(child).children))

    def _assign(self, tree: Tree, depth: int) -> ast.Statement:
        *names, value = tree.children
        return ast.Assign(tuple(map(self.name, names)), self.expr(value, depth), self.span(tree))

    def _weight(self, tree: Tree, depth: int) -> ast.Statement:
        name, kind, init = tree.children
        value = self.optional_expr(init, depth)
        if value is not None and not isinstance(value, ast.Call):
            self.error(
                "FG114",
                f"the initialiser of `{self.name(name).text}` is not a call",
                value.span,
                "expected normal, trunc_normal, xavier, zeros or ones",
                help_=("write, for instance, = zeros() or = normal(std = 0.02)",),
            )
            value = None
        return ast.Weight(self.name(name), self.tensor_type(kind), value, self.span(tree))

    def _buffer(self, tree: Tree, depth: int) -> ast.Statement:
        name, kind, init = tree.children
        return ast.Buffer(
            self.name(name), self.tensor_type(kind), self.optional_expr(init, depth), self.span(tree)
        )

    def _repeat(self, tree: Tree, depth: int) -> ast.Statement:
        index, count, body = tree.children
        return ast.Repeat(self.name(index), self.expr(count, depth), self.body(body, depth), self.span(tree))

    def _if(self, tree: Tree, depth: int) -> ast.Statement:
        *branches, last = tree.children
        pairs = list(zip(branches[0::3], branches[1::3], branches[2::3], strict=True))
        if depth + len(pairs) - 1 > MAX_NESTING:
            self._report_depth(self.span(tree))
            return ast.Return(ast.Literal(None, self.span(tree)), self.span(tree))
        otherwise = () if last is None else self.body(last, depth + len(pairs) - 1)
        whole = self.span(tree)
        for level, (keyword, condition, body) in reversed(list(enumerate(pairs, depth))):
            span = Span(self.source, self.span(_token(keyword)).start, whole.end)
            otherwise = (ast.If(self.expr(condition, level), self.body(body, level), otherwise, span),)
        return otherwise[0]

    def _return(self, tree: Tree, depth: int) -> ast.Statement:
        return ast.Return(self.expr(tree.children[0], depth), self.span(tree))

    # ------------------------------------------------------------ expressions

    def expr(self, child: Child, depth: int = 0) -> ast.Expr:
        """An expression, `depth` levels down; below `MAX_NESTING` it is reported and cut off."""
        tree = _tree(child)
        if depth > MAX_NESTING:
            self._report_depth(self.span(tree))
            return ast.Literal(None, self.span(tree))
        return _EXPRESSIONS[tree.data](self, tree, depth)

    def _report_depth(self, span: Span) -> None:
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

    def _conditional(self, tree: Tree, depth: int) -> ast.Expr:
        then, condition, otherwise = (self.expr(part, depth + 1) for part in tree.children)
        return ast.Conditional(condition, then, otherwise, self.span(tree))

    def _chain(self, tree: Tree, depth: int) -> ast.Expr:
        operands, operators = tree.children[0::2], [_token(token) for token in tree.children[1::2]]
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
            self._report_depth(self.span(operators[MAX_NESTING - depth]))
            return ast.Literal(None, self.span(tree))
        left = self.expr(operands[0], left_depth)
        start = _start(operands[0])
        for index, (operator, operand) in enumerate(zip(operators, operands[1:], strict=True)):
            right = self.expr(operand, left_depth - index)
            span = Span(self.source, start, _end(operand))
            left = ast.Binary(operator.value, left, right, span)
        return left

    def _unary(self, tree: Tree, depth: int) -> ast.Expr:
        operator, operand = tree.children
        return ast.Unary(str(_token(operator)), self.expr(operand, depth + 1), self.span(tree))

    def _transpose(self, tree: Tree, depth: int) -> ast.Expr:
        return ast.Transpose(self.expr(tree.children[0], depth + 1), self.span(tree))

    def _index(self, tree: Tree, depth: int) -> ast.Expr:
        operand, *slices = tree.children
        parts = tuple(self._slice(part, depth + 1) for part in _trees(slices))
        return ast.Index(self.expr(operand, depth + 1), parts, self.span(tree))

    def _slice(self, tree: Tree, depth: int) -> ast.Slice:
        span = self.span(tree)
        if tree.data == "ellipsis":
            return ast.Slice(None, None, None, True, span)
        if tree.data == "at_index":
            return ast.Slice(None, None, self.expr(tree.children[0], depth), False, span)
        start, stop = (self.optional_expr(part, depth) for part in tree.children)
        return ast.Slice(start, stop, None, False, span)

    def _number(self, tree: Tree, depth: int) -> ast.Expr:
        token = _token(tree.children[0])
        span = self.span(token)
        if token.type == "FLOAT":
            value: int | float = float(token.replace("_", ""))
            too_large = math.isinf(value)
        else:
            digits = token.replace("_", "").lstrip("0")
            too_large = len(digits) > 19 or int(digits or "0") > MAX_INT
            value = 0 if too_large else int(digits or "0")
        if too_large:
            self.error(
                "FG120", "number is too large", span, f"at most {MAX_INT} and, with a point, about 1.8e308"
            )
            value = 0
        return ast.Literal(value, span)

    def string(self, child: Child) -> str:
        """The value of a STRING token; FG119 for an unknown escape."""
        token = _token(child)
        start, text, out, index = token.start_pos or 0, str(token)[1:-1], [], 0
        while index < len(text):
            if text[index] != "\\":
                out.append(text[index])
                index += 1
                continue
            escape = text[index + 1]
            if escape not in _ESCAPES:
                self.error(
                    "FG119",
                    f"unknown escape `\\{escape}` in a string",
                    Span(self.source, start + 1 + index, start + 3 + index),
                    'known: \\" \\\\ \\n \\t',
                    help_=("write `\\\\` for a backslash",),
                )
            out.append(_ESCAPES.get(escape, escape))
            index += 2
        return "".join(out)

    def _string(self, tree: Tree, depth: int) -> ast.Expr:
        return ast.Literal(self.string(tree.children[0]), self.span(tree))

    def _constant(self, tree: Tree, depth: int) -> ast.Expr:
        return ast.Literal(_CONSTANTS[str(_token(tree.children[0]))], self.span(tree))

    def _reference(self, tree: Tree, depth: int) -> ast.Expr:
        name = self.name(tree.children[0])
        return ast.Ref(name.text, name.span)

    def _tuple(self, tree: Tree, depth: int) -> ast.Expr:
        items = tuple(self.expr(item, depth + 1) for item in tree.children if item is not None)
        return ast.Tuple(items, self.span(tree))

    def _call(self, tree: Tree, depth: int) -> ast.Expr:
        module, function, arguments, label = tree.children
        return ast.Call(
            None if module is None else self.name(module).text,
            self.name(function),
            self._arguments(_tree(arguments), depth + 1),
            self.optional_name(label),
            self.span(tree),
        )

    def _arguments(self, tree: Tree, depth: int) -> tuple[ast.Argument, ...]:
        behind = False
        arguments: list[ast.Argument] = []
        for part in tree.children:
            if isinstance(part, lark.Token):
                behind = True
            elif part is not None:
                name, value = part.children
                arguments.append(
                    ast.Argument(self.expr(value, depth), self.optional_name(name), behind, self.span(part))
                )
        self._check_order(arguments)
        self._check_twice(arguments)
        return tuple(arguments)

    def _check_order(self, arguments: Sequence[ast.Argument]) -> None:
        for before, argument in pairwise(arguments):
            if before.name is not None and argument.name is None:
                self.error(
                    "FG112",
                    "a positional argument stands behind a keyword argument",
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


_TYPE_SPELLINGS = {
    "integer": "int",
    "long": "int",
    "boolean": "bool",
    "string": "str",
    "double": "float",
    "float32": "float",
    "float64": "float",
    "tensor": "float",
    "Tensor": "float",
    "int64": "int",
    "f32": "float",
    "i64": "int",
}

_ITEMS: dict[str, Callable[[Builder, Tree], ast.Item]] = {
    "use_library": Builder._use_library,
    "use_file": Builder._use_file,
    "param": Builder._param,
    "dim": Builder._dim,
    "block": Builder._block,
    "model": Builder._block,
    "objective": Builder._objective,
    "budget": Builder._budget,
}
_ENTRIES: dict[str, Callable[[Builder, Tree], ast.Limit | ast.Setting | ast.At]] = {
    "limit": Builder._limit,
    "setting": Builder._setting,
    "at": Builder._at,
}
_STATEMENTS: dict[str, Callable[[Builder, Tree, int], ast.Statement]] = {
    "assign": Builder._assign,
    "unpack": Builder._assign,
    "weight": Builder._weight,
    "buffer": Builder._buffer,
    "repeat": Builder._repeat,
    "if_": Builder._if,
    "return_": Builder._return,
}
_EXPRESSIONS: dict[str, Callable[[Builder, Tree, int], ast.Expr]] = {
    "conditional": Builder._conditional,
    "chain": Builder._chain,
    "unary": Builder._unary,
    "transpose": Builder._transpose,
    "index": Builder._index,
    "number": Builder._number,
    "string": Builder._string,
    "constant": Builder._constant,
    "reference": Builder._reference,
    "tuple": Builder._tuple,
    "call": Builder._call,
}


def _trees(children: Iterable[Child]) -> list[Tree]:
    return [child for child in children if isinstance(child, lark.Tree)]


def _tree(child: Child) -> Tree:
    if not isinstance(child, lark.Tree):
        raise TypeError(f"expected a tree, not {child!r}")
    return child


def _token(child: Child) -> lark.Token:
    if not isinstance(child, lark.Token):
        raise TypeError(f"expected a token, not {child!r}")
    return child


def _start(child: Child) -> int:
    """Where an operand begins, its parentheses included."""
    meta = _tree(child).meta
    return int(getattr(meta, "container_start_pos", meta.start_pos))


def _end(child: Child) -> int:
    meta = _tree(child).meta
    return int(getattr(meta, "container_end_pos", meta.end_pos))


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _short(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= 40 else f"{line[:37]}..."
