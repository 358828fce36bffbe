"""A real checkpoint, all-MiniLM-L6-v2: embeddings of a hundred sentences as Transformers computes them."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fastgrad_dsl as fg
from fastgrad_dsl.checkpoints.exporting import export_checkpoint
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from tests.checkpoints.comparison import transformers
from tests.checkpoints.minilm import encoded, minilm, sentences


def test_embeddings_of_a_hundred_sentences(tmp_path: Path) -> None:
    folder = minilm()
    texts = sentences(100)
    assert len(set(texts)) == 100
    tokens, mask = encoded(folder, texts)
    assert mask.sum(1).unique().numel() > 10  # lengths differ, so that padding is at work
    theirs: Any = transformers.AutoModel.from_pretrained(folder).eval()
    import_checkpoint(folder, tmp_path / "minilm.tfg")
    model = fg.compile(tmp_path / "minilm.tfg").module().eval()
    model.load_state_dict(load_file(tmp_path / "minilm.safetensors"))
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        found = model(tokens, mask, torch.zeros_like(tokens))
    shown = mask.unsqueeze(-1)
    wanted = torch.nn.functional.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)
    cosine = torch.nn.functional.cosine_similarity(found.double(), wanted.double())
    assert found.shape == (100, 384)
    assert float(cosine.min()) >= 1 - 1e-6
    others = wanted @ wanted.T - torch.eye(100)
    assert float(others.max()) < 0.99  # that they are equal is no accident of embeddings that are all alike


def test_the_way_back_is_the_folder(tmp_path: Path) -> None:
    folder = minilm()
    import_checkpoint(folder, tmp_path / "minilm.tfg")
    export_checkpoint(tmp_path / "minilm.tfg", tmp_path / "minilm.safetensors", tmp_path / "back")
    assert filecmp.cmp(folder / "config.json", tmp_path / "back" / "config.json", shallow=False)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "back", folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
