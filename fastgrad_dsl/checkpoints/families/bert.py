"""BERT, RoBERTa and XLM-R: encoders of padded texts with learned positions and layer norms after each part.

They come as bare models, with the head for masked tokens, or with the pooling of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastgrad_dsl.checkpoints.families.family import ACTIVATIONS, LANGUAGE_LOSS, Family, params
from fastgrad_dsl.checkpoints.families.pooling import pooling_of
from fastgrad_dsl.checkpoints.fields import Config, number, one_of, refused, size
from fastgrad_dsl.checkpoints.mapping import Rule, linear

MASKED, BARE = "ForMaskedLM", "Model"
POOLER = "pooler.dense.weight"
"""A model may have been saved without it."""


@dataclass(frozen=True)
class Kind:
    """What sets a family of encoders apart.

    classes    what comes before ForMaskedLM and Model in the names of its classes
    head       the head for masked tokens: `dense`, `norm` and `bias` are what its tensors are called
    counted    places count real tokens and follow the padding's id (RoBERTa), or are those in the row (BERT)
    gelu       whether the head always has gelu, or the activation of the layers
    """

    name: str
    title: str
    classes: str
    prefix: str
    head: Mapping[str, str]
    counted: bool
    gelu: bool
    summary: str


FIELDS = (
    size("vocab_size", 30522),
    size("hidden_size", 768),
    size("num_hidden_layers", 12, most=4096),
    size("num_attention_heads", 12, most=4096),
    size("intermediate_size", 3072),
    one_of("hidden_act", "gelu", *ACTIVATIONS),
    size("max_position_embeddings", 512),
    size("type_vocab_size", 2),
    number("layer_norm_eps", 1e-12),
    one_of("position_embedding_type", "absolute", "absolute"),
    one_of("is_decoder", False, False),
    one_of("add_cross_attention", False, False),
    one_of("tie_word_embeddings", True, True),
)


def _family(kind: Kind) -> Family:
    padding = (size("pad_token_id", 1, least=0),) if kind.counted else ()
    return Family(
        kind.name,
        kind.title,
        (kind.classes + BARE, kind.classes + MASKED),
        (*FIELDS, *padding),
        lambda config: _spec(kind, config),
        lambda config: _rules(kind, config),
        lambda config: config.integer("num_hidden_layers"),
        prefix=kind.prefix,
        kept=_kept,
        check=_check,
    )


def _check(config: Config) -> None:
    if config.integer("hidden_size") % config.integer("num_attention_heads"):
        raise refused("hidden_size is not a multiple of num_attention_heads")
    places = config.integer("max_position_embeddings")
    if "pad_token_id" in config.values and config.integer("pad_token_id") + 1 >= places:
        raise refused("pad_token_id leaves no places: max_position_embeddings is too small")
    pooling_of(config.others)


def _is_masked(config: Config) -> bool:
    return config.architecture.endswith(MASKED)


def _kept(config: Config) -> tuple[str, ...]:
    kept = ["{p}embeddings.position_ids", "cls.seq_relationship.*"]
    if _is_masked(config) or pooling_of(config.others) is not None:
        kept.append("{p}pooler.*")
    return tuple(kept)


# ---------------------------------------------------------------- the spec


def _spec(kind: Kind, config: Config) -> str:
    typed = config.integer("type_vocab_size") > 1
    settings = params(
        depth=config.integer("num_hidden_layers"),
        d_model=config.integer("hidden_size"),
        heads=config.integer("num_attention_heads"),
        hidden=config.integer("intermediate_size"),
        context=config.integer("max_position_embeddings"),
        vocab=config.integer("vocab_size"),
        types_known=config.integer("type_vocab_size"),
        padding_id=config.integer("pad_token_id") if kind.counted else None,
        eps=config.real("layer_norm_eps"),
    )
    places = "std.real_places(tokens != padding_id) + padding_id" if kind.counted else "positions(n)"
    kinds = "embedding(type_table, types)" if typed else "type_table"
    inputs = "tokens: int[b, n], mask: bool[b, n]" + (", types: int[b, n]" if typed else "")
    result, tail = _results(kind, config)
    more = "; types: which of the texts that are read together a token is of" if typed else ""
    return f"""
# {kind.summary}
use std

{settings}
dim b
dim n <= {"(context - padding_id - 1)" if kind.counted else "context"}

block layer(x: float[b, n, d_model], mask: bool[b, n]) -> float[b, n, d_model] {{
    x = x + std.attention_padded(x, mask; heads, bias = true) as attention
    x = std.layer_norm(x; eps) as attention_norm
    x = x + std.mlp(x; hidden, activation = "{ACTIVATIONS[config.text("hidden_act")]}")
    x = std.layer_norm(x; eps) as mlp_norm
    return x
}}

# mask: true for a real token, false for padding{more}
model {kind.name.replace("-", "_")}({inputs}) -> {result} {{
    weight table: float[vocab, d_model] = normal(std = 0.02)
    weight places: float[context, d_model] = normal(std = 0.02)
    weight type_table: float[types_known, d_model] = normal(std = 0.02)
    x = embedding(table, tokens) + {kinds} + embedding(places, {places})
    x = std.layer_norm(x; eps) as embedding_norm
    repeat i in depth {{
        x = layer(x, mask) as layers
    }}
{tail}}}
{LANGUAGE_LOSS if _is_masked(config) else ""}"""


def _results(kind: Kind, config: Config) -> tuple[str, str]:
    """The type of the results, and the statements that make them."""
    if _is_masked(config):
        function = "gelu" if kind.gelu else ACTIVATIONS[config.text("hidden_act")]
        called = "std.gelu_tanh" if function == "gelu_tanh" else function
        lines = [
            "x = std.linear(x; d_model) as transform",
            f"x = std.layer_norm({called}(x); eps) as transform_norm",
            "weight bias: float[vocab] = zeros()",
            "return x @ table.T + bias",
        ]
        result = "float[b, n, vocab]"
    elif (pooling := pooling_of(config.others)) is not None:
        lines, result = [pooling.statements], "float[b, d_model]"
    elif not config.has(POOLER):
        lines, result = ["return x"], "float[b, n, d_model]"
    else:
        lines = ["first = std.linear(x[:, 0:1]; d_model) as pooler", "return (x, tanh(first)[:, 0])"]
        result = "(float[b, n, d_model], float[b, d_model])"
    return result, "".join(f"    {line}\n" for line in lines)


# ---------------------------------------------------------------- the tensors


def _rules(kind: Kind, config: Config) -> tuple[Rule, ...]:
    theirs, ours = "{p}encoder.layer.{i}", "layers.{i}"
    attention = f"{ours}.attention."
    rules = [
        Rule("{p}embeddings.word_embeddings.weight", ("table",)),
        Rule("{p}embeddings.position_embeddings.weight", ("places",)),
        Rule("{p}embeddings.token_type_embeddings.weight", ("type_table",)),
        *_norm("{p}embeddings.LayerNorm", "embedding_norm"),
    ]
    for name in ("query", "key", "value"):
        rules += linear(
            f"{theirs}.attention.self.{name}", attention, weight=f"w{name[0]}", offset=f"b{name[0]}"
        )
    rules += linear(f"{theirs}.attention.output.dense", attention, weight="wo", offset="bo")
    rules += _norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
    rules += linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.", weight="w1", offset="b1")
    rules += linear(f"{theirs}.output.dense", f"{ours}.mlp.", weight="w2", offset="b2")
    rules += _norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
    if _is_masked(config):
        rules += linear(kind.head["dense"], "transform")
        rules += _norm(kind.head["norm"], "transform_norm")
        rules += [Rule(kind.head["bias"], ("bias",)), Rule(f"{kind.head['decoder']}.bias", ("bias",))]
        rules.append(Rule(f"{kind.head['decoder']}.weight", ("table",)))
    elif pooling_of(config.others) is None and config.has(POOLER):
        rules += linear("{p}pooler.dense", "pooler")
    return tuple(rules)


def _norm(name: str, path: str) -> tuple[Rule, ...]:
    """A layer norm, under its names of today and those of TensorFlow, which old checkpoints have."""
    names = {"w": ("weight", "gamma"), "b": ("bias", "beta")}
    return tuple(Rule(f"{name}.{each}", (f"{path}.{w}",)) for w, known in names.items() for each in known)


_ROBERTA_HEAD = {
    "dense": "lm_head.dense",
    "norm": "lm_head.layer_norm",
    "bias": "lm_head.bias",
    "decoder": "lm_head.decoder",
}

BERT = _family(
    Kind(
        "bert",
        "BERT",
        "Bert",
        "bert.",
        {
            "dense": "cls.predictions.transform.dense",
            "norm": "cls.predictions.transform.LayerNorm",
            "bias": "cls.predictions.bias",
            "decoder": "cls.predictions.decoder",
        },
        counted=False,
        gelu=False,
        summary="BERT: an encoder of padded texts, with learned positions and layer norms after each part.",
    )
)
_SUMMARY = (
    "an encoder of padded texts, with learned places that count real tokens, and layer norms after each part."
)
ROBERTA = _family(
    Kind("roberta", "RoBERTa", "Roberta", "roberta.", _ROBERTA_HEAD, True, True, f"RoBERTa: {_SUMMARY}")
)
XLM_ROBERTA = _family(
    Kind("xlm-roberta", "XLM-R", "XLMRoberta", "roberta.", _ROBERTA_HEAD, True, True, f"XLM-R: {_SUMMARY}")
)
