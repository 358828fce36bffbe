"""GPT-2 as Transformers computes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.comparison import (
    TOLERANCE,
    Case,
    check_round_trip,
    largest_errors,
    saved,
    tokens,
    transformers,
)


def case_of(folder: Path, **settings: object) -> Case:
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=4, **settings
    )
    return saved(config, "GPT2LMHeadModel", folder)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "settings", [{}, {"n_inner": 37, "activation_function": "relu", "tie_word_embeddings": False}]
)
def test_logits_and_gradients(dtype: torch.dtype, settings: dict[str, object], tmp_path: Path) -> None:
    case = case_of(tmp_path / "saved", **settings)
    errors = largest_errors(
        case, {"input_ids": tokens(97)}, dtype, lambda out: out.logits, lambda inputs: (inputs["input_ids"],)
    )
    assert max(errors) < TOLERANCE[dtype]


def test_the_way_back_is_exact(tmp_path: Path) -> None:
    check_round_trip(case_of(tmp_path / "saved"))
