"""The C++ kernel of a whole step: the step form of a model for one new token of each sequence, as one operation.

Each graph is a function, those that a model repeats one that is given the addresses of each layer's weights and state.
With one token a sequence, values are contiguous [batch, ..]: whatever only moves the axis of tokens moves nothing.
Which programs have one is decided here: those whose operations are all in OPERATIONS, as their rules take them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.codegen.cpp import attention_of_steps
from fastgrad_compiler.codegen.cpp.rows import EXPRESSIONS
from fastgrad_compiler.ir.calls import reachable, runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import STEP, Graph, Node, Program, TensorType, integer, number, sequence
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_grammar.quote import cpp_comment

Tensors: TypeAlias = "tuple[tuple[str, int] | tuple[range, Tensors], ...]"
"""Tensors in their order: (path, numbers); or (iterations, tensors) of a loop, in whose paths `{}` is the iteration.

While they are made, `{}` is where the iterations of loops around would stand, and `*` stands for them.
"""

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


@dataclass(frozen=True)
class StepKernel:
    """The source, the tensors that it is given the addresses of, weights and what the state keeps, and its results.

    Numbers of a tensor of the state are those of each sequence, unless its path ends with `shared`. results: their
    shapes for one sequence. drops: a model in training has dropout, and no kernel.
    """

    text: str
    weights: Tensors
    state: Tensors
    results: tuple[tuple[int, ...], ...]
    drops: bool


class _Unserved(Exception):
    """The program has no such kernel."""


def emit_step(program: Program, exact: bool, guarded: Collection[tuple[str, str]]) -> StepKernel | None:
    """The kernel of a program's step form, None where it has none.

    exact: attentions are exact in place of a polynomial's; guarded: graphs and nodes whose logits are watched.
    """
    try:
        return _Emitter(program, exact, guarded).kernel()
    except _Unserved:
        return None


@dataclass(frozen=True)
class _Value:
    """A pointer to numbers, of each sequence or of all; a constant; or the transpose of a pointer's matrix."""

    text: str
    batch: bool
    shape: tuple[int, ...]
    is_number: bool = False
    transposed: bool = False

    @property
    def count(self) -> int:
        """Its numbers, of one sequence."""
        return math.prod(self.shape)

    @property
    def numbers(self) -> str:
        """Its numbers, of all sequences."""
        return _times("call.batch" if self.batch else "", self.count)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> str:
        """How many rows it has, of all sequences."""
        return _times("call.batch" if self.batch else "", self.count // self.width)


@dataclass
class _Function:
    """A graph as a function: its text, the tensors that it reads, and the memory that it takes while it runs."""

    name: str
    text: str
    weights: Tensors
    state: Tensors
    each: int  # numbers of each sequence
    once: int


class _Emitter:
    """All functions, callees first, and what they share."""

    def __init__(self, program: Program, exact: bool, guarded: Collection[tuple[str, str]]) -> None:
        if program.step is None:
            raise _Unserved
        self.program, self.exact, self.guarded = program, exact, guarded
        self.main = program[program.step]
        self.along = str(program.along)
        tokens = next((n.tensor.shape for n in self.main.inputs if self._is_token(n)), ())
        if len(tokens) < 2 or tokens[0].constant is not None:
            raise _Unserved
        self.batch = tokens[0]
        self.functions: dict[str, _Function] = {}
        self.attentions: dict[KernelSpec, str] = {}
        self.turns: list[tuple[int, float, tuple[float, ...]]] = []
        self.most_tokens: int | None = None
        self.drops = False

    def _is_token(self, node: Node) -> bool:
        return any(self.along in dim.names for dim in node.tensor.shape)

    def shape(self, type_: TensorType) -> tuple[bool, tuple[int, ...]]:
        """Whether a value is one of each sequence, and its shape for one token without the axis of the sequences."""
        sizes = [dim.substitute({self.along: Dim.of(1)}) for dim in type_.shape]
        batch = bool(sizes) and sizes[0] == self.batch
        rest = [size.constant for size in sizes[batch:]]
        if None in rest or 0 in rest:
            raise _Unserved
        return batch, tuple(size for size in rest if size is not None)

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

    # ------------------------------------------------------------ text

    def kernel(self) -> StepKernel:
        if not all(map(self._is_token, self.main.inputs)):
            raise _Unserved
        for graph in reachable(self.program.by_name, [self.main.name]):
            self.functions[graph.name] = _Body(
                self, graph, f"{_numbered(graph.name, len(self.functions))}_step"
            ).function()
        main = self.functions[self.main.name]
        spaces = [(name, attention_of_steps(spec)) for spec, name in self.attentions.items()]
        bodies = [function.text for function in self.functions.values()]
        spaces.append(("step", "\n".join([*bodies, self._entry(main)])))
        text = "".join(
            [
                f"// A step of {cpp_comment(self.program.name)}: one new token of each sequence.\n//\n",
                "// Generated by fastgrad: change the program, not this file.\n\n",
                f"{_INCLUDES}\nconstexpr long TURNS = {len(self.turns)};\n\n{_header()}",
                *(
                    f"\nnamespace {name} {{\nnamespace {{\n\n{body}\n}}  // namespace\n}}  // namespace {name}\n"
                    for name, body in spaces
                ),
                _REGISTRATION,
            ]
        )
        results = [self.shape(self.main[name].tensor) for name in self.main.outputs]
        if not all(batch for batch, _ in results):
            raise _Unserved
        shapes = tuple(shape for _, shape in results)
        return StepKernel(text, _whole(main.weights), _whole(main.state), shapes, self.drops)

    def _entry(self, main: _Function) -> str:
        inputs = self.main.inputs
        lines = [
            "// addresses: of weights, of the state, of inputs and of results. False where nothing was done,",
            "// because an input is not one that a step could serve.",
            "bool run(const Tensor addresses, std::int64_t batch, std::int64_t past, std::int64_t threads) {",
            "  const auto* const given = static_cast<const std::int64_t*>(addresses.data_ptr());",
            f"  const Part part{{given, given + {_count(main.weights)}}};",
            f"  const std::int64_t* const inputs = given + {_count(main.weights) + _count(main.state)};",
        ]
        for place, node in enumerate(inputs):
            lines += [
                f"  const auto* const in{place} = reinterpret_cast<const {_element(node.tensor)}*>(inputs[{place}]);"
            ]
        if self.most_tokens is not None:
            lines += [f"  if (past >= {self.most_tokens}) return false;"]
        for place, node in enumerate(inputs):
            for user in self.main.users[node.name]:
                if user.op == "embedding":
                    count = self.value_of(node).count
                    rows = self.main[user.inputs[0]].tensor.shape[0]
                    lines += [f"  if (!within(in{place}, {_times('batch', count)}, {rows})) return false;"]
        turns = "".join(
            f"  call.turns[{i}] = turns(call, {width}, {base!r}, {{{', '.join(map(repr, stretch))}}});\n"
            for i, (width, base, stretch) in enumerate(self.turns)
        )
        once = main.once + sum(_lines(width) for width, *_ in self.turns)
        lines += [
            "  static thread_local std::vector<real> memory;",
            f"  memory.resize(std::max<std::size_t>(memory.size(), batch * {main.each} + {once} + LINE));",
            "  const auto start = (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64;",
            "  Call call{batch, past, std::max<std::int64_t>(1, threads), {}, reinterpret_cast<real*>(start)};",
            *turns.splitlines(),
        ]
        arguments = [f"in{place}" for place, _ in enumerate(inputs)]
        arguments += [
            f"reinterpret_cast<real*>(inputs[{len(inputs) + i}])" for i, _ in enumerate(self.main.outputs)
        ]
        lines += [f"  {main.name}(call, part, {', '.join(arguments)});", "  return true;", "}", ""]
        return "\n".join(lines)

    def value_of(self, node: Node) -> _Value:
        batch, shape = self.shape(node.tensor)
        return _Value("", batch, shape)


# ---------------------------------------------------------------- graphs


class _Body:
    """Writes the function of one graph."""

    def __init__(self, emitter: _Emitter, graph: Graph, name: str) -> None:
        self.emitter, self.graph, self.name = emitter, graph, name
        self.lines: list[str] = []
        self.values: dict[str, _Value] = {}
        self.several: dict[str, list[_Value]] = {}  # of nodes with more than one result
        self.weights: Tensors = ()
        self.state: Tensors = ()
        self.each = self.once = self.most_each = self.most_once = 0
        self.said = self.above = ""  # of the file: the present statement, and the last one above a line
        self.inlined = self._inlined()

    def function(self) -> _Function:
        graph, parameters = self.graph, ["Call& call", "Part part"]
        for place, node in enumerate(graph.inputs):
            value = self.declared(node, self.variable(node, place))
            self.values[node.name] = value
            parameters.append(f"const {_element(node.tensor)}* {value.text}")
        for i, _ in enumerate(graph.outputs):
            parameters.append(f"real* out_{i}")
        for place, node in enumerate(graph.nodes):
            if node.op != "input" and node.name in graph.alive:
                self.write(node, place)
        for i, name in enumerate(graph.outputs):
            value = self.value(name)
            if graph[name].tensor.dtype != "float":
                raise _Unserved
            if value.text != f"out_{i}":
                self.line(f"std::copy_n({value.text}, {value.numbers}, out_{i});")
        head = f"// {cpp_comment(graph.block or graph.name)}\n"
        body = "".join(f"  {line}\n" for line in self.lines)
        text = f"{head}inline void {self.name}({', '.join(parameters)}) {{\n  const Scratch scratch(call);\n{body}}}\n"
        return _Function(
            self.name,
            text,
            self.weights,
            self.state,
            self.each + self.most_each,
            self.once + self.most_once,
        )

    # ------------------------------------------------------------ what rules ask

    def line(self, text: str) -> None:
        """A line, below what it is in the file."""
        if self.said != self.above:
            self.lines.append(f"// {cpp_comment(self.said)}")
        self.lines.append(text)
        self.above = self.said

    def value(self, name: str) -> _Value:
        """A node as an operand, in memory."""
        value = self.values[name]
        if value.is_number or value.transposed:
            raise _Unserved
        return value

    def target(self, node: Node, place: int) -> _Value:
        """Memory for a node's result: that of the result of the graph, where it is one."""
        if node.name in self.graph.outputs:
            value = self.declared(node, f"out_{self.graph.outputs.index(node.name)}")
        else:
            value = self.declared(node, self.variable(node, place))
            self.memory(value)
        self.values[node.name] = value
        return value

    def memory(self, value: _Value) -> None:
        """Declare it, a pointer to memory of this function."""
        if value.batch:
            self.each += _lines(value.count)
        else:
            self.once += _lines(value.count)
        self.line(f"real* const {value.text} = call.take({value.numbers});")

    def view(self, node: Node, of: _Value) -> None:
        """The same numbers in the same order."""
        self.values[node.name] = self.declared(node, of.text)
        if self.values[node.name].count != of.count or self.values[node.name].batch != of.batch:
            raise _Unserved

    def weight(self, label: str, count: int) -> str:
        self.weights += ((f"{label}{{}}", count),)
        return f"part.weight({_count(self.weights) - 1})"

    def kept(self, path: str, count: int, element: str = "real") -> str:
        self.state += ((path, count),)
        return f"part.kept<{element}>({_count(self.state) - 1})"

    def expression(self, name: str, like: _Value, flat: bool) -> str:
        """A node as an entry `i` of row `row` of a value, by its computation where it is inlined."""
        if name in self.inlined:
            node = self.graph[name]
            return f"({ELEMENTWISE[node.op].format(*(self.expression(each, like, flat) for each in node.inputs))})"
        value = self.values[name]
        if value.is_number:
            return f"real({value.text})"
        return f"{self.value(name).text}[{f'row * {like.count} + i' if flat else _place(value, like)}]"

    # ------------------------------------------------------------ nodes

    def write(self, node: Node, place: int) -> None:
        if node.name in self.inlined or node.name in self.values:
            return
        if node.op not in OPERATIONS and node.op not in ELEMENTWISE:
            raise _Unserved
        if node.span is not None and node.op != "weight":
            self.said = re.sub(r"\s+", " ", node.span.text.strip())[:110]
        if node.op in ELEMENTWISE:
            self._elementwise(node, place)
        else:
            OPERATIONS[node.op](self, node, place)

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
            raise _Unserved
        target = self.target(node, place)
        values = [self.values[name] for name in self._leaves(node)]
        flat = all(v.is_number or (v.shape == target.shape and v.batch == target.batch) for v in values)
        body = ELEMENTWISE[node.op].format(*(self.expression(name, target, flat) for name in node.inputs))
        width = target.count if flat else target.width
        rows = _times("call.batch" if target.batch else "", target.count // width)
        self.line(f"for (long row = 0; row < {rows}; ++row)")
        self.line('  _Pragma("omp simd")')
        self.line(f"  for (long i = 0; i < {width}; ++i) {target.text}[row * {width} + i] = {body};")

    def _leaves(self, node: Node) -> list[str]:
        """What an expression reads."""
        found: dict[str, None] = {}
        for name in node.inputs:
            found.update(dict.fromkeys(self._leaves(self.graph[name]) if name in self.inlined else [name]))
        return list(found)

    def declared(self, node: Node, text: str) -> _Value:
        batch, shape = self.emitter.shape(node.tensor)
        return _Value(text, batch, shape)

    def variable(self, node: Node, place: int) -> str:
        """A name that no word of C++ and no other value has."""
        return _numbered(node.name, place)

    def _run(self, graph: str, indices: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """A call of another graph's function, whose tensors come next; see `_reads`."""
        function = self.emitter.functions[graph]
        self.most_each = max(self.most_each, function.each)
        self.most_once = max(self.most_once, function.once)
        weights, state = _count(function.weights), _count(function.state)
        first = [_sum(_count(self.weights), indices, weights), _sum(_count(self.state), indices, state)]
        part = f"part.from({', '.join(first)})"
        indent = "  " if indices else ""
        self.line(f"{indent}{function.name}({', '.join(['call', part, *inputs, *outputs])});")

    def run(self, node: Node, place: int) -> None:
        """A call."""
        graph = str(node["graph"])
        function = self.emitter.functions[graph]
        if node.get("once"):
            raise _Unserved
        inputs = [self.value(name).text for name in node.inputs]
        self._run(graph, "", inputs, [value.text for value in self.results(node, place)])
        if not node.is_fused:
            self.weights += _called(function.weights, str(node["label"]))
            self.state += _called(function.state, str(node["label"]))

    def repeat(self, node: Node, place: int) -> None:
        """A loop for each run of equal bodies, whose results are given to the next iteration."""
        carried = integer(node["carried"])
        results = self.results(node, place)
        others = [self._other(value) for value in results]
        for name, value in zip(node.inputs[:carried], results, strict=True):
            if self.value(name).batch != value.batch:
                raise _Unserved
            self.line(f"std::copy_n({self.value(name).text}, {value.numbers}, {value.text});")
        fixed = [self.value(name).text for name in node.inputs[carried:]]
        now, first = [value.text for value in results], 0
        for body, times in runs(node):
            function = self.emitter.functions[body]
            self.line(f"for (long i = 0; i < {times}; ++i) {{")
            self._run(body, "i", [*now, *fixed], others)
            for value, one, other in zip(results, now, others, strict=True):
                self.line(f"  std::copy_n({other}, {value.numbers}, {one});")
            self.line("}")
            self.weights += _repeated(function.weights, range(first, first + times))
            self.state += _repeated(function.state, range(first, first + times))
            first += times

    def results(self, node: Node, place: int) -> list[_Value]:
        """Memory for the results of a node that runs graphs."""
        if isinstance(node.type, TensorType):
            return [self.target(node, place)]
        found = []
        for i, type_ in enumerate(node.type or ()):
            batch, shape = self.emitter.shape(type_)
            value = _Value(f"{self.variable(node, place)}_{i}th", batch, shape)
            self.memory(value)
            found.append(value)
        self.several[node.name] = found
        return found

    def _other(self, value: _Value) -> str:
        name = f"{value.text}_next"
        self.memory(_Value(name, value.batch, value.shape))
        return name


Rule: TypeAlias = Callable[[_Body, Node, int], None]


def _weight(body: _Body, node: Node, place: int) -> None:
    value = body.declared(node, "")
    if node.tensor.dtype != "float" or value.batch:
        raise _Unserved
    read = body.weight(str(node["label"]), value.count)
    name = body.variable(node, place)
    body.line(f"const real* const {name} = {read};  // {cpp_comment(str(node['label']))}")
    body.values[node.name] = body.declared(node, name)


def _constant(body: _Body, node: Node, place: int) -> None:
    value = node["value"]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _Unserved
    body.values[node.name] = _Value(repr(float(value)), False, (), is_number=True)


def _view(body: _Body, node: Node, place: int) -> None:
    body.view(node, body.value(node.inputs[0]))


def _heads(body: _Body, node: Node, place: int) -> None:
    """The axis of tokens, of one, and that of heads are exchanged."""
    of, shape = body.value(node.inputs[0]), body.declared(node, "").shape
    tokens = of.shape[-2] if node.op == "split_heads" else shape[-2]
    if tokens != 1:
        raise _Unserved
    body.view(node, of)


def _permute(body: _Body, node: Node, place: int) -> None:
    of = body.value(node.inputs[0])
    shape = (0, *of.shape) if of.batch else of.shape
    axes = [integer(axis) % len(shape) for axis in sequence(node["axes"])]
    moved = [axis for axis in axes if shape[axis] != 1]
    if moved == sorted(moved):
        body.view(node, of)
    elif axes == [1, 0] and not of.batch:
        made = body.declared(node, of.text)
        body.values[node.name] = _Value(made.text, False, made.shape, transposed=True)
    else:
        raise _Unserved


def _dropout(body: _Body, node: Node, place: int) -> None:
    body.emitter.drops = True
    _view(body, node, place)


def _item(body: _Body, node: Node, place: int) -> None:
    body.values[node.name] = body.several[node.inputs[0]][integer(node["index"])]


def _embedding(body: _Body, node: Node, place: int) -> None:
    table, ids = (body.value(name) for name in node.inputs)
    if body.graph.name != body.emitter.main.name or body.graph[node.inputs[1]].op != "input":
        raise _Unserved  # ids are looked at before anything is done
    target = body.target(node, place)
    count = _times("call.batch", ids.count)
    body.line(f"embed({count}, {target.width}, {table.text}, {ids.text}, {target.text});")


def _matmul(body: _Body, node: Node, place: int) -> None:
    """A product with a weight, and others that read the same rows beside it."""
    x, place_of = body.value(node.inputs[0]), {each.name: i for i, each in enumerate(body.graph.nodes)}
    rows, depth, products = x.rows, x.width, []
    for user in body.graph.users[node.inputs[0]]:
        if user.op != "matmul" or user.inputs[0] != node.inputs[0] or user.name not in body.graph.alive:
            continue
        weight = body.values.get(user.inputs[1])
        if weight is None and user is not node and body.graph[user.inputs[1]].op == "weight":
            body.write(body.graph[user.inputs[1]], place_of[user.inputs[1]])
            weight = body.values[user.inputs[1]]
        if weight is None or user.name in body.values:
            continue
        if weight.batch or weight.is_number or len(weight.shape) != 2:
            raise _Unserved
        target = body.target(user, place_of[user.name])
        transposed = str(weight.transposed).lower()
        products.append(f"{{{weight.text}, {target.width}, {transposed}, {target.text}}}")
    body.line(f"multiply(call, {rows}, {depth}, {x.text}, {{{', '.join(products)}}});")


def _norm(body: _Body, node: Node, place: int) -> None:
    x, *weights = (body.value(name) for name in node.inputs)
    eps = [f"real({number(node['eps'])!r})"] if node.op != "unit" else []
    target = body.target(node, place)
    given = [x.rows, str(x.width), *(each.text for each in (x, *weights)), *eps, target.text]
    body.line(f"{node.op}({', '.join(given)});")


def _reduce(body: _Body, node: Node, place: int) -> None:
    x = body.value(node.inputs[0])
    rank = len(x.shape) + x.batch
    if [integer(axis) % rank for axis in sequence(node["axes"])] != [rank - 1] or not x.shape:
        raise _Unserved
    target, divisor = body.target(node, place), x.width if node.op == "mean" else 1
    body.line(f"reduce({x.rows}, {x.width}, {x.text}, {divisor}, {target.text});")


def _fill(body: _Body, node: Node, place: int) -> None:
    target = body.target(node, place)
    value = number(node["value"])
    if target.batch or not math.isfinite(value):
        raise _Unserved
    body.line(f"std::fill_n({target.text}, {target.count}, real({value!r}));")


def _pad(body: _Body, node: Node, place: int) -> None:
    """Zeros around a value that is no token's."""
    x, target = body.value(node.inputs[0]), body.target(node, place)
    if target.batch or node.tensor.dtype != "float":
        raise _Unserved
    axis = integer(node["axis"]) % len(x.shape)
    inner = math.prod(x.shape[axis + 1 :])
    body.line(f"std::fill_n({target.text}, {target.count}, real(0));")
    for outer in range(math.prod(x.shape[:axis])):
        at = (outer * target.shape[axis] + integer(node["before"])) * inner
        size = x.shape[axis] * inner
        body.line(f"std::copy_n({x.text} + {outer * size}, {size}, {target.text} + {at});")


def _slice(body: _Body, node: Node, place: int) -> None:
    """The row of a table of positions that is this token's."""
    x, start = body.value(node.inputs[0]), node["start"]
    if (
        not node.get("past")
        or x.batch
        or integer(node["axis"]) % len(x.shape) != 0
        or not isinstance(start, int)
    ):
        raise _Unserved
    if body.graph.name != body.emitter.main.name:
        raise _Unserved
    body.emitter.limit(x.shape[0] - start)
    row = math.prod(x.shape[1:])
    body.values[node.name] = body.declared(node, f"({x.text} + (call.past + {start}) * {row})")


def _rotary(body: _Body, node: Node, place: int) -> None:
    x = body.value(node.inputs[0])
    if not node.get("past"):
        raise _Unserved
    given = node.get("stretch")
    stretch = () if given is None else tuple(map(number, sequence(given)))
    turns = body.emitter.angles(x.width, number(node["base"]), stretch)
    target, sign = body.target(node, place), -1 if node.get("inverse") else 1
    body.line(f"rotary({x.rows}, {x.width}, call.turns[{turns}], {sign}, {x.text}, {target.text});")


def _recent(body: _Body, node: Node, place: int) -> None:
    """Of the last tokens, without documents."""
    x, *weights = (body.value(name) for name in node.inputs)
    before = integer(node["by"]) if node.op == "shift" else body.value(node.inputs[1]).shape[0] - 1
    documents = len(node.inputs) > (1 if node.op == "shift" else 2)
    if node.get("state") is None or documents or not x.batch or x.shape[-2] != 1:
        raise _Unserved
    if before == 0:
        raise _Unserved
    target = body.target(node, place)
    recent = body.kept(f"{node['state']}{{}}.recent", before * x.count)
    given = [x.rows, str(x.width), str(before), x.text, *(each.text for each in weights), recent, target.text]
    body.line(f"{node.op}({', '.join(given)});")


def _attention(body: _Body, node: Node, place: int) -> None:
    """Causal, by a polynomial, of one token to all before it."""
    attention, emitter = Attention.of(node), body.emitter
    watched = (body.graph.name.removesuffix(STEP), node.name) in emitter.guarded
    if node.get("state") is None or watched or (emitter.exact and not attention.is_own):
        raise _Unserved
    given = attention.by_role([body.value(name) for name in node.inputs])
    spec = spec_of(attention, *(given[role].width if role in given else 0 for role in ("q", "v", "near_q")))
    if spec.padding or spec.documents or not spec.causal or spec.precision != "float32":
        raise _Unserved
    heads, query_heads = given["k"].shape[0], given["q"].shape[0]
    target = body.target(node, place)
    label, ring = f"{node['state']}{{}}", 2 * (spec.near or 0)
    near, forgets = bool(spec.near), spec.forget
    kept = [
        body.kept(f"{label}.k", heads * ring * spec.d),
        body.kept(f"{label}.v", heads * ring * spec.dv),
        body.kept(f"{label}.near_k", heads * ring * spec.near_d) if spec.near_d else "nullptr",
        body.kept(f"{label}.log_gate", heads * ring, "double") if forgets and near else "nullptr",
        body.kept(f"{label}.summed.shared", 1, "std::int64_t") if near else "nullptr",
        body.kept(f"{label}.sums", heads * spec.rank * (spec.dv + 1), "double"),
    ]
    tokens = [
        given[role].text if role in given else "nullptr"
        for role in ("q", "k", "v", "near_q", "near_k", FORGET)
    ]
    sizes = ["call.batch", str(heads), str(query_heads // heads), "call.past", "call.threads"]
    name = emitter.attention(spec)
    body.line(f"{name}::next({', '.join([*sizes, *tokens])}, {{{', '.join(kept)}}}, {target.text});")


OPERATIONS: Mapping[str, Rule] = {
    "weight": _weight,
    "literal": _weight,
    "constant": _constant,
    "call": _Body.run,
    "repeat": _Body.repeat,
    "item": _item,
    "assume_bound": _view,
    "reshape": _view,
    "split_heads": _heads,
    "merge_heads": _heads,
    "permute": _permute,
    "dropout": _dropout,
    "embedding": _embedding,
    "matmul": _matmul,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "unit": _norm,
    "sum": _reduce,
    "mean": _reduce,
    "fill": _fill,
    "pad": _pad,
    "slice": _slice,
    "rotary": _rotary,
    "shift": _recent,
    "depthwise": _recent,
    "poly_attention": _attention,
}
"""What a kernel may compute beside ELEMENTWISE."""


# ---------------------------------------------------------------- text


def _place(value: _Value, like: _Value) -> str:
    """Where entry `i` of row `row` of a value's shape finds what is broadcast to it."""
    shape = (1,) * (len(like.shape) - len(value.shape)) + value.shape
    if len(shape) != len(like.shape) or (value.batch and not like.batch):
        raise _Unserved
    if not shape:
        return "row" if value.batch else "0"
    rows = like.count // like.width
    if shape[:-1] == like.shape[:-1]:
        row = "row" if value.batch or not like.batch else f"row % {rows}" if rows > 1 else ""
    elif set(shape[:-1]) == {1}:
        row = f"row / {rows}" if value.batch else ""
    else:
        raise _Unserved
    width = shape[-1]
    if width not in (1, like.width):
        raise _Unserved
    parts = [f"{row} * {width}" if width > 1 and row else row, "i" if width > 1 else ""]
    return " + ".join(part for part in parts if part) or "0"


def _element(type_: TensorType) -> str:
    if type_.dtype == "bool":
        raise _Unserved
    return "real" if type_.dtype == "float" else "std::int64_t"


def _numbered(name: str, number: int) -> str:
    """What a name becomes in C++: with a number, by which it differs from all that have another one."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", name.partition("@")[0].rpartition(".")[2])
    stem = re.sub(r"_\d+$", "", words).strip("_")
    stem = stem if stem[:1].isalpha() else f"x{stem}"
    return f"{stem}_{number}" if stem[-1].isdigit() else f"{stem}{number}"


def _lines(numbers: int) -> int:
    """Memory for so many numbers, whole lines of float64 and float32."""
    return -(-numbers // 16) * 16


def _times(batch: str, count: int) -> str:
    return str(count) if not batch else batch if count == 1 else f"{batch} * {count}"


def _sum(first: int, index: str, step: int) -> str:
    return f"{first} + {index} * {step}" if index and step else str(first)


def _count(tensors: Tensors) -> int:
    return sum(1 if isinstance(what, str) else len(what) * _count(of) for what, of in tensors)  # type: ignore[arg-type, misc]


def _renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return tuple(
        (change(what), of) if isinstance(what, str) else (what, _renamed(of, change))  # type: ignore[arg-type, misc]
        for what, of in tensors
    )


def _called(tensors: Tensors, label: str) -> Tensors:
    """Those of a graph that is called under a label."""
    return _renamed(tensors, lambda path: f"{label}{{}}.{path.replace('{}', '')}")


def _repeated(tensors: Tensors, iterations: range) -> Tensors:
    """Those of the body of a loop: the iteration stands after the first label."""
    return ((iterations, _renamed(tensors, lambda path: path.replace("{}", "{}.*"))),)


def _whole(tensors: Tensors) -> Tensors:
    """Those of the model."""
    return _renamed(tensors, lambda path: path.replace("{}", "").replace("*", "{}"))


def _header() -> str:
    here = Path(__file__).parent
    text, *numbers = (
        (here / f"{name}.h").read_text(encoding="utf-8") for name in ("step_kernel", "numbers", "scalars")
    )
    return text.replace("// NUMBERS\n", "\n".join(numbers))


_INCLUDES = """\
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <omp.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;
"""
_REGISTRATION = """
#define FASTGRAD_TEXT_OF(name) #name
#define FASTGRAD_TEXT(name) FASTGRAD_TEXT_OF(name)

STABLE_TORCH_LIBRARY_FRAGMENT(fastgrad, library) {
  library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_run(Tensor addresses, int batch, int past, int threads) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastgrad, CPU, library) {
  library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_run", TORCH_BOX(&step::run));
}
"""
