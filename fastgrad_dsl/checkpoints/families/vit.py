"""ViT: an image as patches, with a first token of its own and learned positions; layer norms before each part."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families.family import ACTIVATIONS, Family, params
from fastgrad_dsl.checkpoints.fields import Config, anything, number, one_of, refused, size
from fastgrad_dsl.checkpoints.mapping import Rule, convolution, linear, norm
from fastgrad_dsl.documents.form import shown

CLASSIFIER = "ViTForImageClassification"
POOLER = "pooler.dense.weight"  # which a model may have been saved without
LABELS = 2  # of a config without id2label

FIELDS = (
    size("hidden_size", 768),
    size("num_hidden_layers", 12, most=4096),
    size("num_attention_heads", 12, most=4096),
    size("intermediate_size", 3072),
    one_of("hidden_act", "gelu", *ACTIVATIONS),
    number("layer_norm_eps", 1e-12),
    size("image_size", 224, most=1 << 16),
    size("patch_size", 16, most=1 << 12),
    size("num_channels", 3, most=1 << 12),
    one_of("qkv_bias", True, True),
    one_of("pooler_act", "tanh", "tanh"),
    size("pooler_output_size", None, optional=True),
    anything("id2label"),
)


def _check(config: Config) -> None:
    for name, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if config.integer(name) % config.integer(part):
            raise refused(f"{name} is not a multiple of {part}")
    labels = config.values["id2label"]
    if labels is not None and not (isinstance(labels, dict) and labels):
        raise refused(f"id2label is {shown(labels)}, expected an object")


def _is_classifier(config: Config) -> bool:
    return config.architecture == CLASSIFIER


def _spec(config: Config) -> str:
    labels = config.values["id2label"]
    classes = len(labels) if isinstance(labels, dict) else LABELS
    pooled = config.either("pooler_output_size", config.integer("hidden_size"))
    classifier = _is_classifier(config)
    settings = params(
        depth=config.integer("num_hidden_layers"),
        d_model=config.integer("hidden_size"),
        heads=config.integer("num_attention_heads"),
        hidden=config.integer("intermediate_size"),
        side=config.integer("image_size"),
        patch=config.integer("patch_size"),
        channels=config.integer("num_channels"),
        classes=classes if classifier else None,
        pooled=None if classifier or not config.has(POOLER) else pooled,
        eps=config.real("layer_norm_eps"),
    )
    result, tail, loss = _results(config)
    return f"""
# ViT: an image as patches, with a first token of its own and learned positions; layer norms before each part.
use std

{settings}
dim b

block layer(x: float[b, n, d_model]) -> float[b, n, d_model] {{
    x = x + std.attention(std.layer_norm(x; eps) as attention_norm; heads, bias = true)
    x = x + std.mlp(
        std.layer_norm(x; eps) as mlp_norm; hidden, activation = "{ACTIVATIONS[config.text("hidden_act")]}"
    )
    return x
}}

model vit(images: float[b, channels, side, side]) -> {result} {{
    weight first_token: float[1, 1, d_model] = normal(std = 0.02)
    weight places: float[1, (side // patch) * (side // patch) + 1, d_model] = normal(std = 0.02)
    x = std.linear(patches(images, patch); d_model) as embed
    x = concat(broadcast_to(first_token, (b, 1, d_model)), x; axis = 1) + places
    repeat i in depth {{
        x = layer(x) as layers
    }}
    x = std.layer_norm(x; eps) as norm
    {tail}
}}
{loss}"""


def _results(config: Config) -> tuple[str, str, str]:
    """The type of the results, the statements that make them, and the objective."""
    hidden = "float[b, (side // patch) * (side // patch) + 1, d_model]"
    if _is_classifier(config):
        tail = "first = std.linear(x[:, 0:1]; classes) as output\n    return first[:, 0]"
        loss = "\nobjective loss(logits: float[b, classes], labels: int[b]) = cross_entropy(logits, labels)\n"
        return "float[b, classes]", tail, loss
    if not config.has(POOLER):
        return hidden, "return x", ""
    tail = "first = std.linear(x[:, 0:1]; pooled) as pooler\n    return (x, tanh(first)[:, 0])"
    return f"({hidden}, float[b, pooled])", tail, ""


def _rules(config: Config) -> tuple[Rule, ...]:
    theirs, ours = "{p}encoder.layer.{i}", "layers.{i}"
    attention = f"{ours}.attention."
    projection = convolution(config.integer("num_channels"), config.integer("patch_size"))
    rules = [
        Rule("{p}embeddings.cls_token", ("first_token",)),
        Rule("{p}embeddings.position_embeddings", ("places",)),
        Rule("{p}embeddings.patch_embeddings.projection.weight", ("embed.w",), projection),
        Rule("{p}embeddings.patch_embeddings.projection.bias", ("embed.b",)),
        *norm("{p}layernorm", "norm"),
        *norm(f"{theirs}.layernorm_before", f"{ours}.attention_norm"),
        *norm(f"{theirs}.layernorm_after", f"{ours}.mlp_norm"),
        *linear(f"{theirs}.attention.output.dense", attention, weight="wo", offset="bo"),
        *linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.", weight="w1", offset="b1"),
        *linear(f"{theirs}.output.dense", f"{ours}.mlp.", weight="w2", offset="b2"),
    ]
    for name in ("query", "key", "value"):
        place = f"{theirs}.attention.attention.{name}"
        rules += linear(place, attention, weight=f"w{name[0]}", offset=f"b{name[0]}")
    if _is_classifier(config):
        rules += linear("classifier", "output")
    elif config.has(POOLER):
        rules += linear("{p}pooler.dense", "pooler")
    return tuple(rules)


def _kept(config: Config) -> tuple[str, ...]:
    return ("{p}embeddings.mask_token", *(("{p}pooler.*",) if _is_classifier(config) else ()))


VIT = Family(
    "vit",
    "ViT",
    (CLASSIFIER, "ViTModel"),
    FIELDS,
    _spec,
    _rules,
    lambda config: config.integer("num_hidden_layers"),
    prefix="vit.",
    kept=_kept,
    check=_check,
)
