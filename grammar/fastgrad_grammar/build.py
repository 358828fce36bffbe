"""Items, statements and types: from lark's parse tree to `ast`, with the checks that a grammar words badly."""

from __future__ import annotations

from collections.abc import Callable

import lark

from fastgrad_grammar import ast
from fastgrad_grammar.build_expression import (
    Child,
    ExpressionBuilder,
    Tree,
    either,
    short,
    token_of,
    tree_of,
    trees_of,
)
from fastgrad_grammar.diagnostics import nearest
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.source import Span

VALUE_TYPES = ("int", "float", "bool", "str", "floats")
TENSOR_TYPES = ("float", "int", "bool")


class Builder(ExpressionBuilder):
    """Converts one parse tree; what is wrong goes to `diagnostics`, and a stand-in takes its place."""

    def file(self, tree: Tree) -> ast.File:
        """The whole file."""
        items = tuple(_ITEMS[item.data](self, item) for item in trees_of(tree.children))
        return ast.File(items, Span(self.source, 0, len(self.source.text)))

    # ------------------------------------------------------------ types

    def value_type(self, child: Child) -> ast.ValueType:
        """`int`, `float?`; anything else is FG110."""
        tree = tree_of(child)
        if tree.data != "value_type":
            span = self.span(tree)
            self.error(
                "FG110",
                "a tensor type where a compile-time type is needed",
                span,
                f"expected one of {either(VALUE_TYPES)}",
            )
            return ast.ValueType("int", False, span)
        name, optional = self.name(tree.children[0]), tree.children[1] is not None
        if name.text not in VALUE_TYPES:
            self._unknown_type(name, VALUE_TYPES)
        return ast.ValueType(name.text, optional, self.span(tree))

    def tensor_type(self, child: Child) -> ast.TensorType:
        """`float[b, n]`; anything else is FG110."""
        tree = tree_of(child)
        if tree.data != "tensor_type":
            span = self.span(tree)
            self.error(
                "FG110",
                f"`{short(span.text)}` is not the type of a tensor",
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
        self.error(
            "FG110", f"unknown type `{name.text}`", name.span, f"expected {either(known)}", help_=help_
        )

    # ------------------------------------------------------------ signatures

    def parameters(self, child: Child) -> tuple[tuple[ast.TensorParam, ...], tuple[ast.ValueParam, ...]]:
        """The tensors before `;` and the compile-time values after it."""
        tensors: list[ast.TensorParam] = []
        values: list[ast.ValueParam] = []
        behind = False
        for part in tree_of(child).children:
            if isinstance(part, lark.Token):
                behind = True
            elif part is not None:
                self._parameter(part, behind, tensors, values)
        return tuple(tensors), tuple(values)

    def _parameter(
        self, tree: Tree, behind: bool, tensors: list[ast.TensorParam], values: list[ast.ValueParam]
    ) -> None:
        name, span = self.name(tree.children[0]), self.span(tree)
        type_tree, default = tree_of(tree.children[1]), self.optional_expr(tree.children[2])
        if type_tree.data == "tensor_type":
            if behind:
                self.error(
                    "FG109",
                    f"the tensor `{name.text}` is after `;`",
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
            f"the compile-time value `{name.text}` is before `;`",
            span,
            "tensors come before `;`, compile-time values after it",
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
        types = tuple(self.tensor_type(result) for result in tree_of(results).children)
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
        entries = tuple(_ENTRIES[entry.data](self, entry) for entry in trees_of(tree.children[1:]))
        return ast.Budget(self.optional_name(tree.children[0]), entries, self.span(tree))

    def _limit(self, tree: Tree) -> ast.Limit:
        return ast.Limit(self.name(tree.children[0]), self.expr(tree.children[1]), self.span(tree))

    def _setting(self, tree: Tree) -> ast.Setting:
        return ast.Setting(self.name(tree.children[0]), self.expr(tree.children[1]), self.span(tree))

    def _at(self, tree: Tree) -> ast.At:
        pattern, rule = tree.children[-2:]
        literal = ast.Literal(self.string(pattern), self.span(token_of(pattern)))
        return ast.At(literal, self._rule(tree_of(rule)), self.span(tree))

    def _rule(self, tree: Tree) -> ast.Rule:
        if tree.data == "exact":
            return ast.Exact(self.span(tree))
        return self._limit(tree) if tree.data == "limit" else self._setting(tree)

    # ------------------------------------------------------------ statements

    def body(self, child: Child, depth: int) -> tuple[ast.Statement, ...]:
        """The statements between braces."""
        return tuple(
            _STATEMENTS[tree.data](self, tree, depth + 1) for tree in trees_of(tree_of(child).children)
        )

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
            self.report_depth(self.span(tree))
            return ast.Return(ast.Literal(None, self.span(tree)), self.span(tree))
        otherwise = () if last is None else self.body(last, depth + len(pairs) - 1)
        whole = self.span(tree)
        for level, (keyword, condition, body) in reversed(list(enumerate(pairs, depth))):
            span = Span(self.source, self.span(token_of(keyword)).start, whole.end)
            otherwise = (ast.If(self.expr(condition, level), self.body(body, level), otherwise, span),)
        return otherwise[0]

    def _return(self, tree: Tree, depth: int) -> ast.Statement:
        return ast.Return(self.expr(tree.children[0], depth), self.span(tree))


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
