"""What docs/operations.md says of each operation, in numpy: nothing here is shared with the compiler.

`REFERENCE[op](inputs, attributes)` takes float64, int64 and bool arrays and attributes without dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Inputs = Sequence[Array]
Values = Mapping[str, Any]
Definition = Callable[[Inputs, Values], Array]

_ERF = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


def _distance(n: int, m: int) -> Array:
    return np.arange(n)[:, None] - np.arange(m)[None, :]


def _runs(ids: Array) -> Array:
    """The number of each token's run of equal ids, by a loop."""
    result = np.zeros_like(ids)
    for row in range(ids.shape[0]):
        for i in range(1, ids.shape[1]):
            result[row, i] = result[row, i - 1] + int(ids[row, i] != ids[row, i - 1])
    return result


def visible(op: str, scores: Array, rest: Inputs, values: Values) -> Array:
    """Which pairs a mask shows, broadcast to the scores."""
    n, m = scores.shape[-2:]
    between = (1,) * (scores.ndim - 3)
    if op == "causal":
        seen = _distance(n, m) >= 0
    elif op == "window":
        seen = np.abs(_distance(n, m)) < values["width"]
    elif op == "padding":
        seen = rest[0].reshape(scores.shape[0], *between, 1, m)
    elif op == "prefix":
        early = np.arange(m) < rest[0].reshape(scores.shape[0], *between, 1, 1)
        seen = (_distance(n, m) >= 0) | early
    else:
        runs = _runs(rest[0])
        seen = (runs[:, :, None] == runs[:, None, :]).reshape(scores.shape[0], *between, n, n)
    return np.broadcast_to(seen, scores.shape)


def _mask(op: str) -> Definition:
    return lambda xs, a: np.where(visible(op, xs[0], xs[1:], a), xs[0], a.get("fill", -math.inf))


def _gates(log_gate: Array) -> Array:
    """What each pair is multiplied by, as a logarithm: a difference of running sums."""
    n = log_gate.shape[-1]
    running, sums = np.zeros(log_gate.shape[:-1]), np.zeros((*log_gate.shape, n))
    totals: list[Array] = []
    for i in range(n):
        running = running + np.where(log_gate[..., i] < -1000.0, -1000.0, log_gate[..., i])
        for j, earlier in enumerate(totals):
            sums[..., i, j] = running - earlier
        totals.append(running)
    return sums


def _forget(s: Array, log_gate: Array) -> Array:
    return np.where(np.isneginf(s), s, s + _gates(log_gate))


def _decay(w: Array, log_gate: Array) -> Array:
    return np.where(np.isneginf(w), w, w * np.exp(_gates(log_gate)))


def _near(s: Array, block: int) -> Array:
    n, m = s.shape[-2:]
    return np.abs(np.arange(n)[:, None] // block - np.arange(m)[None, :] // block) <= 1


def softmax(s: Array, axis: int) -> Array:
    with np.errstate(invalid="ignore"):
        top = np.max(s, axis=axis, keepdims=True)
        weights = np.exp(s - np.where(np.isneginf(top), 0.0, top))
        total = np.sum(weights, axis=axis, keepdims=True)
        return weights / np.where(total == 0, 1.0, total)


def _polynomial(s: Array, coefficients: Sequence[float]) -> Array:
    finite = np.where(np.isneginf(s), 0.0, s)
    total = np.zeros_like(s)
    for c in coefficients[::-1]:
        total = c + finite * total
    return np.where(np.isneginf(s), 0.0, total)


def _normalize_rows(w: Array) -> Array:
    w = np.where(np.isneginf(w), 0.0, w)
    total = w.sum(-1, keepdims=True)
    return w / np.where(total == 0, 1.0, total)


def _rotary(x: Array, base: float, inverse: bool, stretch: tuple[float, ...] = (1.0,)) -> Array:
    *_, n, d = x.shape
    result = x.copy()
    for position in range(n):
        for i in range(d // 2):
            angle = position * base ** (-2.0 * i / d) * (-1 if inverse else 1)
            angle /= stretch[i if len(stretch) > 1 else 0]
            first, second = x[..., position, i], x[..., position, i + d // 2]
            result[..., position, i] = first * math.cos(angle) - second * math.sin(angle)
            result[..., position, i + d // 2] = first * math.sin(angle) + second * math.cos(angle)
    return result


def _shift(x: Array, by: int, ids: Inputs) -> Array:
    result = np.zeros_like(x)
    runs = [_runs(each) for each in ids]
    for t in range(x.shape[-2]):
        if 0 <= t - by < x.shape[-2]:
            result[..., t, :] = x[..., t - by, :]
            for run in runs:
                result[run[:, t] != run[:, t - by], ..., t, :] = 0.0
    return result


def _depthwise(x: Array, w: Array, ids: Inputs, reverse: bool) -> Array:
    taps = [w[k] * _shift(x, -k if reverse else k, ids) for k in range(len(w))]
    return np.asarray(sum(taps))


def _depthwise_weights(g: Array, x: Array, ids: Inputs, width: int) -> Array:
    result = np.zeros((width, x.shape[-1]))
    for k in range(width):
        products = g * _shift(x, k, ids)
        for place in np.ndindex(x.shape[:-1]):
            result[k] += products[place]
    return result


def _sinusoid(length: int, width: int) -> Array:
    result = np.zeros((length, width))
    for position in range(length):
        for column in range(width):
            angle = position * 10000.0 ** (-(column - column % 2) / width)
            result[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return result


def _alibi(s: Array) -> Array:
    heads, n, m = s.shape[-3:]
    slopes = np.array([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)])
    return s - slopes[:, None, None] * np.abs(_distance(n, m))


def _embedding_gradient(cotangent: Array, ids: Array, rows: int) -> Array:
    result = np.zeros((rows, cotangent.shape[-1]))
    for place in np.ndindex(ids.shape):
        result[ids[place]] += cotangent[place]
    return result


def _patches(image: Array, size: int) -> Array:
    b, _, height, width = image.shape
    rows = [
        image[:, :, y : y + size, x : x + size].reshape(b, -1)
        for y in range(0, height, size)
        for x in range(0, width, size)
    ]
    return np.stack(rows, axis=1)


def _sum_to(x: Array, shape: Sequence[int]) -> Array:
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(a for a, size in enumerate(shape) if size == 1 < x.shape[a]), keepdims=True)


def _unit(x: Array) -> Array:
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-6)


def _layer_norm(x: Array, w: Array, b: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b


def to_int(x: Array) -> Array:
    """Towards 0; NaN is 0, and what 64 bits do not hold their nearest."""
    if x.dtype != np.float64:
        return x.astype(np.int64)
    least, most = -(2**63), 2**63 - 1
    whole = [
        0 if math.isnan(v) else (least if v < 0 else most) if math.isinf(v) else min(max(int(v), least), most)
        for v in x.ravel().tolist()
    ]
    return np.array(whole, dtype=np.int64).reshape(x.shape)


def _cast(x: Array, dtype: str) -> Array:
    return to_int(x) if dtype == "int" else x.astype({"float": np.float64, "bool": np.bool_}[dtype])


def _clamp(x: Array, low: float | None, high: float | None) -> Array:
    result = x if low is None else np.where(x < low, np.asarray(low, x.dtype), x)
    return result if high is None else np.where(result > high, np.asarray(high, x.dtype), result)


def _extreme(better: Callable[[Array, Array], Array]) -> Definition:
    def rule(xs: Inputs, a: Values) -> Array:
        left, right = np.broadcast_arrays(*xs)
        result = np.where(better(left, right), left, right)
        return result if result.dtype != np.float64 else np.where(np.isnan(left + 0.0), left + 0.0, result)

    return rule


def _cross_entropy(logits: Array, targets: Array, a: Values) -> Array:
    losses = []
    for place in np.ndindex(targets.shape):
        if targets[place] == a.get("ignored"):
            continue
        row, share = logits[place], a.get("smoothing", 0.0)
        below = row - row.max()  # logits so large that log 2 is lost beside them count, too
        truth = below[targets[place]]
        if share:
            truth = (1 - share) * truth + share * below.mean()
        losses.append(math.log(np.exp(below).sum()) - truth)
    return np.asarray(np.mean(losses))


def _linear_cross_entropy(xs: Inputs, a: Values) -> Array:
    x, w, targets, *bias = xs
    return _cross_entropy(np.einsum("...d,dc->...c", x, w) + sum(bias), targets, a)


def _reduce(function: Callable[..., Array]) -> Definition:
    return lambda xs, a: function(xs[0], axis=tuple(a["axes"]), keepdims=bool(a["keepdim"]))


def _attention(xs: Inputs, a: Values) -> Array:
    q, k, v, *rest = xs
    extra = dict(zip(a["roles"], rest, strict=True))
    times = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, times, -3), np.repeat(v, times, -3)
    s = a["scale"] * (q @ np.swapaxes(k, -1, -2))
    if a["near"] is not None:
        near = s
        if "near_q" in extra:
            near_k = np.repeat(extra["near_k"], times, -3)
            near = extra["near_q"] @ np.swapaxes(near_k, -1, -2)
        s = np.where(_near(s, a["near"]), near, s)
    s = _alibi(s) if a["alibi"] else s
    s = _forget(s, np.repeat(extra["forget"], times, -2)) if "forget" in extra else s
    for op, wanted in (("causal", a["causal"]), ("window", a["window"] is not None)):
        if wanted:
            s = _mask(op)([s], {"width": a["window"]})
    for op in ("padding", "documents"):
        if op in extra:
            s = _mask(op)([s, extra[op]], {})
    return np.asarray(softmax(s, -1) @ v)


REFERENCE: dict[str, Definition] = {
    "constant": lambda xs, a: np.array(a["value"]),
    "fill": lambda xs, a: np.full(a["shape"], a["value"], dtype=np.float64),
    "literal": lambda xs, a: np.array(a["values"], dtype=np.float64),
    "reshape": lambda xs, a: xs[0].reshape(a["shape"]),
    "permute": lambda xs, a: np.transpose(xs[0], a["axes"]),
    "split_heads": lambda xs, a: np.swapaxes(
        xs[0].reshape(*xs[0].shape[:-1], a["heads"], xs[0].shape[-1] // a["heads"]), -2, -3
    ),
    "merge_heads": lambda xs, a: np.concatenate(
        [xs[0][..., h, :, :] for h in range(xs[0].shape[-3])], axis=-1
    ),
    "repeat_heads": lambda xs, a: np.repeat(xs[0], a["times"], axis=-3),
    "concat": lambda xs, a: np.concatenate(xs, axis=a["axis"]),
    "stack": lambda xs, a: np.stack(xs, axis=a["axis"]),
    "slice": lambda xs, a: np.take(xs[0], range(a["start"], a["stop"]), axis=a["axis"]),
    "select": lambda xs, a: np.take(xs[0], a["index"], axis=a["axis"]),
    "pad": lambda xs, a: np.pad(
        xs[0],
        [
            (a["before"], a["after"]) if axis == a["axis"] % xs[0].ndim else (0, 0)
            for axis in range(xs[0].ndim)
        ],
    ),
    "patches": lambda xs, a: _patches(xs[0], a["size"]),
    "broadcast_to": lambda xs, a: np.broadcast_to(xs[0], a["shape"]),
    "sum_to": lambda xs, a: _sum_to(xs[0], a["shape"]),
    "embedding": lambda xs, a: xs[0][xs[1]],
    "embedding_gradient": lambda xs, a: _embedding_gradient(xs[0], xs[1], a["rows"]),
    "arange": lambda xs, a: np.arange(a["stop"]),
    "one_hot": lambda xs, a: np.eye(a["classes"])[xs[0]],
    "add": lambda xs, a: xs[0] + xs[1],
    "sub": lambda xs, a: xs[0] - xs[1],
    "mul": lambda xs, a: xs[0] * xs[1],
    "div": lambda xs, a: xs[0] / xs[1],
    "minimum": _extreme(lambda x, y: x < y),
    "maximum": _extreme(lambda x, y: x > y),
    "neg": lambda xs, a: -xs[0],
    "exp": lambda xs, a: np.exp(xs[0]),
    "log": lambda xs, a: np.log(xs[0]),
    "sqrt": lambda xs, a: np.sqrt(xs[0]),
    "rsqrt": lambda xs, a: 1 / np.sqrt(xs[0]),
    "tanh": lambda xs, a: np.tanh(xs[0]),
    "sigmoid": lambda xs, a: sigmoid(xs[0]),
    "relu": lambda xs, a: np.where(xs[0] < 0, 0.0, xs[0]),
    "gelu": lambda xs, a: xs[0] * (1 + _ERF(xs[0] / math.sqrt(2))) / 2,
    "silu": lambda xs, a: xs[0] * sigmoid(xs[0]),
    "log_sigmoid": lambda xs, a: -np.logaddexp(0.0, -xs[0]),
    "softplus": lambda xs, a: np.logaddexp(0.0, xs[0]),
    "abs": lambda xs, a: np.abs(xs[0]),
    "erf": lambda xs, a: _ERF(xs[0]),
    "logical_not": lambda xs, a: ~xs[0],
    "less": lambda xs, a: xs[0] < xs[1],
    "less_equal": lambda xs, a: xs[0] <= xs[1],
    "equal": lambda xs, a: xs[0] == xs[1],
    "cast": lambda xs, a: _cast(xs[0], a["dtype"]),
    "clamp": lambda xs, a: _clamp(xs[0], a["low"], a["high"]),
    "where": lambda xs, a: np.where(xs[0], xs[1], xs[2]),
    "matmul": lambda xs, a: xs[0] @ xs[1],
    "sum": _reduce(np.sum),
    "mean": _reduce(np.mean),
    "amax": _reduce(np.max),
    "softmax": lambda xs, a: softmax(xs[0], a["axis"]),
    "layer_norm": lambda xs, a: _layer_norm(xs[0], xs[1], xs[2], a["eps"]),
    "rms_norm": lambda xs, a: xs[0] / np.sqrt((xs[0] ** 2).mean(-1, keepdims=True) + a["eps"]) * xs[1],
    "unit": lambda xs, a: _unit(xs[0]),
    **{op: _mask(op) for op in ("causal", "window", "padding", "documents", "prefix")},
    "forget": lambda xs, a: _forget(*xs),
    "decay": lambda xs, a: _decay(*xs),
    "near_far": lambda xs, a: np.where(_near(xs[0], a["block"]), xs[0], xs[1]),
    "polynomial": lambda xs, a: _polynomial(xs[0], a["coefficients"]),
    "normalize_rows": lambda xs, a: _normalize_rows(xs[0]),
    "assume_bound": lambda xs, a: xs[0],
    "rotary": lambda xs, a: _rotary(xs[0], a["base"], bool(a.get("inverse")), a.get("stretch", (1.0,))),
    "shift": lambda xs, a: _shift(xs[0], a["by"], xs[1:]),
    "depthwise": lambda xs, a: _depthwise(xs[0], xs[1], xs[2:], bool(a.get("reverse"))),
    "depthwise_weights": lambda xs, a: _depthwise_weights(xs[0], xs[1], xs[2:], a["width"]),
    "sinusoid": lambda xs, a: _sinusoid(a["length"], a["width"]),
    "alibi": lambda xs, a: _alibi(xs[0]),
    "dropout": lambda xs, a: xs[0],
    "cross_entropy": lambda xs, a: _cross_entropy(xs[0], xs[1], a),
    "linear_cross_entropy": _linear_cross_entropy,
    "mse": lambda xs, a: np.asarray(np.mean((xs[0] - xs[1]) ** 2)),
    "attention": _attention,
}


def reference(op: str, inputs: Inputs, values: Values) -> Array:
    """The result of an operation; quiet where numbers leave their domain."""
    with np.errstate(all="ignore"):
        return np.asarray(REFERENCE[op](inputs, values))
