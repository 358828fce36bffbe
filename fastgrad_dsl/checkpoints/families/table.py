"""All families, by model_type."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families.bert import BERT, ROBERTA, XLM_ROBERTA
from fastgrad_dsl.checkpoints.families.family import Family
from fastgrad_dsl.checkpoints.families.gemma import GEMMA, GEMMA2, GEMMA3
from fastgrad_dsl.checkpoints.families.gpt2 import GPT2
from fastgrad_dsl.checkpoints.families.llama import LLAMA
from fastgrad_dsl.checkpoints.families.mistral import MISTRAL
from fastgrad_dsl.checkpoints.families.olmo2 import OLMO2
from fastgrad_dsl.checkpoints.families.qwen import QWEN2, QWEN3
from fastgrad_dsl.checkpoints.families.vit import VIT

_FAMILIES = (
    GPT2,
    LLAMA,
    QWEN2,
    MISTRAL,
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    QWEN3,
    OLMO2,
    VIT,
    GEMMA,
    GEMMA2,
    GEMMA3,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
