"""Vector-Jacobian products of the operations inside a graph, one rule for each operation.

A rule takes the cotangent `g` of the result `y`, `y` itself and the inputs, and gives the inputs' cotangents, or the
one of a single input; None where nothing flows. A cotangent may have the shape that broadcasting gave the result, or
one that broadcasts to the input's: `Value.fit` settles both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, pi, sqrt
from typing import TypeAlias

from fastgrad_compiler.ir.builder import Operand, Value
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, TensorType, integer, number, sequence
from fastgrad_compiler.ir.masks import LEAST_LOG_GATE, MASKS

Cotangents: TypeAlias = Sequence[Value | None]

RULES: dict[str, Callable[..., Value | Cotangents]] = {
    "neg": lambda g, y, x: -g,
    "exp": lambda g, y, x: g * y,
    "log": lambda g, y, x: g / x,
    "sqrt": lambda g, y, x: g / (y * 2.0),
    "rsqrt": lambda g, y, x: g * y * y * y * -0.5,
    "tanh": lambda g, y, x: g * (1.0 - y * y),
    "sigmoid": lambda g, y, x: g * y * (1.0 - y),
    "relu": lambda g, y, x: g.only(x > 0.0),
    "gelu": lambda g, y, x: g * (_normal_cdf(x) + x * _normal_pdf(x)),
    "silu": lambda g, y, x: g * (y + x.op("sigmoid") * (1.0 - y)),
    "log_sigmoid": lambda g, y, x: g * (-x).op("sigmoid"),
    "softplus": lambda g, y, x: g * x.op("sigmoid"),
    "abs": lambda g, y, x: g.only(x > 0.0) - g.only(x < 0.0),
    "erf": lambda g, y, x: g * (x * -x).op("exp") * (2.0 / sqrt(pi)),
    "cast": lambda g, y, x: g,
    "clamp": lambda g, y, x: g.only(x.op("equal", y)),
    # shape
    "reshape": lambda g, y, x: g.reshape(x.shape),
    "permute": lambda g, y, x: g.permute(_inverse(_ints(y["axes"]), len(x.shape))),
    "split_heads": lambda g, y, x: g.op("merge_heads"),
    "merge_heads": lambda g, y, x: g.op("split_heads", heads=_whole(x.shape[-3])),
    "repeat_heads": lambda g, y, x: sum_groups(g, x.shape[-3]),
    "slice": lambda g, y, x: _unslice(g, x, y["axis"], y["start"], y["stop"]),
    "select": lambda g, y, x: _unselect(g, x, integer(y["axis"]), _dim(y["index"])),
    "pad": lambda g, y, x: _slice(g, y["axis"], _dim(y["before"]), _dim(y["before"]) + _size(x, y["axis"])),
    "patches": lambda g, y, x: _unpatch(g, x, integer(y["size"])),
    "broadcast_to": lambda g, y, x: g,
    "sum_to": lambda g, y, x: g,
    # reduce
    "sum": lambda g, y, x: _keepdim(g, y, x),
    "mean": lambda g, y, x: _keepdim(g, y, x) / _reduced_count(y, x),
    "amax": lambda g, y, x: _share(_keepdim(g, y, x), x.op("equal", _keepdim(y, y, x)), _ints(y["axes"])),
    # normalise
    "softmax": lambda g, y, x: y * (g - (g * y).sum((integer(y["axis"]),), keepdim=True)),
    "unit": lambda g, y, x: _unit(g, y, x),
    # weights: 0 where a mask hides the pair, and so is their derivative
    "polynomial": lambda g, y, x: g * x.op("polynomial", coefficients=_derivative(y["coefficients"])),
    "normalize_rows": lambda g, y, x: _normalize_rows(g, y, x),
    "assume_bound": lambda g, y, x: g,
    # position: a rotation's transpose is its inverse; alibi adds what does not depend on the scores
    "rotary": lambda g, y, x: g.op("rotary", **_turned_back(y.node)),
    "alibi": lambda g, y, x: g,
    # other: graphs run as in evaluation, where dropout is the identity
    "dropout": lambda g, y, x: g,
    # of several inputs
    "add": lambda g, y, a, b: (g, g),
    "sub": lambda g, y, a, b: (g, -g),
    "mul": lambda g, y, a, b: (g * b, g * a),
    "div": lambda g, y, a, b: (g / b, -(g / b) * y),
    "minimum": lambda g, y, a, b: _winner(g, a < b, b < a),
    "maximum": lambda g, y, a, b: _winner(g, b < a, a < b),
    "matmul": lambda g, y, a, b: (g @ b.T, a.T @ g),
    "rms_norm": lambda g, y, x, w: _rms_norm(g, x, w, y["eps"]),
    "forget": lambda g, y, s, gate: (g, of_gate(g, gate)),
    "decay": lambda g, y, w, gate: (g.op("decay", gate), of_gate((g * y).only(y > -inf), gate)),
    "near_far": lambda g, y, near, far: split_near_far(g, y["block"]),
    "embedding": lambda g, y, w, ids: (g.op("embedding_gradient", ids, rows=_whole(w.shape[0])), None),
    "embedding_gradient": lambda g, y, d, ids: (g.op("embedding", ids), None),
    "cross_entropy": lambda g, y, logits, targets: (_cross_entropy(g, y, logits, targets), None),
    "mse": lambda g, y, a, b: _mse(g, a - b),
    "where": lambda g, y, c, a, b: (None, g.only(c), g.only(c.op("logical_not"))),
    "layer_norm": lambda g, y, x, w, b: _layer_norm(g, x, w, y["eps"]),
    "concat": lambda g, y, *xs: _unconcat(g, xs, y["axis"]),
    "stack": lambda g, y, *xs: [g.op("select", axis=y["axis"], index=i) for i in range(len(xs))],
    **dict.fromkeys(MASKS, lambda g, y, *xs: _mask(g, y, xs)),
    "shift": lambda g, y, x, *ids: (g.op("shift", *ids, by=-integer(y["by"])), *(None for _ in ids)),
    "depthwise": lambda g, y, *xs: _depthwise(g, y, xs),
    "depthwise_weights": lambda g, y, *xs: _depthwise_weights(g, xs),
}


# attributes as numbers, and dims as attributes


def _ints(value: Attribute) -> tuple[int, ...]:
    return tuple(map(integer, sequence(value)))


def _dim(value: Attribute) -> Dim:
    return value if isinstance(value, Dim) else Dim.of(integer(value))


def _whole(dim: Dim) -> int | Dim:
    return dim if dim.constant is None else dim.constant


def _size(x: Value, axis: Attribute) -> Dim:
    return x.shape[integer(axis)]


# shape


def _inverse(axes: tuple[int, ...], rank: int) -> list[int]:
    forward = [axis % rank for axis in axes]
    return [forward.index(axis) for axis in range(rank)]


def _slice(x: Value, axis: Attribute, start: Dim, stop: Dim) -> Value:
    return x.op("slice", axis=axis, start=_whole(start), stop=_whole(stop))


def _unslice(g: Value, x: Value, axis: Attribute, start: Attribute, stop: Attribute) -> Value:
    return g.op("pad", axis=axis, before=start, after=_whole(_size(x, axis) - _dim(stop)))


def _unselect(g: Value, x: Value, axis: int, index: Dim) -> Value:
    place = axis % len(x.shape)
    row = g.reshape((*x.shape[:place], Dim.of(1), *x.shape[place + 1 :]))
    return _unslice(row, x, axis, _whole(index), index + 1)


def _unconcat(g: Value, xs: Sequence[Value], axis: Attribute) -> list[Value]:
    pieces, start = [], Dim.of(0)
    for x in xs:
        stop = start + _size(x, axis)
        pieces.append(_slice(g, axis, start, stop))
        start = stop
    return pieces


def _unpatch(g: Value, image: Value, size: int) -> Value:
    """[b, h/s * w/s, c*s*s] to [b, c, h, w]."""
    batch, channels, height, width = image.shape
    side = Dim.of(size)
    rows, columns = (dim.divide(size, g.builder.multiples) for dim in (height, width))
    if rows is None or columns is None:
        raise TypeError(f"patches of {size} of an image {image.node.type}")
    grid = g.reshape((batch, rows, columns, channels, side, side))
    return grid.permute((0, 3, 1, 4, 2, 5)).reshape(image.shape)


def sum_groups(g: Value, heads: Dim) -> Value:
    """[.., heads * times, n, d] to [.., heads, n, d]: each head gets the sum over those that read it."""
    *batch, grouped, n, d = g.shape
    if grouped == heads:
        return g
    times = grouped.divide(heads)
    if times is None:
        raise TypeError(f"{grouped} heads in {heads} groups")
    return g.reshape((*batch, heads, times, n, d)).sum((-3,))


# reduce and normalise


def _keepdim(g: Value, y: Value, x: Value) -> Value:
    """A value shaped like the reduction `y` of `x`, with the reduced axes as 1."""
    reduced = {axis % len(x.shape) for axis in _ints(y["axes"])}
    return g.reshape(tuple(Dim.of(1) if i in reduced else dim for i, dim in enumerate(x.shape)))


def _reduced_count(y: Value, x: Value) -> Operand:
    return x.builder.count(tuple(_size(x, axis) for axis in _ints(y["axes"])))


def _share(g: Value, winners: Value, axes: tuple[int, ...]) -> Value:
    """`g` in equal shares to the entries that tie for the maximum."""
    ones = winners.op("cast", dtype="float")
    return g * ones / ones.sum(axes, keepdim=True)


def _winner(g: Value, first: Value, second: Value) -> Cotangents:
    """`g` to the operand that won, half to each on a tie; none of it to the other, whatever it is."""
    half = (g * 0.5).fit(first.shape)
    return tuple(
        half.only(won) + half.only(lost.op("logical_not")) for won, lost in ((first, second), (second, first))
    )


def _unit(g: Value, y: Value, x: Value) -> Value:
    squared, least = (x * x).sum(keepdim=True), 1e-12  # below it the norm is held constant
    radial = (y * (g * y).sum(keepdim=True)).only(squared >= least)
    return (g - radial) * squared.op("maximum", least).op("rsqrt")


def _turned_back(node: Node) -> dict[str, Attribute]:
    """The attributes of the rotation back."""
    return {**dict(node.attributes), "inverse": not node.get("inverse", False)}


def _derivative(coefficients: Attribute) -> tuple[float, ...]:
    """Of a polynomial with these ascending coefficients."""
    return tuple(power * number(c) for power, c in enumerate(sequence(coefficients)))[1:] or (0.0,)


def _normalize_rows(g: Value, y: Value, x: Value) -> Value:
    visible = x > -inf
    total = x.only(visible).sum(keepdim=True)
    none = total.op("equal", 0.0)  # then nothing was divided
    shared = (g * y).sum(keepdim=True).only(none.op("logical_not"))
    return ((g - shared) / (total + none.op("cast", dtype="float"))).only(visible)


def _rms_norm(g: Value, x: Value, w: Value, eps: Attribute) -> Cotangents:
    scale = ((x * x).mean(keepdim=True) + number(eps)).op("rsqrt")
    normal, gw = x * scale, g * w
    return (gw - normal * (gw * normal).mean(keepdim=True)) * scale, g * normal


def _layer_norm(g: Value, x: Value, w: Value, eps: Attribute) -> Cotangents:
    centred = x - x.mean(keepdim=True)
    scale = ((centred * centred).mean(keepdim=True) + number(eps)).op("rsqrt")
    normal, gw = centred * scale, g * w
    return (gw - gw.mean(keepdim=True) - normal * (gw * normal).mean(keepdim=True)) * scale, g * normal, g


def _normal_cdf(x: Value) -> Value:
    return ((x * sqrt(0.5)).op("erf") + 1.0) * 0.5


def _normal_pdf(x: Value) -> Value:
    return (x * x * -0.5).op("exp") * (1.0 / sqrt(2.0 * pi))


# scores and losses


def split_near_far(g: Value, block: Attribute) -> tuple[Value, Value]:
    """The cotangents of `near_far(near, far)`: each keeps its own pairs."""
    zero = g.builder.fill(g.shape, 0.0)
    return g.op("near_far", zero, block=block), zero.op("near_far", g, block=block)


def of_gate(g: Value, gate: Value) -> Value:
    """The cotangent of a log gate [.., n] from that of what it adds to the scores [.., n, n].

    Gate t is in the sums of the pairs j < t <= i. With a token's row sum less its column sum of the past, the total of
    those pairs is a running sum from the end. A gate below the least one changes nothing.
    """
    past = g.op("causal", fill=0.0)
    own = past.sum() - past.sum((-2,))
    n = gate.shape[-1]
    later = g.builder.fill((n, n), 1.0).op("causal", fill=0.0)  # 1 for each row from the column on
    running = own.reshape((*own.shape[:-1], Dim.of(1), n)) @ later
    return running.reshape(own.shape).only(gate >= LEAST_LOG_GATE)


def _cross_entropy(g: Value, y: Value, logits: Value, targets: Value) -> Value:
    build = g.builder
    smoothing, ignored = number(y.node.get("smoothing", 0.0)), y.node.get("ignored")
    if ignored is None:
        difference = _above_truth(logits, targets, smoothing)
        return difference * (g / build.count(targets.shape))
    left_out = build.emit("constant", (), {"value": ignored}, type=TensorType("int", ()))
    some = build.emit("constant", (), {"value": 0}, type=TensorType("int", ()))  # a class that is there
    out = targets.op("equal", left_out)
    counted = out.op("logical_not")
    difference = _above_truth(logits, build.emit("where", (out, some, targets)), smoothing)
    ones = counted.op("cast", dtype="float")
    share = g / ones.sum(tuple(range(-len(targets.shape), 0)))
    return difference * (ones * share).reshape((*targets.shape, Dim.of(1)))


def _above_truth(logits: Value, targets: Value, smoothing: float) -> Value:
    """softmax of the logits less the truth, of which all classes have the share `smoothing`."""
    truth = targets.op("one_hot", classes=_whole(logits.shape[-1]))
    if smoothing:
        build = logits.builder
        truth = truth * (1 - smoothing) + build.constant(smoothing) / build.count(logits.shape[-1:])
    return logits.op("softmax", axis=-1) - truth


def _mask(g: Value, y: Value, xs: Sequence[Value]) -> Cotangents:
    """What was filled in does not depend on the scores."""
    size = MASKS[y.node.op].size
    sizes = {} if size is None else {size: y[size]}
    return g.op(y.node.op, *xs[1:], **sizes, fill=0.0), *(None for _ in xs[1:])


def _depthwise(g: Value, y: Value, xs: Sequence[Value]) -> Cotangents:
    """The mirrored convolution for x; for w_k, products of tokens that are k apart."""
    x, w, *ids = xs
    reverse = bool(y.node.get("reverse", False))
    later, earlier = (x, g) if reverse else (g, x)
    weights = later.op("depthwise_weights", earlier, *ids, width=_whole(w.shape[0]))
    return g.op("depthwise", w, *ids, reverse=not reverse), weights, *(None for _ in ids)


def _depthwise_weights(g: Value, xs: Sequence[Value]) -> Cotangents:
    later, earlier, *ids = xs
    return (
        earlier.op("depthwise", g, *ids),
        later.op("depthwise", g, *ids, reverse=True),
        *(None for _ in ids),
    )


def _mse(g: Value, difference: Value) -> Cotangents:
    first = difference * (g * 2.0 / g.builder.count(difference.shape))
    return first, -first
