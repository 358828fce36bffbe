"""The logits of a run, captured from the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from fastgrad_compiler.attention.table import attention_table, is_own
from fastgrad_compiler.attention.value import ATTENTION
from fastgrad_compiler.ir.graph import Node, Program, number
from fastgrad_compiler.reference import operations_torch
from fastgrad_compiler.reference.interpret import run
from fastgrad_compiler.reference.torch_env import Env, Rule


def captured_logits(
    program: Program,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The logits [batch, heads, n, m] of every attention by path, masks left out, less the plan's centre; float64.

    They carry gradients to `inputs` and `weights`.
    """
    found: list[Tensor] = []

    def watched(rule: Rule) -> Rule:
        def watch(node: Node, tensors: list[Tensor], env: Env) -> Tensor | tuple[Tensor, ...]:
            if not is_own(node):
                found.append(_logits(node, tensors))
            return rule(node, tensors, env)

        return watch

    rules = {op: watched(operations_torch.TORCH[op]) for op in ATTENTION}
    with patch.dict(operations_torch.TORCH, rules):
        run(program, inputs, weights, dtype=torch.float64)
    paths = [entry.full_path for entry in attention_table(program) if not is_own(entry.node)]
    return dict(zip(paths, found, strict=True))


def _logits(node: Node, tensors: list[Tensor]) -> Tensor:
    q, k = tensors[:2]
    centre = node.get("centre")
    if centre is not None:
        k = k - torch.tensor(centre, dtype=torch.float64)[:, None, :]
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    return number(node["scale"]) * (q @ k.mT)
