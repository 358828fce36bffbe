"""Gemma 1 to 3: norms by 1 + w, a scaled table; from 2 on windows and four norms a layer, in 2 also caps."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families import rope
from fastgrad_dsl.checkpoints.families.decoder import EXACT_GELU, GATED, Kind, family, sizes
from fastgrad_dsl.checkpoints.families.windows import (
    FULL,
    SLIDING,
    Windows,
    layer_types,
    only_full,
    windows_of,
)
from fastgrad_dsl.checkpoints.fields import Config, anything, flag, number, one_of, refused, size

GELU = "gelu_pytorch_tanh"


def _biases(config: Config) -> tuple[bool, bool]:
    return config.flag("attention_bias"), config.flag("attention_bias")


def _one_activation(config: Config) -> None:
    """Transformers computes hidden_act in some versions of Gemma 1 and hidden_activation, unless null, in others."""
    act, activation = config.text("hidden_act"), config.values["hidden_activation"]
    if activation is not None and GATED.get(config.text("hidden_activation")) != GATED.get(act):
        raise refused(f'hidden_act is "{act}", and hidden_activation "{activation}": they disagree')


def _windows(config: Config) -> Windows:
    """Every second layer (in Gemma 3 every sixth) attends to all, unless layer_types says otherwise."""
    count = config.integer("num_hidden_layers")
    period = config.integer("sliding_window_pattern") if "sliding_window_pattern" in config.values else 2
    usual = [SLIDING if (layer + 1) % period else FULL for layer in range(count)]
    types = layer_types(config.values["layer_types"], count, usual)
    return windows_of(
        types, None if config.values["sliding_window"] is None else config.integer("sliding_window")
    )


def _cap(config: Config, name: str) -> float | None:
    return None if config.values[name] is None else config.real(name)


def _caps(config: Config) -> tuple[float | None, float | None]:
    return _cap(config, "attn_logit_softcapping"), _cap(config, "final_logit_softcapping")


def _logit_cap(config: Config) -> tuple[None, float | None]:
    """Of Gemma 3, whose class in Transformers keeps attn_logit_softcapping and never applies it."""
    return None, _cap(config, "final_logit_softcapping")


GEMMA = family(
    Kind(
        "gemma",
        "Gemma",
        "GemmaForCausalLM",
        "Gemma: RMS norms by 1 + w, rotary positions, grouped heads, a gated feed-forward part.",
        (
            *sizes(
                vocab=256000,
                kv_heads=16,
                tied=True,
                activation=("hidden_act", GELU),
                more_activations=(EXACT_GELU,),
            ),
            *rope.positions(8192),
            size("head_dim", 256),
            flag("attention_bias", False),
            one_of("hidden_activation", None, None, EXACT_GELU, *GATED),
            only_full(),
        ),
        biases=_biases,
        check=_one_activation,
        gemma=True,
    )
)

GEMMA2 = family(
    Kind(
        "gemma2",
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma 2: RMS norms by 1 + w around each part, rotary positions, grouped heads, caps, sliding windows.",
        (
            *sizes(vocab=256000, kv_heads=4, tied=True, activation=("hidden_activation", GELU)),
            *rope.positions(8192),
            size("head_dim", 256),
            flag("attention_bias", False),
            number("query_pre_attn_scalar", 256),
            size("sliding_window", 4096, optional=True),
            anything("layer_types"),
            number("attn_logit_softcapping", 50.0, optional=True),
            number("final_logit_softcapping", 30.0, optional=True),
        ),
        biases=_biases,
        norms="both",
        windows=_windows,
        activation="hidden_activation",
        gemma=True,
        caps=_caps,
        scaled_by=lambda config: config.real("query_pre_attn_scalar"),
    )
)

GEMMA3 = family(
    Kind(
        "gemma3_text",
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma 3: RMS norms by 1 + w around each part and of each head's q and k, two kinds of rotary positions.",
        (
            *sizes(vocab=262208, kv_heads=4, tied=True, activation=("hidden_activation", GELU)),
            *rope.positions(131072, base=1_000_000.0),
            number("rope_local_base_freq", 10000.0),
            size("head_dim", 256),
            flag("attention_bias", False),
            number("query_pre_attn_scalar", 256),
            size("sliding_window", 4096, optional=True),
            size("sliding_window_pattern", 6, most=4096),
            anything("layer_types"),
            number("final_logit_softcapping", None, optional=True),
            one_of("use_bidirectional_attention", False, False),
        ),
        biases=_biases,
        norms="both",
        head_norms="each",
        windows=_windows,
        activation="hidden_activation",
        gemma=True,
        caps=_logit_cap,
        scaled_by=lambda config: config.real("query_pre_attn_scalar"),
        local_base=lambda config: config.real("rope_local_base_freq"),
    )
)
