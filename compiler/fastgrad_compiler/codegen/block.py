"""The body of a `forward`: one statement for each of the `.tfg` file, each after its line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePath

from fastgrad_compiler.analysis.needs import Needs, Source, Step, sources, weight_path
from fastgrad_compiler.codegen.attention_kernels import kernel_spec
from fastgrad_compiler.codegen.cpp.step_kernel import StepKernel
from fastgrad_compiler.codegen.expressions import TORCH
from fastgrad_compiler.codegen.guards import Guards
from fastgrad_compiler.codegen.liveness import FOREVER, Statements
from fastgrad_compiler.codegen.loops import write_repeat
from fastgrad_compiler.codegen.members import Leaf, Member, Repeated, members
from fastgrad_compiler.codegen.names import base, member_access, variable
from fastgrad_compiler.codegen.place import Operands
from fastgrad_compiler.codegen.row_functions import RowFunction, row_function
from fastgrad_compiler.codegen.writer import (
    ADD,
    ATOM,
    MULTIPLY,
    Expr,
    Writer,
    attribute,
    call,
    index,
    literal,
    method,
    noun,
    tuple_text,
    weight,
)
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import LOSS, STEP, Attribute, Graph, Node, Program, TensorType
from fastgrad_compiler.ir.names import unique
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.targets import PYTORCH, Backends
from fastgrad_grammar.quote import comment
from fastgrad_grammar.source import Span

LONGEST = 88  # of an expression, before parts of it get a name of their own


@dataclass
class Imports:
    """What a generated module takes from its siblings: names by file, kernels by their node's specification."""

    helpers: set[str] = field(default_factory=set)
    kernels: dict[KernelSpec, str] = field(default_factory=dict)  # with the name that the module gives it
    specs: set[str] = field(default_factory=set)  # of those kernels, with `_spec` after their names
    natives: set[str] = field(default_factory=set)  # likewise, with `_native`
    exact_attention: bool = False
    rows: dict[str, RowFunction] = field(default_factory=dict)  # by kernel
    steps: set[str] = field(default_factory=set)  # of runtime/step.py, step_attention.py and state.py
    step_kernel: StepKernel | None = None  # of the model's whole step
    backends: Backends = PYTORCH  # of the kernels


@dataclass(frozen=True)
class Module:
    """What all blocks of one generated module share."""

    program: Program
    classes: dict[str, str]
    needs: dict[str, Needs]
    imports: Imports
    exact: bool
    safe_softmax: bool
    guards: Guards = field(default_factory=dict)  # filled as classes are written

    def has_batch(self, node: Node) -> bool:
        """Whether the first axis of a value is that of the sequences."""
        tokens = next(
            (each.tensor.shape for each in self.program[self.program.main].inputs if self.is_token(each)), ()
        )
        return bool(node.tensor.shape) and node.tensor.shape[0] == tokens[0] and len(tokens) > 1

    def is_token(self, node: Node) -> bool:
        """Whether an input of the model is along the dim of its step form."""
        return any(self.program.along in dim.names for dim in node.tensor.shape)


def place_of(span: Span) -> str:
    """`gpt.tfg:14`, on one line; the folder of the user's file is left out."""
    path, _, line = span.short_place.rpartition(":")
    return comment(f"{path if path.startswith('std/') else PurePath(path).name}:{line}")


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
        self,
        module: Module,
        graph: Graph,
        writer: Writer,
        members: Mapping[str, Member],
        *,
        in_class: bool = True,
    ) -> None:
        self.module, self.graph, self.writer, self.members = module, graph, writer, members
        self.exact, self.safe_softmax = module.exact, module.safe_softmax
        self.in_class = in_class
        self.loops: tuple[tuple[str, int], ...] = ()  # counter and first iteration of each loop around
        self.late: frozenset[str] = frozenset()  # inputs that are not there in every call
        self.fixed: Sequence[str] = ()  # inputs of a model's step form that the first call alone is given
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
        text = dim.substitute({name: Dim.of(self.dims[name]) for name in dim.names}).python
        return Expr(text, ADD if len(dim.terms) > 1 else MULTIPLY if " " in text else ATOM)

    def helper(self, name: str) -> str:
        self.module.imports.helpers.add(name)
        return name

    def type(self, name: str) -> TensorType:
        return self.graph[name].tensor

    def like(self) -> Expr:
        return self.template or Expr("like")

    def device(self) -> Expr:
        present = [node.name for node in self.graph.inputs if node.name not in self.late]
        if present:
            return attribute(self.values[present[0]], "device")
        return attribute(self.like(), "device")

    @property
    def backends(self) -> Backends:
        return self.module.imports.backends

    def kernel(self, node: Node) -> str:
        spec, kernels = kernel_spec(self.graph, node), self.module.imports.kernels
        if spec not in kernels:
            name = "polynomial_attention" if spec.window is None else "window_attention"
            kernels[spec] = unique(name, kernels.values())
        return kernels[spec]

    def kernel_spec(self, node: Node) -> str:
        name = f"{self.kernel(node)}_spec"
        self.module.imports.specs.add(name)
        return name

    def kernel_native(self, node: Node) -> str:
        name = f"{self.kernel(node)}_native"
        self.module.imports.natives.add(name)
        return name

    def state(self, label: Attribute) -> Expr:
        return call("state.at", literal(str(label)), *(counter for counter, _ in self.loops))

    def step_helper(self, name: str) -> str:
        self.module.imports.steps.add(name)
        return name

    def guard(self, node: Node) -> Expr | None:
        whole = self.graph.name.removesuffix(STEP).removesuffix(LOSS)
        label = self.module.guards.get((whole, node.name)) if self.in_class else None
        return attribute(self._member(label), "key") if label is not None else None

    def exact_kernel(self) -> str:
        self.module.imports.exact_attention = True
        return "exact_attention"

    def bind(self, value: Expr, name: str) -> Expr:
        target = self.allocate(variable(name), self.at, strict=True)
        self.holders[target] = self.at
        self.writer.statement(f"{target} = ", value)
        return Expr(target)

    def remark(self, text: str) -> None:
        self.writer.comment(text)

    # ------------------------------------------------------------ names

    def allocate(self, stem: str, until: int, *, strict: bool = False) -> str:
        """A variable whose present value, if any, is not needed after this statement (`strict`: in it)."""
        limit = self.at - 1 if strict else self.at
        taken = [name for name, last in self.holders.items() if last > limit]
        name = unique(stem, [*taken, *self.dims.values()])
        self.holders[name] = until
        return name

    def assign(self, node_name: str) -> str:
        """The variable that holds a node from here on."""
        stem = variable(base(node_name, self.graph.by_name))
        target = self.allocate(stem, self.statements.last_use[node_name])
        self.values[node_name] = Expr(target)
        return target

    def bind_inputs(self, late: Collection[str] = ()) -> list[str]:
        """The names of the arguments, in order; `late`: of those that are not there in every call."""
        self.late = frozenset(late)
        path = weight_path(self.module.program, self.graph)
        floats = [
            node.name
            for node in self.graph.inputs
            if node.tensor.dtype == "float" and node.name not in self.late
        ]
        if path is None and floats and self.module.needs[self.graph.name].makes:
            self.statements.last_use[floats[0]] = FOREVER  # other tensors are made like it
        names = [self.assign(node.name) for node in self.graph.inputs]
        if path is not None:
            self.template = self._path(path)
        elif floats:
            self.template = self.values[floats[0]]
        return names

    def name_dims(self, wanted: Sequence[str]) -> None:
        """Variables for run-time dims, which keep their names."""
        for name in wanted:
            self.dims[name] = unique(variable(name), [*self.holders, *self.dims.values()])

    def read_dims(self, node: Node, wanted: Sequence[str], inputs: Sequence[Node] = ()) -> list[str]:
        """Statements that read those dims that `node`, an input, shows first among `inputs`; gives their names."""
        shown = sources(inputs or self.graph.inputs)
        names = [name for name in wanted if name in shown and shown[name].input == node.name]
        if names:
            self._read_dims(node, names, shown)
        return names

    def _read_dims(self, node: Node, names: list[str], shown: Mapping[str, Source]) -> None:
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
        direct = direct and last is not None and not last.get("once")
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
                write_repeat(self, node)
            elif node.get("once"):
                self._write_once(node)
            elif isinstance(node.type, tuple):
                self._several(node, self._call(node))
            else:
                value = self.expression(node)
                self.writer.statement(f"{self.assign(node.name)} = ", value)
        self.at = FOREVER - 1

    def _write_once(self, node: Node) -> None:
        """What the first call computes, and every call reads."""
        graph = self.module.program[str(node["graph"])]
        state = self.state(node["label"])
        inner = self._nested(graph, [self.value(name) for name in node.inputs])
        self.writer.line("if state.starts:")
        with self.writer.indented():
            inner.writer = Writer(self.writer.column)
            if self.fixed:
                left = ", ".join(self.fixed) if len(self.fixed) > 1 else f"[{self.fixed[0]}]"
                inner.writer.line(f"{left} = fixed")
            for name in self.module.needs[graph.name].dims:
                if name not in inner.dims:
                    inner.name_dims([name])
                    for given in graph.inputs:
                        inner.read_dims(given, [name])
            inner.write()
            shared = [
                place for place, name in enumerate(graph.outputs) if not self.module.has_batch(graph[name])
            ]
            keep = method(state, "keep", *inner.results(), shared=tuple_text(shared) if shared else None)
            inner.writer.statement("", keep)
            for line in inner.writer.lines:
                self.writer.line(line)
        if isinstance(node.type, tuple):
            self._several(node, method(state, "kept"))
        else:
            self.writer.statement(f"[{self.assign(node.name)}] = ", method(state, "kept"))
        self.last_comment = ""

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
        if node.op in ("weight", "buffer", "literal"):
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
            longest = max(range(len(operands)), key=lambda i: weight(operands[i]), default=-1)
            if longest < 0 or not weight(operands[longest]):
                break
            operands[longest] = self.bind(operands[longest], noun(self.graph[node.inputs[longest]]))
            result = self._apply(node, operands)
        return result

    def _apply(self, node: Node, operands: Operands) -> Expr:
        lines = len(self.writer.lines)
        result = TORCH[node.op](self, node, operands)
        if len(result.text) > LONGEST and any(map(weight, operands)):
            del self.writer.lines[lines:]  # remarks and masks of a rule are written again by the next attempt
        return result

    def _call(self, node: Node) -> Expr:
        graph = str(node["graph"])
        needed = self.module.needs[graph]
        arguments: list[object] = []
        for name in node.inputs:
            value = self.value(name)
            if len(value.text) > LONGEST // 2 and not value.is_name:
                value = self.bind(value, noun(self.graph[name]))
            arguments.append(value)
        if node.is_fused:
            return call(row_function(self.module, graph), *arguments)
        steps = graph.endswith(STEP)
        if steps:
            arguments.append(self.state(node["label"]))
        arguments += [f"{variable(name)}={self.dims[name]}" for name in needed.extra]
        if needed.like:
            arguments.append(f"like={self.like()}")
        if not self.in_class:
            return call(f"{self.module.classes[graph]}()", *arguments)
        member = self._member(str(node["label"]))
        run = f"{member}.step" if steps else f"{member}.loss" if graph.endswith(LOSS) else str(member)
        again = None if steps else node.get("recompute")
        return call(run, *arguments) if again is None else self._recomputed(run, arguments, again)

    def _recomputed(self, run: str, arguments: Sequence[object], times: Attribute) -> Expr:
        """A call whose values are made again, always (True) or in the first iterations of the loop around it."""
        when = None if times is True else f"when={self.loops[-1][0]} < {times}"
        return call(self.helper("recomputed"), run, *arguments, *([] if when is None else [when]))

    def _member(self, label: str) -> Expr:
        member: Leaf | Repeated = self.members[label]
        text = member_access(label, member.kind)
        for counter, first in self.loops:
            assert isinstance(member, Repeated)
            text += f"[{counter}]" if member.complete else f'[f"{{{counter}}}"]'
            member = member.at(first)
        return Expr(text)

    def _path(self, path: Sequence[Step]) -> Expr:
        """The weight at the end of the way."""
        text = "self"
        for step in path:
            member = members(self.module.program, self.module.program[step.graph], self.module.classes)[
                step.label
            ]
            text = member_access(step.label, member.kind, text)
            for _ in range(step.depth):
                assert isinstance(member, Repeated)
                text += "[0]" if member.complete else '["0"]'
                member = member.at(0)
        return Expr(text)

    def _several(self, node: Node, value: Expr) -> None:
        assert isinstance(node.type, tuple)
        items = {
            int(str(user["index"])): user.name
            for user in self.graph.users[node.name]
            if self.graph.users[user.name] or user.name in self.graph.outputs
        }
        targets = [self.assign(items[i]) if i in items else "_" for i in range(len(node.type))]
        self.writer.statement(f"{', '.join(targets)} = ", value)

    def inside(self, graph: Graph, counter: str, first: int, inputs: Sequence[Expr]) -> Block:
        """The body of a repeat from the iteration `first` on, as a block of its own with the same members; what is
        needed later is out of its reach.
        """
        inner = self._nested(graph, inputs)
        inner.loops = (*self.loops, (counter, first))
        inner.holders[counter] = FOREVER
        return inner

    def _nested(self, graph: Graph, inputs: Sequence[Expr]) -> Block:
        """A graph whose statements stand among this one's."""
        inner = Block(self.module, graph, Writer(), self.members, in_class=self.in_class)
        inner.loops, inner.dims, inner.template = self.loops, dict(self.dims), self.template
        inner.values = {node.name: value for node, value in zip(graph.inputs, inputs, strict=True)}
        inner.holders = {name: FOREVER for name, last in self.holders.items() if last >= self.at}
        return inner


def _scaled(size: Expr, factor: Fraction) -> str:
    if factor.denominator == 1:
        return str(size) if factor == 1 else f"{factor.numerator} * {size}"
    return (
        f"{size} // {factor.denominator}"
        if factor.numerator == 1
        else f"{factor.numerator} * {size} // {factor.denominator}"
    )
