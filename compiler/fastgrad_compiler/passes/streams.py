"""Where the tokens along a dim are in each value of a graph, and that operations treat them one by one.

A value whose type has the dim n is a stream: one of its axes runs over the tokens, and an entry at a token depends on
that token alone, or on earlier ones through an operation that a step form knows (`LOOKING_BACK`). The table STREAMS has
a rule for each operation: where the tokens of the result are, from where those of the operands are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.calls import callees
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, integer, sequence
from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_compiler.ir.ops import ARITHMETIC, COMPARISONS, FUNCTIONS

ONE = Dim.of(1)
LOOKING_BACK = frozenset((*ATTENTION, "shift", "depthwise"))


@dataclass(frozen=True)
class Stream:
    """Tokens along `axis` (negative), which holds major * n * minor entries; `missing`: without the last so many."""

    axis: int
    major: Dim = ONE
    minor: Dim = ONE
    missing: int = 0

    def moved(self, by: int) -> Stream:
        """The same tokens `by` axes further to the right."""
        return replace(self, axis=self.axis + by)


Placed: TypeAlias = "Stream | None"  # None: a value without tokens


class NoStep(Exception):
    """An operation that has no step form: its reason, and its node where it is known."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Streams:
    """Of a graph: the streams by name of value, those of a node with several results by place.

    live: the values that are computed anew in every call; fixed: those that depend on inputs, but on no token. The rest
    depend on weights and constants alone.
    """

    placed: dict[str, tuple[Placed, ...]] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    fixed: set[str] = field(default_factory=set)

    def of(self, name: str) -> Placed:
        """The stream of a value with one result."""
        return self.placed[name][0]


@dataclass(frozen=True)
class Look:
    """What rules may ask: the program, the dim, and the streams of a graph that a node runs."""

    program: Program
    along: str
    streams: Callable[[str], Streams]

    @property
    def tokens(self) -> Dim:
        """The dim n."""
        return Dim.of(self.along)

    def axes(self, type_: TensorType) -> list[int]:
        """The axes, negative, in which n occurs."""
        rank = len(type_.shape)
        return [axis - rank for axis, dim in enumerate(type_.shape) if self.along in dim.names]


@dataclass(frozen=True)
class Site:
    """A node with its operands."""

    look: Look
    graph: Graph
    node: Node
    places: tuple[Placed, ...]

    def type(self, place: int = 0) -> TensorType:
        """The type of an operand."""
        return self.graph[self.node.inputs[place]].tensor

    @property
    def place(self) -> Placed:
        """That of the first operand."""
        return self.places[0]

    def fail(self, reason: str) -> NoStep:
        """What a rule raises."""
        return NoStep(reason, self.node)


def stream_of(look: Look, node: Node) -> Placed:
    """The stream of an input, by its type. Raises NoStep where its tokens are not along one axis by themselves."""
    axes = look.axes(node.tensor)
    if not axes:
        return None
    dim = node.tensor.shape[axes[0]]
    minor = dim.divide(look.tokens)
    if len(axes) > 1 or minor is None or minor.constant is None:
        raise NoStep(f"the tokens of {node.name}: {node.tensor} are not along one axis by themselves", node)
    return Stream(axes[0], minor=minor)


def streams(look: Look, graph: Graph) -> Streams:
    """The streams of a graph. Raises NoStep where an operation mixes tokens or sees later ones."""
    found = Streams()
    main = look.program[look.program.main]
    has_fixed = any(not look.axes(node.tensor) for node in main.inputs)
    for node in graph.nodes:
        if node.op == "input":
            placed: tuple[Placed, ...] = (stream_of(look, node),)
        elif node.op == "item":
            placed = (found.placed[node.inputs[0]][integer(node["index"])],)
        else:
            places = tuple(found.of(name) for name in node.inputs)
            placed = _placed(Site(look, graph, node, places))
        found.placed[node.name] = placed
        if any(placed) or not found.live.isdisjoint(node.inputs):
            found.live.add(node.name)
        elif (has_fixed and node.op == "input") or not found.fixed.isdisjoint(node.inputs):
            found.fixed.add(node.name)
    for name in graph.outputs:
        stream = found.of(name)
        if stream is not None and stream.missing:
            raise NoStep("a result without the last tokens", graph[name])
    return found


def _placed(site: Site) -> tuple[Placed, ...]:
    node = site.node
    if node.op in ("call", "repeat"):
        return _of_graphs(site)
    if any(place is not None and place.missing for place in site.places) and node.op not in ("pad", "concat"):
        raise site.fail("the last tokens are left out, and nothing stands in their place")
    placed = STREAMS[node.op](site)
    axes = site.look.axes(node.tensor)
    if len(axes) > 1:
        raise site.fail("every token meets every other one")
    if axes != ([] if placed is None else [placed.axis]):
        raise site.fail("the tokens are not along an axis")
    return (placed,)


def _of_graphs(site: Site) -> tuple[Placed, ...]:
    """The results of the graphs that a node runs, which are alike."""
    (first, *_) = callees(site.node)
    for callee in callees(site.node):
        inner = site.look.streams(callee)
        graph = site.look.program[callee]
        for given, node in zip(site.places, graph.inputs, strict=True):
            if given != inner.of(node.name):
                raise site.fail(f"the tokens of {node.name} are not along one axis by themselves")
        found = tuple(inner.of(name) for name in graph.outputs)
        if site.node.op == "repeat" and found != site.places[: len(found)]:
            raise site.fail("an iteration moves the tokens to another axis")
        if callee == first:
            results = found
    return results


# ---------------------------------------------------------------- rules

Rule: TypeAlias = Callable[[Site], Placed]


def _none(site: Site) -> Placed:
    """Of a weight or a constant."""
    return None


def _together(site: Site) -> Placed:
    """Entry by entry: the operands' tokens are along the same axis."""
    found = {place for place in site.places if place is not None}
    if len(found) > 1:
        raise site.fail("tokens of one operand meet those of another")
    return next(iter(found), None)


def _but(*axes: int) -> Rule:
    """Something that mixes these axes of the first operand."""

    def rule(site: Site) -> Placed:
        if site.place is not None and site.place.axis in axes:
            raise site.fail("it mixes tokens")
        return _together(site)

    return rule


def _along(site: Site) -> Placed:
    """Something that mixes the axis that its attribute names."""
    return _but(_axis(site))(site)


def _axis(site: Site) -> int:
    axis, rank = integer(site.node["axis"]), len(site.type().shape)
    return axis if axis < 0 else axis - rank


def _reduced(site: Site) -> Placed:
    axes, place = tuple(map(integer, sequence(site.node["axes"]))), site.place
    if place is None:
        return None
    if place.axis in axes:
        raise site.fail("it mixes tokens")
    if site.node["keepdim"]:
        return place
    return place.moved(sum(axis > place.axis for axis in axes))


def _matmul(site: Site) -> Placed:
    left, right = site.places
    if (left is not None and left.axis == -1) or (right is not None and right.axis == -2):
        raise site.fail("the product sums over tokens")
    if left is not None and right is not None and (left != right or left.axis > -3):
        raise site.fail("every token meets every other one")
    return left or right


def _reshape(site: Site) -> Placed:
    place = site.place
    if place is None:
        return None if not site.look.axes(site.node.tensor) else _fail(site, "tokens come from nothing")
    source, shape = site.type().shape, site.node.tensor.shape
    outer = prod(source[: place.axis], start=place.major)
    before = ONE
    for index, dim in enumerate(shape):
        if site.look.along in dim.names:
            major = outer.divide(before, site.look.program.multiples)
            minor = None if major is None else dim.divide(major * site.look.tokens)
            if major is None or minor is None:
                break
            return Stream(index - len(shape), major, minor)
        before = before * dim
    raise site.fail("it puts entries of several tokens together")


def _fail(site: Site, reason: str) -> Placed:
    raise site.fail(reason)


def _permute(site: Site) -> Placed:
    place = site.place
    if place is None:
        return None
    axes = tuple(map(integer, sequence(site.node["axes"])))
    rank = len(axes)
    return replace(place, axis=[axis % rank for axis in axes].index(place.axis + rank) - rank)


def _split_heads(site: Site) -> Placed:
    place = site.place
    if place is None or place.axis == -2:
        return place
    return place.moved(-1) if place.axis < -2 else _fail(site, "it puts tokens into several heads")


def _merge_heads(site: Site) -> Placed:
    place = site.place
    if place is None or place.axis == -2:
        return place
    return place.moved(1) if place.axis < -3 else _fail(site, "it puts several tokens into one")


def _concat(site: Site) -> Placed:
    axis = _axis(site)
    if all(place is None or place.axis != axis for place in site.places):
        return _together(site)
    if moved_by(site.graph, site.node, site.places):
        return replace(site.places[-1], missing=0) if site.places[-1] else None
    raise site.fail("it puts something before, after or between the tokens")


def _stack(site: Site) -> Placed:
    place, rank = _together(site), len(site.node.tensor.shape)
    new = integer(site.node["axis"]) % rank
    return place.moved(-1) if place is not None and place.axis + rank - 1 < new else place


def _slice(site: Site) -> Placed:
    place, axis = site.place, _axis(site)
    start, stop = (_dim(site, key) for key in ("start", "stop"))
    if place is None:
        if stop - start != site.look.tokens:
            return None if site.look.along not in (stop - start).names else _fail(site, "it takes part of n")
        return Stream(axis) if start.constant is not None else _fail(site, "it begins at a token")
    if place.axis != axis:
        return place
    missing = (site.look.tokens - stop).constant
    if start != Dim.of(0) or missing is None or missing < 0 or place.major != ONE or place.minor != ONE:
        raise site.fail("it takes tokens out")
    return replace(place, missing=missing)


def _dim(site: Site, key: str) -> Dim:
    value = site.node[key]
    assert isinstance(value, int | Dim)
    return Dim.of(value)


def _select(site: Site) -> Placed:
    place, axis = site.place, _axis(site)
    if place is None or place.axis == axis:
        return None if place is None else _fail(site, "it takes one token out")
    return place.moved(1) if place.axis < axis else place


def _pad(site: Site) -> Placed:
    place = site.place
    if place is None or place.axis != _axis(site):
        return place if place is None or not place.missing else _fail(site, "the last tokens are left out")
    if moved_by(site.graph, site.node, site.places):
        return replace(place, missing=0)
    raise site.fail("it puts something before or after the tokens")


def moved_by(graph: Graph, node: Node, places: Sequence[Placed]) -> int:
    """By how many tokens a `pad` or `concat` moves those of a slice without the last ones, zeros before them; else 0.

    The tokens are along the second axis from the end, as `shift` has them.
    """
    place = places[-1]
    if place is None or place.axis != -2 or not place.missing or graph[node.inputs[-1]].op != "slice":
        return 0
    if node.op == "pad":
        fits = node["before"] == place.missing and node["after"] == 0
    else:
        zeros = graph[node.inputs[0]]
        fits = len(node.inputs) == 2 and zeros.op == "fill" and zeros["value"] == 0.0
        fits = fits and zeros.tensor.shape[-2] == Dim.of(place.missing)
    return place.missing if fits else 0


def _patches(site: Site) -> Placed:
    place = site.place
    return None if place is None else place.moved(1) if place.axis == -4 else _fail(site, "it mixes tokens")


def _broadcast_to(site: Site) -> Placed:
    return site.place or _made(site)


def _made(site: Site) -> Placed:
    """A tensor that is made of dims alone."""
    axes = site.look.axes(site.node.tensor)
    if not axes:
        return None
    dim = site.node.tensor.shape[axes[0]]
    if len(axes) > 1 or dim != site.look.tokens:
        raise site.fail(f"it makes a tensor of {dim} tokens")
    return Stream(axes[0])


def _embedding(site: Site) -> Placed:
    table, ids = site.places
    if table is not None:
        raise site.fail("it looks up tokens")
    return None if ids is None else ids.moved(-1)


def _one_hot(site: Site) -> Placed:
    return None if site.place is None else site.place.moved(-1)


def _rotary(site: Site) -> Placed:
    place = site.place
    if place is not None and place.axis == -2 and (place.major, place.minor) != (ONE, ONE):
        raise site.fail("positions count entries of several tokens")
    return _but(-1)(site)


def _moved(site: Site) -> Placed:
    """`shift` and `depthwise`: along the second axis from the end."""
    node, (place, *others) = site.node, site.places
    if node.op == "depthwise" and others.pop(0) is not None:
        raise site.fail("its weights depend on tokens")
    if place is None or place.axis != -2:
        documents = any(each is not None for each in others)
        return place if not documents else _fail(site, "documents are along the tokens, and it is not")
    if (place.major, place.minor) != (ONE, ONE):
        raise site.fail("it moves entries of several tokens")
    if node.get("reverse") or (node.op == "shift" and integer(node["by"]) < 0):
        raise site.fail("it sees later tokens")
    return place


def _mask(site: Site) -> Placed:
    """A mask on scores that are not part of an attention: one that asks for no place."""
    if site.place is not None and (site.node.op != "padding" or site.place.axis == -1):
        raise site.fail(
            "every token meets every other one, and the compiler does not recognise this as attention"
        )
    return _together(site)


def _pairs(site: Site) -> Placed:
    if any(site.places):
        raise site.fail(
            "every token meets every other one, and the compiler does not recognise this as attention"
        )
    return None


def _attention(site: Site) -> Placed:
    attention = Attention.of(site.node)
    given = attention.by_role(site.places)
    q, keys = given["q"], [given[role] for role in given if role not in ("q", "near_q")]
    if not any(site.places):
        return None
    if q is not None and q.axis < -3 and all(place == q for place in keys):
        return q
    if any(place is not None and (place.major, place.minor) != (ONE, ONE) for place in site.places):
        raise site.fail("its rows are entries of several tokens")
    if q is None or q.axis != -2:
        raise site.fail("its queries are not the tokens")
    if all(place is None for place in keys):
        mask = attention.mask
        if attention.near or attention.alibi or mask.causal or mask.window:
            raise site.fail("it compares the places of two sequences")
        return q
    if given["k"] is None or given["k"].axis != -2:
        raise site.fail("its keys are not the tokens")
    if not attention.mask.causal:
        raise site.fail("it sees later tokens: it is not causal")
    return q


def _losses(site: Site) -> Placed:
    return _fail(site, "it is a mean over tokens") if any(site.places) else None


STREAMS: dict[str, Rule] = {
    **dict.fromkeys(("weight", "buffer", "constant", "literal"), _none),
    **dict.fromkeys((*ARITHMETIC, *COMPARISONS, *FUNCTIONS), _together),
    **dict.fromkeys(
        ("neg", "abs", "logical_not", "cast", "clamp", "where", "polynomial", "assume_bound", "dropout"),
        _together,
    ),
    "matmul": _matmul,
    **dict.fromkeys(("sum", "mean", "amax"), _reduced),
    "softmax": _along,
    **dict.fromkeys(("layer_norm", "rms_norm", "unit", "normalize_rows"), _but(-1)),
    "reshape": _reshape,
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": _but(-3),
    "concat": _concat,
    "stack": _stack,
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "patches": _patches,
    "broadcast_to": _broadcast_to,
    **dict.fromkeys(("fill", "arange", "sinusoid"), _made),
    "embedding": _embedding,
    "one_hot": _one_hot,
    **dict.fromkeys(MASKS, _mask),
    **dict.fromkeys((*GATED, "near_far", "alibi"), _pairs),
    "rotary": _rotary,
    **dict.fromkeys(("shift", "depthwise"), _moved),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(("cross_entropy", "linear_cross_entropy", "mse"), _losses),
}

DECLINED: dict[str, str] = {
    **dict.fromkeys(("input", "item", "call", "repeat"), "belongs to the graph, not to a value"),
    **dict.fromkeys(
        (
            "sum_to",
            "embedding_gradient",
            "depthwise_weights",
            "poly_attention_backward",
            "repeat_backward",
            "weight_gradient",
        ),
        "stands in gradients alone",
    ),
}
