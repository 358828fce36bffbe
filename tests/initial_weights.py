"""The weights with which a module starts, found without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastgrad_compiler.ir.flatten import weights
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.runtime.initialise import INITIALISERS


def initial_weights(program: Program, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every weight and buffer by path, as its initialiser gives it.

    One generator, seeded once, serves them in the order of `torch.nn.Module.named_parameters`: what a
    module holds itself, then its children. Values are drawn in float32 and converted: every dtype starts
    from the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = dict(weights(program))
    kinds = {"float": dtype or torch.get_default_dtype(), "int": torch.int64, "bool": torch.bool}
    result: dict[str, Tensor] = {}
    for path in _parameter_order(nodes):
        node = nodes[path]
        kind, *arguments = node["init"] if isinstance(node["init"], tuple) else (node["init"],)
        tensor = torch.empty(tuple(dim.evaluate({}) for dim in node.tensor.shape))
        INITIALISERS[str(kind)](tensor, *arguments, generator=generator)
        result[path] = tensor.to(kinds[node.tensor.dtype])
    return result


def _parameter_order(paths: Mapping[str, Node]) -> Iterator[str]:
    """Paths as a tree: leaves of a level in order of appearance, then its branches."""
    branches: dict[str, dict[str, Node]] = {}
    for path, node in paths.items():
        head, dot, rest = path.partition(".")
        if dot:
            branches.setdefault(head, {})[rest] = node
        else:
            yield path
    for head, inner in branches.items():
        yield from (f"{head}.{rest}" for rest in _parameter_order(inner))
