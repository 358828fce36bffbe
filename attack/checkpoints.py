"""Checkpoints that are made without Transformers, from what a family's table says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrad_dsl.checkpoints.mapping import expanded
from fastgrad_dsl.checkpoints.model import recognise

GPT2: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 11, "n_positions": 8, "n_embd": 4,
    "n_layer": 2, "n_head": 2,
}  # fmt: skip


def tensors_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random tensors of a checkpoint, those of the backbone without a prefix; each weight is there once."""
    model = recognise({"config.json": dict(config)})
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    done: set[tuple[str, ...]] = set()
    for name, rule in expanded(
        model.family.rules(model.config), model.family.layers(model.config), ""
    ).items():
        if rule.paths not in done:
            done.add(rule.paths)
            found[name] = torch.randn(rule.layout.shape([model.shapes[path] for path in rule.paths]))
    return found


TENSORS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"


def write_folder(
    folder: Path, config: Mapping[str, Any] = GPT2, tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = dict(tensors if tensors is not None else tensors_of(config))
    save_file(found, folder / TENSORS, {"format": "pt"})
    return folder


def write_shards(folder: Path, config: Mapping[str, Any] = GPT2) -> Path:
    """The same with an index, which names one file."""
    write_folder(folder, config)
    (folder / TENSORS).rename(folder / SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors_of(config), SHARD)}
    (folder / f"{TENSORS}.index.json").write_text(json.dumps(index))
    return folder
