"""GPT-2: learned positions, layer norms before each part, queries, keys and values in one matrix."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families.family import ACTIVATIONS, LANGUAGE_LOSS, Family, params
from fastgrad_dsl.checkpoints.fields import Config, flag, number, one_of, refused, size
from fastgrad_dsl.checkpoints.mapping import COLUMNS, SAME, TRANSPOSED, Rule, norm

FIELDS = (
    size("vocab_size", 50257),
    size("n_positions", 1024),
    size("n_embd", 768),
    size("n_layer", 12, most=4096),
    size("n_head", 12, most=4096),
    size("n_inner", None, optional=True),
    one_of("activation_function", "gelu_new", *ACTIVATIONS),
    number("layer_norm_epsilon", 1e-5),
    flag("tie_word_embeddings", True),
    one_of("scale_attn_weights", True, True),
    one_of("scale_attn_by_inverse_layer_idx", False, False),
    one_of("add_cross_attention", False, False),
)


def _check(config: Config) -> None:
    if config.integer("n_embd") % config.integer("n_head"):
        raise refused("n_embd is not a multiple of n_head")


def _spec(config: Config) -> str:
    tied = config.flag("tie_word_embeddings")
    settings = params(
        depth=config.integer("n_layer"),
        d_model=config.integer("n_embd"),
        heads=config.integer("n_head"),
        hidden=config.either("n_inner", 4 * config.integer("n_embd")),
        context=config.integer("n_positions"),
        vocab=config.integer("vocab_size"),
        eps=config.real("layer_norm_epsilon"),
    )
    activation = ACTIVATIONS[config.text("activation_function")]
    logits = "x @ table.T" if tied else "std.linear(x; vocab, bias = false) as output"
    return f"""
# GPT-2: learned positions, layer norms before each part{", the table as the output's weight" if tied else ""}.
use std

{settings}
dim b
dim n <= context

block layer(x: float[b, n, d_model]) -> float[b, n, d_model] {{
    x = x + std.attention(std.layer_norm(x; eps) as attention_norm; heads, bias = true, causal = true)
    x = x + std.mlp(std.layer_norm(x; eps) as mlp_norm; hidden, activation = "{activation}")
    return x
}}

model gpt2(tokens: int[b, n]) -> float[b, n, vocab] {{
    weight table: float[vocab, d_model] = normal(std = 0.02)
    weight places: float[context, d_model] = normal(std = 0.02)
    x = embedding(table, tokens) + embedding(places, positions(n))
    repeat i in depth {{
        x = layer(x) as layers
    }}
    x = std.layer_norm(x; eps) as norm
    return {logits}
}}
{LANGUAGE_LOSS}"""


def _rules(config: Config) -> tuple[Rule, ...]:
    layer, ours = "{p}h.{i}", "layers.{i}"
    attention = f"{ours}.attention"
    table = ("table",) if config.flag("tie_word_embeddings") else ("output.w",)
    return (
        Rule("{p}wte.weight", ("table",)),
        Rule("{p}wpe.weight", ("places",)),
        *norm(f"{layer}.ln_1", f"{ours}.attention_norm"),
        Rule(f"{layer}.attn.c_attn.weight", tuple(f"{attention}.w{each}" for each in "qkv"), COLUMNS),
        Rule(f"{layer}.attn.c_attn.bias", tuple(f"{attention}.b{each}" for each in "qkv"), COLUMNS),
        Rule(f"{layer}.attn.c_proj.weight", (f"{attention}.wo",)),
        Rule(f"{layer}.attn.c_proj.bias", (f"{attention}.bo",)),
        *norm(f"{layer}.ln_2", f"{ours}.mlp_norm"),
        Rule(f"{layer}.mlp.c_fc.weight", (f"{ours}.mlp.w1",)),
        Rule(f"{layer}.mlp.c_fc.bias", (f"{ours}.mlp.b1",)),
        Rule(f"{layer}.mlp.c_proj.weight", (f"{ours}.mlp.w2",)),
        Rule(f"{layer}.mlp.c_proj.bias", (f"{ours}.mlp.b2",)),
        *norm("{p}ln_f", "norm"),
        Rule("lm_head.weight", table, SAME if table == ("table",) else TRANSPOSED),
    )


GPT2 = Family(
    "gpt2",
    "GPT-2",
    ("GPT2LMHeadModel",),
    FIELDS,
    _spec,
    _rules,
    lambda config: config.integer("n_layer"),
    prefix="transformer.",
    kept=lambda config: ("{p}h.*.attn.bias", "{p}h.*.attn.masked_bias"),
    check=_check,
)
