"""Llama and its kin: rotary positions, RMS norms, grouped heads and a gated feed-forward part, in variations."""

from __future__ import annotations

import math
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

EXACT_GELU = "gelu"
"""An activation that only Gemma's first configs name, whose gated part is a block of the spec."""

GELU_GATED = """
# (gelu(x Wg) * (x Wu)) Wd
block gated(x: float[b, n, d_model]) -> float[b, n, d_model] {
    weight gate: float[d_model, hidden] = xavier()
    weight up: float[d_model, hidden] = xavier()
    weight down: float[hidden, d_model] = xavier()
    return (gelu(x @ gate) * (x @ up)) @ down
}
"""

HEAD_NORM = """
# x / sqrt(mean(x^2) + eps) * w for each head, with weights that all heads share
block head_norm(x: float[b, h, n, width]) -> float[b, h, n, width] {
    weight w: float[width] = ones()
    return rms_norm(x, w, eps)
}
"""

GEMMA_NORM = """
# x / sqrt(mean(x^2) + eps) * (1 + w)
block norm(x: float[b, n, d_model]) -> float[b, n, d_model] {
    weight w: float[d_model] = zeros()
    return rms_norm(x, 1.0 + w, eps)
}
"""


@dataclass(frozen=True)
class Kind:
    """What sets a family of decoders apart.

    summary       a comment for the spec
    biases        whether queries, keys and values have one, and whether the output of attention has
    norms         before each part (Llama), after it (OLMo 2), or both (Gemma 2)
    head_norms    of queries and keys: of each head (Qwen3), or of all heads together (OLMo 2)
    windows       which layers attend to a window
    activation    the field that names it
    gemma         whether norms multiply by 1 + w, and the table's rows are multiplied by the root of their width
    caps          of scores and of logits, beyond which none can be, and none for no cap
    scaled_by     the square of what scores are divided by; none: the width of a head
    local_base    the base of the rotary positions of layers with a window, none if it is that of all layers
    check         raises TfgError FG602 for fields that do not fit each other in this family alone
    """

    name: str
    title: str
    architecture: str
    summary: str
    fields: tuple[Field, ...]
    biases: Callable[[Config], tuple[bool, bool]] = lambda config: (False, False)
    norms: Literal["before", "after", "both"] = "before"
    head_norms: Literal["none", "each", "all"] = "none"
    windows: Callable[[Config], Windows] = lambda config: Windows()
    activation: str = "hidden_act"
    gemma: bool = False
    caps: Callable[[Config], tuple[float | None, float | None]] = lambda config: (None, None)
    scaled_by: Callable[[Config], float | None] = lambda config: None
    local_base: Callable[[Config], float | None] = lambda config: None
    check: Callable[[Config], None] = lambda config: None


def sizes(
    *,
    vocab: int,
    kv_heads: int | None,
    tied: bool = False,
    eps: float = 1e-6,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    more_activations: tuple[str, ...] = (),
) -> tuple[Field, ...]:
    """Fields that all of these families have, with the defaults of one; `activation` is its field and the default."""
    return (
        size("vocab_size", vocab),
        size("hidden_size", 4096),
        size("intermediate_size", 11008),
        size("num_hidden_layers", 32, most=4096),
        size("num_attention_heads", 32, most=4096),
        size("num_key_value_heads", kv_heads, optional=True, most=4096),
        number("rms_norm_eps", eps),
        flag("tie_word_embeddings", tied),
        one_of(*activation, *GATED, *more_activations),
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
        check=lambda config: _check(kind, config),
    )


def width_of(config: Config) -> int:
    """The width of a head."""
    heads = config.integer("num_attention_heads")
    return config.either("head_dim", config.integer("hidden_size") // heads)


def _check(kind: Kind, config: Config) -> None:
    heads = config.integer("num_attention_heads")
    if heads % config.either("num_key_value_heads", heads):
        raise refused("num_attention_heads is not a multiple of num_key_value_heads")
    if config.values.get("head_dim") is None and config.integer("hidden_size") % heads:
        raise refused("hidden_size is not a multiple of num_attention_heads")
    if width_of(config) % 2:
        raise refused("the width of a head is odd, and rotary positions turn pairs")
    kind.check(config)


def _spec(kind: Kind, config: Config) -> str:
    rope, windows = rope_of(config), kind.windows(config)
    heads = config.integer("num_attention_heads")
    score_cap, logit_cap = kind.caps(config)
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
        local_base=None if windows.width is None else kind.local_base(config),
        sliding=windows.width,
        query_scale=_query_scale(kind, config),
        score_cap=score_cap,
        logit_cap=logit_cap,
    )
    value = "; window: int?" if windows.choice else ""
    passed = "; window = window" if windows.choice else ""
    chosen = f"; window = {windows.choice}" if windows.choice else ""
    signature = f"(x: float[b, n, d_model]{value}) -> float[b, n, d_model]"
    return f"""
# {kind.summary}
use std

{settings}
dim b
dim n <= context
{_norms(kind)}{_gated(kind, config)}{rope.block}
block attention{signature} {{
{_attention(kind, config, windows)}}}

block layer{signature} {{
{_parts(kind, config, passed)}    return x
}}

model {kind.name}(tokens: int[b, n]) -> float[b, n, vocab] {{
    weight table: float[vocab, d_model] = normal(std = 0.02)
    x = embedding(table, tokens){" * sqrt(d_model)" if kind.gemma else ""}
    repeat i in depth {{
        x = layer(x{chosen}) as layers
    }}
    x = {_norm(kind, "x", "norm")}
    {_logits(config, logit_cap)}
}}
{LANGUAGE_LOSS}"""


def _norms(kind: Kind) -> str:
    """The blocks of norms that std does not have."""
    head = HEAD_NORM if kind.head_norms == "each" else ""
    if not kind.gemma:
        return head
    return GEMMA_NORM + head.replace("* w for", "* (1 + w) for").replace("ones()", "zeros()").replace(
        "(x, w", "(x, 1.0 + w"
    )


def _gated(kind: Kind, config: Config) -> str:
    """The block of a gated feed-forward part that std does not have."""
    return GELU_GATED if config.text(kind.activation) == EXACT_GELU else ""


def _norm(kind: Kind, value: str, label: str) -> str:
    """A norm of a value."""
    return f"norm({value}) as {label}" if kind.gemma else f"std.rms_norm({value}; eps) as {label}"


def _query_scale(kind: Kind, config: Config) -> float | None:
    """What queries are multiplied by, so that scores are divided by another number than the root of a head's width."""
    by = kind.scaled_by(config)
    return None if by is None or by == width_of(config) else math.sqrt(width_of(config) / by)


def _logits(config: Config, cap: float | None) -> str:
    """The last statements: logits, and their cap."""
    logits = "x @ table.T" if _tied(config) else "std.linear(x; vocab, bias = false) as output"
    return f"return {logits}" if cap is None else f"x = {logits}\n    return logit_cap * tanh(x / logit_cap)"


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
    local = None if windows.width is None else kind.local_base(config)
    for name in "qk":
        turned = rope.turned(name)
        if local is not None:
            near = f"rotary({name}; base = local_base)"
            turned = f"{turned} if window == none else {near}" if windows.choice else near
        lines.append(f"{name} = {turned}")
    if _query_scale(kind, config) is not None:
        lines.append("q = query_scale * q")
    window = "" if windows.width is None else f", window = {'window' if windows.choice else 'sliding'}"
    if kind.caps(config)[0] is None:
        lines.append(f"y = std.attend(q, k, v; causal = true{window})")
    else:
        lines.append(f"y = std.attend_capped(q, k, v; cap = score_cap, causal = true{window})")
    lines.append(f"return std.linear(y; d_model, bias = {_word(outer)}) as output")
    return "".join(f"    {line}\n" for line in lines)


def _parts(kind: Kind, config: Config, passed: str) -> str:
    """The two parts of a layer with their norms."""
    activation = config.text(kind.activation)
    mlp = "gated({}) as mlp" if activation == EXACT_GELU else f"{GATED[activation]}({{}}; hidden) as mlp"
    lines = []
    for label, part in (("attention", f"attention({{}}{passed})"), ("mlp", mlp)):
        value = "x" if kind.norms == "after" else _norm(kind, "x", f"{label}_norm")
        if kind.norms == "before":
            lines.append(f"x = x + {part.format(value)}")
        else:
            after = f"{label}_norm" if kind.norms == "after" else f"{label}_result_norm"
            lines.append(f"y = {part.format(value)}")
            lines.append(f"x = x + {_norm(kind, 'y', after)}")
    return "".join(f"    {line}\n" for line in lines)


_NORM_NAMES = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"},
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_result_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_result_norm",
    },
}
"""What Transformers calls the norms of a layer, and what the spec does."""


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
    for name, label in _NORM_NAMES[kind.norms].items():
        rules += norm(f"{theirs}.{name}", f"{ours}.{label}", bias=False)
    if _tied(config):
        return (*rules, Rule("lm_head.weight", ("table",)))
    return (*rules, *linear("lm_head", "output", bias=False))


def _tied(config: Config) -> bool:
    return config.flag("tie_word_embeddings")


def _word(value: bool) -> str:
    return "true" if value else "false"
