"""What a model takes, and random batches of it for measuring without data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from torch import Tensor

    from fastgrad_dsl.documents.plan import Plan

ID_OPERATIONS = {
    "embedding": 1,
    "cross_entropy": 1,
    "linear_cross_entropy": 2,
    "one_hot": 0,
}  # op -> which of its inputs holds ids
DOCUMENT_OPERATIONS = ("documents", "shift", "depthwise")  # their int operand has ids of documents
ENTRY_BYTES = 4  # of the smallest entries that a batch is made of
BOUNDARIES = 3  # of documents in a random sequence, on average


@dataclass(frozen=True)
class Input:
    """One tensor that a model or its objective takes; `ids` are less than `below`; others may name `documents`."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    below: int = 2
    documents: bool = False
    ids: bool = False


def model_inputs(program: Program) -> tuple[Input, ...]:
    """The inputs of the model, in order."""
    graph = flatten(program)
    return tuple(_input(graph, node) for node in graph.inputs)


def target_inputs(program: Program) -> tuple[Input, ...]:
    """What the objective takes beyond the model's results; empty without an objective."""
    if program.objective is None:
        return ()
    graph = flatten(program, program.objective)
    results = len(program[program.main].outputs)
    return tuple(_input(graph, node) for node in graph.inputs[results:])


def random_batch(inputs: Sequence[Input], dims: Mapping[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Gaussian floats, uniform ids, packed documents of random lengths, masks that are true for a random leading part.

    That part is one token at least. Ints that are no ids, one for each sequence, are lengths from 0 to the longest of
    the other dims. Raises TfgError FG426 for a batch larger than the machine's memory.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    batch = []
    shapes = [tuple(dim.evaluate(dims) for dim in tensor.shape) for tensor in inputs]
    check_memory(
        f"a batch of {', '.join(f'{name} = {size}' for name, size in dims.items())}",
        ENTRY_BYTES * sum(map(prod, shapes)),
    )
    for tensor, shape in zip(inputs, shapes, strict=True):
        if tensor.documents:
            begins = torch.rand(shape, generator=generator) < BOUNDARIES / shape[-1]
            batch.append(begins.cumsum(-1))
        elif tensor.dtype == "int" and len(shape) == 1 and not tensor.ids:
            longest = max(
                (size for name, size in dims.items() if name not in tensor.shape[0].names), default=1
            )
            batch.append(torch.randint(longest + 1, shape, generator=generator))
        elif tensor.dtype == "int":
            batch.append(torch.randint(tensor.below, shape, generator=generator))
        elif tensor.dtype == "bool":
            lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
            batch.append(torch.arange(shape[-1]) < lengths)
        else:
            batch.append(torch.randn(shape, generator=generator))
    return tuple(batch)


def check_memory(what: str, size: int) -> None:
    """TfgError FG426 where `what`, of `size` bytes, is larger than the machine's memory.

    The system grants more than it has, and kills who uses it.
    """
    if size > memory_bytes():
        message = f"not enough memory: {what} takes {size:,} bytes, and the machine has {memory_bytes():,}"
        raise TfgError.of("FG426", message)


def weight_entries(program: Program) -> int:
    """How many numbers the weights and buffers of a program have."""
    nodes = [node for node in flatten(program).nodes if node.op in ("weight", "buffer")]
    return sum(prod(dim.evaluate({}) for dim in node.tensor.shape) for node in nodes)


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dims_of(plan: Plan, batch: Sequence[Tensor]) -> dict[str, int]:
    """The run-time dims of a batch of a plan's model, from the inputs in whose shapes they stand alone."""
    described = [*plan.inputs, *plan.targets]
    return {
        dim: size
        for tensor, given in zip(described, batch, strict=False)
        for dim, size in zip(tensor.shape, given.shape, strict=True)
        if dim.isidentifier()
    }


def tokens_of(plan: Plan, batch: Sequence[Tensor]) -> int:
    """How many tokens a batch of a plan's model has: the product of the run-time dims of its largest input."""
    sizes = (
        prod(size for dim, size in zip(tensor.shape, given.shape, strict=True) if not dim.isdigit())
        for tensor, given in zip(plan.inputs, batch, strict=False)
    )
    return max(sizes, default=0)


def _input(graph: Graph, node: Node) -> Input:
    users = graph.users[node.name]
    limits = [limit for user in users if (limit := _id_limit(graph, node, user))]
    documents = not limits and any(_names_documents(node, user) for user in users)
    return Input(
        node.name, node.tensor.dtype, node.tensor.shape, min(limits, default=2), documents, bool(limits)
    )


def _names_documents(node: Node, user: Node) -> bool:
    """Whether `user` reads an int tensor as ids of documents: by a mask on scores, a convolution or an attention."""
    roles = user.get("roles")
    named = user.inputs[3:] if isinstance(roles, tuple) and "documents" in roles else ()
    return node.tensor.dtype == "int" and node.name in (
        user.inputs[1:] if user.op in DOCUMENT_OPERATIONS else named
    )


def _id_limit(graph: Graph, node: Node, user: Node) -> int | None:
    """How many ids `user` has, where it reads `node` as ids."""
    place = ID_OPERATIONS.get(user.op)
    if place is None or user.inputs[place] != node.name:
        return None
    if user.op == "embedding":
        return graph[user.inputs[0]].tensor.shape[0].constant
    if user.op in ("cross_entropy", "linear_cross_entropy"):
        return graph[user.inputs[place - 1]].tensor.shape[-1].constant
    return Dim.of(user["classes"]).constant  # type: ignore[arg-type]  # shapes has checked that it is one
