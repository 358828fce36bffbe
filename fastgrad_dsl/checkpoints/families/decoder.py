"""Llama and its kin: rotary positions, RMS norms, grouped heads and a gated feed-forward part, in variations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastgrad_dsl.checkpoints.families.family import LANGUAGE_LOSS, Family, params
from fastgrad_dsl.checkpoints.families.rope import rope_of
from fastgrad_dsl.checkpoints.families.windows import Windows
from fastgrad_dsl.checkpoints.fields import Config, Field, flag, number, one_of, refused, size
from fastgrad_dsl.checkpoints.mapping import TRANSPOSED, Rule, linear, norm

GATED = {
    "silu": "std.swiglu",
    "swish": "std.swiglu",
    "gelu_pytorch_tanh": "std.geglu",
    "gelu_new": "std.geglu",
}
"""The gated feed-forward part of an activation."""

HEAD_NORM = """
# x / sqrt(mean(x^2) + eps) * w for each head, with weights that all heads share
block head_norm(x: float[b, h, n, width]) -> float[b, h, n, width] {
    weight w: float[width] = ones()
    return rms_norm(x, w, eps)
}
"""


@dataclass(frozen=True)
class Kind:
    """What sets a family of decoders apart.

    summary       a comment for the spec
    biases        whether queries, keys and values have one, and whether the output of attention has
    norms         before each part (Llama), or after it (OLMo 2)
    head_norms    of queries and keys: of each head (Qwen3), or of all heads together (OLMo 2)
    windows       which layers attend to a window
    activation    the field that names it
    """

    name: str
    title: str
    architecture: str
    summary: str
    fields: tuple[Field, ...]
    biases: Callable[[Config], tuple[bool, bool]] = lambda config: (False, False)
    norms: Literal["before", "after"] = "before"
    head_norms: Literal["none", "each", "all"] = "none"
    windows: Callable[[Config], Windows] = lambda config: Windows()
    activation: str = "hidden_act"


def sizes(*, vocab: int, kv_heads: int | None, tied: bool = False, eps: float = 1e-6) -> tuple[Field, ...]:
    """Fields that all of these families have, with the defaults of one."""
    return (
        size("vocab_size", vocab),
        size("hidden_size", 4096),
        size("intermediate_size", 11008),
        size("num_hidden_layers", 32, most=4096),
        size("num_attention_heads", 32, most=4096),
        size("num_key_value_heads", kv_heads, optional=True, most=4096),
        number("rms_norm_eps", eps),
        flag("tie_word_embeddings", tied),
        one_of("hidden_act", "silu", *GATED),
    )


def family(kind: Kind) -> Family:
    """The family of a kind of decoders."""
    return Family(
        kind.name,
        kind.title,
        (kind.architecture,),
        kind.fields,
        lambda config: _spec(kind, config),
        lambda config: _rules(kind, config),
        lambda config: config.integer("num_hidden_layers"),
        prefix="model.",
        kept=lambda config: ("{p}layers.*.self_attn.rotary_emb.inv_freq", "{p}rotary_emb.inv_freq"),
        check=_check,
    )


def width_of(config: Config) -> int:
    """The width of a head."""
    heads = config.integer("num_attention_heads")
    return config.either("head_dim", config.integer("hidden_size") // heads)


def _check(config: Config) -> None:
    heads = config.integer("num_attention_heads")
    if heads % config.either("num_key_value_heads", heads):
        raise refused("num_attention_heads is no multiple of num_key_value_heads")
    if config.values.get("head_dim") is None and config.integer("hidden_size") % heads:
        raise refused("hidden_size is no multiple of num_attention_heads")
    if width_of(config) % 2:
        raise refused("the width of a head is odd, and rotary positions turn pairs")


def _spec(kind: Kind, config: Config) -> str:
    rope, windows = rope_of(config), kind.windows(config)
    heads = config.integer("num_attention_heads")
    settings = params(
        depth=config.integer("num_hidden_layers"),
        d_model=config.integer("hidden_size"),
        heads=heads,
        kv_heads=config.either("num_key_value_heads", heads),
        width=width_of(config),
        hidden=config.integer("intermediate_size"),
        context=config.integer("max_position_embeddings"),
        vocab=config.integer("vocab_size"),
        eps=config.real("rms_norm_eps"),
        rope_base=rope.base,
        rope_scale=None if rope.scale == 1.0 else rope.scale,
        sliding=windows.width,
    )
    value = "; window: int?" if windows.choice else ""
    passed = "; window = window" if windows.choice else ""
    chosen = f"; window = {windows.choice}" if windows.choice else ""
    logits = "x @ table.T" if _tied(config) else "std.linear(x; vocab, bias = false) as output"
    signature = f"(x: float[b, n, d_model]{value}) -> float[b, n, d_model]"
    return f"""
# {kind.summary}
use std

{settings}
dim b
dim n <= context
{HEAD_NORM if kind.head_norms == "each" else ""}{rope.block}
block attention{signature} {{
{_attention(kind, config, windows)}}}

block layer{signature} {{
{_parts(kind, config, passed)}    return x
}}

model {kind.name}(tokens: int[b, n]) -> float[b, n, vocab] {{
    weight table: float[vocab, d_model] = normal(std = 0.02)
    x = embedding(table, tokens)
    repeat i in depth {{
        x = layer(x{chosen}) as layers
    }}
    x = std.rms_norm(x; eps) as norm
    return {logits}
}}
{LANGUAGE_LOSS}"""


def _attention(kind: Kind, config: Config, windows: Windows) -> str:
    """The body of the block: projections, norms, positions, and what attends."""
    rope = rope_of(config)
    inner, outer = kind.biases(config)
    lines = []
    for name, label, count in (("q", "query", "heads"), ("k", "key", "kv_heads"), ("v", "value", "kv_heads")):
        lines.append(f"{name} = std.linear(x; {count} * width, bias = {_word(inner)}) as {label}")
        if kind.head_norms == "all" and name != "v":
            lines.append(f"{name} = std.rms_norm({name}; eps) as {label}_norm")
        lines.append(f"{name} = split_heads({name}, {count})")
        if kind.head_norms == "each" and name != "v":
            lines.append(f"{name} = head_norm({name}) as {label}_norm")
    lines += [f"{name} = {rope.turned(name)}" for name in "qk"]
    window = "" if windows.width is None else f", window = {'window' if windows.choice else 'sliding'}"
    lines.append(f"y = std.attend(q, k, v; causal = true{window})")
    lines.append(f"return std.linear(y; d_model, bias = {_word(outer)}) as output")
    return "".join(f"    {line}\n" for line in lines)


def _parts(kind: Kind, config: Config, passed: str) -> str:
    """The two parts of a layer with their norms."""
    gated = GATED[config.text(kind.activation)]
    lines = []
    if kind.norms == "before":
        lines.append("x = x + attention(std.rms_norm(x; eps) as attention_norm" + passed + ")")
        lines.append(f"x = x + {gated}(std.rms_norm(x; eps) as mlp_norm; hidden) as mlp")
    else:
        lines.append(f"y = attention(x{passed})")
        lines.append("x = x + std.rms_norm(y; eps) as attention_norm")
        lines.append(f"y = {gated}(x; hidden) as mlp")
        lines.append("x = x + std.rms_norm(y; eps) as mlp_norm")
    return "".join(f"    {line}\n" for line in lines)


def _rules(kind: Kind, config: Config) -> tuple[Rule, ...]:
    theirs, ours = "{p}layers.{i}", "layers.{i}"
    inner, outer = kind.biases(config)
    attention = f"{ours}.attention"
    rules = [Rule("{p}embed_tokens.weight", ("table",)), *norm("{p}norm", "norm", bias=False)]
    for name, label in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += linear(f"{theirs}.self_attn.{name}_proj", f"{attention}.{label}", bias=inner)
    rules += linear(f"{theirs}.self_attn.o_proj", f"{attention}.output", bias=outer)
    if kind.head_norms != "none":
        for name, label in (("q", "query"), ("k", "key")):
            rules += norm(f"{theirs}.self_attn.{name}_norm", f"{attention}.{label}_norm", bias=False)
    for name in ("gate", "up", "down"):
        rules.append(Rule(f"{theirs}.mlp.{name}_proj.weight", (f"{ours}.mlp.{name}",), TRANSPOSED))
    names = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }
    for name, label in zip(names[kind.norms], ("attention_norm", "mlp_norm"), strict=True):
        rules += norm(f"{theirs}.{name}", f"{ours}.{label}", bias=False)
    if _tied(config):
        return (*rules, Rule("lm_head.weight", ("table",)))
    return (*rules, *linear("lm_head", "output", bias=False))


def _tied(config: Config) -> bool:
    return config.flag("tie_word_embeddings")


def _word(value: bool) -> str:
    return "true" if value else "false"
