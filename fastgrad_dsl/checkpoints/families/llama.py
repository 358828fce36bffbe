"""Llama 2 and 3, and what has their shape: SmolLM, TinyLlama, Yi and others."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families import rope
from fastgrad_dsl.checkpoints.families.decoder import Kind, family, sizes
from fastgrad_dsl.checkpoints.families.windows import only_full
from fastgrad_dsl.checkpoints.fields import Config, flag, one_of, size


def _biases(config: Config) -> tuple[bool, bool]:
    return config.flag("attention_bias"), config.flag("attention_bias")


LLAMA = family(
    Kind(
        "llama",
        "Llama",
        "LlamaForCausalLM",
        "Llama: RMS norms, rotary positions, grouped heads, a gated feed-forward part.",
        (
            *sizes(vocab=32000, kv_heads=None),
            *rope.positions(2048),
            size("head_dim", None, optional=True),
            flag("attention_bias", False),
            only_full(),
            one_of("mlp_bias", False, False),
        ),
        biases=_biases,
    )
)
