"""All families, by model_type."""

from __future__ import annotations

from fastgrad_dsl.checkpoints.families.family import Family
from fastgrad_dsl.checkpoints.families.gpt2 import GPT2

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2,)}
