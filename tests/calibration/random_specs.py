"""Specs at random: depth, heads, widths, gains, masks, near fields and budgets, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class RandomSpec:
    """A model on float inputs or on tokens, with its budget; `length` is a good length of a batch."""

    text: str
    length: int
    output: float
    gradient: float


def random_spec(seed: int, trust: str, *, forget: bool = False) -> RandomSpec:
    """The spec of a seed; the same model and limits for either trust. `forget`: with gates, so causal."""
    rng = random.Random(seed)
    depth, heads = rng.randint(1, 4), rng.choice([1, 2, 4])
    kv_heads = rng.choice([h for h in (1, 2, 4) if heads % h == 0])
    qk_dim, v_dim = rng.choice([2, 4, 8]), rng.choice([4, 8, 12])
    width = rng.choice([16, 24, 32])
    mask = rng.choice(["causal", "none", "padding"])
    mask = "causal" if forget else mask
    options = [f"heads = {heads}", f"kv_heads = {kv_heads}", f"qk_dim = {qk_dim}", f"v_dim = {v_dim}"]
    if mask == "causal":
        options.append("causal = true")
    limited = rng.random() < 0.6
    if limited:
        options.append(f"gain = {rng.choice([0.5, 1.0, 2.0])}")
        if rng.random() < 0.4:
            options.append(f"near = {rng.choice([4, 8])}")
    if rng.random() < 0.4:
        options.append("rope = 1000.0")
    if not limited and rng.random() < 0.5:
        options.append("bias = true")
    if forget:
        options.append("forget = true")
    norm = rng.choice(["rms_norm", "layer_norm"])
    output = rng.choice([3e-3, 1e-2, 5e-2])
    gradient = output * rng.choice([2.0, 5.0])
    near = (
        f"\n    near = {rng.choice([4, 8])}"
        if not limited and mask != "padding" and rng.random() < 0.5
        else ""
    )
    padded = mask == "padding"
    block, given, inputs = (
        ("attention_padded", ", mask", ", mask: bool[b, n]") if padded else ("attention", "", "")
    )
    text = f"""use std
dim b
dim n <= 16384
model random(x: float[b, n, {width}]{inputs}) -> float[b, n, {width}] {{
    repeat i in {depth} {{
        x = x + std.{block}(std.{norm}(x){given}; {", ".join(options)}) as layers
        x = x + std.mlp(std.rms_norm(x); hidden = {2 * width})
    }}
    return std.rms_norm(x)
}}
objective loss(y: float[b, n, {width}], wanted: float[b, n, {width}]) = mse(y, wanted)
budget {{
    output <= {output:g}
    gradient <= {gradient:g}{near}
    trust = {trust}
}}
"""
    return RandomSpec(text, rng.choice([33, 48, 64]), output, gradient)
