"""Low-rank adapters: W + A B in place of W while a model is tuned, merged into W at the end (arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.api.compiled import owner_of


class LowRank(nn.Module):
    """W + A B of a weight W [m, n], with A [m, r] of random entries and B [r, n] of zeros."""

    def __init__(self, like: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        m, n = like.shape
        self.a = nn.Parameter(torch.randn(m, rank, generator=generator).to(like) / m**0.5)
        self.b = nn.Parameter(torch.zeros(rank, n, dtype=like.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its change."""
        return weight + self.a @ self.b


def adapted(program: Program, rank: int) -> tuple[str, ...]:
    """The paths of the matrices that get adapters: larger than the rank both ways, and no tables of embeddings."""
    graph = flatten(program)
    found = []
    for node in graph.nodes:
        if node.op != "weight" or any(user.op == "embedding" for user in graph.users[node.name]):
            continue
        sizes = [dim.evaluate({}) for dim in node.tensor.shape]
        if len(sizes) == 2 and min(sizes) > rank:
            found.append(str(node["label"]))
    return tuple(found)


def add_adapters(model: nn.Module, paths: tuple[str, ...], rank: int, seed: int) -> None:
    """Give the weights at these paths adapters, in place; they themselves get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        block, name = owner_of(model, path)
        weight = block.get_parameter(name)
        parametrize.register_parametrization(block, name, LowRank(weight.detach(), rank, generator))
        block.parametrizations[name].original.requires_grad_(False)  # type: ignore[index, union-attr]


def merge_adapters(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Make each weight what it is with its adapter, in place, as if there had been none."""
    for path in paths:
        parametrize.remove_parametrizations(*owner_of(model, path), leave_parametrized=True)
