"""What every operation means, in numpy: see `oracle.py`. Conventions that are not obvious:

softmax         exp(s) / sum exp(s); a row where every s is -inf gives zeros
unit            x / max(||x||, 1e-6)
polynomial      0 where the score is -inf, as exp
normalize_rows  an entry of -inf, which a mask leaves, is 0; a row whose sum is 0 is left as it is
cast            from float to int towards 0, NaN to 0, and to the nearest where 64 bits do not hold it;
                from bool 0 or 1; to bool whether it is not 0
div             gives a float, of ints too
clamp           gives ints of ints, those within the limits
mean            of nothing is NaN, a sum 0
rotary          turns pairs (i, i + d/2) by position * base^(-2 i / d), over the stretch of the pair
shift           zeros where there is no such token, or one of another document; so in depthwise
sinusoid        sin in even and cos in odd columns c, of position / 10000^((c - c % 2) / width)
dropout         the identity: a run here evaluates, it does not train
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node
from fastgrad_compiler.reference import oracle_attention as pairs
from fastgrad_compiler.reference import oracle_convolution as tokens
from fastgrad_compiler.reference.oracle_attention import Array

Sizes: TypeAlias = Mapping[str, int]
Rule: TypeAlias = Callable[[Node, list[Array], Sizes], Array]

KINDS: dict[str, type] = {"float": np.float64, "int": np.int64, "bool": np.bool_}


# ---------------------------------------------------------------- attributes


def integer(value: Attribute) -> int:
    """An attribute that is an int; TypeError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def _number(value: Attribute) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _items(value: Attribute) -> tuple[Attribute, ...]:
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is not a tuple")
    return value


def _size(value: Attribute, sizes: Sizes) -> int:
    return value.evaluate(sizes) if isinstance(value, Dim) else integer(value)


def _shape(value: Attribute, sizes: Sizes) -> tuple[int, ...]:
    return tuple(_size(each, sizes) for each in _items(value))


# ---------------------------------------------------------------- values that are made


def _constant(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    value = node["value"]
    kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return np.asarray(value, KINDS[kind])


def _fill(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    return np.full(_shape(node["shape"], sizes), _number(node["value"]), np.float64)


def _sinusoid(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    length, width = _size(node["length"], sizes), _size(node["width"], sizes)
    columns = np.arange(width)
    angle = np.arange(length)[:, None] / 10000.0 ** ((columns - columns % 2) / width)
    return np.where(columns % 2 == 0, np.sin(angle), np.cos(angle))


# ---------------------------------------------------------------- shape


def _permute(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    return inputs[0].transpose([integer(axis) for axis in _items(node["axes"])])


def _split_heads(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    heads = _size(node["heads"], sizes)
    return np.stack(np.split(x, heads, axis=-1), axis=-3)


def _merge_heads(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    return np.concatenate([x[..., head, :, :] for head in range(x.shape[-3])], axis=-1)


def _slice(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    axis, start, stop = integer(node["axis"]), _size(node["start"], sizes), _size(node["stop"], sizes)
    if not 0 <= start <= stop <= x.shape[axis]:
        raise ValueError(f"slice {start}:{stop} of an axis of {x.shape[axis]} entries")
    return np.take(x, range(start, stop), axis=axis)


def _select(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    axis, index = integer(node["axis"]), _size(node["index"], sizes)
    if not 0 <= index < x.shape[axis]:
        raise ValueError(f"index {index} of an axis of {x.shape[axis]} entries")
    return np.asarray(np.take(x, index, axis=axis))


def _pad(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    around = [(0, 0)] * x.ndim
    around[integer(node["axis"])] = (_size(node["before"], sizes), _size(node["after"], sizes))
    return np.pad(x, around)


def _patches(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    """Row by row of patches; in a patch, channel by channel, row by row."""
    (x,) = inputs
    size = integer(node["size"])
    batch, _, height, width = x.shape
    if height % size or width % size:
        raise ValueError(f"an image of {height} x {width} in patches of {size}")
    corners = [(i, j) for i in range(0, height, size) for j in range(0, width, size)]
    return np.stack([x[:, :, i : i + size, j : j + size].reshape(batch, -1) for i, j in corners], axis=1)


def _sum_to(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    shape = _shape(node["shape"], sizes)
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    grown = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return np.asarray(x.sum(axis=grown, keepdims=True))


# ---------------------------------------------------------------- lookup


def _known(ids: Array, count: int, what: str) -> Array:
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        raise ValueError(f"{what} from {ids.min()} to {ids.max()} where there are {count}")
    return ids


def _embedding(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    table, ids = inputs
    return table[_known(ids, len(table), "ids")]


def _embedding_gradient(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    cotangent, ids = inputs
    rows = np.zeros((_size(node["rows"], sizes), cotangent.shape[-1]))
    np.add.at(rows, _known(ids, len(rows), "ids"), cotangent)
    return rows


def _one_hot(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    classes = _size(node["classes"], sizes)
    return np.asarray(_known(inputs[0], classes, "ids")[..., None] == np.arange(classes), np.float64)


# ---------------------------------------------------------------- by element


def _unary(function: Callable[[Array], Array]) -> Rule:
    return lambda node, inputs, sizes: function(inputs[0])


def _binary(function: Callable[[Array, Array], Array]) -> Rule:
    return lambda node, inputs, sizes: function(inputs[0], inputs[1])


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float64)


def _sigmoid(x: Array) -> Array:
    return np.where(x < 0, np.exp(np.minimum(x, 0.0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


def _cast(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    if node["dtype"] != "int" or x.dtype != np.float64:
        return x.astype(KINDS[str(node["dtype"])])
    most = np.iinfo(np.int64)
    inside = (x >= -(2.0**63)) & (x < 2.0**63)
    beyond = np.where(np.isnan(x), 0, np.where(x > 0, most.max, most.min))
    return np.where(inside, np.trunc(np.where(inside, x, 0.0)).astype(np.int64), beyond)


def _clamp(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    """Of ints to the ints within the limits."""
    (x,) = inputs
    whole = x.dtype == np.int64
    if node["low"] is not None:
        low = _number(node["low"])
        x = np.maximum(x, math.ceil(low) if whole else low)
    if node["high"] is not None:
        high = _number(node["high"])
        x = np.minimum(x, math.floor(high) if whole else high)
    return x


# ---------------------------------------------------------------- over axes


def _over(function: Callable[..., Array]) -> Rule:
    def rule(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
        axes = tuple(integer(axis) for axis in _items(node["axes"]))
        return np.asarray(function(inputs[0], axis=axes, keepdims=bool(node["keepdim"])))

    return rule


def _mean(x: Array, axis: tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """0 / 0 of nothing."""
    total = np.asarray(x.sum(axis=axis, keepdims=keepdims))
    return np.asarray(total / (x.size / total.size if total.size and x.size else 0.0))


def _over_root_mean_square(x: Array, eps: Attribute) -> Array:
    return np.asarray(x / np.sqrt(_mean(x * x, (-1,), True) + _number(eps)))


def _layer_norm(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    x, w, b = inputs
    return _over_root_mean_square(x - _mean(x, (-1,), True), node["eps"]) * w + b


def _rms_norm(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    x, w = inputs
    return _over_root_mean_square(x, node["eps"]) * w


def _unit(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    return np.asarray(x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), 1e-6))


def _normalize_rows(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    weights = np.where(inputs[0] == -math.inf, 0.0, inputs[0])
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0.0, 1.0, total))


def _cross_entropy(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    logits, targets = inputs
    counted = targets != node.get("ignored")
    _known(np.where(counted, targets, 0), logits.shape[-1], "targets")
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    places = np.where(counted, targets, 0)[..., None]
    truth = np.take_along_axis(logits, places, axis=-1)[..., 0]
    smoothing = _number(node.get("smoothing", 0.0))
    if smoothing:
        truth = (1 - smoothing) * truth + smoothing * logits.mean(axis=-1)
    return _mean((total - truth)[counted])


def _linear_cross_entropy(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    x, w, targets, *bias = inputs
    return _cross_entropy(node, [sum(bias, np.matmul(x, w)), targets], sizes)


# ---------------------------------------------------------------- positions and masks


def _rotary(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    (x,) = inputs
    length, half = x.shape[-2], x.shape[-1] // 2
    speed = _number(node["base"]) ** (-np.arange(half) / half)
    stretch = node.get("stretch")
    if stretch is not None:
        speed = speed / np.array([_number(each) for each in _items(stretch)])
    angle = np.arange(length)[:, None] * speed * (-1 if node.get("inverse") else 1)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _masked(seen: Callable[[Node, list[Array]], Array]) -> Rule:
    def rule(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
        fill = node.get("fill")
        return np.where(seen(node, inputs), inputs[0], -math.inf if fill is None else _number(fill))

    return rule


def _near_far(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    local, far = inputs
    queries, keys = local.shape[-2:]
    return np.where(pairs.near(queries, keys, integer(node["block"])), local, far)


def _polynomial(node: Node, inputs: list[Array], sizes: Sizes) -> Array:
    hidden = inputs[0] == -math.inf
    coefficients = [_number(each) for each in _items(node["coefficients"])]
    return np.where(hidden, 0.0, pairs.horner(coefficients, np.where(hidden, 0.0, inputs[0])))


MEANING: dict[str, Rule] = {
    "constant": _constant,
    "fill": _fill,
    "literal": lambda node, inputs, sizes: np.asarray(node["values"], np.float64),
    "reshape": lambda node, inputs, sizes: inputs[0].reshape(_shape(node["shape"], sizes)),
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": lambda node, inputs, sizes: np.repeat(inputs[0], _size(node["times"], sizes), axis=-3),
    "concat": lambda node, inputs, sizes: np.concatenate(inputs, axis=integer(node["axis"])),
    "stack": lambda node, inputs, sizes: np.stack(inputs, axis=integer(node["axis"])),
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "patches": _patches,
    "broadcast_to": lambda node, inputs, sizes: np.broadcast_to(inputs[0], _shape(node["shape"], sizes)),
    "sum_to": _sum_to,
    "embedding": _embedding,
    "embedding_gradient": _embedding_gradient,
    "arange": lambda node, inputs, sizes: np.arange(_size(node["stop"], sizes), dtype=np.int64),
    "one_hot": _one_hot,
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "div": _binary(np.true_divide),
    "minimum": _binary(np.minimum),
    "maximum": _binary(np.maximum),
    "neg": _unary(np.negative),
    "exp": _unary(np.exp),
    "log": _unary(np.log),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1.0 / np.sqrt(x)),
    "tanh": _unary(np.tanh),
    "sigmoid": _unary(_sigmoid),
    "relu": _unary(lambda x: np.maximum(x, 0.0)),
    "gelu": _unary(lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "log_sigmoid": _unary(lambda x: -np.logaddexp(0.0, -x)),
    "softplus": _unary(lambda x: np.logaddexp(0.0, x)),
    "abs": _unary(np.abs),
    "erf": _unary(_erf),
    "logical_not": _unary(np.logical_not),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "equal": _binary(np.equal),
    "cast": _cast,
    "clamp": _clamp,
    "where": lambda node, inputs, sizes: np.where(inputs[0], inputs[1], inputs[2]),
    "matmul": _binary(np.matmul),
    "sum": _over(np.sum),
    "mean": _over(_mean),
    "amax": _over(np.max),
    "softmax": lambda node, inputs, sizes: pairs.softmax(inputs[0], integer(node["axis"])),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": _unit,
    "causal": _masked(lambda node, given: pairs.causal(given[0].shape[-2], given[0].shape[-1])),
    "window": _masked(
        lambda node, given: pairs.window(given[0].shape[-2], given[0].shape[-1], integer(node["width"]))
    ),
    "padding": _masked(lambda node, given: pairs.padding(given[1], given[0].ndim)),
    "documents": _masked(lambda node, given: pairs.documents(given[1], given[0].ndim)),
    "prefix": _masked(lambda node, given: pairs.prefix(given[1], given[0].ndim, given[0].shape[-1])),
    "forget": _binary(pairs.forget),
    "decay": _binary(pairs.decay),
    "near_far": _near_far,
    "polynomial": _polynomial,
    "normalize_rows": _normalize_rows,
    "assume_bound": _unary(lambda x: x),
    "rotary": _rotary,
    "shift": lambda node, xs, sizes: tokens.moved(xs[0], integer(node["by"]), xs[1:]),
    "depthwise": lambda node, xs, sizes: tokens.depthwise(xs[0], xs[1], xs[2:], bool(node.get("reverse"))),
    "depthwise_weights": lambda node, xs, sizes: tokens.depthwise_weights(
        xs[0], xs[1], xs[2:], integer(node["width"])
    ),
    "alibi": _unary(lambda x: x + pairs.alibi(x)),
    "sinusoid": _sinusoid,
    "dropout": _unary(lambda x: x),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "mse": lambda node, inputs, sizes: _mean((inputs[0] - inputs[1]) ** 2),
    "attention": lambda node, inputs, sizes: pairs.attention(node, inputs),
    "poly_attention": lambda node, inputs, sizes: pairs.poly_attention(node, inputs),
}

STRUCTURE = ("input", "weight", "buffer", "call", "repeat", "item")
"""Operations that a run itself carries out."""

DECLINED: dict[str, str] = dict.fromkeys(
    ("poly_attention_backward", "repeat_backward", "weight_gradient"),
    "is of gradient graphs, which do not run here",
)
"""Operations without a meaning here, and why."""
