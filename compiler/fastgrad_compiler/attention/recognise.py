"""Attention, recognised by structure: what `attention_pattern` matches becomes one `attention` node, or one
`poly_attention` where the weights are a polynomial that the model gives: that is low-rank as it stands.

The node keeps the span of the product with the values, takes its name where the user gave one, and says in
`bound` and `proof` what is proved of its logits. Constant factors of q, of k and of the scores are one
`scale`; learned ones are multiplied into q. Heads of keys, values and gates that were repeated for grouped attention
are taken as they were before. The node's operands are [b, h, n, d] whatever the model's are: axes before the heads are
one batch, and tensors without heads have one. An attention with a prefix becomes two, of whose rows each is one's or
the other's. What nobody reads any more is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, prod

from fastgrad_compiler.attention.factors import factor_of
from fastgrad_compiler.attention.pattern import Match, match
from fastgrad_compiler.attention.scores import Product, obstacle
from fastgrad_compiler.attention.value import ATTENTION, OWN, Attention, Mask, Polynomial, Range, Verdict
from fastgrad_compiler.ir.builder import Builder, Value
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.ir.masks import FORGET, MASKS
from fastgrad_compiler.ir.words import place

# also where nothing reads them: inputs are the signature, and weights have their place in the state_dict, which calls
# and repeats may hold
_KEPT = ("input", "weight", "buffer", "call", "repeat")
_ROWWISE = ("unit", "rotary", "neg")  # what repeating heads commutes with
_ENTRYWISE = (
    "log_sigmoid",
    "neg",
    "softplus",
    "sigmoid",
    "log",
    "exp",
    "clamp",
)  # and what gates are made by


def recognise_attention(program: Program) -> Program:
    """The program with every attention as one node; graphs without one are returned as they are.

    Types must be there, and bounds, if the logits' range is to be known.
    """
    certified = program.trust == "certified"
    return program.with_graphs(_recognise(graph, program.multiples, certified) for graph in program.graphs)


def _recognise(graph: Graph, multiples: Mapping[str, int], certified: bool) -> Graph:
    builder = Builder(graph.nodes, multiples)
    first_new, renamed = len(graph.nodes), dict[str, str]()
    nodes: list[Node] = []
    for node in graph.nodes:
        builder.span = node.span
        found = match(graph, node) if node.op in ("matmul", "div") else None
        reasons = _reasons(graph, found, certified) if found else ()
        result = _attention(builder, found, reasons, node.name) if found else None
        if result is None:
            nodes.append(node)
            continue
        nodes.extend(builder.nodes[first_new:])
        first_new = len(builder.nodes)
        renamed[node.name] = result
    if not renamed:
        return graph
    outputs = tuple(renamed.get(name, name) for name in graph.outputs)
    changed = replace(graph, nodes=tuple(node.renamed(renamed) for node in nodes), outputs=outputs)
    kept = [node.name for node in nodes if node.op in _KEPT]
    alive = changed.ancestors((*outputs, *kept))
    return _keep_names(replace(changed, nodes=tuple(n for n in changed.nodes if n.name in alive)), renamed)


def _reasons(graph: Graph, found: Match, certified: bool) -> tuple[str, ...]:
    """The proof of R, or why nothing is known of the logits."""
    if found.range.bound is not None:
        return found.range.proof
    told = [node for node in graph.nodes if node.op == "assume_bound"] if certified else []
    unheard = tuple(
        f"`trust = certified` does not count what assume_bound says{place(node)}" for node in told
    )
    return (*obstacle(graph, found.far), *unheard)


def _keep_names(graph: Graph, renamed: Mapping[str, str]) -> Graph:
    """The attention takes the name that the user gave to its result, now that the old node is gone."""
    names = {
        _source(graph, new): old
        for old, new in renamed.items()
        if new in graph.by_name and not old.startswith("_")
    }
    nodes = tuple(node.renamed(names) for node in graph.nodes)
    return replace(graph, nodes=nodes, outputs=tuple(names.get(name, name) for name in graph.outputs))


def _source(graph: Graph, name: str) -> str:
    """The attention after the reshape or transposition of its result, or the choice between two."""
    while graph[name].op not in (*ATTENTION, "where"):
        name = graph[name].inputs[0]
    return name


# ---------------------------------------------------------------- the node


@dataclass(frozen=True, slots=True)
class _Pair:
    """q [.., n, d] and k [.., m, d], with the scale of their product."""

    query: Value
    key: Value
    scale: float


def _attention(builder: Builder, found: Match, reasons: tuple[str, ...], name: str) -> str | None:
    """Emit the attention of a match: the name of its result; None, and no node, where the operands do not
    fit the node. `reasons` are the proof of its range, or why it has none; `name` is that of the product.
    """
    start = len(builder.nodes)
    scope = _Scope(builder)
    pairs = [scope.pair(product) for product in (found.far, found.local) if product is not None]
    value = scope[found.value]
    value = scope.swapped(value) if found.transposed else value
    gate = scope[found.operands[FORGET]] if found.mask.forget else None
    pairs, value, gate = scope.ungrouped(pairs, value, gate)
    if not _fit(pairs, value, gate, found):
        del builder.nodes[start:]
        return None
    result = _emit(scope, found, pairs, value, gate, reasons, name)
    result = result.reshape((*pairs[0].query.shape[:-1], value.shape[-1]))
    return (result.T if found.transposed else result).name


def _with_heads(value: Value, alibi: bool) -> Value:
    """As [b, h, n, d]: alibi tells heads from a batch where there is one axis, which is a batch else."""
    *leading, tokens, width = value.shape
    heads = leading.pop() if len(leading) > 1 or (leading and alibi) else Dim.of(1)
    return value.reshape((prod(leading, start=Dim.of(1)), heads, tokens, width))


def _as_heads(gate: Value) -> Value:
    """The log gates of each head as [b, h, n]."""
    *leading, tokens = gate.shape
    heads = leading.pop() if len(leading) > 1 else Dim.of(1)
    return gate.reshape((prod(leading, start=Dim.of(1)), heads, tokens))


def _of_batch(operand: Value, like: Value) -> Value:
    """The operand of a mask, [b, m], with all the axes before the heads of `like` for its batch."""
    batch, *more = like.shape[:-3] or like.shape[:1]
    if not more:
        return operand
    *_, tokens = operand.shape
    spread = operand.reshape((batch, *(Dim.of(1) for _ in more), tokens))
    return spread.op("broadcast_to", shape=(batch, *more, tokens)).reshape((prod(more, start=batch), tokens))


def _fit(pairs: list[_Pair], value: Value, gate: Value | None, found: Match) -> bool:
    """Whether these are operands of one attention: the same leading dims, key heads that divide query
    heads, a gate for each key.
    """
    rank = len(value.shape)
    operands = [operand for pair in pairs for operand in (pair.query, pair.key)]
    if rank < 2 or any(len(operand.shape) != rank for operand in operands):
        return False
    if any(operand.shape[-1].constant is None for operand in (*operands, value)):
        return False  # attention over channels: no kernel has a width that the run decides
    if gate is not None and gate.shape != value.shape[:-1]:
        return False
    if found.alibi and len(pairs) > 1:
        return False  # nothing that is emitted adds slopes to near and far logits
    if rank == 3 and found.alibi and found.operands:
        return False  # the first axis would be heads and batch at once
    batch = slice(0, -3 if rank > 3 else -2)
    if any(operand.shape[batch] != value.shape[batch] for operand in operands):
        return False
    return rank <= 3 or all(
        pair.key.shape[-3] == value.shape[-3] and pair.query.shape[-3].divide(pair.key.shape[-3]) is not None
        for pair in pairs
    )


def _emit(
    scope: _Scope,
    found: Match,
    pairs: list[_Pair],
    value: Value,
    gate: Value | None,
    reasons: tuple[str, ...],
    name: str,
) -> Value:
    far = pairs[0]
    floats = [far.query, far.key, value]
    for local in pairs[1:]:
        floats += [scope.times(local.query, local.scale), local.key]
    inputs = [_with_heads(each, found.alibi) for each in floats]
    read = {} if gate is None else {FORGET: _as_heads(gate)}
    masks = (role for role in found.mask.operands if role in MASKS)
    read |= {role: _of_batch(scope[found.operands[role]], far.query) for role in masks}
    attention = Attention(
        found.mask,
        far.scale,
        found.near,
        len(pairs) > 1,
        found.alibi,
        replace(found.range, proof=reasons),
    )
    if "prefix" in found.operands and not found.mask.causal:
        inside = _of_batch(_before(scope[found.operands["prefix"]], value.shape[-2]), far.query)
        return _split(inside, found, attention, inputs, read, name)
    return _node(scope.builder, found, attention, [*inputs, *read.values()])


def _node(
    builder: Builder, found: Match, attention: Attention, inputs: list[Value], name: str = "_attention"
) -> Value:
    if not found.coefficients:
        return builder.emit("attention", inputs, attention.attributes("attention"), name=name)
    own = replace(
        attention,
        range=Range(),
        polynomial=Polynomial(OWN, found.coefficients, eps=0.0, eps_prime=0.0),
        verdict=Verdict("polynomial", "exact: the model's own polynomial"),
    )
    return builder.emit("poly_attention", inputs, own.attributes("poly_attention"), name=name)


def _before(length: Value, tokens: Dim) -> Value:
    """bool [b, tokens]: which are among the first `length`, int [b]."""
    place = length.builder.emit("arange", (), {"stop": tokens})
    return place < length.reshape((length.shape[0], Dim.of(1)))


def _split(
    inside: Value, found: Match, attention: Attention, inputs: list[Value], read: dict[str, Value], name: str
) -> Value:
    """An attention with a prefix, bool [b, n], by its queries: one of the prefix sees all of it and nothing else, and
    one after it, which has the whole prefix in its past, sees its past.
    """
    build, stem = inside.builder, "_attention" if name.startswith("_") else name
    shown = inside
    if "padding" in read:
        hidden = build.emit("constant", (), {"value": False})
        shown = build.emit("where", (inside, read["padding"], hidden))
    mask = found.mask & Mask(operands=("padding",))
    whole = [*inputs, *({**read, "padding": shown}[role] for role in mask.operands)]
    among = _node(build, found, replace(attention, mask=mask), whole, f"{stem}_prefix")
    mask = replace(found.mask, causal=True)
    after = _node(build, found, replace(attention, mask=mask), [*inputs, *read.values()], f"{stem}_past")
    rows = inside.reshape((inside.shape[0], Dim.of(1), inside.shape[1], Dim.of(1)))
    return build.emit("where", (rows, among, after))


class _Scope:
    """The nodes of the graph and those that were added, as values to build on."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.nodes = {node.name: node for node in builder.nodes}

    def __getitem__(self, name: str) -> Value:
        return Value(self.builder, self.nodes[name])

    def times(self, value: Value, scale: float) -> Value:
        """The value times a constant, itself for 1."""
        if scale == 1:
            return value
        return value * self.builder.emit("constant", (), {"value": scale})

    def pair(self, product: Product) -> _Pair:
        """q and k of a product, their constant factors taken into the scale and its gains into q."""
        left, scale = self.peeled(self[product.left], product.scale)
        right, scale = self.peeled(self[product.right], scale)
        right, scale = self.peeled(self.swapped(right), scale)
        query, key = (right, left) if product.flipped else (left, right)
        for op, gain in product.gains:
            query = query.op(op, self[gain])
        return _Pair(query, key, scale)

    def peeled(self, value: Value, scale: float) -> tuple[Value, float]:
        """A tensor without its constant factors, and the scale with them."""
        while (found := factor_of(self.nodes, value.node)) is not None and isfinite(scale * found[1]):
            value, scale = self[found[0]], scale * found[1]
        return value, scale

    def swapped(self, value: Value) -> Value:
        """The last two axes exchanged, by as few permutations as it takes."""
        axes = value.node.get("axes") if value.node.op == "permute" else None
        if not isinstance(axes, tuple):
            return value.T
        exchanged = tuple(axis for axis in (*axes[:-2], axes[-1], axes[-2]) if isinstance(axis, int))
        source = self[value.node.inputs[0]]
        return source if exchanged == tuple(range(len(axes))) else source.permute(exchanged)

    def ungrouped(
        self, pairs: list[_Pair], value: Value, gate: Value | None
    ) -> tuple[list[_Pair], Value, Value | None]:
        """Keys, values and gates as they were before their heads were repeated, where all were repeated alike."""
        repeats = {self.repeats(operand) for operand in (value, *(pair.key for pair in pairs))}
        repeats |= set() if gate is None else {self.gate_repeats(gate)}
        if repeats == {1} or len(repeats) > 1:
            return self.as_gated(pairs, value, gate)
        pairs = [replace(pair, key=self.unrepeated(pair.key)) for pair in pairs]
        return pairs, self.unrepeated(value), None if gate is None else self.ungated(gate)

    def as_gated(
        self, pairs: list[_Pair], value: Value, gate: Value | None
    ) -> tuple[list[_Pair], Value, Value | None]:
        """Keys and values with a head for each gate, where query heads share one by broadcasting."""
        if gate is None or len(value.shape) < 4 or value.shape[-3] == gate.shape[-2]:
            return pairs, value, gate
        times = gate.shape[-2].divide(value.shape[-3])
        if times is None or times.constant is None:
            return pairs, value, gate
        repeat = partial(Value.op, name="repeat_heads", times=times.constant)
        return [replace(pair, key=repeat(pair.key)) for pair in pairs], repeat(value), gate

    def repeats(self, value: Value) -> int:
        """How often each head is repeated, 1 if it is not."""
        node = value.node
        while node.op in _ROWWISE:
            node = self.nodes[node.inputs[0]]
        times = node["times"] if node.op == "repeat_heads" else 1
        return times if isinstance(times, int) else 1

    def gate_repeats(self, gate: Value) -> int:
        """How often the gates of each head are repeated: as rows [.., h, n, 1], which then lose their last axis."""
        node, rank = gate.node, len(gate.shape)
        while node.op in _ENTRYWISE or self.drops_last(node):
            node = self.nodes[node.inputs[0]]
        times = node["times"] if node.op == "repeat_heads" and len(node.tensor.shape) == rank + 1 else 1
        return times if isinstance(times, int) else 1

    def drops_last(self, node: Node) -> bool:
        """Whether a node leaves out the last axis, of size 1."""
        inputs = [self.nodes[name].tensor.shape for name in node.inputs]
        return node.op == "reshape" and inputs[0] == (*node.tensor.shape, Dim.of(1))

    def ungated(self, gate: Value) -> Value:
        """The same gates without the repetition."""
        if gate.node.op == "repeat_heads":
            return self[gate.node.inputs[0]]
        inner = self.ungated(self[gate.node.inputs[0]])
        if gate.node.op == "reshape":
            unshaped = self[inner.node.inputs[0]] if inner.node.op == "reshape" else inner
            return unshaped.reshape(inner.shape[:-1])
        return inner.op(gate.node.op, **dict(gate.node.attributes))

    def unrepeated(self, value: Value) -> Value:
        """The same rows without the repetition."""
        if value.node.op == "repeat_heads":
            return self[value.node.inputs[0]]
        inner = self.unrepeated(self[value.node.inputs[0]])
        return inner.op(value.node.op, **dict(value.node.attributes))
