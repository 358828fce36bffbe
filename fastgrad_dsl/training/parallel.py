"""What a mesh asks of the machine, the model and the batch: checked before anything is started."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastgrad_compiler.analysis.means import problem
from fastgrad_compiler.analysis.widths import divisible_blocks
from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.batches import ENTRY_BYTES, memory_bytes, weight_entries
from fastgrad_dsl.training.loop import Options
from fastgrad_dsl.training.ranks import WORLD_SIZE, Mesh, is_rank
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

PROCESS_BYTES = 200 * 2**20
"""Of a process that has done nothing but import PyTorch, less than measured."""
COPIES = 4  # of all weights: themselves, their gradients and two moments
CHANGING = ("exact", "clamp")  # policies of guards that change what is computed


@dataclass(frozen=True)
class Parallel:
    """The processes that a command line asks for, with a number left out where the others say it.

    restarts: how often all are started again where one is lost; timeout: seconds in which each has to answer.
    recompute: blocks run again in the backward pass.
    """

    nproc: int | None = None
    data: int | None = None
    context: int | None = None
    tensor: int | None = None
    restarts: int = 3
    timeout: float = 600.0
    recompute: bool = False

    def mesh(self) -> Mesh:
        """The mesh. TfgError FG503 where the numbers do not agree with each other, or with what torchrun started.

        FG416 for one process that is to run blocks again.
        """
        mesh = self._mesh()
        if self.recompute and mesh.count == 1:
            message = "--recompute is for several processes"
            raise TfgError.of(
                "FG416", message, "in one, `memory` in the file's budget says what is made again"
            )
        return mesh

    def _mesh(self) -> Mesh:
        count = self.nproc or (int(os.environ[WORLD_SIZE]) if is_rank() else None)
        tensor = self.tensor or 1
        if count is None:
            return Mesh(self.data or 1, self.context or 1, tensor)
        data = self.data or max(1, count // (tensor * (self.context or 1)))
        mesh = Mesh(data, self.context or max(1, count // (tensor * data)), tensor)
        started = int(os.environ[WORLD_SIZE]) if is_rank() else count
        if not mesh.count == count == started:
            size = f"--data {mesh.data} --context {mesh.context}"
            size += f" --tensor {tensor}" if tensor > 1 else ""
            there = count if mesh.count != count else started
            message = f"a mesh of {size} has {mesh.count} processes, and there are {there}"
            raise TfgError.of("FG503", message, f"give --nproc {mesh.count}, or another mesh")
        return mesh


def check_batch(options: Options, mesh: Mesh) -> None:
    """TfgError FG503 where a batch or its sequences have no equal parts for all, FG416 where --accumulate has none."""
    if options.batch % options.accumulate:
        message = f"--accumulate {options.accumulate} does not divide a batch of {options.batch}"
        raise TfgError.of("FG416", message, "give a --batch that it divides")
    if options.batch % (options.accumulate * mesh.data):
        parts = f"{options.accumulate} times {mesh.data}" if options.accumulate > 1 else str(mesh.data)
        message = f"--data {mesh.data}: a batch of {options.batch} sequences has no {parts} equal parts"
        raise TfgError.of("FG503", message, "give a --batch that they divide")
    if mesh.context > options.tokens:
        message = (
            f"--context {mesh.context}: sequences of {options.tokens} tokens are too short for so many pieces"
        )
        raise TfgError.of("FG503", message, "give a longer --seq")


def check_model(compiled: Compiled, options: Options, mesh: Mesh) -> None:
    """TfgError where the model cannot be trained so: FG501, FG502 without a step form, FG503 for the rest."""
    program = compiled.program
    if mesh.context > 1:
        program = compiled.stepped()
        if program.on_violation in CHANGING and not options.exact:
            message = f"--context {mesh.context}: on_violation = {program.on_violation} needs whole sequences"
            raise TfgError.of("FG503", message, "take the policy warn or raise")
    if mesh.tensor > 1:
        _check_parts(compiled, mesh.tensor)
    along = [program.along] if mesh.context > 1 and program.along is not None else []
    if mesh.data > 1 or options.accumulate > 1:
        along += sorted(program[program.main].inputs[0].tensor.shape[0].names)
    for dim in along:
        found = problem(program[program.objective], dim) if program.objective is not None else None
        if found is not None:
            raise TfgError([found])


def _check_parts(compiled: Compiled, tensor: int) -> None:
    """TfgError FG503 where no block can be divided, or the parts of one would not be equal."""
    program = compiled.program
    if program.on_violation == "exact":
        message = f"--tensor {tensor}: on_violation = exact needs all heads of an attention"
        raise TfgError.of("FG503", message, "take the policy warn, clamp or raise")
    blocks = divisible_blocks(program)
    if not blocks:
        message = (
            f"--tensor {tensor}: no block of {program.main} has heads or a hidden width that can be divided"
        )
        raise TfgError.of("FG503", message, "docs/distributed.md says which blocks have")
    uneven = [
        Diagnostic(
            "FG503",
            f"--tensor {tensor} does not divide the {parts.units} heads or hidden entries of {path}",
        )
        for path, parts in blocks.items()
        if parts.units % tensor
    ]
    if uneven:
        raise TfgError(uneven)


def check_machine(program: Program, mesh: Mesh) -> None:
    """TfgError FG503 where so many processes, or the weights with what training keeps, are more than the memory."""
    size = mesh.count * PROCESS_BYTES + COPIES * ENTRY_BYTES * weight_entries(program)
    if size > memory_bytes():
        message = (
            f"{mesh.count} processes take {size:,} bytes at least, and the machine has {memory_bytes():,}"
        )
        raise TfgError.of("FG503", message, "give a smaller mesh")
