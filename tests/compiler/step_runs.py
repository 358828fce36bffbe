"""Runs of a program on a whole text and in steps, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgrad_compiler.ir.flatten import weights
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference import interpret
from fastgrad_compiler.reference.interpret_step import Kept, run_step

DOUBLE = torch.float64


def random_weights(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal weights, small enough that nothing overflows."""
    return {
        path: 0.4
        * torch.randn([dim.constant or 1 for dim in node.tensor.shape], dtype=DOUBLE, generator=generator)
        for path, node in weights(program)
    }


def random_inputs(program: Program, sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
    """Inputs of the model: normal floats, ids below 4, and masks."""
    found = []
    for node in program[program.main].inputs:
        shape = [dim.evaluate(sizes) for dim in node.tensor.shape]
        if node.tensor.dtype == "int":
            found.append(torch.randint(0, 4, shape, generator=generator))
        elif node.tensor.dtype == "bool":
            found.append(torch.rand(shape, generator=generator) > 0.3)
        else:
            found.append(torch.randn(shape, dtype=DOUBLE, generator=generator))
    return found


def whole(program: Program, inputs: Sequence[Tensor], values: Mapping[str, Tensor]) -> list[Tensor]:
    """The results of the model on a whole text."""
    found = interpret.run(program, inputs, values, dtype=DOUBLE)
    return [found] if isinstance(found, Tensor) else list(found)


def in_steps(
    program: Program, inputs: Sequence[Tensor], values: Mapping[str, Tensor], split: Sequence[int]
) -> list[Tensor]:
    """Those of its step form, put together from calls of so many tokens each."""
    nodes, kept, first = program[program.main].inputs, Kept(), 0
    parts: list[list[Tensor]] = []
    for count in split:
        given = [
            part(program, node.tensor.shape, x, first, count) for node, x in zip(nodes, inputs, strict=True)
        ]
        found = run_step(program, given, values, kept, dtype=DOUBLE)
        parts.append([found] if isinstance(found, Tensor) else list(found))
        first += count
    outputs = [program[program.main][name].tensor.shape for name in program[program.main].outputs]
    return [
        torch.cat(pieces, axis) if (axis := axis_of(program, shape)) is not None else pieces[-1]
        for pieces, shape in zip(zip(*parts, strict=True), outputs, strict=True)
    ]


def axis_of(program: Program, shape: Sequence[object]) -> int | None:
    """The axis of the tokens."""
    return next((axis for axis, dim in enumerate(shape) if program.along in getattr(dim, "names", ())), None)


def part(program: Program, shape: Sequence[object], x: Tensor, first: int, count: int) -> Tensor:
    """An input of some tokens; the whole one if it has none."""
    axis = axis_of(program, shape)
    if axis is None:
        return x
    minor = x.shape[axis] // max(1, TOKENS)
    return x.narrow(axis, first * minor, count * minor)


TOKENS = 13
