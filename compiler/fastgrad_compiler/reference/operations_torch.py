"""What every operation means, in plain dense torch: passes, kernels and generated code are tested against it.

Nothing here is shared with the kernels, and nothing is fast. Conventions that are not obvious:

    softmax        a row without any visible entry gives zeros
    unit           x / ||x||, and less where ||x|| < 1e-6: its norm never exceeds 1
    polynomial     0 where the score is -inf, as exp
    int            towards 0; NaN is 0, and what 64 bits do not hold their nearest
    normalize_rows weights of -inf, which a mask leaves, are 0; a row of zeros stays one
    rotary         turns pairs (i, i + d/2) by position * base^(-2 i / d), over the stretch of the pair
    shift          zeros where there is no such token, or one of another document; so in depthwise
    sinusoid       sin in even and cos in odd columns, as Vaswani et al.
    alibi          head i of h has slope 2^(-8 (i + 1) / h)
    forget, decay  of a pair j <= i the gates after j up to i count, of another none; one below -1000 is -1000
    dropout        the identity: the interpreter evaluates, it does not train
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.attention.value import Mask
from fastgrad_compiler.ir.graph import Node, integer, number, sequence
from fastgrad_compiler.ir.masks import MASKS
from fastgrad_compiler.ir.ops import ARITHMETIC, FUNCTIONS
from fastgrad_compiler.reference.attention_torch import (
    alibi,
    attention,
    forgotten,
    near_mask,
    poly_attention,
    poly_attention_backward,
    polynomial,
    softmax,
    visible_pairs,
)
from fastgrad_compiler.reference.torch_env import Env, Rule
from fastgrad_compiler.runtime.documents import document_runs

# ---------------------------------------------------------------- structure and shape


def _constant(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    value = node["value"]
    dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else env.dtype
    return torch.tensor(value, dtype=dtype, device=env.device)


def _fill(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return torch.full(env.shape(node["shape"]), number(node["value"]), dtype=env.dtype, device=env.device)


def _split_heads(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    heads = env.size(node["heads"])
    x = inputs[0]
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def _slice(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    start, stop, axis = env.size(node["start"]), env.size(node["stop"]), integer(node["axis"])
    if not 0 <= start <= stop <= inputs[0].shape[axis]:
        raise ValueError(f"slice {start}:{stop} of axis {axis}, which has {inputs[0].shape[axis]} entries")
    return inputs[0].narrow(axis, start, stop - start)


def _select(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    place, axis = env.size(node["index"]), integer(node["axis"])
    if not 0 <= place < inputs[0].shape[axis]:
        raise ValueError(f"index {place} of axis {axis}, which has {inputs[0].shape[axis]} entries")
    return inputs[0].select(axis, place)


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
    return rows.index_add(0, ids.flatten(), cotangent.reshape(-1, cotangent.shape[-1]))


def _one_hot(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    return functional.one_hot(inputs[0], env.size(node["classes"])).to(env.dtype)


# ---------------------------------------------------------------- arithmetic, reductions, norms


def _div(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    left, right = (x if x.is_floating_point() else x.to(env.dtype) for x in inputs)
    return left / right


def _cast(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    if node["dtype"] == "int" and inputs[0].is_floating_point():
        return _truncated(inputs[0])
    return inputs[0].to({"float": env.dtype, "int": torch.int64, "bool": torch.bool}[str(node["dtype"])])


def _truncated(x: Tensor) -> Tensor:
    """Towards 0; conversions of what int64 does not hold are not the same on every processor."""
    inside = (x >= -(2.0**63)) & (x < 2.0**63)
    ends = torch.where(x > 0, 2**63 - 1, torch.where(x < 0, -(2**63), 0))
    return torch.where(inside, x.masked_fill(~inside, 0.0).long(), ends)


def _clamp(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    limit = number if inputs[0].is_floating_point() else integer
    low, high = (None if node[key] is None else limit(node[key]) for key in ("low", "high"))
    return inputs[0].clamp(low, high)


def _reduce(function: Callable[..., Tensor]) -> Rule:
    def rule(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
        axes = tuple(map(integer, sequence(node["axes"])))
        return function(inputs[0], dim=axes, keepdim=bool(node["keepdim"])) if axes else inputs[0]

    return rule


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
    counted = torch.ones_like(targets, dtype=torch.bool)
    if node.get("ignored") is not None:
        counted = targets != integer(node["ignored"])
    shares = logits.log_softmax(-1)[counted]
    chosen = shares.gather(-1, targets[counted][..., None])[..., 0]
    smoothing = number(node.get("smoothing", 0.0))
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * shares.mean(-1)
    return -chosen.mean()


def _linear_cross_entropy(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x, w, targets, *bias = inputs
    logits = x @ w
    return _cross_entropy(node, [logits + bias[0] if bias else logits, targets], env)


# ---------------------------------------------------------------- positions and masks


def _rotary(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x = inputs[0]
    length, width = x.shape[-2:]
    speed = number(node["base"]) ** (
        -2 * torch.arange(width // 2, dtype=torch.float64, device=x.device) / width
    )
    stretch = node.get("stretch")
    if stretch is not None:
        numbers = [number(each) for each in sequence(stretch)]
        speed = speed / torch.tensor(numbers, dtype=torch.float64, device=x.device)
    angle = torch.arange(length, dtype=torch.float64, device=x.device)[:, None] * speed
    if node.get("inverse"):
        angle = -angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _moved(x: Tensor, by: int, ids: Sequence[Tensor]) -> Tensor:
    """x_(t - by) at place t, 0 where no token is there, or one of another document; x [.., n, c], ids int [b, n]."""
    n = x.shape[-2]
    source = torch.arange(n, device=x.device) - by
    seen = (source >= 0) & (source < n)
    source = source.clamp(0, max(n - 1, 0))
    for each in ids:
        runs = document_runs(each)
        same = seen & (runs == runs[:, source])
        seen = same.reshape(len(same), *[1] * (x.dim() - 3), n)
    return torch.where(seen[..., None], x.index_select(-2, source), 0.0)


def _depthwise(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    x, w, *ids = inputs
    sign = -1 if node.get("reverse") else 1
    taps = (w[k] * _moved(x, sign * k, ids) for k in range(1, len(w)))
    return sum(taps, w[0] * x)


def _depthwise_weights(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    cotangent, x, *ids = inputs
    taps = [cotangent * _moved(x, k, ids) for k in range(integer(node["width"]))]
    return torch.stack([tap.flatten(0, -2).sum(0) for tap in taps])


def _sinusoid(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    length, width = env.size(node["length"]), env.size(node["width"])
    column = torch.arange(width, dtype=torch.float64, device=env.device)
    position = torch.arange(length, dtype=torch.float64, device=env.device)[:, None]
    angle = position * 10000.0 ** (-(column - column % 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(env.dtype)


def _masked(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    scores, *operands = inputs
    mask = Mask.of(node)
    given = dict(zip(mask.operands, operands, strict=True))
    n, m = scores.shape[-2:]
    seen = visible_pairs(mask, given, n, m, torch.arange(n, device=scores.device), scores.dim())
    return scores.masked_fill(~seen, number(node.get("fill", float("-inf"))))


def _forget(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    scores, log_gate = inputs
    gates = forgotten(log_gate, torch.arange(scores.shape[-1], device=scores.device))
    return (scores + gates).masked_fill(scores == -math.inf, -math.inf)


def _decay(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    weights, log_gate = inputs
    hidden = weights == -math.inf
    gates = forgotten(log_gate, torch.arange(weights.shape[-1], device=weights.device))
    return (weights.masked_fill(hidden, 0.0) * gates.exp()).masked_fill(hidden, -math.inf)


def _prefix(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    """No attention has this mask: it is here for scores of every other use."""
    scores, lengths = inputs
    n, device = scores.shape[-1], scores.device
    early = torch.arange(n, device=device) < lengths.reshape(-1, *[1] * (scores.dim() - 1))
    seen = early | visible_pairs(Mask(causal=True), {}, n, n, torch.arange(n, device=device), scores.dim())
    return scores.masked_fill(~seen, number(node.get("fill", float("-inf"))))


def _polynomial(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    (s,) = inputs
    hidden = s == -math.inf
    coefficients = [number(c) for c in sequence(node["coefficients"])]
    return polynomial(coefficients, s.masked_fill(hidden, 0.0)).masked_fill(hidden, 0.0)


def _normalize_rows(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    weights = inputs[0].masked_fill(inputs[0] == -math.inf, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _near_far(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    local, far = inputs
    n, m = local.shape[-2:]
    near = near_mask(torch.arange(n, device=local.device), m, integer(node["block"]))
    return torch.where(near, local, far)


# ---------------------------------------------------------------- the table


def _unary(function: Callable[[Tensor], Tensor]) -> Rule:
    return lambda node, inputs, env: function(inputs[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda node, inputs, env: function(inputs[0], inputs[1])


_OF_NETWORKS = {"gelu", "silu", "softplus"}

TORCH: dict[str, Rule] = {
    "constant": _constant,
    "fill": _fill,
    "literal": lambda node, inputs, env: torch.tensor(node["values"], dtype=env.dtype, device=env.device),
    "reshape": lambda node, inputs, env: inputs[0].reshape(env.shape(node["shape"])),
    "permute": lambda node, inputs, env: inputs[0].permute([*map(integer, sequence(node["axes"]))]),
    "split_heads": _split_heads,
    "merge_heads": lambda node, inputs, env: inputs[0].transpose(-3, -2).flatten(-2),
    "repeat_heads": lambda node, inputs, env: inputs[0].repeat_interleave(env.size(node["times"]), -3),
    "concat": lambda node, inputs, env: torch.cat(inputs, integer(node["axis"])),
    "stack": lambda node, inputs, env: torch.stack(inputs, integer(node["axis"])),
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "patches": _patches,
    "broadcast_to": lambda node, inputs, env: inputs[0].broadcast_to(env.shape(node["shape"])),
    "sum_to": lambda node, inputs, env: inputs[0].sum_to_size(env.shape(node["shape"])),
    "embedding": lambda node, inputs, env: functional.embedding(inputs[1], inputs[0]),
    "embedding_gradient": _embedding_gradient,
    "arange": lambda node, inputs, env: torch.arange(env.size(node["stop"]), device=env.device),
    "one_hot": _one_hot,
    **{
        name: _unary(getattr(torch, name))
        for name in {*FUNCTIONS, "neg", "abs", "logical_not"} - _OF_NETWORKS - {"log_sigmoid"}
    },
    **{name: _unary(getattr(functional, name)) for name in _OF_NETWORKS},
    **{name: _binary(getattr(torch, name)) for name in (*ARITHMETIC, "matmul")},
    "div": _div,
    "log_sigmoid": _unary(functional.logsigmoid),
    "softplus": _unary(lambda x: functional.softplus(x, threshold=40.0)),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "equal": _binary(torch.eq),
    "cast": _cast,
    "clamp": _clamp,
    "where": lambda node, inputs, env: torch.where(*inputs),
    "sum": _reduce(torch.sum),
    "mean": _reduce(torch.mean),
    "amax": _reduce(torch.amax),
    "softmax": lambda node, inputs, env: softmax(inputs[0], integer(node["axis"])),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": _unit,
    **dict.fromkeys(MASKS, _masked),
    "prefix": _prefix,
    "forget": _forget,
    "decay": _decay,
    "near_far": _near_far,
    "polynomial": _polynomial,
    "normalize_rows": _normalize_rows,
    "assume_bound": lambda node, inputs, env: inputs[0],
    "rotary": _rotary,
    "shift": lambda node, inputs, env: _moved(inputs[0], integer(node["by"]), inputs[1:]),
    "depthwise": _depthwise,
    "depthwise_weights": _depthwise_weights,
    "sinusoid": _sinusoid,
    "alibi": lambda node, inputs, env: inputs[0] + alibi(inputs[0]),
    "dropout": lambda node, inputs, env: inputs[0],
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "mse": lambda node, inputs, env: (inputs[0] - inputs[1]).square().mean(),
    "attention": attention,
    "poly_attention": poly_attention,
    "poly_attention_backward": poly_attention_backward,
}

DECLINED: dict[str, str] = {
    **dict.fromkeys(("input", "weight", "buffer"), "is given to a run"),
    **dict.fromkeys(("call", "repeat", "repeat_backward"), "runs another graph"),
    "item": "reads one of several results",
    "weight_gradient": "is a result of a run",
}
"""Operations that the interpreter itself carries out, and why they have no rule here."""
