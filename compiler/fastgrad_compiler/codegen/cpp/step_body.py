"""One graph of a step as a C++ function: its statements, the memory that it takes, and the tensors that it reads.

With one token a sequence, values are contiguous [batch, ..]: whatever only moves the axis of tokens moves nothing.
Operations that work entry by entry become C++ expressions here; `step_rules.py` has a rule for each of the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fastgrad_compiler.codegen.cpp.rows import EXPRESSIONS
from fastgrad_compiler.codegen.cpp.step_tensors import Kept, Tensors, called, count, repeated
from fastgrad_compiler.ir.calls import runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, integer
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_grammar.quote import cpp_comment

ELEMENTWISE: Mapping[str, str] = {
    **{op: text for op, text in EXPRESSIONS.items() if op != "sum_to"},
    "abs": "std::abs({})",
    "erf": "std::erf({})",
    "gelu": "real(0.5) * {0} * (real(1) + std::erf({0} * real(0.70710678118654752440)))",
    "log": "std::log({})",
    "log_sigmoid": "({0} < 0 ? {0} : real(0)) - std::log1p(std::exp(-std::abs({0})))",
    "relu": "{0} < 0 ? real(0) : {0}",
    "softplus": "{0} > 40 ? {0} : std::log1p(std::exp({0}))",
    "tanh": "std::tanh({})",
}

DEEPEST = 32
"""Operations within each other that one expression computes."""


class Unserved(Exception):
    """The program has no such kernel."""


@dataclass(frozen=True)
class Value:
    """A pointer to numbers, of each sequence or of all; a constant; or the transpose of a pointer's matrix.

    stored: the numbers are a weight's, as the model holds it.
    """

    text: str
    batch: bool
    shape: tuple[int, ...]
    is_number: bool = False
    transposed: bool = False
    stored: bool = False

    @property
    def element(self) -> str:
        """The type of its numbers."""
        return "input" if self.stored else "real"

    @property
    def count(self) -> int:
        """Its numbers, of one sequence."""
        return math.prod(self.shape)

    @property
    def numbers(self) -> str:
        """Its numbers, of all sequences."""
        return times("call.batch" if self.batch else "", self.count)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> str:
        """How many rows it has, of all sequences."""
        return times("call.batch" if self.batch else "", self.count // self.width)


@dataclass
class Function:
    """A graph as a function: its text, the tensors that it reads, and the memory that it takes while it runs."""

    name: str
    text: str
    weights: Tensors
    state: Tensors
    each: int  # numbers of each sequence
    once: int
    rows: tuple[tuple[int, int], ...]  # inputs by place that are rows of a table, and how many it has


class Shared:
    """What the functions of a step share, and those that are written, by graph, callees first.

    exact: attentions are exact in place of a polynomial's; guarded: graphs and nodes whose logits are watched; rules:
    of the operations beside ELEMENTWISE.
    """

    def __init__(
        self, program: Program, exact: bool, guarded: Collection[tuple[str, str]], rules: Mapping[str, Rule]
    ) -> None:
        if program.step is None:
            raise Unserved
        self.program, self.exact, self.guarded, self.rules = program, exact, guarded, rules
        self.main = program[program.step]
        self.along = str(program.along)
        tokens = next((n.tensor.shape for n in self.main.inputs if self.is_token(n)), ())
        if len(tokens) < 2 or tokens[0].constant is not None:
            raise Unserved
        self.batch = tokens[0]
        self.functions: dict[str, Function] = {}
        self.attentions: dict[KernelSpec, str] = {}
        self.softmax = False  # whether there is one
        self.turns: list[tuple[int, float, tuple[float, ...]]] = []
        self.most_tokens: int | None = None
        self.drops = False

    def is_token(self, node: Node) -> bool:
        """Whether an input has a value for each token."""
        return any(self.along in dim.names for dim in node.tensor.shape)

    def shape(self, type_: TensorType) -> tuple[bool, tuple[int, ...]]:
        """Whether a value is one of each sequence, and its shape for one token without the axis of the sequences."""
        sizes = [dim.substitute({self.along: Dim.of(1)}) for dim in type_.shape]
        batch = bool(sizes) and sizes[0] == self.batch
        rest = [size.constant for size in sizes[batch:]]
        if None in rest or 0 in rest:
            raise Unserved
        return batch, tuple(size for size in rest if size is not None)

    def declared(self, type_: TensorType, text: str) -> Value:
        """A value of a type."""
        batch, shape = self.shape(type_)
        return Value(text, batch, shape)

    def angles(self, width: int, base: float, stretch: tuple[float, ...]) -> int:
        """The place of the angles that `rotary` turns by among those of a call."""
        key = (width, base, stretch)
        if key not in self.turns:
            self.turns.append(key)
        return self.turns.index(key)

    def attention(self, spec: KernelSpec) -> str:
        """The namespace of an attention."""
        return self.attentions.setdefault(spec, f"attention{len(self.attentions)}")

    def limit(self, tokens: int) -> None:
        """There are positions for so many tokens."""
        self.most_tokens = min(tokens, self.most_tokens or tokens)


class Body:
    """Writes the function of one graph."""

    def __init__(self, shared: Shared, graph: Graph, name: str) -> None:
        self.shared, self.graph, self.name = shared, graph, name
        self.lines: list[str] = []
        self.values: dict[str, Value] = {}
        self.several: dict[str, list[Value]] = {}  # of nodes with more than one result
        self.weights: Tensors = ()
        self.state: Tensors = ()
        self.each = self.once = self.most_each = self.most_once = 0
        self.rows: list[tuple[int, int]] = []
        self.said = self.above = ""  # of the file: the present statement, and the last one above a line
        self.inlined = self._inlined()

    def function(self) -> Function:
        graph, parameters = self.graph, ["Call& call", "Part part"]
        for place, node in enumerate(graph.inputs):
            value = self.declared(node, self.variable(node, place))
            self.values[node.name] = value
            parameters.append(f"const {element_type(node.tensor)}* {value.text}")
        for i, _ in enumerate(graph.outputs):
            parameters.append(f"real* out_{i}")
        for place, node in enumerate(graph.nodes):
            if node.op != "input" and node.name in graph.alive:
                self.write(node, place)
        for i, name in enumerate(graph.outputs):
            value = self.value(name)
            if graph[name].tensor.dtype != "float":
                raise Unserved
            if value.text != f"out_{i}":
                self.line(f"std::copy_n({value.text}, {value.numbers}, out_{i});")
        head = f"// {cpp_comment(graph.block or graph.name)}\n"
        body = "".join(f"  {line}\n" for line in self.lines)
        text = f"{head}inline void {self.name}({', '.join(parameters)}) {{\n  const Scratch scratch(call);\n{body}}}\n"
        return Function(
            self.name,
            text,
            self.weights,
            self.state,
            self.each + self.most_each,
            self.once + self.most_once,
            tuple(self.rows),
        )

    # ------------------------------------------------------------ what rules ask

    def line(self, text: str) -> None:
        """A line, below what it is in the file."""
        if self.said != self.above:
            self.lines.append(f"// {cpp_comment(self.said)}")
        self.lines.append(text)
        self.above = self.said

    def value(self, name: str) -> Value:
        """A node as an operand, in memory, of the type `real`."""
        value = self.operand(name)
        if value.stored:
            wide = f"wide_{len(self.lines)}_real"
            self.line(f"const Wide {wide}({value.text}, {value.numbers});")
            value = self.values[name] = replace(value, text=f"{wide}.data", stored=False)
        return value

    def operand(self, name: str) -> Value:
        """A node as an operand, in memory."""
        value = self.values[name]
        if value.is_number or value.transposed:
            raise Unserved
        return value

    def target(self, node: Node, place: int) -> Value:
        """Memory for a node's result: that of the result of the graph, where it is one."""
        if node.name in self.graph.outputs:
            value = self.declared(node, f"out_{self.graph.outputs.index(node.name)}")
        else:
            value = self.declared(node, self.variable(node, place))
            self.memory(value)
        self.values[node.name] = value
        return value

    def memory(self, value: Value) -> None:
        """Declare it, a pointer to memory of this function."""
        if value.batch:
            self.each += whole_lines(value.count)
        else:
            self.once += whole_lines(value.count)
        self.line(f"real* const {value.text} = call.take({value.numbers});")

    def view(self, node: Node, of: Value) -> None:
        """The same numbers in the same order."""
        self.values[node.name] = replace(self.declared(node, of.text), stored=of.stored)
        if self.values[node.name].count != of.count or self.values[node.name].batch != of.batch:
            raise Unserved

    def weight(self, label: str, numbers: int) -> str:
        self.weights += (Kept(f"{label}{{}}", numbers),)
        return f"part.weight({count(self.weights) - 1})"

    def kept(self, path: str, numbers: int, element: str) -> str:
        self.state += (Kept(path, numbers),)
        return f"part.kept<{element}>({count(self.state) - 1})"

    def is_row(self, name: str, rows: int) -> None:
        """An input has rows of a table, which is looked at before anything is done."""
        places = [place for place, node in enumerate(self.graph.inputs) if node.name == name]
        if not places:
            raise Unserved
        self.rows.append((places[0], rows))

    def expression(self, name: str, like: Value, flat: bool) -> str:
        """A node as an entry `i` of row `row` of a value, by its computation where it is inlined."""
        if name in self.inlined:
            node = self.graph[name]
            return f"({ELEMENTWISE[node.op].format(*(self.expression(each, like, flat) for each in node.inputs))})"
        value = self.values[name]
        if value.is_number:
            return f"real({value.text})"
        entry = f"{self.operand(name).text}[{f'row * {like.count} + i' if flat else _place(value, like)}]"
        return f"number({entry})" if value.stored else entry

    # ------------------------------------------------------------ nodes

    def write(self, node: Node, place: int) -> None:
        if node.name in self.inlined or node.name in self.values:
            return
        if node.op not in self.shared.rules and node.op not in ELEMENTWISE:
            raise Unserved
        if node.span is not None and node.op != "weight":
            self.said = re.sub(r"\s+", " ", node.span.text.strip())[:110]
        if node.op in ELEMENTWISE:
            self._elementwise(node, place)
        else:
            self.shared.rules[node.op](self, node, place)

    def _inlined(self) -> set[str]:
        """The nodes that are, in expressions of at most DEEPEST operations within each other."""
        depths: dict[str, int] = {}
        for node in self.graph.nodes:
            depth = 1 + max((depths.get(name, 0) for name in node.inputs), default=0)
            if self._is_inlined(node) and depth < DEEPEST:
                depths[node.name] = depth
        return set(depths)

    def _is_inlined(self, node: Node) -> bool:
        """Whether an entry of a node is computed where its one reader needs it."""
        users = self.graph.users[node.name]
        return (
            node.op in ELEMENTWISE
            and len(users) == 1
            and users[0].op in ELEMENTWISE
            and users[0].type == node.type
            and node.name not in self.graph.outputs
        )

    def _elementwise(self, node: Node, place: int) -> None:
        if node.tensor.dtype != "float":
            raise Unserved
        target = self.target(node, place)
        values = [self.values[name] for name in self._leaves(node)]
        flat = all(v.is_number or (v.shape == target.shape and v.batch == target.batch) for v in values)
        body = ELEMENTWISE[node.op].format(*(self.expression(name, target, flat) for name in node.inputs))
        width = target.count if flat else target.width
        rows = times("call.batch" if target.batch else "", target.count // width)
        self.line(f"for (long row = 0; row < {rows}; ++row)")
        self.line('  _Pragma("omp simd")')
        self.line(f"  for (long i = 0; i < {width}; ++i) {target.text}[row * {width} + i] = {body};")

    def _leaves(self, node: Node) -> list[str]:
        """What an expression reads."""
        found: dict[str, None] = {}
        for name in node.inputs:
            found.update(dict.fromkeys(self._leaves(self.graph[name]) if name in self.inlined else [name]))
        return list(found)

    def declared(self, node: Node, text: str) -> Value:
        return self.shared.declared(node.tensor, text)

    def variable(self, node: Node, place: int) -> str:
        """A name that no word of C++ and no other value has."""
        return numbered(node.name, place)

    def _run(self, graph: str, indices: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """A call of another graph's function, whose tensors come next; see `_reads`."""
        function = self.shared.functions[graph]
        self.most_each = max(self.most_each, function.each)
        self.most_once = max(self.most_once, function.once)
        weights, state = count(function.weights), count(function.state)
        first = [_sum(count(self.weights), indices, weights), _sum(count(self.state), indices, state)]
        part = f"part.from({', '.join(first)})"
        indent = "  " if indices else ""
        self.line(f"{indent}{function.name}({', '.join(['call', part, *inputs, *outputs])});")

    def run(self, node: Node, place: int) -> None:
        """A call."""
        graph = str(node["graph"])
        function = self.shared.functions[graph]
        if node.get("once"):
            raise Unserved
        inputs = [self.value(name).text for name in node.inputs]
        for at, rows in function.rows:
            self.is_row(node.inputs[at], rows)
        self._run(graph, "", inputs, [value.text for value in self.results(node, place)])
        if not node.is_fused:
            self.weights += called(function.weights, str(node["label"]))
            self.state += called(function.state, str(node["label"]))

    def repeat(self, node: Node, place: int) -> None:
        """A loop for each run of equal bodies, whose results are given to the next iteration."""
        carried = integer(node["carried"])
        results = self.results(node, place)
        others = [self._other(value) for value in results]
        for name, value in zip(node.inputs[:carried], results, strict=True):
            if self.value(name).batch != value.batch:
                raise Unserved
            self.line(f"std::copy_n({self.value(name).text}, {value.numbers}, {value.text});")
        fixed = [self.value(name).text for name in node.inputs[carried:]]
        now, first = [value.text for value in results], 0
        for body, times in runs(node):
            function = self.shared.functions[body]
            if function.rows:
                raise Unserved
            self.line(f"for (long i = 0; i < {times}; ++i) {{")
            self._run(body, "i", [*now, *fixed], others)
            for value, one, other in zip(results, now, others, strict=True):
                self.line(f"  std::copy_n({other}, {value.numbers}, {one});")
            self.line("}")
            self.weights += repeated(function.weights, range(first, first + times))
            self.state += repeated(function.state, range(first, first + times))
            first += times

    def results(self, node: Node, place: int) -> list[Value]:
        """Memory for the results of a node that runs graphs."""
        types = (node.type,) if isinstance(node.type, TensorType) else node.type or ()
        if any(type_.dtype != "float" for type_ in types):
            raise Unserved
        if isinstance(node.type, TensorType):
            return [self.target(node, place)]
        found = []
        for i, type_ in enumerate(types):
            batch, shape = self.shared.shape(type_)
            value = Value(f"{self.variable(node, place)}_{i}th", batch, shape)
            self.memory(value)
            found.append(value)
        self.several[node.name] = found
        return found

    def _other(self, value: Value) -> str:
        name = f"{value.text}_next"
        self.memory(Value(name, value.batch, value.shape))
        return name


Rule: TypeAlias = Callable[[Body, Node, int], None]
"""Writes what a node becomes; its place in the graph numbers its name."""


# ---------------------------------------------------------------- text


def _place(value: Value, like: Value) -> str:
    """Where entry `i` of row `row` of a value's shape finds what is broadcast to it."""
    shape = (1,) * (len(like.shape) - len(value.shape)) + value.shape
    if len(shape) != len(like.shape) or (value.batch and not like.batch):
        raise Unserved
    if not shape:
        return "row" if value.batch else "0"
    rows = like.count // like.width
    if shape[:-1] == like.shape[:-1]:
        row = "row" if value.batch or not like.batch else f"row % {rows}" if rows > 1 else ""
    elif set(shape[:-1]) == {1}:
        row = f"row / {rows}" if value.batch else ""
    else:
        raise Unserved
    width = shape[-1]
    if width not in (1, like.width):
        raise Unserved
    parts = [f"{row} * {width}" if width > 1 and row else row, "i" if width > 1 else ""]
    return " + ".join(part for part in parts if part) or "0"


def element_type(type_: TensorType) -> str:
    return {"float": "real", "bool": "bool"}.get(type_.dtype, "std::int64_t")


def numbered(name: str, number: int) -> str:
    """What a name becomes in C++: with a number, by which it differs from all that have another one."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", name.partition("@")[0].rpartition(".")[2])
    stem = re.sub(r"_\d+$", "", words).strip("_")
    stem = stem if stem[:1].isalpha() else f"x{stem}"
    return f"{stem}_{number}" if stem[-1].isdigit() else f"{stem}{number}"


def whole_lines(numbers: int) -> int:
    """Memory for so many numbers, whole lines of float64 and float32."""
    return -(-numbers // 16) * 16


def times(batch: str, count: int) -> str:
    return str(count) if not batch else batch if count == 1 else f"{batch} * {count}"


def _sum(first: int, index: str, step: int) -> str:
    return f"{first} + {index} * {step}" if index and step else str(first)
