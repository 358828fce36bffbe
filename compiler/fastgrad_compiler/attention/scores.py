"""From the scores of an attention inward, to the product of q and k: what softmax, or a polynomial, over keys
commutes with.

Each step takes a node and gives the name of the operand to go on with, or None where the node changes the
function. A step is exact in real arithmetic: where the text gives a number, the attention gives the same one. Where the
text divides 0 by 0 or takes infinity from infinity (a row that sees no key, less its largest score), it promises none,
and the attention's result is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, isfinite, prod

from fastgrad_compiler.attention.factors import factor_of, swaps
from fastgrad_compiler.attention.value import Mask, Range
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Bound, Graph, Node
from fastgrad_compiler.ir.masks import FORGET, GATED, MASKS
from fastgrad_compiler.ir.ops import limits
from fastgrad_compiler.ir.words import describe, number, place


@dataclass(frozen=True, slots=True)
class Product:
    """Logits `scale * gains * q.k`: `left` is q, `right` is k transposed (`flipped`: left is k, right is q
    transposed).

    `gains` are (op, node): factors without a key axis that multiply or divide the logits.
    """

    left: str
    right: str
    flipped: bool
    scale: float
    gains: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Walk:
    """Where the walk inward stands. `factor` is the constant by which everything outside multiplies what is
    inside; `operands` the nodes that the masks read, by role; `refused` says of forget gates, by name, why they are no
    attention's.
    """

    graph: Graph
    mask: Mask = field(default_factory=Mask)
    operands: dict[str, str] = field(default_factory=dict)
    alibi: bool = False
    consumed: set[str] = field(default_factory=set)
    flipped: bool = False
    factor: float = 1.0
    gains: list[tuple[str, str]] = field(default_factory=list)
    positive: bool = True  # the gains met so far, where a mask may still lie inside
    masks_allowed: bool = True
    near_allowed: bool = True
    # a constant added to a row of these scores changes the weights: they are a polynomial of the scores, or the
    # scores of one branch of a near field, beside which the other stays where it is
    level_matters: bool = False
    range: Range = field(default_factory=Range)
    refused: dict[str, str] = field(default_factory=dict)

    def refuse(self, why: str) -> None:
        """What is wrong with an attention around forget gates that could be its."""
        self.refused |= {name: known or why for name, known in self.refused.items()}


def is_key_axis(walk: Walk, axis: object, node: Node) -> bool:
    rank = len(node.tensor.shape)
    return isinstance(axis, int) and axis % rank == (rank - 2 if walk.flipped else rank - 1)


def same(walk: Walk, left: str, right: str) -> bool:
    """Whether two names compute the same, node by node; both spellings are then consumed as far as they
    differ. Each pair is looked at once.
    """
    pairs, seen = [(left, right)], set[tuple[str, str]]()
    while pairs:
        pair = pairs.pop()
        if pair[0] == pair[1] or pair in seen:
            continue
        seen.add(pair)
        one, other = (walk.graph[name] for name in pair)
        alike = (one.op, one.attributes, len(one.inputs)) == (other.op, other.attributes, len(other.inputs))
        if not alike or one.op in ("input", "weight", "buffer", "call", "repeat", "dropout"):
            return False
        pairs += zip(one.inputs, other.inputs, strict=True)
    walk.consumed |= {name for pair in seen for name in pair}
    return True


def inward(walk: Walk, name: str) -> tuple[Product, Product | None, int | None] | None:
    """Follow the scores to their product of q and k, or to a near and a far one."""
    while True:
        node = walk.graph[name]
        _note_range(walk, node)
        walk.consumed.add(name)
        if node.op == "matmul":
            return _product(walk, node), None, None
        if node.op == "near_far":
            return _near_far(walk, node)
        step = _STEPS.get(node.op)
        inner = step(walk, node) if step else None
        if inner is None:
            return None
        name = inner


def _note_range(walk: Walk, node: Node) -> None:
    """Keep the least R that any node on the way gives, times what multiplies it further out.

    What is asserted of the node or of a gain is asserted of R; of two equal ranges the proved one is kept.
    """
    if node.bound is None or walk.alibi:
        return
    gains = [(op, walk.graph[gain].bound) for op, gain in walk.gains]
    outside = abs(walk.factor) * prod(_size(op, bound) for op, bound in gains)
    limit = outside * node.bound.magnitude
    premises = [node.bound, *(bound for _, bound in gains if bound is not None)]
    asserted = any(premise.asserted for premise in premises)
    if not isfinite(limit) or (limit, asserted) >= (walk.range.limit, walk.range.asserted):
        return
    proof = tuple(dict.fromkeys(line for premise in premises for line in premise.proof))
    if outside != 1:
        proof += (f"the logits are at most {number(outside)} times that: |s| is at most {number(limit)}",)
    walk.range = Range(limit, asserted, proof)


def _size(op: str, gain: Bound | None) -> float:
    """What a gain multiplies by at most; infinity where nothing is known."""
    if gain is None:
        return inf
    if op == "mul":
        return gain.magnitude
    return 1 / min(abs(gain.low), abs(gain.high)) if gain.low * gain.high > 0 else inf


def _product(walk: Walk, node: Node) -> Product:
    return Product(node.inputs[0], node.inputs[1], walk.flipped, walk.factor, tuple(walk.gains))


def _near_far(walk: Walk, node: Node) -> tuple[Product, Product | None, int | None] | None:
    """Both parts; the range is asked of the far one, whose nodes come last. One part twice is a plain
    attention whose rewrite is exact nearby.
    """
    if walk.flipped or not walk.near_allowed or not isinstance(block := node["block"], int):
        return None
    local, far = node.inputs
    return near_and_far(walk, local, far, block)


def near_and_far(walk: Walk, local: str, far: str, block: int) -> tuple[Product, Product | None, int] | None:
    """The products of the far scores and, where they are others, of the local ones; no mask lies in either."""
    parts, level_matters = [], walk.level_matters or local != far
    for part in dict.fromkeys((local, far)):
        inner = replace(
            walk,
            gains=list(walk.gains),
            masks_allowed=False,
            near_allowed=False,
            level_matters=level_matters,
        )
        found = inward(inner, part)
        if found is None:
            return None
        parts.append((found[0], inner.range))
    walk.range = parts[-1][1]
    return parts[-1][0], parts[0][0] if local != far else None, block


def _scaled(walk: Walk, node: Node) -> str | None:
    """A constant factor, or a gain that does not depend on the key."""
    constant_factor = factor_of(walk.graph.by_name, node)
    if constant_factor is not None:
        name, value = constant_factor
        walk.factor *= value
        return name if isfinite(walk.factor) else None
    if node.op == "neg":
        return None
    left, right = (walk.graph[name] for name in node.inputs)
    for scores, gain in ((left, right), (right, left))[: 2 if node.op == "mul" else 1]:
        if scores.tensor.shape == node.tensor.shape and _is_gain(walk, gain):
            walk.gains.append((node.op, gain.name))
            bound = gain.bound
            walk.positive = walk.positive and bound is not None and bound.low > 0 and not bound.asserted
            return scores.name
    return None


def _is_gain(walk: Walk, gain: Node) -> bool:
    trailing = gain.tensor.shape[-2:] if walk.flipped else gain.tensor.shape[-1:]
    return all(dim == Dim.of(1) for dim in trailing)


def _transposed(walk: Walk, node: Node) -> str | None:
    walk.flipped = not walk.flipped
    return node.inputs[0] if swaps(node) else None


def masked(walk: Walk, node: Node) -> str | None:
    """A mask whose hidden pairs weigh 0: its fill is -inf, which a positive factor outside of it keeps. What it
    does to a transposed matrix is another mask.
    """
    if walk.flipped or not walk.masks_allowed or not (walk.positive and walk.factor > 0):
        return None
    if node.get("fill") not in (None, -inf):
        return None
    if node.inputs[1:] and walk.operands.setdefault(node.op, node.inputs[1]) != node.inputs[1]:
        return None  # two different ones of a kind are not one attention
    walk.mask &= Mask.of(node)
    return node.inputs[0]


def gated(walk: Walk, node: Node) -> str | None:
    """A forget gate, of scores or of weights: what it adds to scores, nothing may multiply, cut off or raise to a
    power. R is that of the scores inside of it.
    """
    walk.refused[node.name] = _gate_objection(walk, node)
    if walk.refused[node.name]:
        return None
    walk.operands[FORGET] = node.inputs[1]
    walk.mask &= Mask(operands=(FORGET,))
    walk.range = Range()
    return node.inputs[0]


def misplaced(walk: Walk, node: Node) -> None:
    """A forget gate of the kind that is for the other of scores and weights."""
    other = next(op for op in GATED if op != node.op)
    walk.refused[node.name] = (
        f"{node.op} is for {GATED[node.op]}, and this is one of {GATED[other]}: write {other}"
    )


def _gate_objection(walk: Walk, node: Node) -> str:
    """Why a forget gate cannot be the attention's; empty where it can."""
    gate = walk.graph[node.inputs[1]]
    if FORGET in walk.operands:
        return "the attention has another forget gate"
    if walk.flipped:
        return "its scores are transposed"
    if walk.factor != 1 or walk.gains:
        return "a factor stands outside of it, which would multiply what it adds: put the factor inside"
    if not walk.masks_allowed:
        return "it stands in one part of a near_far, or in a clamp: put it outside"
    if walk.level_matters:
        return "it would not multiply the weights, which are a polynomial of its scores: write decay(weights, log_gate)"
    if gate.bound is None or gate.bound.high > 0:
        return f"nothing proves that {describe(gate)}{place(gate)} is at most 0, as log_sigmoid(x) is"
    if gate.bound.asserted:
        return f"that {describe(gate)}{place(gate)} is at most 0 is asserted, not proved"
    return ""


def _alibi(walk: Walk, node: Node) -> str | None:
    """Slopes are added to scaled logits: nothing may multiply them."""
    if walk.flipped or not walk.masks_allowed or walk.alibi or walk.factor != 1 or walk.gains:
        return None
    walk.alibi = True
    walk.range = Range()
    return node.inputs[0]


def _clamped(walk: Walk, node: Node) -> str | None:
    """A clamp that provably changes nothing; inside of it no mask may lie, whose fill it would change."""
    bound, (low, high) = walk.graph[node.inputs[0]].bound, limits(node)
    if bound is None or bound.asserted or bound.low < low or bound.high > high:
        return None
    walk.masks_allowed = False
    return node.inputs[0]


def _shifted(walk: Walk, node: Node) -> str | None:
    """Less the row's largest score, which softmax ignores where it is taken from the whole row; it keeps exp from
    overflowing.
    """
    scores, largest = node.inputs
    top = walk.graph[largest]
    if walk.level_matters or top.op != "amax" or not top["keepdim"] or len(axes := _tuple(top["axes"])) != 1:
        return None
    if not is_key_axis(walk, axes[0], top) or not same(walk, scores, top.inputs[0]):
        return None
    walk.consumed.add(largest)
    walk.range = Range()
    return scores


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _through(walk: Walk, node: Node) -> str | None:
    return node.inputs[0]


def _cast(walk: Walk, node: Node) -> str | None:
    return node.inputs[0] if keeps_values(walk.graph, node) else None


def keeps_values(graph: Graph, node: Node) -> bool:
    """Whether a cast goes from float to float: another one rounds, or turns numbers into truth values."""
    return node.tensor.dtype == graph[node.inputs[0]].tensor.dtype == "float"


def _undropped(walk: Walk, node: Node) -> str | None:
    return node.inputs[0] if node["p"] == 0 else None


_STEPS: dict[str, Callable[[Walk, Node], str | None]] = {
    **dict.fromkeys(("mul", "div", "neg"), _scaled),
    **dict.fromkeys(MASKS, masked),
    "permute": _transposed,
    "alibi": _alibi,
    "forget": gated,
    "decay": misplaced,
    "clamp": _clamped,
    "sub": _shifted,
    "assume_bound": _through,
    "cast": _cast,
    "dropout": _undropped,
}


def obstacle(graph: Graph, product: Product) -> tuple[str, ...]:
    """Why nothing is proved of the logits: which of q and k has rows of unknown norm."""
    lines = []
    for name in (product.left, product.right):
        node = graph[name]
        while node.op in ("permute", "repeat_heads", "split_heads", "rotary", "neg"):
            node = graph[node.inputs[0]]
        scaled = factor_of(graph.by_name, node)
        node = graph[scaled[0]] if scaled else node
        if node.bound is None or not isfinite(node.bound.norm):
            lines.append(f"nothing limits the rows of {describe(node)}{place(node)}")
    return tuple(dict.fromkeys(lines))
