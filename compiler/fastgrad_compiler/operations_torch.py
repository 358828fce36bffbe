"""What every operation means, in plain dense torch: the definition that passes, kernels and generated code are tested against.

Nothing here is shared with the kernels, nothing is fast, and n x n scores are fine. Conventions that are not obvious:

    softmax        a row without any visible entry gives zeros
    unit           x / ||x||, and less where ||x|| < 1e-6: its norm never exceeds 1
    rotary         turns pairs (i, i + d/2) by position * base^(-2 i / d)
    sinusoid       sin in even and cos in odd columns, as Vaswani et al.
    alibi          head i of h has slope 2^(-8 (i + 1) / h)
    dropout        the identity: the interpreter evaluates, it does not train
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Attribute, Node


@dataclass(frozen=True)
class Env:
    """What a run knows beside tensors: the sizes of the run-time dims, the float dtype, the device."""

    dims: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    def size(self, value: Attribute) -> int:
        """An attribute that is an int or a Dim, as a number."""
        if isinstance(value, Dim):
            return value.evaluate(self.dims)
        return integer(value)

    def shape(self, value: Attribute) -> tuple[int, ...]:
        """An attribute that is a tuple of ints and Dims, as numbers."""
        return tuple(map(self.size, sequence(value)))


Rule: TypeAlias = Callable[[Node, list[Tensor], Env], "Tensor | tuple[Tensor, ...]"]


def integer(value: Attribute) -> int:
    """The attribute as an int; TypeError where it is none."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def number(value: Attribute) -> float:
    """The attribute as a float; TypeError where it is no number."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def sequence(value: Attribute) -> tuple[Attribute, ...]:
    """The attribute as a tuple; TypeError where it is none."""
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is not a tuple")
    return value


# ---------------------------------------------------------------- structure and shape


def _constant(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    value = node["value"]
    dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else env.dtype
    return torch.tensor(value, dtype=dtype, device=env.device)


def _fill(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return torch.full(env.shape(node["shape"]), number(node["value"]), dtype=env.dtype, device=env.device)


def _split_heads(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    heads = env.size(node["heads"])
    return inputs[0].unflatten(-1, (heads, inputs[0].shape[-1] // heads)).transpose(-3, -2)


def _slice(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    start, stop = env.size(node["start"]), env.size(node["stop"])
    return inputs[0].narrow(integer(node["axis"]), start, stop - start)


def _pad(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    axis, parts = integer(node["axis"]), [inputs[0]]
    for place, key in ((0, "before"), (2, "after")):
        shape = list(inputs[0].shape)
        shape[axis] = env.size(node[key])
        parts.insert(place, inputs[0].new_zeros(shape))
    return torch.cat(parts, axis)


def _patches(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    size = integer(node["size"])
    batch, channels, height, width = inputs[0].shape
    rows, columns = height // size, width // size
    cut = inputs[0].reshape(batch, channels, rows, size, columns, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size * size)


def _embedding_gradient(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    cotangent, ids = inputs
    rows = cotangent.new_zeros(env.size(node["rows"]), cotangent.shape[-1])
    return rows.index_add(0, ids.flatten(), cotangent.flatten(0, -2))


def _one_hot(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return functional.one_hot(inputs[0], env.size(node["classes"])).to(env.dtype)


# ---------------------------------------------------------------- arithmetic, reductions, norms


def _div(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    left, right = (x if x.is_floating_point() else x.to(env.dtype) for x in inputs)
    return left / right


def _cast(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return inputs[0].to({"float": env.dtype, "int": torch.int64, "bool": torch.bool}[str(node["dtype"])])


def _clamp(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    low, high = node["low"], node["high"]
    return inputs[0].clamp(None if low is None else number(low), None if high is None else number(high))


def _reduce(function: Callable[..., Tensor]) -> Rule:
    def rule(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
        axes = tuple(map(integer, sequence(node["axes"])))
        return function(inputs[0], dim=axes, keepdim=bool(node["keepdim"])) if axes else inputs[0]

    return rule


def softmax(scores: Tensor, axis: int = -1) -> Tensor:
    """exp(s) / sum exp(s), zeros where all s are -inf."""
    top = scores.amax(axis, keepdim=True)
    weights = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    total = weights.sum(axis, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _layer_norm(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x, w, b = inputs
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + number(node["eps"])).rsqrt() * w + b


def _rms_norm(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x, w = inputs
    return x * (x.square().mean(-1, keepdim=True) + number(node["eps"])).rsqrt() * w


def _unit(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return inputs[0] * inputs[0].square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _cross_entropy(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    logits, targets = inputs
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None])
    return -chosen.mean()


# ---------------------------------------------------------------- positions and masks


def _rotary(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x = inputs[0]
    length, width = x.shape[-2:]
    speed = number(node["base"]) ** (
        -2 * torch.arange(width // 2, dtype=torch.float64, device=x.device) / width
    )
    angle = torch.arange(length, dtype=torch.float64, device=x.device)[:, None] * speed
    if node.get("inverse"):
        angle = -angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _sinusoid(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    length, width = env.size(node["length"]), env.size(node["width"])
    column = torch.arange(width, dtype=torch.float64, device=env.device)
    position = torch.arange(length, dtype=torch.float64, device=env.device)[:, None]
    angle = position * 10000.0 ** (-(column - column % 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(env.dtype)


def _alibi(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return inputs[0] + alibi(inputs[0])


def alibi(scores: Tensor) -> Tensor:
    """What `alibi` adds to scores [.., h, n, m]: [h, n, m]."""
    heads, n, m = scores.shape[-3:]
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64, device=scores.device) / heads)
    return (-slopes[:, None, None] * _distance(n, m, scores.device).abs()).to(scores.dtype)


def _distance(n: int, m: int, device: torch.device) -> Tensor:
    """i - j for each query i and key j."""
    return torch.arange(n, device=device)[:, None] - torch.arange(m, device=device)


def causal_mask(n: int, m: int, device: torch.device) -> Tensor:
    """True where j <= i."""
    return _distance(n, m, device) >= 0


def window_mask(n: int, m: int, width: int, device: torch.device) -> Tensor:
    """True where |i - j| < width."""
    return _distance(n, m, device).abs() < width


def near_mask(n: int, m: int, block: int, device: torch.device) -> Tensor:
    """True where |floor(i / block) - floor(j / block)| <= 1."""
    blocks = (torch.arange(size, device=device) // block for size in (n, m))
    rows, columns = blocks
    return (rows[:, None] - columns).abs() <= 1


def padding_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask [b, m] of keys as one of scores [b, .., n, m]."""
    return mask.reshape(mask.shape[0], *[1] * (scores.dim() - 2), mask.shape[1])


def documents_mask(ids: Tensor, scores: Tensor) -> Tensor:
    """True where query and key are of one document: ids [b, n], scores [b, .., n, n]."""
    same = ids[:, :, None] == ids[:, None, :]
    return same.reshape(ids.shape[0], *[1] * (scores.dim() - 3), *same.shape[1:])


def _masked(visible: Callable[[Node, list[Tensor]], Tensor]) -> Rule:
    def rule(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
        return inputs[0].masked_fill(~visible(node, inputs), number(node.get("fill", -math.inf)))

    return rule


def _near_far(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    local, far = inputs
    return torch.where(near_mask(*local.shape[-2:], integer(node["block"]), local.device), local, far)


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Attention:
    """The inputs of an attention node by role, heads of k and v repeated for the heads of q that share them."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra: Mapping[str, Tensor]
    scale: float
    near: int | None

    @staticmethod
    def of(node: Node, inputs: Sequence[Tensor]) -> _Attention:
        q, k, v, *rest = inputs
        extra = dict(zip(map(str, sequence(node["roles"])), rest, strict=True))
        k, v = _like(k, q), _like(v, q)
        if "near_k" in extra:
            extra["near_k"] = _like(extra["near_k"], extra["near_q"])
        near = node["near"]
        return _Attention(q, k, v, extra, number(node["scale"]), None if near is None else integer(near))

    def scores(self) -> Tensor:
        """scale q.k, [.., h, n, m]."""
        return self.scale * (self.q @ self.k.mT)

    def near_scores(self) -> Tensor:
        """The logits of near pairs: their own, or the same as the far ones'."""
        return self.extra["near_q"] @ self.extra["near_k"].mT if "near_q" in self.extra else self.scores()

    def near_pairs(self) -> Tensor:
        """True for near pairs, [n, m]."""
        n, m = self.q.shape[-2], self.k.shape[-2]
        if self.near is None:
            return torch.zeros(n, m, dtype=torch.bool, device=self.q.device)
        return near_mask(n, m, self.near, self.q.device)

    def visible(self, node: Node, scores: Tensor) -> Tensor:
        """True where the masks let a query see a key, broadcastable to the scores."""
        n, m = scores.shape[-2:]
        seen = torch.ones(n, m, dtype=torch.bool, device=scores.device)
        if node["causal"]:
            seen = seen & causal_mask(n, m, scores.device)
        width = node.get("window")
        if width is not None:
            seen = seen & window_mask(n, m, integer(width), scores.device)
        if "padding" in self.extra:
            seen = seen & padding_mask(self.extra["padding"], scores)
        if "documents" in self.extra:
            seen = seen & documents_mask(self.extra["documents"], scores)
        return seen


def _like(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values of shared heads, each head once for every query head that reads it."""
    if shared.dim() < 3 or q.dim() < 3:
        return shared
    return shared.repeat_interleave(q.shape[-3] // shared.shape[-3], -3)


def _unlike(gradient: Tensor, shared: Tensor) -> Tensor:
    """The cotangent of `shared` from that of `_like(shared, q)`."""
    if shared.dim() >= 3 and gradient.shape[-3] != shared.shape[-3]:
        gradient = gradient.unflatten(-3, (shared.shape[-3], -1)).sum(-3)
    return gradient.sum_to_size(shared.shape)


def _attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    a = _Attention.of(node, inputs)
    scores = a.scores()
    if a.near is not None:
        scores = torch.where(a.near_pairs(), a.near_scores(), scores)
    if node["alibi"]:
        scores = scores + alibi(scores)
    return softmax(scores.masked_fill(~a.visible(node, scores), -math.inf)) @ a.v


def _polynomial(coefficients: Sequence[float], s: Tensor) -> Tensor:
    """sum of c_j s^j."""
    result = torch.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = result * s + coefficient
    return result


def _coefficients(node: Node) -> list[float]:
    return [number(value) for value in sequence(node["coefficients"])]


def _weights(node: Node, a: _Attention) -> tuple[Tensor, Tensor]:
    """a~ of docs/mathematics.md, sections 3 and 5, and e^-m_i, which the far part carries."""
    s = a.scores()
    seen, near = a.visible(node, s), a.near_pairs()
    t = a.near_scores().masked_fill(~(near & seen), -math.inf)
    damping = (-t.amax(-1, keepdim=True).clamp(min=0.0)).exp()
    far = torch.where(seen & ~near, damping * _polynomial(_coefficients(node), s), torch.zeros_like(s))
    return t.exp() * damping + far, damping


def _normaliser(weights: Tensor) -> Tensor:
    """D, and 1 for a query that sees no key."""
    total = weights.sum(-1, keepdim=True)
    return total.masked_fill((weights == 0).all(-1, keepdim=True), 1.0)


def _poly_attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    a = _Attention.of(node, inputs)
    weights, _ = _weights(node, a)
    return weights @ a.v / _normaliser(weights)


def _poly_attention_backward(node: Node, inputs: list[Tensor], env: Env) -> tuple[Tensor, ...]:
    """docs/mathematics.md, sections 4 and 5: m_i cancels and gets no gradient."""
    *given, cotangent = inputs
    a = _Attention.of(node, given)
    weights, damping = _weights(node, a)
    total = _normaliser(weights)
    u = cotangent / total
    delta = (cotangent * (weights @ a.v / total)).sum(-1, keepdim=True) / total
    d_weights = u @ a.v.mT - delta

    s = a.scores()
    near, seen = a.near_pairs(), a.visible(node, s)
    slope = [j * c for j, c in enumerate(_coefficients(node))][1:]
    d_near = torch.where(near, d_weights * weights, torch.zeros_like(s))
    d_far = torch.where(seen & ~near, d_weights * damping * _polynomial(slope, s), torch.zeros_like(s))
    d_scores = a.scale * (d_far if "near_q" in a.extra else d_far + d_near)

    results = [d_scores @ a.k, d_scores.mT @ a.q, weights.mT @ u]
    if "near_q" in a.extra:
        results += [d_near @ a.extra["near_k"], d_near.mT @ a.extra["near_q"]]
    floats = [x for x in given if x.is_floating_point()]
    return tuple(_unlike(g, x) for g, x in zip(results, floats, strict=True))


# ---------------------------------------------------------------- the table


def _unary(function: Callable[[Tensor], Tensor]) -> Rule:
    return lambda node, inputs, env: function(inputs[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda node, inputs, env: function(inputs[0], inputs[1])


TORCH: dict[str, Rule] = {
    "constant": _constant,
    "fill": _fill,
    "reshape": lambda node, inputs, env: inputs[0].reshape(env.shape(node["shape"])),
    "permute": lambda node, inputs, env: inputs[0].permute([*map(integer, sequence(node["axes"]))]),
    "split_heads": _split_heads,
    "merge_heads": lambda node, inputs, env: inputs[0].transpose(-3, -2).flatten(-2),
    "repeat_heads": lambda node, inputs, env: inputs[0].repeat_interleave(env.size(node["times"]), -3),
    "concat": lambda node, inputs, env: torch.cat(inputs, integer(node["axis"])),
    "stack": lambda node, inputs, env: torch.stack(inputs, integer(node["axis"])),
    "slice": _slice,
    "select": lambda node, inputs, env: inputs[0].select(integer(node["axis"]), env.size(node["index"])),
    "pad": _pad,
    "patches": _patches,
    "broadcast_to": lambda node, inputs, env: inputs[0].broadcast_to(env.shape(node["shape"])),
    "sum_to": lambda node, inputs, env: inputs[0].sum_to_size(env.shape(node["shape"])),
    "embedding": lambda node, inputs, env: inputs[0][inputs[1]],
    "embedding_gradient": _embedding_gradient,
    "arange": lambda node, inputs, env: torch.arange(env.size(node["stop"]), device=env.device),
    "one_hot": _one_hot,
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "div": _div,
    "minimum": _binary(torch.minimum),
    "maximum": _binary(torch.maximum),
    "neg": _unary(torch.neg),
    "exp": _unary(torch.exp),
    "log": _unary(torch.log),
    "sqrt": _unary(torch.sqrt),
    "rsqrt": _unary(torch.rsqrt),
    "tanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.sigmoid),
    "relu": _unary(torch.relu),
    "gelu": _unary(functional.gelu),
    "silu": _unary(functional.silu),
    "softplus": _unary(functional.softplus),
    "abs": _unary(torch.abs),
    "erf": _unary(torch.erf),
    "logical_not": _unary(torch.logical_not),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "equal": _binary(torch.eq),
    "cast": _cast,
    "clamp": _clamp,
    "where": lambda node, inputs, env: torch.where(*inputs),
    "matmul": _binary(torch.matmul),
    "sum": _reduce(torch.sum),
    "mean": _reduce(torch.mean),
    "amax": _reduce(torch.amax),
    "softmax": lambda node, inputs, env: softmax(inputs[0], integer(node["axis"])),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": _unit,
    "causal": _masked(lambda node, inputs: causal_mask(*inputs[0].shape[-2:], inputs[0].device)),
    "window": _masked(
        lambda node, inputs: window_mask(*inputs[0].shape[-2:], integer(node["width"]), inputs[0].device)
    ),
    "padding": _masked(lambda node, inputs: padding_mask(inputs[1], inputs[0])),
    "documents": _masked(lambda node, inputs: documents_mask(inputs[1], inputs[0])),
    "near_far": _near_far,
    "assume_bound": lambda node, inputs, env: inputs[0],
    "rotary": _rotary,
    "sinusoid": _sinusoid,
    "alibi": _alibi,
    "dropout": lambda node, inputs, env: inputs[0],
    "cross_entropy": _cross_entropy,
    "mse": lambda node, inputs, env: (inputs[0] - inputs[1]).square().mean(),
    "attention": _attention,
    "poly_attention": _poly_attention,
    "poly_attention_backward": _poly_attention_backward,
}

DECLINED: dict[str, str] = {
    **dict.fromkeys(("input", "weight", "buffer"), "is given to a run"),
    **dict.fromkeys(("call", "repeat", "repeat_backward"), "runs another graph"),
    "item": "reads one of several results",
    "weight_gradient": "is a result of a run",
}
"""Operations that the interpreter itself carries out, and why they have no rule here."""
