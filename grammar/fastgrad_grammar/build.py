"""Items, statements and types: from lark's parse tree to `ast`, with the checks that a grammar words badly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lark

from fastgrad_grammar import ast
from fastgrad_grammar.build_expression import (
    Child,
    ExpressionBuilder,
    Tree,
    node,
    token_of,
    tree_of,
    trees_of,
)
from fastgrad_grammar.diagnostics import either, nearest, short
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.source import Span

VALUE_TYPES = ("int", "float", "bool", "str", "floats")
TENSOR_TYPES = ("float", "int", "bool")


class Builder(ExpressionBuilder):
    """Converts one parse tree; what is wrong goes to `diagnostics`, and a stand-in takes its place."""

    def file(self, tree: Tree) -> ast.File:
        """The whole file."""
        items = tuple(_ITEMS[item.data](self, item) for item in trees_of(tree.children))
        return ast.File(Span(self.source, 0, len(self.source.text)), items)

    # ------------------------------------------------------------ types

    def value_type(self, child: Child, depth: int = 0) -> ast.ValueType:
        """`int`, `float?`; anything else is FG110."""
        tree = tree_of(child)
        if tree.data != "value_type":
            span = self.span(tree)
            message = "a tensor type where a compile-time type is needed"
            self.error("FG110", message, span, f"expected one of {either(VALUE_TYPES)}")
            return ast.ValueType(span, "int", False)
        name, optional = self.name(tree.children[0]), tree.children[1] is not None
        if name.text not in VALUE_TYPES:
            self._unknown_type(name, VALUE_TYPES)
        return ast.ValueType(self.span(tree), name.text, optional)

    def tensor_type(self, child: Child, depth: int = 0) -> ast.TensorType:
        """`float[b, n]`; anything else is FG110."""
        tree = tree_of(child)
        if tree.data != "tensor_type":
            span = self.span(tree)
            message, bare = f"`{short(span.text)}` is not the type of a tensor", span.text.rstrip("?")
            help_ = f"write {bare}[b, n], or {bare}[] for a scalar"
            self.error("FG110", message, span, "expected dimensions in brackets", help_=(help_,))
            return ast.TensorType(span, span.text, ())
        name = self.name(tree.children[0])
        if name.text not in TENSOR_TYPES:
            self._unknown_type(name, TENSOR_TYPES)
        dims = tuple(self.expr(dim, 1) for dim in tree.children[1:] if dim is not None)
        return ast.TensorType(self.span(tree), name.text, dims)

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
        type_tree, given = tree_of(tree.children[1]), tree.children[2]
        default = None if given is None else self.expr(given)
        if type_tree.data == "tensor_type":
            if behind:
                message, help_ = f"the tensor `{name.text}` is after `;`", "move it before the `;`"
                self.error("FG109", message, span, "tensors come first", help_=(help_,))
            if default is not None:
                message = f"the tensor `{name.text}` has a default"
                self.error("FG109", message, default.span, "only compile-time values have defaults")
            tensors.append(ast.TensorParam(span, name, self.tensor_type(type_tree)))
            return
        if not behind:
            message = f"the compile-time value `{name.text}` is before `;`"
            label = "tensors come before `;`, compile-time values after it"
            tensor = f"{name.text}: {self.span(type_tree).text.rstrip('?')}[...] if it is a tensor"
            help_ = f"write `;` instead of `,` before {name.text}, or {tensor}"
            self.error("FG109", message, span, label, help_=(help_,))
        values.append(ast.ValueParam(span, name, self.value_type(type_tree), default))

    # ------------------------------------------------------------ items

    def _use_file(self, tree: Tree, depth: int = 0) -> ast.Item:
        return ast.Use(self.span(tree), self.name(tree.children[1]), self.string(tree.children[0]))

    def _block(self, tree: Tree, depth: int = 0) -> ast.Item:
        name, parameters, results, body = tree.children
        tensors, values = self.parameters(parameters)
        types = tuple(self.tensor_type(result) for result in tree_of(results).children)
        statements = self.body(body, 0)
        is_model = tree.data == "model"
        return ast.BlockDecl(self.span(tree), is_model, self.name(name), tensors, values, types, statements)

    def _objective(self, tree: Tree, depth: int = 0) -> ast.Item:
        name, parameters, value = tree.children
        tensors, values = self.parameters(parameters)
        for extra in values[:1]:
            message, help_ = "an objective takes tensors only", "use a `param` of the file instead"
            self.error("FG109", message, extra.span, "a compile-time value", help_=(help_,))
        return ast.Objective(self.span(tree), self.name(name), tensors, self.expr(value))

    def _budget(self, tree: Tree, depth: int = 0) -> ast.Item:
        model, *entries = tree.children
        built = tuple(_ENTRIES[entry.data](self, entry) for entry in trees_of(entries))
        return ast.Budget(self.span(tree), None if model is None else self.name(model), built)

    def _at(self, tree: Tree, depth: int = 0) -> ast.At:
        pattern, rule = token_of(tree.children[-2]), tree_of(tree.children[-1])
        literal = ast.Literal(self.span(pattern), self.string(pattern))
        return ast.At(self.span(tree), literal, _ENTRIES[rule.data](self, rule))

    # ------------------------------------------------------------ statements

    def body(self, child: Child, depth: int) -> tuple[ast.Statement, ...]:
        """The statements between braces."""
        statements = trees_of(tree_of(child).children)
        return tuple(_STATEMENTS[tree.data](self, tree, depth + 1) for tree in statements)

    def _assign(self, tree: Tree, depth: int) -> ast.Statement:
        *names, value = tree.children
        return ast.Assign(self.span(tree), tuple(map(self.name, names)), self.expr(value, depth))

    def _weight(self, tree: Tree, depth: int) -> ast.Statement:
        name, kind, init = tree.children
        value = None if init is None else self.expr(init, depth)
        call = value if isinstance(value, ast.Call) else None
        if value is not None and call is None:
            message = f"the initialiser of `{self.name(name).text}` is not a call"
            label = "expected normal, trunc_normal, xavier, linspace, zeros, ones or constant"
            help_ = "write, for instance, = zeros() or = normal(std = 0.02)"
            self.error("FG114", message, value.span, label, help_=(help_,))
        return ast.Weight(self.span(tree), self.name(name), self.tensor_type(kind), call)

    def _if(self, tree: Tree, depth: int) -> ast.Statement:
        *branches, last = tree.children
        pairs = list(zip(branches[0::3], branches[1::3], branches[2::3], strict=True))
        if depth + len(pairs) - 1 > MAX_NESTING:
            self.report_depth(self.span(tree))
            return ast.Return(self.span(tree), ast.Literal(self.span(tree), None))
        otherwise = () if last is None else self.body(last, depth + len(pairs) - 1)
        whole = self.span(tree)
        for level, (keyword, condition, body) in reversed(list(enumerate(pairs, depth))):
            span = Span(self.source, self.span(token_of(keyword)).start, whole.end)
            otherwise = (ast.If(span, self.expr(condition, level), self.body(body, level), otherwise),)
        return otherwise[0]


_TYPE_SPELLINGS = {
    **dict.fromkeys(("integer", "long", "int64", "i64"), "int"),
    **dict.fromkeys(("double", "float32", "float64", "f32", "tensor", "Tensor"), "float"),
    "boolean": "bool",
    "string": "str",
}

_ITEMS: dict[str, Callable[..., ast.Item]] = {
    "use_library": node(ast.Use, Builder.name),
    "use_file": Builder._use_file,
    "param": node(ast.Param, Builder.name, Builder.value_type, Builder.expr),
    "dim": node(ast.DimDecl, Builder.name, Builder.expr, Builder.expr),
    "block": Builder._block,
    "model": Builder._block,
    "objective": Builder._objective,
    "budget": Builder._budget,
}
_ENTRIES: dict[str, Callable[..., Any]] = {
    "limit": node(ast.Limit, Builder.name, Builder.expr),
    "setting": node(ast.Setting, Builder.name, Builder.expr),
    "exact": node(ast.Exact),
    "at": Builder._at,
}
_STATEMENTS: dict[str, Callable[..., ast.Statement]] = {
    "assign": Builder._assign,
    "unpack": Builder._assign,
    "weight": Builder._weight,
    "buffer": node(ast.Buffer, Builder.name, Builder.tensor_type, Builder.expr),
    "repeat": node(ast.Repeat, Builder.name, Builder.expr, Builder.body),
    "if_": Builder._if,
    "return_": node(ast.Return, Builder.expr),
}
