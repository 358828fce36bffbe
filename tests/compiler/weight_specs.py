"""Models whose ranges the weights prove, their weights and inputs, and the search for logits that leave a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.analysis.weights.ranges import weight_ranges
from fastgrad_compiler.attention.value import ATTENTION
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.source import Source
from tests.compiler.captured import captured_logits
from tests.initial_weights import initial_weights


@dataclass(frozen=True)
class Spec:
    """A model `m` of x, and of `more`; `reached` is the share of each head's R that an ascent over inputs finds."""

    body: str
    reached: float
    more: str = ""
    rank: str = "float[b, n, 16]"


def written(projected: str, *, heads: int = 4, scale: float = 0.5, norm: str = "std.rms_norm(x)") -> str:
    """An attention written out, whose queries and keys [b, heads, n, d] are made of h."""
    return f"""
    h = {norm}
    {projected}
    return merge_heads(softmax(causal({scale} * (q @ k.T))) @ split_heads(h, {heads}))"""


TWO = "weight wq: float[16, 16] = xavier()\n    weight wk: float[16, 16] = xavier()\n    "
HEADS = "q = split_heads({}, 4)\n    k = split_heads({}, 4)"
SPECS = {
    "rms norm": Spec("return std.attention(std.rms_norm(x); heads = 4)", 0.98),
    "layer norm": Spec("return std.attention(std.layer_norm(x); heads = 4)", 0.75),
    "biases": Spec("return std.attention(std.rms_norm(x); heads = 4, bias = true, causal = true)", 0.85),
    "biases behind a layer norm": Spec(
        "return std.attention(std.layer_norm(x); heads = 4, bias = true)", 0.8
    ),
    "rotary": Spec("return std.attention(std.rms_norm(x); heads = 4, rope = 100.0)", 0.65),
    "rotary with biases": Spec(
        "return std.attention(std.rms_norm(x); heads = 2, rope = 9.0, bias = true)", 0.5
    ),
    "grouped": Spec("return std.attention(std.rms_norm(x); heads = 4, kv_heads = 2)", 0.98),
    "grouped with biases": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, kv_heads = 1, bias = true)", 0.9
    ),
    "other widths": Spec("return std.attention(std.rms_norm(x); heads = 2, qk_dim = 3, v_dim = 5)", 0.98),
    "wide heads": Spec("return std.attention(std.rms_norm(x); heads = 2, qk_dim = 24)", 0.98),
    "cross": Spec(
        "return std.cross_attention(std.rms_norm(x), std.rms_norm(y); heads = 4)",
        0.98,
        ", y: float[b, m, 12]",
    ),
    "gain": Spec("return std.attention(std.rms_norm(x); heads = 4, gain = 1.5)", 0.98),
    "learned gain": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, gain = 2.0, learned = true)", 0.98
    ),
    "near field": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, gain = 2.0, learned = true, near = 1, causal = true)",
        0.98,
    ),
    "windows": Spec("return std.attention(std.rms_norm(x); heads = 4, window = 2)", 0.98),
    "tied projections": Spec(
        written(
            "weight w: float[16, 16] = xavier()\n    q = split_heads(h @ w, 4)\n    k = split_heads(h @ w, 4)"
        ),
        0.98,
    ),
    "heads by reshape": Spec(
        written(
            TWO + "q = permute(reshape(h @ wq, (b, n, 4, 4)), (0, 2, 1, 3))\n    "
            "k = permute(reshape(h @ wk, (b, n, 4, 4)), (0, 2, 1, 3))"
        ),
        0.98,
    ),
    "one fused weight": Spec(
        written(
            "weight w: float[16, 48] = xavier()\n    y = h @ w\n    q = split_heads(y[.., 0:16], 4)\n    "
            "k = split_heads(y[.., 16:32], 4)"
        ),
        0.98,
    ),
    "a weight for each head": Spec(
        written(
            "weight wq: float[4, 4, 4] = normal()\n    q = split_heads(h, 4) @ wq\n    k = split_heads(h, 4)"
        ),
        0.98,
    ),
    "normalised queries": Spec(
        written(
            TWO + "weight qn: float[4] = ones()\n    weight kn: float[4] = ones()\n    "
            "q = rms_norm(split_heads(h @ wq, 4), qn)\n    k = rms_norm(split_heads(h @ wk, 4), kn)"
        ),
        0.98,
    ),
    "partly rotated": Spec(
        written(
            TWO
            + "u = split_heads(h @ wq, 4)\n    q = concat(rotary(u[.., 0:2], 9.0), u[.., 2:4]; axis = -1)\n    "
            "k = split_heads(h @ wk, 4)"
        ),
        0.5,
    ),
    "the token before": Spec(written(TWO + HEADS.format("shift(h) @ wq", "h @ wk")), 0.5),
    "a short convolution": Spec(
        written(TWO + HEADS.format("std.short_conv(h @ wq; width = 2)", "h @ wk")), 0.55
    ),
    "scales of entries": Spec(
        written(
            TWO + "weight s: float[16] = normal()\n    " + HEADS.format("(h * s) @ wq", "(-h / 2.0) @ wk")
        ),
        0.98,
    ),
    "a row scaled twice": Spec(
        written(
            TWO + "weight s: float[4, 1, 4] = normal()\n    q = split_heads(h @ wq, 4) * exp(s)\n    "
            "k = split_heads(h @ wk, 4)"
        ),
        0.98,
    ),
    "a sum of projections": Spec(
        written(TWO + HEADS.format("h @ wq + h @ wk + h @ wq + h @ wk + h @ wq", "h @ wk - 0.1 * h")), 0.25
    ),
    "bounded activations": Spec(written(TWO + HEADS.format("tanh(h @ wq)", "sigmoid(h) @ wk")), 0.1),
    "shrinking functions": Spec(written(TWO + HEADS.format("gelu(h @ wq)", "relu(h) @ wk")), 0.25),
    "clamped": Spec(written(TWO + HEADS.format("clamp(x; low = -1.0, high = 2.0) @ wq", "h @ wk")), 0.5),
    "gated": Spec(written(TWO + HEADS.format("(h * sigmoid(x)) @ wq", "(h * tanh(h @ wk)) @ wk")), 0.3),
    "larger and chosen": Spec(
        written(TWO + HEADS.format("max(h @ wq, h)", "where(h < 0.5, h, 2.0 * h) @ wk")), 0.25
    ),
    "mixed after an attention": Spec(
        "y = std.attention(std.rms_norm(x); heads = 4) as first\n    return std.attention(y; heads = 4) as second",
        0.08,
    ),
    "mixed with biases": Spec(
        "y = std.attention(std.rms_norm(x); heads = 4, kv_heads = 2, bias = true) as first\n    "
        "return std.attention(y; heads = 4, kv_heads = 2, bias = true) as second",
        0.08,
    ),
    "rows scaled by one factor": Spec(
        written(TWO + HEADS.format("(h * tanh(x[.., 0:1])) @ wq", "h @ wk")), 0.9
    ),
    "rows with offsets scaled": Spec(
        written(TWO + HEADS.format("(h * tanh(x[.., 0:1])) @ wq", "h @ wk"), norm="std.layer_norm(x)"), 0.5
    ),
    "short rows cut from long ones": Spec(
        "y = std.attention(reshape(std.rms_norm(x), (b, 4 * n, 4)); heads = 1)\n    return reshape(y, (b, n, 16))",
        0.1,
    ),
    "halves by index": Spec(
        written(
            "weight w: float[16, 32] = xavier()\n    u = permute(reshape(h @ w, (b, n, 2, 16)), (2, 0, 1, 3))\n    "
            "q = split_heads(u[0, ..], 4)\n    k = split_heads(u[1, ..], 4)"
        ),
        0.98,
    ),
    "a class token": Spec(
        "weight t: float[16] = normal()\n    c = concat(std.rms_norm(x), broadcast_to(t, (b, 1, 16)); axis = -2)\n    "
        "return std.attention(c; heads = 2)[:, 0:n]",
        0.1,
    ),
    "repeated keys": Spec(
        written(
            TWO + "q = split_heads(h @ wq, 4)\n    k = repeat_heads(split_heads((h @ wk)[.., 0:8], 2), 2)"
        ),
        0.98,
    ),
    "normalised heads": Spec(
        "y = merge_heads(unit(split_heads(x, 4)))\n    return std.attention(y; heads = 2, bias = true)", 0.6
    ),
    "places": Spec(
        written(TWO + "weight p: float[3, 16] = normal()\n    " + HEADS.format("(h + p) @ wq", "h @ wk + p")),
        0.7,
        rank="float[b, 3, 16]",
    ),
    "dropout": Spec(written(TWO + HEADS.format("dropout(h; p = 0.5) @ wq", "h @ wk")), 0.3),
    "no batch": Spec(
        "weight wq: float[16, 5] = xavier()\n    weight wk: float[16, 5] = xavier()\n    "
        "weight w: float[16] = ones()\n    h = rms_norm(x, w)\n    "
        "return softmax((h @ wq) @ (h @ wk).T) @ h",
        0.98,
        rank="float[n, 16]",
    ),
}


def spec_program(
    body: str, signature: str = "x: float[b, n, 16]", result: str = "float[b, n, 16]"
) -> Program:
    """A model of this body whose attentions are recognised."""
    text = (
        f"use std\ndim b\ndim n\ndim m\nmodel m({signature}) -> {result} {{\n    {body}\n}}\n"
        'budget {\n    at "*" exact\n}\n'
    )
    return run(elaborate(Source("spec.tfg", text)), until="attention")[-1].program


@cache
def program_of(name: str) -> Program:
    spec = SPECS[name]
    return spec_program(spec.body, f"x: {spec.rank}{spec.more}", spec.rank)


def weights_of(program: Program, size: float, seed: int = 0) -> dict[str, Tensor]:
    """Initial weights moved by random amounts, then scaled: nothing is a plain one or zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    weights = initial_weights(program, seed, torch.float64)
    return {
        path: size * (w + 0.5 * torch.randn(w.shape, generator=generator, dtype=torch.float64))
        for path, w in weights.items()
    }


def drawn(program: Program, batch: int, seed: int, tokens: int = 3) -> dict[str, Tensor]:
    """Float inputs, of three tokens or as many as the program says."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": batch, "n": tokens, "m": 4}
    return {
        node.name: torch.randn(
            [d.evaluate(sizes) for d in node.tensor.shape], generator=generator, dtype=torch.float64
        )
        for node in program[program.main].inputs
    }


def only(program: Program, weights: dict[str, Tensor], *, centring: bool = True) -> LogitRange:
    (found,) = weight_ranges(program, weights, centring=centring).values()
    return found


def with_attention(program: Program, **values: object) -> Program:
    """The program with attributes of its attentions set."""

    def changed(node: Node) -> Node:
        return node.with_attributes(**values) if node.op in ATTENTION else node  # type: ignore[arg-type]

    return program.with_graphs(replace(g, nodes=tuple(map(changed, g.nodes))) for g in program.graphs)


def shares(ranges: dict[str, LogitRange], logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """|s| as a share of its head's R, [.., heads, n, m]."""
    return {
        path: s.abs() / torch.tensor(ranges[path].heads, dtype=torch.float64)[:, None, None]
        for path, s in logits.items()
    }


def ascended(
    program: Program, weights: dict[str, Tensor], ranges: dict[str, LogitRange], enough: float = math.inf
) -> Tensor:
    """The largest share of R that gradient ascent over the inputs finds, for each head of the last attention.

    Each head has sequences of its own; the second token is the query, the first the key. Ends when all have enough.
    """
    path = list(ranges)[-1]
    heads, starts = len(ranges[path].heads), 6
    inputs = {key: x.requires_grad_() for key, x in drawn(program, heads * starts, 1, 2).items()}
    ascent = torch.optim.Adam(inputs.values(), lr=0.1, maximize=True)
    best = torch.zeros(heads, dtype=torch.float64)
    for _ in range(150):
        found = shares(ranges, captured_logits(program, inputs, weights))
        for each, share in found.items():
            assert share.max() <= 1, each
        own = found[path][..., 1, 0]
        own = (
            own.reshape(starts, heads, heads).diagonal(dim1=1, dim2=2) if own.dim() > 1 and heads > 1 else own
        )
        best = torch.maximum(best, own.detach().reshape(-1, heads).amax(0))
        if best.min() >= enough:
            break
        ascent.zero_grad()
        own.sum().backward()
        ascent.step()
    return best
