"""The body of a `forward`: one statement for each of the `.tfg` file, each behind its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePath

from fastgrad_compiler.codegen.attention_kernels import kernel_spec
from fastgrad_compiler.codegen.expressions import TORCH
from fastgrad_compiler.codegen.kernel import KernelSpec
from fastgrad_compiler.codegen.liveness import FOREVER, Statements
from fastgrad_compiler.codegen.members import Member, Repeated, runs_of
from fastgrad_compiler.codegen.names import base, member_access, unique, variable
from fastgrad_compiler.codegen.needs import Needs, sources, weight_path
from fastgrad_compiler.codegen.place import Operands
from fastgrad_compiler.codegen.writer import ADD, ATOM, MULTIPLY, Expr, Writer, attribute, call, index, literal
from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Attribute, Graph, Node, Program, TensorType
from fastgrad_grammar.source import Span

LONGEST = 88  # of an expression, before parts of it get a name of their own


@dataclass
class Imports:
    """What a generated module takes from its siblings: names by file, kernels by their node's specification."""

    helpers: set[str] = field(default_factory=set)
    kernels: dict[KernelSpec, str] = field(default_factory=dict)  # with the name that the module gives it
    exact_attention: bool = False


@dataclass(frozen=True)
class Module:
    """What all blocks of one generated module share."""

    program: Program
    classes: dict[str, str]
    needs: dict[str, Needs]
    imports: Imports
    exact: bool
    safe_softmax: bool


def place_of(span: Span) -> str:
    """`gpt.tfg:14`; the folder of the user's file is left out."""
    path, _, line = span.short_place.rpartition(":")
    return f"{path if path.startswith('std/') else PurePath(path).name}:{line}"


def source_line(span: Span) -> str:
    """The whole line or lines in which a span stands, on one line."""
    source = span.source
    first, last = source.position(span.start)[0], source.position(max(span.start, span.end - 1))[0]
    lines = [source.line(number).strip() for number in range(first, last + 1)]
    if len(lines) > 1:
        lines = [line if '"' in line else line.partition("#")[0].strip() for line in lines]
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


class Block:
    """Writes the statements of one graph. As a `Place`, it is what the rules of TORCH ask."""

    def __init__(
        self, module: Module, graph: Graph, writer: Writer, members: Mapping[str, Member], *, in_class: bool = True
    ) -> None:
        self.module, self.graph, self.writer, self.members = module, graph, writer, members
        self.exact, self.safe_softmax = module.exact, module.safe_softmax
        self.in_class = in_class
        self.suffix = ""  # behind a label within a repeat
        self.template: Expr | None = None  # a float tensor that new ones are made like
        self.comments = True
        self.values: dict[str, Expr] = {}
        self.holders: dict[str, int] = {}  # variable -> position of its value's last use
        self.dims: dict[str, str] = {}
        self.statements = Statements(graph)
        self.at = 0
        self.last_comment = ""

    # ------------------------------------------------------------ what the rules ask

    def dim(self, value: Attribute) -> Expr:
        assert isinstance(value, int | Dim)
        dim = Dim.of(value)
        text = dim.substitute({name: self.dims[name] for name in dim.names}).python
        return Expr(text, ADD if len(dim.terms) > 1 else MULTIPLY if " " in text else ATOM)

    def helper(self, name: str) -> str:
        self.module.imports.helpers.add(name)
        return name

    def type(self, name: str) -> TensorType:
        return self.graph[name].tensor

    def like(self) -> Expr:
        return self.template or Expr("like")

    def device(self) -> Expr:
        if self.graph.inputs:
            return attribute(self.values[self.graph.inputs[0].name], "device")
        return attribute(self.like(), "device")

    def kernel(self, node: Node) -> str:
        spec, kernels = kernel_spec(self.graph, node), self.module.imports.kernels
        if spec not in kernels:
            kernels[spec] = unique("polynomial_attention", kernels.values())
        return kernels[spec]

    def exact_kernel(self) -> str:
        self.module.imports.exact_attention = True
        return "exact_attention"

    def bind(self, value: Expr, name: str) -> Expr:
        target = self._allocate(variable(name), self.at, strict=True)
        self.holders[target] = self.at
        self.writer.statement(f"{target} = ", value)
        return Expr(target)

    def remark(self, text: str) -> None:
        self.writer.comment(text)

    # ------------------------------------------------------------ names

    def _allocate(self, stem: str, until: int, *, strict: bool = False) -> str:
        """A variable whose present value, if any, is not needed after this statement (`strict`: in it)."""
        limit = self.at - 1 if strict else self.at
        taken = [name for name, last in self.holders.items() if last > limit]
        name = unique(stem, [*taken, *self.dims.values()])
        self.holders[name] = until
        return name

    def assign(self, node_name: str) -> str:
        """The variable that holds a node from here on."""
        stem = variable(base(node_name, self.graph.by_name))
        target = self._allocate(stem, self.statements.last_use[node_name])
        self.values[node_name] = Expr(target)
        return target

    def bind_inputs(self) -> list[str]:
        """The names of the arguments, in order."""
        path = weight_path(self.module.program, self.graph)
        floats = [node.name for node in self.graph.inputs if node.tensor.dtype == "float"]
        if path is None and floats and self.module.needs[self.graph.name].makes:
            self.statements.last_use[floats[0]] = FOREVER  # other tensors are made like it
        names = [self.assign(node.name) for node in self.graph.inputs]
        if path is not None:
            self.template = Expr(self._path(path))
        elif floats:
            self.template = self.values[floats[0]]
        return names

    def name_dims(self, wanted: Sequence[str]) -> None:
        """Variables for run-time dims, which keep their names."""
        for name in wanted:
            self.dims[name] = unique(variable(name), [*self.holders, *self.dims.values()])

    def read_dims(self, node: Node, wanted: Sequence[str]) -> list[str]:
        """Statements that read those dims that `node`, an input, shows; gives their names."""
        shown = sources(self.graph)
        names = [name for name in wanted if name in shown and shown[name].input == node.name]
        if names:
            self._read_dims(node, names)
        return names

    def _read_dims(self, node: Node, names: list[str]) -> None:
        shown = sources(self.graph)
        shape = attribute(self.values[node.name], "shape")
        plain = {shown[n].axis: n for n in names if shown[n].factor == 1}
        rank = len(node.tensor.shape)
        if len(plain) > 1 or rank == 1 == len(plain):
            targets = [self.dims[plain[axis]] if axis in plain else "_" for axis in range(rank)]
            while len(targets) > 1 and targets[-1] == "_" == targets[-2]:
                targets.pop()
            short = len(targets) < rank
            places = f"[:{len(targets)}]" if short else ""
            self.writer.line(f"{', '.join(targets)}{',' if rank == 1 else ''} = {shape}{places}")
            names = [n for n in names if n not in plain.values()]
        for name in names:
            size = index(shape, str(shown[name].axis))
            self.writer.line(f"{self.dims[name]} = {_scaled(size, shown[name].factor)}")

    # ------------------------------------------------------------ statements

    def write(self) -> None:
        """All statements but the return."""
        self._write(self.statements.roots)

    def write_function(self) -> None:
        """All statements; a last one whose value is the result returns it."""
        roots = self.statements.roots
        last = roots[-1] if roots else None
        direct = last is not None and last.op != "repeat" and self.graph.outputs == (last.name,)
        if last is None or not direct or self.statements.uses[last.name] > 1:
            self._write(roots)
            self._return()
            return
        self._write(roots[:-1])
        self.at = len(roots) - 1
        self._comment(last)
        self.writer.statement("return ", self.expression(last))

    def _write(self, roots: Sequence[Node]) -> None:
        for position, node in enumerate(roots):
            self.at = position
            self._comment(node)
            if node.op == "repeat":
                self._repeat(node)
            elif isinstance(node.type, tuple):
                self._several(node, self._call(node))
            else:
                value = self.expression(node)
                self.writer.statement(f"{self.assign(node.name)} = ", value)
        self.at = FOREVER - 1

    def results(self) -> list[Expr]:
        """The values of the outputs."""
        found = []
        for name in self.graph.outputs:
            if name not in self.values:
                self._comment(self.graph[name])
            found.append(self.value(name))
        return found

    def _return(self) -> None:
        found = self.results()
        if len(found) == 1:
            self.writer.statement("return ", found[0])
        else:
            self.writer.line(f"return {', '.join(map(str, found))}")

    def _comment(self, node: Node) -> None:
        span = self.statements.statement_of(node).span
        if span is None or not self.comments:
            return
        text = source_line(span)
        if node.op == "repeat":
            text = text.partition("{")[0] + "{"
        mark = f"{place_of(span)}: {text}"
        if mark != self.last_comment:
            self.writer.comment(mark)
        self.last_comment = mark

    def value(self, name: str) -> Expr:
        """A node as an operand: its variable, or its expression."""
        node = self.graph[name]
        if name in self.values:
            return self.values[name]
        if node.op in ("weight", "buffer"):
            return self._member(str(node["label"]))
        if node.op == "constant":
            number = node["value"]
            assert not isinstance(number, tuple | Dim)
            return literal(number)
        return self.expression(node)

    def expression(self, node: Node) -> Expr:
        """The expression of a node; where it grows long, its longest parts are kept in variables first."""
        if node.op == "call":
            return self._call(node)
        operands = [self.value(name) for name in node.inputs]
        result = self._apply(node, operands)
        while len(result.text) > LONGEST:
            longest = max(range(len(operands)), key=lambda i: self._weight(operands[i]), default=-1)
            if longest < 0 or not self._weight(operands[longest]):
                break
            operands[longest] = self.bind(operands[longest], _noun(self.graph[node.inputs[longest]]))
            result = self._apply(node, operands)
        return result

    def _weight(self, operand: Expr) -> int:
        return 0 if operand.is_name or operand.number else len(operand.text)

    def _apply(self, node: Node, operands: Operands) -> Expr:
        lines = len(self.writer.lines)
        result = TORCH[node.op](self, node, operands)
        if len(result.text) > LONGEST and any(map(self._weight, operands)):
            del self.writer.lines[lines:]  # remarks and masks of a rule are written again by the next attempt
        return result

    def _call(self, node: Node) -> Expr:
        graph = str(node["graph"])
        needed = self.module.needs[graph]
        arguments: list[object] = []
        for name in node.inputs:
            value = self.value(name)
            if len(value.text) > LONGEST // 2 and not value.is_name:
                value = self.bind(value, _noun(self.graph[name]))
            arguments.append(value)
        arguments += [f"{variable(name)}={self.dims[name]}" for name in needed.extra]
        if needed.like:
            arguments.append(f"like={self.like()}")
        if not self.in_class:
            return call(f"{self.module.classes[graph]}()", *arguments)
        return call(str(self._member(str(node["label"]))), *arguments)

    def _member(self, label: str) -> Expr:
        member = self.members[label]
        access = member_access(label, member.kind)
        if isinstance(member, Repeated) and not member.complete:
            places = self.suffix[1:-1].split("][")
            return Expr(access + "".join(f'[f"{{{place}}}"]' for place in places))
        return Expr(access + self.suffix)

    def _path(self, path: str) -> str:
        label, *rest = re.split(r"(?=[.\[])", path)
        return member_access(label, self.members[label].kind) + "".join(rest)

    def _several(self, node: Node, value: Expr) -> None:
        assert isinstance(node.type, tuple)
        items = {int(str(user["index"])): user.name for user in self.graph.users[node.name]}
        targets = [self.assign(items[i]) if i in items else "_" for i in range(len(node.type))]
        self.writer.statement(f"{', '.join(targets)} = ", value)

    # ------------------------------------------------------------ repeats

    def _repeat(self, node: Node) -> None:
        carried = int(str(node["carried"]))
        given = [self.value(name) for name in node.inputs]
        for position in range(carried, len(given)):
            if self._weight(given[position]):
                given[position] = self.bind(given[position], _noun(self.graph[node.inputs[position]]))
        results = self._repeat_results(node, carried)
        loop = self._loop_variables(node, given, results, carried)
        runs = runs_of(node)
        counter = unique("i", [*self.holders, *self.dims.values()])
        bodies = [self._body(name, loop, given, counter) for name, _ in runs]
        total = sum(times for _, times in runs)
        self.writer.line(f"for {counter} in range({total}):")
        with self.writer.indented():
            self._alternatives(counter, bodies, [times for _, times in runs])
        for name, target in zip(results, loop, strict=True):
            if name is not None:
                self.values[name] = Expr(target)
                self.holders[target] = self.statements.last_use[name]
        self.last_comment = ""

    def _repeat_results(self, node: Node, carried: int) -> list[str | None]:
        if not isinstance(node.type, tuple):
            return [node.name]
        items = {int(str(user["index"])): user.name for user in self.graph.users[node.name]}
        return [items.get(i) for i in range(carried)]

    def _loop_variables(
        self, node: Node, given: list[Expr], results: list[str | None], carried: int
    ) -> list[str]:
        """The variables that the loop rebinds; their first values are assigned where they are not there already."""
        loop: list[str] = []
        body = self.module.program[runs_of(node)[0][0]]
        for position in range(carried):
            first, name = node.inputs[position], results[position]
            stem = variable(base(name or body.inputs[position].name, self.graph.by_name))
            shared = first in node.inputs[carried:] or node.inputs[:carried].count(first) > 1
            free = self.statements.last_use[first] <= self.at and not shared
            text = given[position].text
            if free and text in self.holders and text not in loop:
                target = text
            else:
                target = self._allocate(stem, FOREVER, strict=True)
                self.writer.statement(f"{target} = ", given[position])
            self.holders[target] = FOREVER
            loop.append(target)
        return loop

    def _body(self, name: str, loop: list[str], given: list[Expr], counter: str) -> list[str]:
        """The lines of one iteration."""
        graph = self.module.program[name]
        inner = Block(self.module, graph, Writer(), self.members, in_class=self.in_class)
        inner.suffix, inner.dims, inner.template = f"{self.suffix}[{counter}]", self.dims, self.template
        for node, value in zip(graph.inputs, [*map(Expr, loop), *given[len(loop) :]], strict=True):
            inner.values[node.name] = value
        inner.holders = {variable: FOREVER for variable, last in self.holders.items() if last >= self.at}
        inner.holders[counter] = FOREVER
        for node, target in zip(graph.inputs, loop, strict=False):
            inner.holders[target] = inner.statements.last_use[node.name]
        inner.write()
        self._rebind(inner, loop)
        return inner.writer.lines

    def _rebind(self, inner: Block, loop: list[str]) -> None:
        """The new carried values in the loop's variables."""
        found = inner.results()
        moved = [(target, value) for target, value in zip(loop, found, strict=True) if value.text != target]
        if len(moved) == 1:
            inner.writer.statement(f"{moved[0][0]} = ", moved[0][1])
        elif moved:
            inner.writer.line(f"{', '.join(t for t, _ in moved)} = {', '.join(str(v) for _, v in moved)}")

    def _alternatives(self, counter: str, bodies: list[list[str]], times: list[int]) -> None:
        distinct: dict[tuple[str, ...], list[int]] = {}
        start = 0
        for body, count in zip(bodies, times, strict=True):
            distinct.setdefault(tuple(body), []).extend(range(start, start + count))
            start += count
        if len(distinct) == 1:
            self._lines(bodies[0])
            return
        for number, (lines, places) in enumerate(distinct.items()):
            last = number == len(distinct) - 1
            head = "else:" if last else f"{'elif' if number else 'if'} {counter} in {_places(places)}:"
            self.writer.line(head)
            with self.writer.indented():
                self._lines(lines)

    def _lines(self, lines: Sequence[str]) -> None:
        for line in lines or ["pass"]:
            self.writer.line(line)


def _places(places: list[int]) -> str:
    """`range(2, 6)`, `range(0, 6, 2)` or `(0, 3, 4)`."""
    steps = {b - a for a, b in zip(places, places[1:], strict=False)}
    if len(places) > 1 and len(steps) == 1:
        step = steps.pop()
        bounds = f"{places[0]}, {places[-1] + 1}" if places[0] or step > 1 else f"{places[-1] + 1}"
        return f"range({bounds}{f', {step}' if step > 1 else ''})"
    return f"({places[0]},)" if len(places) == 1 else f"({', '.join(map(str, places))})"


def _noun(node: Node) -> str:
    """A name for what a node gives, where the user gave none."""
    if node.op == "call":
        return str(node["label"])
    return {"matmul": "product", "poly_attention": "attention", "mul": "scaled", "add": "total"}.get(node.op, node.op)


def _scaled(size: Expr, factor: Fraction) -> str:
    if factor.denominator == 1:
        return str(size) if factor == 1 else f"{factor.numerator} * {size}"
    return f"{size} // {factor.denominator}" if factor.numerator == 1 else f"{factor.numerator} * {size} // {factor.denominator}"
