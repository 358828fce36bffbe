"""Small models with softmax attention, texts for them, and a conversion of a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fastgrad_dsl as fg
from fastgrad_dsl.conversion.run import Request
from fastgrad_dsl.conversion.spec import Form
from fastgrad_dsl.models.text_data import load_text
from fastgrad_dsl.training.loop import Options, train

DECODER = """use std
dim b
dim n <= 4096

# A layer.
block layer(x: float[b, n, d]; heads: int) -> float[b, n, d] {
    x = x + std.attention(std.rms_norm(x); heads, causal = true, rope = 100.0)  # who heeds whom
    return x + std.swiglu(std.rms_norm(x) as norm; hidden = 24)
}

model decoder(tokens: int[b, n]) -> float[b, n, 256] {
    weight table: float[256, 16] = normal(std = 0.3)
    x = embedding(table, tokens)
    repeat i in 2 {
        x = layer(x; heads = 2) as layers
    }
    return std.rms_norm(x) @ table.T
}

objective loss(logits: float[b, n, 256], targets: int[b, n]) = cross_entropy(logits, targets)
"""
ENCODER = """use std
dim b
dim n <= 96

model encoder(tokens: int[b, n], mask: bool[b, n], types: int[b, n]) -> float[b, 16] {
    weight table: float[256, 16] = normal(std = 1.0)
    weight kinds: float[2, 16] = normal(std = 1.0)
    x = embedding(table, tokens) + embedding(kinds, types)
    repeat i in 2 {
        x = std.layer_norm(x + std.attention_padded(x, mask; heads = 2, bias = true) as layers) as norms
    }
    return unit(std.mean_pool(x, mask))
}
"""
LETTERS = "the quick brown fox jumps over a lazy dog; "


def options(**changed: Any) -> Options:
    """Of a phase of a few steps on short sequences."""
    settings: dict[str, Any] = {
        "steps": 12, "tokens": 48, "batch": 2, "learning_rate": 3e-2, "weight_decay": 0.0, "warmup": 2,
        "validate_every": 4, "checkpoint_every": 4,
    }  # fmt: skip
    return Options(**{**settings, **changed})


def decoder_text(folder: Path) -> Path:
    """A text whose words repeat at several distances."""
    path = folder / "text.txt"
    words = LETTERS.split()
    draws = torch.randint(len(words), (1200,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(words[draw] for draw in draws))
    return path


def encoder_texts(folder: Path, lines: int = 60) -> Path:
    """A text in each line, of 10 to 90 bytes."""
    path = folder / "lines.txt"
    generator = torch.Generator().manual_seed(1)
    texts = []
    for _ in range(lines):
        start, size = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 40), (10, 90))
        )
        texts.append((LETTERS * 4)[start : start + size])
    path.write_text("\n".join(texts) + "\n\n")
    return path


def original(spec: str, folder: Path, data: Path, steps: int = 0) -> tuple[fg.Compiled, Path]:
    """A compiled spec, and a file with its weights, whose attention is sharper than at first, or trained on a text."""
    (folder / "model.tfg").write_text(spec)
    compiled = fg.compile(folder / "model.tfg", target="torch", validate=False)
    model = compiled.module(seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".wq", ".wk")):
                weight.mul_(2.0)
    if steps:
        training = options(
            steps=steps, learning_rate=1e-2, validate_every=steps, checkpoint_every=steps, batch=4
        )
        assert compiled.loss is not None
        for _ in train(model, compiled.loss, load_text(data, 48), training, folder / "original"):
            pass
    save_file(dict(model.state_dict()), folder / "weights.safetensors")
    return compiled, folder / "weights.safetensors"


def request(folder: Path, spec: str = DECODER, trained: int = 0, **changed: Any) -> Request:
    """A conversion of a small model, which was trained for so many steps, into folder/out."""
    data = encoder_texts(folder) if spec is ENCODER else decoder_text(folder)
    compiled, weights = original(spec, folder, data, trained)
    settings: dict[str, Any] = {
        "transfer": options(),
        "tuning": options(learning_rate=1e-3),
        "form": Form(near=4, far_dim=4),
    }
    return Request(compiled, weights, data, folder / "out", **{**settings, **changed})


def numbers(report: Any) -> Mapping[tuple[str, int], Any]:
    """The rows of a report by what they are and their length."""
    return {(each.what, each.tokens): each for each in report.measured}
