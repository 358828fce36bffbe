"""Qwen2 and Qwen3: Llama with biases of queries, keys and values (2), or norms of each head's queries and keys (3)."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families import rope
from fastgrad_dsl.checkpoints.families.decoder import Kind, family, sizes
from fastgrad_dsl.checkpoints.families.windows import FULL, SLIDING, Windows, layer_types, windows_of
from fastgrad_dsl.checkpoints.fields import Config, anything, flag, number, size

_FIELDS = (
    *sizes(vocab=151936, kv_heads=32),
    *rope.positions(32768),
    flag("use_sliding_window", False),
    size("sliding_window", 4096, optional=True),
    number("max_window_layers", 28, least=0, most=4096),
    anything("layer_types"),
)


def _windows(config: Config) -> Windows:
    """Full attention in the first `max_window_layers` layers, unless layer_types says otherwise."""
    has = config.flag("use_sliding_window") and config.values["sliding_window"] is not None
    count, full = config.integer("num_hidden_layers"), config.real("max_window_layers")
    usual = [SLIDING if has and layer >= full else FULL for layer in range(count)]
    types = layer_types(config.values["layer_types"], count, usual)
    return windows_of(types, config.integer("sliding_window") if has else None)


QWEN2 = family(
    Kind(
        "qwen2",
        "Qwen2",
        "Qwen2ForCausalLM",
        "Qwen2: RMS norms, rotary positions, grouped heads, a gated feed-forward part, biases of q, k and v.",
        (*_FIELDS, size("head_dim", None, optional=True)),
        biases=lambda config: (True, False),
        windows=_windows,
    )
)

QWEN3 = family(
    Kind(
        "qwen3",
        "Qwen3",
        "Qwen3ForCausalLM",
        "Qwen3: RMS norms, rotary positions, grouped heads, a gated feed-forward part, norms of each head's q and k.",
        (*_FIELDS, size("head_dim", 128), flag("attention_bias", False)),
        biases=lambda config: (config.flag("attention_bias"), config.flag("attention_bias")),
        head_norms="each",
        windows=_windows,
    )
)
