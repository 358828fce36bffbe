"""conversion.json: what was converted, and how well the model does before and after each phase."""

from __future__ import annotations

from typing import Literal

from fastgrad_dsl.documents.base import Count, Document, Part, Size

What = Literal["loss", "output error", "attention error", "rank correlation"]
FORMAT: Literal["fastgrad-conversion-1"] = "fastgrad-conversion-1"


class Measured(Document, frozen=True):
    """One quantity on held-out text at a length: of the original, and converted before and after each phase.

    what: a loss in nats per token, the relative squared error of outputs or of attentions' results, or the rank
    correlation (Spearman's) of the similarities of texts with the original's. None: not measured yet.
    """

    what: What
    tokens: Size
    original: float | None
    before: float | None = None
    transferred: float | None = None
    tuned: float | None = None


class LeftAttention(Document, frozen=True):
    """An attention that was not converted, and why."""

    path: str
    reason: str


class Conversion(Document, frozen=True):
    """The report of a conversion; tokens are those that each phase trains on."""

    format: Literal["fastgrad-conversion-1"]
    model: str
    near: Size
    far_dim: Size
    converted: tuple[str, ...]
    left: tuple[LeftAttention, ...]
    transfer_tokens: Count
    tuning_tokens: Count
    adapters: Size | None
    seconds: Part
    measured: tuple[Measured, ...]
