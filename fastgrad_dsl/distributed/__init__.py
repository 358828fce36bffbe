"""Sequences that are too long for one machine, in pieces on many (docs/distributed.md)."""

from __future__ import annotations

from fastgrad_dsl.distributed.context import context_parallel as context_parallel
from fastgrad_dsl.distributed.context import mean_over_tokens as mean_over_tokens
from fastgrad_dsl.distributed.context import shard_sequence as shard_sequence
from fastgrad_dsl.distributed.sharding import shard_model as shard_model

__all__ = ["context_parallel", "mean_over_tokens", "shard_model", "shard_sequence"]
