"""Whether tensors from outside are a batch of a model, before anything runs on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.models.batches import Input, model_inputs, target_inputs


def batch_problem(program: Program, batch: Sequence[object]) -> str | None:
    """The first thing that is wrong with a batch: the model's inputs, with or without the objective's targets."""
    inputs, targets = model_inputs(program), target_inputs(program)
    if len(batch) not in (len(inputs), len(inputs) + len(targets)):
        return (
            f"the batch has {len(batch)} tensors; expected {len(inputs)} inputs, then {len(targets)} targets"
        )
    described = [*inputs, *targets][: len(batch)]
    tensors = [given for given in batch if isinstance(given, Tensor)]
    if len(tensors) < len(batch):
        return "a batch holds tensors, and nothing else"
    for wanted, given in zip(described, tensors, strict=True):
        problem = _kind(wanted, given) or _ids(wanted, given)
        if problem is not None:
            return problem
    return next(_sizes(program, described, tensors), None)


def is_whole(given: Tensor) -> bool:
    """Whether a tensor holds ints, of any width."""
    return not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)


def _kind(wanted: Input, given: Tensor) -> str | None:
    kind = "int" if is_whole(given) else "float" if given.is_floating_point() else str(given.dtype)[6:]
    if kind == wanted.dtype and given.dim() == len(wanted.shape):
        return None
    shape = ", ".join(map(str, wanted.shape))
    return f"{wanted.name} is {kind}{list(given.shape)}, not {wanted.dtype}[{shape}]"


def _ids(wanted: Input, given: Tensor) -> str | None:
    if not wanted.ids or not given.numel():
        return None
    low, high = int(given.min()), int(given.max())
    if low >= 0 and high < wanted.below:
        return None
    return f"{wanted.name} holds {low if low < 0 else high}: its ids lie from 0 to {wanted.below - 1}"


def _sizes(program: Program, described: Sequence[Input], batch: Sequence[Tensor]) -> Iterator[str]:
    """Sizes that are 0, that contradict each other, or what the file declares of their dims."""
    found: dict[str, int] = {}
    places = [
        (wanted, dim, size)
        for wanted, given in zip(described, batch, strict=True)
        for dim, size in zip(wanted.shape, given.shape, strict=True)
    ]
    for wanted, dim, size in places:
        if size < 1:
            yield f"{wanted.name} has a size of 0"
        if str(dim).isidentifier():
            found.setdefault(str(dim), size)
    for wanted, dim, size in places:
        if dim.names <= found.keys() and dim.evaluate(found) != size:
            yield f"{wanted.name} has the size {size} where {dim} is {dim.evaluate(found)}"
    for info in program.dims:
        size = found.get(info.name, info.multiple_of)
        if size > (info.at_most or size) or size % info.multiple_of:
            most, multiple = info.at_most, info.multiple_of
            yield f"the file declares {info.name} at most {most}, a multiple of {multiple}: it is {size}"
