"""OLMo 2: norms after each part instead of before it, and of all queries and all keys of a token together."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families import rope
from fastgrad_dsl.checkpoints.families.decoder import Kind, family, sizes
from fastgrad_dsl.checkpoints.families.windows import only_full
from fastgrad_dsl.checkpoints.fields import flag, size

OLMO2 = family(
    Kind(
        "olmo2",
        "OLMo 2",
        "Olmo2ForCausalLM",
        "OLMo 2: rotary positions, a gated feed-forward part, RMS norms after each part, and of q and k.",
        (
            *sizes(vocab=50304, kv_heads=None, eps=1e-5),
            *rope.positions(2048),
            size("head_dim", None, optional=True),
            flag("attention_bias", False),
            only_full(),
        ),
        biases=lambda config: (config.flag("attention_bias"), config.flag("attention_bias")),
        norms="after",
        head_norms="all",
    )
)
