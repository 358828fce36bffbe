"""BERT, RoBERTa and sentence embeddings as Transformers computes them, on padded batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrad_grammar.diagnostics import TfgError
from tests.checkpoints.comparison import (
    TOLERANCE,
    Case,
    check_round_trip,
    imported,
    largest_errors,
    saved,
    tokens,
    transformers,
)

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def batch(kind: str, mask: Tensor = PADDED) -> dict[str, Tensor]:
    ids = tokens(97)
    ids = torch.where(ids < 3, 3, ids)
    if kind == "Bert":
        types = (torch.arange(7) > 2).long().expand(2, 7)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {"input_ids": torch.where(mask == 0, 1, ids), "attention_mask": mask}


def arguments(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    types = (inputs["token_type_ids"],) if "token_type_ids" in inputs else ()
    return inputs["input_ids"], inputs["attention_mask"] == 1, *types


def case_of(
    kind: str, model: str, folder: Path, made: Mapping[str, Any] | None = None, **settings: Any
) -> Case:
    types = 2 if kind == "Bert" else 1
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, "type_vocab_size": types, **settings})
    return saved(config, f"{kind}{model}", folder, made)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}], ids=["", "set"]
)
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
def test_logits_and_gradients_of_masked_tokens(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = case_of(kind, "ForMaskedLM", tmp_path / "saved", **settings)
    for dtype in TOLERANCE:
        errors = largest_errors(case, batch(kind), dtype, lambda out: out.logits, arguments)
        assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_hidden_states_and_the_pooler(kind: str, tmp_path: Path) -> None:
    case = case_of(kind, "Model", tmp_path / "saved")
    for dtype in TOLERANCE:
        for index, what in enumerate(("last_hidden_state", "pooler_output")):
            errors = largest_errors(case, batch(kind), dtype, attrgetter(what), arguments, index=index)
            assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_model_without_a_pooler(kind: str, tmp_path: Path) -> None:
    case = case_of(kind, "Model", tmp_path / "saved", {"add_pooling_layer": False})
    errors = largest_errors(case, batch(kind), torch.float64, lambda out: out.last_hidden_state, arguments)
    assert max(errors) < TOLERANCE[torch.float64]
    check_round_trip(case)


def test_places_of_roberta_count_real_tokens_wherever_padding_is(tmp_path: Path) -> None:
    case = case_of("Roberta", "ForMaskedLM", tmp_path / "saved")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]])
    errors = largest_errors(case, batch("Roberta", mask), torch.float64, lambda out: out.logits, arguments)
    assert max(errors) < TOLERANCE[torch.float64]


def _pooled(folder: Path, mode: str, normalise: bool) -> None:
    """What sentence-transformers writes beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": paths[index],
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    config = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**config, mode: True}))


@pytest.mark.medium
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("mode", ["pooling_mode_mean_tokens", "pooling_mode_cls_token"])
def test_sentence_embeddings(mode: str, normalise: bool, tmp_path: Path) -> None:
    first = case_of("Bert", "Model", tmp_path / "first" / "saved")
    folder = tmp_path / "first" / "saved"
    _pooled(folder, mode, normalise)
    (tmp_path / "second").mkdir()
    folder = folder.rename(tmp_path / "second" / "saved")
    case = imported(first.theirs, folder)
    mask = PADDED.double().unsqueeze(-1)

    def embeddings(out: Any) -> Tensor:
        x = out.last_hidden_state
        x = (x * mask.to(x.dtype)).sum(1) / mask.to(x.dtype).sum(1) if "mean" in mode else x[:, 0]
        return torch.nn.functional.normalize(x, dim=-1) if normalise else x

    for dtype in TOLERANCE:
        errors = largest_errors(case, batch("Bert"), dtype, embeddings, arguments)
        assert max(errors) < TOLERANCE[dtype]
    check_round_trip(case)
    back = folder.parent / "back"
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_pooling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    first = case_of("Bert", "Model", tmp_path / "saved")
    _pooled(tmp_path / "saved", "pooling_mode_max_tokens", normalise=False)
    with pytest.raises(TfgError, match="the pooling mode is"):
        imported(first.theirs, tmp_path / "saved")


@pytest.mark.parametrize("model", ["ForMaskedLM", "Model"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_the_way_back_is_exact(kind: str, model: str, tmp_path: Path) -> None:
    check_round_trip(case_of(kind, model, tmp_path / "saved"))


def test_old_names_and_tensors_of_other_heads(tmp_path: Path) -> None:
    case = case_of("Bert", "ForMaskedLM", tmp_path / "first" / "saved")
    (tmp_path / "second").mkdir()
    folder = case.folder.rename(tmp_path / "second" / "saved")
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    old["cls.seq_relationship.weight"] = torch.randn(2, 32)
    old["bert.pooler.dense.bias"] = torch.randn(32)
    old["bert.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    again = imported(case.theirs, folder)
    check_round_trip(again)
    weights = load_file(again.spec.with_suffix(".safetensors"))
    assert torch.equal(weights["embedding_norm.w"], tensors["bert.embeddings.LayerNorm.weight"])
