"""The pass `step`: from a model that is causal in one dim, the program that runs it on the next tokens along that dim.

The step form of a graph has its inputs for c >= 1 new tokens, and gives their results. It is the graph itself, but for

* what tells positions, which go on from those of the calls before (`past`),
* what looks back: attention, `shift` and `depthwise` keep what they need of earlier tokens under a label (`state`),
* what depends on inputs without the dim alone, such as the memory of an encoder: its own graph, which the first call
  runs, and whose results are kept (a `call` with `once`).

Everything else must treat tokens one by one, for which `passes/streams.py` has a rule for each operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from fastgrad_compiler.attention.value import ATTENTION
from fastgrad_compiler.ir.calls import callees, reachable, runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import ONCE, STEP, Graph, Node, Program, attributes, step_form
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.passes.streams import LOOKING_BACK, Look, NoStep, Placed, Streams, moved_by, streams
from fastgrad_grammar.diagnostics import Diagnostic, TfgError


def derive_step(program: Program) -> Program:
    """The program with the step form of its model, or as it is where there is none."""
    try:
        return with_step(program)
    except TfgError:
        return program


def with_step(program: Program, along: str | None = None) -> Program:
    """The program with the step form of its model along a dim, found by itself where only one has it.

    Raises TfgError FG501 with the place of an operation that mixes tokens or sees later ones, FG502 where no dim is
    one to step along, or several are.
    """
    if along is not None:
        if along not in _dims(program):
            raise TfgError([_no_dim(program, f"the model has no dim {along}")])
        return _derived(program, along)
    found: dict[str, Program] = {}
    refused: list[TfgError] = []
    for name in _dims(program):
        try:
            found[name] = _derived(program, name)
        except TfgError as error:
            refused.append(error)
    chosen = [name for name, each in found.items() if _looks_back(each)]
    if not chosen and not refused:
        first = {node.tensor.shape[0].names for node in program[program.main].inputs if node.tensor.shape}
        chosen = [name for name in found if frozenset((name,)) not in first]
    if len(chosen) == 1:
        return found[chosen[0]]
    if chosen:
        raise TfgError([_no_dim(program, f"it may be {' or '.join(sorted(chosen))}")])
    raise refused[0] if refused else TfgError([_no_dim(program, "no dim has tokens one after the other")])


def _dims(program: Program) -> tuple[str, ...]:
    """The run-time dims of the model's inputs, those of axes other than the first before others."""
    later: dict[str, None] = {}
    first: dict[str, None] = {}
    for node in program[program.main].inputs:
        for axis, dim in enumerate(node.tensor.shape):
            (later if axis else first).update(dict.fromkeys(sorted(dim.names)))
    return tuple({**later, **first})


def _no_dim(program: Program, reason: str) -> Diagnostic:
    return Diagnostic("FG502", f"model {program.name} has no step form: {reason}", program[program.main].span)


def _looks_back(program: Program) -> bool:
    """Whether anything keeps what it needs of earlier tokens, or tells positions."""
    marks = {"state", "past"}
    return any(
        not marks.isdisjoint(key for key, _ in node.attributes)
        for graph in program.graphs
        if graph.name.endswith(STEP)
        for node in graph.nodes
    )


def _derived(program: Program, along: str) -> Program:
    graphs = [graph for graph in program.graphs if not graph.name.endswith((STEP, ONCE))]
    program = replace(program, graphs=tuple(graphs), step=None, along=None)
    _check_inputs(program, along)
    derivation = _Derivation(program, along)
    name = derivation.step(program.main)
    if name == program.main:  # nothing to keep: the step form is written all the same
        main = program[name]
        name = step_form(name)
        derivation.graphs.append(replace(main, name=name))
    derived = {graph.name: graph for graph in derivation.graphs}
    read = [graph for graph in reachable({**program.by_name, **derived}, [name]) if graph.name in derived]
    return replace(program, graphs=(*program.graphs, *read), step=name, along=along)


def _check_inputs(program: Program, along: str) -> None:
    """Raises TfgError FG501 where a size of new tokens could not be given by its name."""
    for node in program[program.main].inputs:
        dims = [dim for dim in node.tensor.shape if along not in dim.names]
        sums = [dim for dim in dims if dim.names and dim != Dim.of(next(iter(dim.names)))]
        if sums and len(dims) < len(node.tensor.shape):
            message = (
                f"no step form along {along}: {node.name} has the size {sums[0]}, which is not a dim itself"
            )
            raise TfgError([Diagnostic("FG501", message, node.span)])


@dataclass
class _Derivation:
    """The step forms that were derived so far; of a graph without anything to change, itself."""

    program: Program
    along: str
    graphs: list[Graph] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)
    _streams: dict[str, Streams] = field(default_factory=dict)
    _labels: dict[str, UniqueNames] = field(default_factory=dict)  # by the graph that holds the repeats

    def streams(self, graph: str) -> Streams:
        """Where the tokens of a graph's values are; raises TfgError FG501."""
        if graph not in self._streams:
            source = self.program[graph]
            try:
                self._streams[graph] = streams(Look(self.program, self.along, self.streams), source)
            except NoStep as error:
                span = None if error.node is None else error.node.span
                message = f"no step form along {self.along}: {error.reason}"
                raise TfgError([Diagnostic("FG501", message, span or source.span)]) from None
        return self._streams[graph]

    def step(self, graph: str) -> str:
        """The name of the step form of a graph."""
        if graph not in self._names:
            self._names[graph] = self._step(self.program[graph])
        return self._names[graph]

    def _step(self, graph: Graph) -> str:
        found = self.streams(graph.name)
        once = self._once(graph, found)
        form = self._form(graph, found, once)
        if form.nodes == graph.nodes:
            return graph.name
        self.graphs.append(form)
        return form.name

    # ------------------------------------------------------------ what is the same in every call

    def _once(self, graph: Graph, found: Streams) -> tuple[str, ...]:
        """The values that do not depend on tokens, but on inputs, and that those of tokens are computed from."""
        is_main = graph.name == self.program.main
        wanted: dict[str, None] = {}
        for node in graph.nodes:
            if node.name in found.live:
                wanted.update(dict.fromkeys(node.inputs))
        wanted.update(dict.fromkeys(graph.outputs))
        return tuple(
            name for name in wanted if name in found.fixed and (is_main or graph[name].op != "input")
        )

    def _form(self, graph: Graph, found: Streams, once: tuple[str, ...]) -> Graph:
        """The step form of a graph. The graph of `once` is added on the way."""
        nodes = list(graph.inputs)
        names: dict[str, str] = {}
        if once:
            kept, names = self._kept(graph, once)
            nodes += kept
        for node in graph.nodes:
            if node.op != "input" and node.name not in once:
                live = self._live(graph, node, found) if node.name in found.live else node
                nodes.append(replace(live, inputs=tuple(names.get(name, name) for name in live.inputs)))
        outputs = tuple(names.get(name, name) for name in graph.outputs)
        whole = replace(graph, name=step_form(graph.name), nodes=tuple(nodes), outputs=outputs)
        needed = tuple(node for node in nodes if node.op == "input" or node.name in whole.alive)
        return replace(whole, nodes=needed)

    def _kept(self, graph: Graph, once: tuple[str, ...]) -> tuple[list[Node], dict[str, str]]:
        """The call of the graph that computes what is kept, its results, and other names for kept inputs."""
        needed = graph.ancestors(once)
        body = tuple(node for node in graph.nodes if node.name in needed)
        inner = Graph(f"{graph.name}{ONCE}", body, once, "", graph.span)
        self.graphs.append(inner)
        taken = UniqueNames(node.name for node in graph.nodes)
        names = {name: taken.take(f"_{name}") for name in once if graph[name].op == "input"}
        results = [names.get(name, name) for name in once]
        label = self._label(graph.name, once[0])
        values = attributes(graph=inner.name, label=label, once=True)
        given = tuple(node.name for node in inner.inputs)
        types = tuple(graph[name].tensor for name in once)
        if len(once) == 1:
            return [Node(results[0], "call", given, values, types[0], span=graph[once[0]].span)], names
        whole = Node(taken.take("_kept"), "call", given, values, types, span=graph[once[0]].span)
        items = [
            Node(result, "item", (whole.name,), attributes(index=index), type_)
            for index, (result, type_) in enumerate(zip(results, types, strict=True))
        ]
        return [whole, *items], names

    # ------------------------------------------------------------ what is computed anew

    def _live(self, graph: Graph, node: Node, found: Streams) -> Node:
        """A node of a step form, by one that reads or makes tokens."""
        places = tuple(found.of(name) for name in node.inputs) if node.op != "item" else ()
        if node.op in ("call", "repeat"):
            return self._runs(node)
        if node.op in ("arange", "sinusoid") or (node.op == "slice" and places[0] is None):
            return node.with_attributes(past=True)
        if node.op == "rotary" and places[0] is not None and places[0].axis == -2:
            return node.with_attributes(past=True)
        if node.op in ("pad", "concat") and (by := moved_by(graph, node, places)):
            source = graph[node.inputs[-1]].inputs
            label = self._label(graph.name, node.name)
            return replace(node, op="shift", inputs=source, attributes=attributes(by=by, state=label))
        if node.op in LOOKING_BACK:
            return self._looking_back(graph, node, places)
        return node

    def _runs(self, node: Node) -> Node:
        if node.op == "call":
            return node.with_attributes(graph=self.step(str(node["graph"])))
        return node.with_attributes(bodies=tuple((self.step(body), times) for body, times in runs(node)))

    def _looking_back(self, graph: Graph, node: Node, places: tuple[Placed, ...]) -> Node:
        """Attention and convolution: what they read of tokens is kept."""
        stream = places[0]
        if stream is None or stream.axis != -2:
            return node  # along another axis than the tokens
        if places[1 if node.op in ATTENTION else 0] is not None:
            return node.with_attributes(state=self._label(graph.name, node.name))
        if node.op == "poly_attention":
            return node.with_attributes(memory=self._label(graph.name, node.name))
        return node

    def _label(self, graph: str, name: str) -> str:
        """Under which what a node keeps is found: one label a node, among all that stand in the same class."""
        owner = self._owner(graph)
        taken = self._labels.setdefault(owner, UniqueNames())
        return taken.take(name.removeprefix("_"))

    def _owner(self, graph: str) -> str:
        """The graph in whose class a graph is written: for the body of a repeat, the one that repeats it."""
        while graph in self._bodies:
            graph = self._bodies[graph]
        return graph

    @cached_property
    def _bodies(self) -> dict[str, str]:
        """The graph that repeats each body."""
        found: dict[str, str] = {}
        for graph in reachable(self.program.by_name, [self.program.main]):
            for node in graph.nodes:
                if node.op == "repeat":
                    found.update(dict.fromkeys(callees(node), graph.name))
        return found
