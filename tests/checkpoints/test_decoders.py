"""Llama and its kin as Transformers computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgrad_dsl.checkpoints.exporting import export_checkpoint
from tests.checkpoints.comparison import (
    TOLERANCE,
    Case,
    check_round_trip,
    largest_errors,
    ours_of,
    relative,
    saved,
    tokens,
    transformers,
)
from tests.checkpoints.double import make_double

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, with biases and wide heads": (
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 12, "rms_norm_eps": 1e-4},
    ),
    "llama, linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 500.0}),
    "llama, dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama, llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 100.0}),
    "llama, yarn": ("Llama", {"rope_scaling": YARN, "rope_theta": 100.0}),
    "llama, yarn as it may be set": (
        "Llama",
        {"rope_scaling": {**YARN, "beta_fast": 3, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5}},
    ),
    "llama, gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": 3}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "qwen3, windows": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma, untied": ("Gemma", {"head_dim": 6, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma, as its first configs name gelu": (
        "Gemma", {"head_dim": 8, "hidden_act": "gelu", "hidden_activation": None},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma2, no caps": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
         "layer_types": ["full_attention", "full_attention"]},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 9, "rope_theta": 50.0,
         "rope_local_base_freq": 7.0, "layer_types": ["sliding_attention", "full_attention"],
         "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "gemma3, windows": ("Gemma3Text", {"head_dim": 6, "sliding_window": 3, "rope_local_base_freq": 7.0}),
    "gemma3, a cap of scores that is never applied": (
        "Gemma3Text",
        {"head_dim": 6, "sliding_window": 3, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2, biases": ("Olmo2", {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
}  # fmt: skip


def case_of(name: str, folder: Path) -> Case:
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    return saved(config, f"{kind.removesuffix('Text')}ForCausalLM", folder)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name, tmp_path / "saved")
    inputs = {"input_ids": tokens(97)}
    for dtype in TOLERANCE:
        if dtype == torch.float64:
            make_double(case.theirs, monkeypatch)
        errors = largest_errors(
            case, inputs, dtype, lambda out: out.logits, lambda inputs: (inputs["input_ids"],)
        )
        assert max(errors) < TOLERANCE[dtype]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3", "olmo2", "gemma", "gemma2", "gemma3"])
def test_the_way_back_is_exact(name: str, tmp_path: Path) -> None:
    check_round_trip(case_of(name, tmp_path / "saved"))


def test_the_way_back_from_shards_of_bfloat16(tmp_path: Path) -> None:
    kind, settings = MODELS["qwen2"]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings, "torch_dtype": torch.bfloat16})
    case = saved(config, "Qwen2ForCausalLM", tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    check_round_trip(case)


def test_weights_of_another_dtype_are_converted_back(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL)
    case = saved(config, "LlamaForCausalLM", tmp_path / "saved", {"dtype": torch.bfloat16})
    weights = load_file(case.spec.with_suffix(".safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    save_file({name: tensor.double() for name, tensor in weights.items()}, tmp_path / "double.safetensors")
    export_checkpoint(case.spec, tmp_path / "double.safetensors", tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (case.folder / name).read_bytes()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    for (key, now), was in zip(again.state_dict().items(), case.theirs.state_dict().values(), strict=True):
        assert torch.equal(now, was), key


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llama, yarn", "mistral", "gemma2, no caps", "gemma3"])
def test_imported_models_run_token_by_token(name: str, tmp_path: Path) -> None:
    case = case_of(name, tmp_path / "saved")
    model: Any = ours_of(case, torch.float64)
    ids = tokens(97)
    with torch.no_grad():
        whole, state, found = model(ids), model.start(2), []
        for first, count in ((0, 3), (3, 1), (4, 1), (5, 2)):
            out, state = model.step(ids[:, first : first + count], state)
            found.append(out)
    assert relative(torch.cat(found, 1), whole) < 1e-10
