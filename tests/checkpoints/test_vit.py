"""ViT as Transformers computes it."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.comparison import (
    TOLERANCE,
    Case,
    check_round_trip,
    largest_errors,
    saved,
    transformers,
)
from tests.checkpoints.double import make_double


def case_of(model: str, folder: Path, **settings: Any) -> Case:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=15,
        patch_size=5, **settings,
    )  # fmt: skip
    return saved(config, model, folder)


def compared(
    case: Case, monkeypatch: pytest.MonkeyPatch, what: str, index: int = 0, channels: int = 3
) -> None:
    images = torch.randn(2, channels, 15, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for dtype in TOLERANCE:
        if dtype == torch.float64:
            make_double(case.theirs, monkeypatch)
        inputs = {"pixel_values": images.to(dtype)}
        errors = largest_errors(
            case,
            inputs,
            dtype,
            attrgetter(what),
            lambda inputs: (inputs["pixel_values"],),
            index=index,
        )
        assert max(errors) < TOLERANCE[dtype]


def test_logits_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared(case_of("ViTForImageClassification", tmp_path / "saved"), monkeypatch, "logits")


def test_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_labels": 7, "num_channels": 1, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}
    compared(
        case_of("ViTForImageClassification", tmp_path / "saved", **settings),
        monkeypatch,
        "logits",
        channels=1,
    )


@pytest.mark.parametrize(("index", "what"), [(0, "last_hidden_state"), (1, "pooler_output")])
def test_hidden_states_and_the_pooler(
    index: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(case_of("ViTModel", tmp_path / "saved"), monkeypatch, what, index)


@pytest.mark.parametrize("model", ["ViTForImageClassification", "ViTModel"])
def test_the_way_back_is_exact(model: str, tmp_path: Path) -> None:
    check_round_trip(case_of(model, tmp_path / "saved"))
