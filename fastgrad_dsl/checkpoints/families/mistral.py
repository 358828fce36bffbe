"""Mistral: Llama with a sliding window in every layer, where its config has one."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families import rope
from fastgrad_dsl.checkpoints.families.decoder import Kind, family, sizes
from fastgrad_dsl.checkpoints.families.windows import Windows
from fastgrad_dsl.checkpoints.fields import Config, one_of, size


def _windows(config: Config) -> Windows:
    return Windows() if config.values["sliding_window"] is None else Windows(config.integer("sliding_window"))


MISTRAL = family(
    Kind(
        "mistral",
        "Mistral",
        "MistralForCausalLM",
        "Mistral: RMS norms, rotary positions, grouped heads, a gated feed-forward part, a sliding window.",
        (
            *sizes(vocab=32000, kv_heads=8),
            *rope.positions(4096 * 32),
            size("head_dim", None, optional=True),
            size("sliding_window", 4096, optional=True),
            one_of("layer_types", None, None),
        ),
        windows=_windows,
    )
)
