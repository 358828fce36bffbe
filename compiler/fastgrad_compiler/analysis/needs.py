"""What each graph must be told to make new tensors: run-time dims that no input shows, and a tensor to be like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from fastgrad_compiler.ir.calls import callees, reachable, runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, Program, TensorType, integer
from fastgrad_compiler.ir.ops import ARITHMETIC, COMPARISONS

_MAKING = frozenset({"arange", "fill", "one_hot", "sinusoid"})  # make a tensor from nothing but dims
_MIXING = frozenset((*ARITHMETIC, "where"))  # ints may stand beside floats
# what takes ints of any size
_LOOKING = frozenset(
    (
        "embedding",
        "documents",
        *COMPARISONS,
        "shift",
        "depthwise",
        "attention",
        "poly_attention",
        "linear_cross_entropy",
    )
)
_SHAPED = {
    "reshape": ("shape",),
    "broadcast_to": ("shape",),
    "fill": ("shape",),
    "slice": ("start", "stop"),
    "select": ("index",),
    "pad": ("before", "after"),
    "arange": ("stop",),
    "sinusoid": ("length", "width"),
    "one_hot": ("classes",),
    "repeat_heads": ("times",),
}


@dataclass(frozen=True)
class Source:
    """A dim read from an input's shape: `factor` times the size of its `axis`."""

    name: str
    input: str
    axis: int
    factor: Fraction


@dataclass(frozen=True)
class Needs:
    """`dims`: those that the graph's forward uses, in order of name; `extra`: of those, the ones its caller must give.

    `makes`: whether it makes new tensors; `like`: whether its caller must give one whose dtype and device those take.
    """

    dims: tuple[str, ...]
    extra: tuple[str, ...]
    makes: bool
    like: bool


def sources(inputs: Iterable[Node]) -> dict[str, Source]:
    """Where each dim that inputs show is read."""
    found: dict[str, Source] = {}
    for node in inputs:
        for axis, dim in enumerate(node.tensor.shape):
            if len(dim.terms) == 1 and len(dim.terms[0][0]) == 1:
                ((name,), coefficient) = dim.terms[0]
                if name not in found or (found[name].factor != 1 and coefficient == 1):
                    found[name] = Source(name, node.name, axis, 1 / coefficient)
    return found


def needs(program: Program) -> dict[str, Needs]:
    """Of every graph that the model and its objective reach."""
    found: dict[str, Needs] = {}
    roots = (*program.roots, program.step) if program.step is not None else program.roots
    for graph in reachable(program.by_name, roots):
        found[graph.name] = _needs(program, graph, found)
    return found


def _has_tensor(program: Program, graph: Graph) -> bool:
    """Whether a float tensor is at hand in the graph: an input, or a weight of its own or of a block that it calls."""
    given = any(node.tensor.dtype == "float" for node in graph.inputs)
    return given or weight_path(program, graph) is not None


@dataclass(frozen=True)
class Step:
    """A label of a graph, after `depth` repeats, on the way to a weight."""

    graph: str
    label: str
    depth: int


def weight_path(program: Program, graph: Graph, owner: str = "", depth: int = 0) -> tuple[Step, ...] | None:
    """The way to some float weight of the graph, the first one where it is repeated.

    A repeat's body belongs to the graph `owner` (by default itself), after `depth` repeats.
    """
    owner = owner or graph.name
    for node in graph.nodes:
        if node.op in ("weight", "buffer") and node.tensor.dtype == "float":
            return (Step(owner, str(node["label"]), depth),)
    for node in graph.nodes:
        inner = None
        if node.op == "call" and not node.get("once"):
            inner = weight_path(program, program[str(node["graph"])])
            inner = inner and (Step(owner, str(node["label"]), depth), *inner)
        elif node.op == "repeat":
            inner = weight_path(program, program[runs(node)[0][0]], owner, depth + 1)
        if inner:
            return inner
    return None


def is_counted(program: Program, graph: Graph, name: str) -> bool:
    """Whether ints are computed with, which are of 64 bits, and not only looked up or compared."""
    for user in graph.users[name]:
        places = [place for place, source in enumerate(user.inputs) if source == name]
        if user.op == "call" or (user.op == "repeat" and min(places) >= integer(user["carried"])):
            inner = [program[callee] for callee in callees(user)]
            if any(is_counted(program, each, each.inputs[place].name) for each in inner for place in places):
                return True
        elif user.op not in _LOOKING:
            return True
    return False


def _needs(program: Program, graph: Graph, found: Mapping[str, Needs]) -> Needs:
    """A repeat's body is written into its owner: it needs what it needs, its inputs show nothing new."""
    dims: set[str] = set()
    makes = False
    for node in graph.nodes:
        dims |= {name for dim in _dims(graph, node) for name in dim.names}
        makes = makes or _makes_tensor(graph, node)
        for callee in callees(node):
            inner = found[callee]
            dims |= set(inner.dims if node.op == "repeat" else inner.extra)
            makes = makes or (inner.makes if node.op == "repeat" or node.get("once") else inner.like)
    if graph.name in (program.main, program.training):
        dims |= _checked(program, graph)
    extra = dims - sources(graph.inputs).keys()
    like = makes and not _has_tensor(program, graph)
    return Needs(tuple(sorted(dims)), tuple(sorted(extra)), makes, like)


def _checked(program: Program, graph: Graph) -> set[str]:
    """The dims of the model's inputs that can be wrong: shown twice, or limited by the file."""
    shown = Counter(name for node in graph.inputs for dim in node.tensor.shape for name in dim.names)
    limited = {info.name for info in program.dims if info.at_most is not None or info.multiple_of > 1}
    return {name for name, count in shown.items() if count > 1 or name in limited}


def _makes_tensor(graph: Graph, node: Node) -> bool:
    """Whether a node's expression needs a tensor to be like: for numbers as tensors, or ints that become floats."""
    if node.op in _MAKING or (node.op == "cast" and node["dtype"] == "float"):
        return True
    operands = [graph[name] for name in node.inputs]
    tensors = [operand for operand in operands if operand.op != "constant"]
    if operands and not tensors:
        return True
    if node.op in ("where", "stack"):
        return len(operands) - len(tensors) >= (2 if node.op == "where" else 1)
    floats = any(isinstance(t.type, TensorType) and t.type.dtype == "float" for t in tensors)
    return node.op in _MIXING and node.tensor.dtype == "float" and not floats


def _dims(graph: Graph, node: Node) -> Iterator[Dim]:
    for key in _SHAPED.get(node.op, ()):
        yield from _of(node[key])
    if node.op == "rms_norm":
        yield graph[node.inputs[0]].tensor.shape[-1]


def _of(value: Attribute) -> Iterator[Dim]:
    if isinstance(value, Dim):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _of(part)
