"""(a), of models that run step by step: any split of a text into calls gives the results of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.passes.step import with_step
from fastgrad_compiler.reference.interpret_step import Kept, run_step
from fastgrad_grammar.diagnostics import TfgError

Shape = Sequence[Dim]
Step = Callable[[list[Tensor]], Sequence[Tensor]]


def stepped(program: Program, rng: random.Random) -> Program | None:
    """The program with a step form along one of its dims, None where it has none."""
    names = sorted(
        {n for node in program[program.main].inputs for dim in node.tensor.shape for n in dim.names}
    )
    rng.shuffle(names)
    for name in names:
        try:
            return with_step(program, name)
        except TfgError:
            continue
    return None


def random_split(count: int, rng: random.Random) -> list[int]:
    """Numbers of tokens in calls, at least one each."""
    split: list[int] = []
    while sum(split) < count:
        split.append(min(rng.choice((1, 1, 2, 5, count)), count - sum(split)))
    return split


def by_interpreter(
    program: Program, inputs: Sequence[Tensor], weights: Mapping[str, Tensor], split: Sequence[int]
) -> list[Tensor]:
    """The results of the step form, put together from calls of so many tokens each."""
    kept = Kept()

    def step(parts: list[Tensor]) -> Sequence[Tensor]:
        found = run_step(program, parts, weights, kept, dtype=torch.float64)
        return [found] if isinstance(found, Tensor) else found

    return _together(program, inputs, split, step)


def by_module(
    program: Program, model: Any, inputs: Sequence[Tensor], split: Sequence[int], sizes: Mapping[str, int]
) -> list[Tensor]:
    """The same of a generated module; sizes: of the run-time dims."""
    nodes = program[program.main].inputs
    is_token = [axis_of(program, node.tensor.shape) is not None for node in nodes]
    fixed = [x for x, token in zip(inputs, is_token, strict=True) if not token]
    state = model.start(*fixed, **{name: size for name, size in sizes.items() if name != program.along})

    def step(parts: list[Tensor]) -> Sequence[Tensor]:
        results: list[Tensor]
        *results, _ = model.step(*(x for x, token in zip(parts, is_token, strict=True) if token), state)
        return results

    return _together(program, inputs, split, step)


def axis_of(program: Program, shape: Shape) -> int | None:
    """The axis of the tokens."""
    return next((axis for axis, dim in enumerate(shape) if program.along in dim.names), None)


def _together(program: Program, inputs: Sequence[Tensor], split: Sequence[int], step: Step) -> list[Tensor]:
    main = program[program.main]
    axes = [axis_of(program, node.tensor.shape) for node in main.inputs]
    first, total = 0, sum(split)
    found: list[Sequence[Tensor]] = []
    for count in split:
        parts = [
            x
            if axis is None
            else x.narrow(axis, *(place * x.shape[axis] // total for place in (first, count)))
            for x, axis in zip(inputs, axes, strict=True)
        ]
        found.append(step(parts))
        first += count
    results = [axis_of(program, main[name].tensor.shape) for name in main.outputs]
    pieces = zip(results, zip(*found, strict=True), strict=True)
    return [each[-1] if axis is None else torch.cat(each, axis) for axis, each in pieces]
