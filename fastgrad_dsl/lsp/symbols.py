"""The names of a text: what each one means, and where it stands.

A name of a block means one thing throughout the block, however often it is bound anew. A label means what `at "..."`
finds by it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fastgrad_grammar import ast
from fastgrad_grammar.source import Source, Span

_SEGMENT = re.compile(r"[^.\"]+")


@dataclass(frozen=True)
class Symbol:
    """What a name means: `space` is block, file, use, label or the name of a block, in `path`."""

    path: str
    space: str
    name: str


@dataclass(frozen=True)
class Occurrence:
    """A place of a symbol; `kind` is that of its binding. `node` is the syntax whose value the name is bound to."""

    symbol: Symbol
    span: Span
    kind: str
    defines: bool = False
    node: Span | None = None


@dataclass(frozen=True)
class Index:
    """The occurrences of a text by their place, and its items."""

    source: Source
    items: tuple[ast.Item, ...]
    occurrences: tuple[Occurrence, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [each.span.start for each in self.occurrences]

    def at(self, offset: int) -> Occurrence | None:
        """The occurrence at a place, also one that ends there."""
        place = bisect_right(self._starts, offset) - 1
        found = self.occurrences[place] if place >= 0 else None
        if found is not None and found.span.start == offset == found.span.end:
            return None
        if found is None or offset > found.span.end:
            return None
        return found

    @cached_property
    def by_symbol(self) -> Mapping[Symbol, tuple[Occurrence, ...]]:
        """All places of each symbol, in order."""
        found: dict[Symbol, list[Occurrence]] = {}
        for each in self.occurrences:
            found.setdefault(each.symbol, []).append(each)
        return {symbol: tuple(places) for symbol, places in found.items()}

    @cached_property
    def blocks(self) -> Mapping[str, ast.BlockDecl]:
        """Blocks and models by name."""
        return {item.name.text: item for item in reversed(self.items) if isinstance(item, ast.BlockDecl)}

    @cached_property
    def uses(self) -> Mapping[str, ast.Use]:
        """What the file uses, by the name that it has there."""
        return {item.name.text: item for item in reversed(self.items) if isinstance(item, ast.Use)}

    def block_at(self, offset: int) -> ast.BlockDecl | None:
        """The block or model around a place."""
        blocks = (item for item in self.items if isinstance(item, ast.BlockDecl))
        return next((block for block in blocks if block.span.start <= offset <= block.span.end), None)

    def space_at(self, offset: int) -> str:
        """The space of the names that are bound around a place, empty outside of blocks and the objective."""
        items = (item for item in self.items if isinstance(item, ast.BlockDecl | ast.Objective))
        item = next((item for item in items if item.span.start <= offset <= item.span.end), None)
        if item is None:
            return ""
        return f"{'block' if isinstance(item, ast.BlockDecl) else 'objective'} {item.name.text}"

    def definition_before(self, symbol: Symbol, offset: int) -> Occurrence | None:
        """Where a name that stands at a place was bound last: what binds it after that is another value."""
        found = [each for each in self.by_symbol.get(symbol, ()) if each.defines]
        before = [each for each in found if each.span.start <= offset]
        return before[-1] if before else (found[0] if found else None)


def index_of(source: Source, tree: ast.File | None, used: Mapping[str, str]) -> Index:
    """The index of a tree; `used` are the paths of the files that it uses, by the name that it has for them."""
    items = tree.items if tree is not None else ()
    found = _Finder(source.path, items, used).run()
    return Index(source, items, tuple(sorted(found, key=lambda each: each.span.start)))


@dataclass
class _Finder:
    """One pass over the items; `locals` are the names that the block has bound so far."""

    path: str
    items: tuple[ast.Item, ...]
    used: Mapping[str, str]
    found: list[Occurrence] = field(default_factory=list)
    locals: dict[str, str] = field(default_factory=dict)
    space: str = ""
    taken: set[int] = field(default_factory=set)
    blocks: set[str] = field(default_factory=set)
    file: dict[str, str] = field(default_factory=dict)

    def run(self) -> list[Occurrence]:
        self.blocks = {item.name.text for item in self.items if isinstance(item, ast.BlockDecl)}
        self.file = {
            item.name.text: "param" if isinstance(item, ast.Param) else "dim"
            for item in reversed(self.items)
            if isinstance(item, ast.Param | ast.DimDecl)
        }
        for item in self.items:
            self.locals, self.space = {}, ""
            self._item(item)
        self._patterns()
        return self.found

    # ------------------------------------------------------------ items

    def _item(self, item: ast.Item) -> None:
        match item:
            case ast.Use():
                self._define(item.name, "use", "use", item.span)
            case ast.Param():
                self._expr(item.value)
                self._define(item.name, "file", "param", item.span)
            case ast.DimDecl():
                self._exprs(item.at_most, item.multiple_of)
                self._define(item.name, "file", "dim", item.span)
            case ast.BlockDecl():
                self._define(item.name, "block", "model" if item.is_model else "block", item.span)
                self._block(item)
            case ast.Objective():
                self._objective(item)
            case ast.Budget():
                self._budget(item)

    def _objective(self, item: ast.Objective) -> None:
        self._define(item.name, "objective", "objective", item.span)
        self.space = f"objective {item.name.text}"
        for tensor in item.tensors:
            self._exprs(*tensor.type.dims)
            self._bind(tensor.name, "input", tensor.span)
        self._expr(item.value)

    def _budget(self, item: ast.Budget) -> None:
        if item.model is not None and item.model.text in self.blocks:
            self._add("block", item.model.text, item.model.span, "model")
        for entry in item.entries:
            rule = entry.rule if isinstance(entry, ast.At) else entry
            if not isinstance(rule, ast.Exact):
                self._expr(rule.value)

    def _block(self, block: ast.BlockDecl) -> None:
        self.space = f"block {block.name.text}"
        values = {value.name.text for value in block.values}
        if not block.is_model:
            for tensor in block.tensors:
                for dim in tensor.type.dims:
                    if isinstance(dim, ast.Ref) and dim.name not in values and self._is_free(dim.name):
                        self._bind(ast.Name(dim.span, dim.name), "size", dim.span)
        for value in block.values:
            self.locals[value.name.text] = "value"
        for tensor in block.tensors:
            self._exprs(*tensor.type.dims)
            self._bind(tensor.name, "input", tensor.span)
        for value in block.values:
            self._exprs(value.default)
            self._bind(value.name, "value", value.span)
        for result in block.results:
            self._exprs(*result.dims)
        self._body(block.body)

    def _is_free(self, name: str) -> bool:
        return name not in self.locals and self.file.get(name) != "param"

    # ------------------------------------------------------------ statements

    def _body(self, body: Iterable[ast.Statement]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, statement: ast.Statement) -> None:
        match statement:
            case ast.Assign():
                self._expr(statement.value)
                node = statement.value.span if len(statement.targets) == 1 else None
                for target in statement.targets:
                    self._bind(target, "local", node)
            case ast.Weight() | ast.Buffer():
                self._exprs(*statement.type.dims, statement.init)
                kind = "weight" if isinstance(statement, ast.Weight) else "buffer"
                self._bind(statement.name, kind, statement.span)
            case ast.Repeat():
                self._expr(statement.count)
                self._bind(statement.index, "index", None)
                self._body(statement.body)
            case ast.If():
                self._expr(statement.condition)
                self._body(statement.then)
                self._body(statement.otherwise)
            case ast.Return():
                self._expr(statement.value)

    # ------------------------------------------------------------ expressions

    def _exprs(self, *exprs: ast.Expr | None) -> None:
        for expr in exprs:
            if expr is not None:
                self._expr(expr)

    def _expr(self, expr: ast.Expr) -> None:
        match expr:
            case ast.Ref():
                self._name(expr.name, expr.span)
            case ast.Call():
                self._call(expr)
            case _:
                for child in children(expr):
                    self._expr(child)

    def _name(self, name: str, span: Span) -> None:
        if name in self.locals:
            self._add(self.space, name, span, self.locals[name])
        elif name in self.file:
            self._add("file", name, span, self.file[name])

    def _call(self, call: ast.Call) -> None:
        name, path = call.function, self.path
        if call.module is not None:
            at = Span(call.span.source, call.span.start, call.span.start + len(call.module))
            self._add("use", call.module, at, "use")
            path = self.used.get(call.module, "")
        own = self.space == f"block {name.text}"
        is_block = bool(path) if call.module is not None else name.text in self.blocks and not own
        if is_block:
            self.found.append(Occurrence(Symbol(path, "block", name.text), name.span, "block"))
        for argument in call.arguments:
            if argument.name is not None and is_block:
                symbol = Symbol(path, f"block {name.text}", argument.name.text)
                self.found.append(Occurrence(symbol, argument.name.span, "parameter"))
            self._expr(argument.value)
        if call.label is not None:
            self._define(call.label, "label", "label", call.span)

    # ------------------------------------------------------------ labels in patterns

    def _patterns(self) -> None:
        """The segments of `at "layers.0.*"` that are labels, or names of blocks whose calls have no label."""
        labels = {each.symbol.name for each in self.found if each.kind == "label"}
        called = {each.symbol for each in self.found if each.kind == "block" and not each.defines}
        by_name = {symbol.name: symbol for symbol in called}
        for item in self.items:
            for entry in item.entries if isinstance(item, ast.Budget) else ():
                if not isinstance(entry, ast.At):
                    continue
                span = entry.pattern.span
                for segment in _SEGMENT.finditer(span.text):
                    at = Span(span.source, span.start + segment.start(), span.start + segment.end())
                    if segment[0] in labels:
                        self._add("label", segment[0], at, "label")
                    elif segment[0] in by_name:
                        self.found.append(Occurrence(by_name[segment[0]], at, "block"))

    # ------------------------------------------------------------ what is found

    def _bind(self, name: ast.Name, kind: str, node: Span | None) -> None:
        self.locals.setdefault(name.text, kind)
        self.taken.add(name.span.start)
        self.found.append(Occurrence(self._symbol(self.space, name.text), name.span, kind, True, node))

    def _define(self, name: ast.Name, space: str, kind: str, node: Span) -> None:
        self.found.append(Occurrence(self._symbol(space, name.text), name.span, kind, True, node))

    def _add(self, space: str, name: str, span: Span, kind: str) -> None:
        if span.start not in self.taken:  # a dim of a signature, which is bound where it first stands
            self.found.append(Occurrence(self._symbol(space, name), span, kind))

    def _symbol(self, space: str, name: str) -> Symbol:
        return Symbol(self.path, space, name)


def children(expr: object) -> Iterator[ast.Expr]:
    """The expressions directly inside of one; those of a call are its arguments."""
    match expr:
        case ast.Unary() | ast.Transpose():
            yield expr.operand
        case ast.Binary():
            yield from (expr.left, expr.right)
        case ast.Conditional():
            yield from (expr.then, expr.condition, expr.otherwise)
        case ast.Tuple():
            yield from expr.items
        case ast.Call():
            yield from (argument.value for argument in expr.arguments)
        case ast.Index():
            yield expr.operand
            for part in expr.slices:
                yield from (each for each in (part.start, part.stop, part.index) if each is not None)
