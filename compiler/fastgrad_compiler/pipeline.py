"""The passes in their order, and running them with every stage kept, verified and validated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.passes.fuse import fuse_rows
from fastgrad_compiler.passes.loss import derive_training, fuse_loss
from fastgrad_compiler.passes.lowrank import rewrite_low_rank
from fastgrad_compiler.passes.memory import plan_memory
from fastgrad_compiler.passes.step import derive_step
from fastgrad_compiler.planning.plan import Assignment, plan_attention


@dataclass(frozen=True)
class Pass:
    """A function Program -> Program with the name that stages and the command line show.

    `exact`: the model and the objective mean the same after it, which is put to the test (`validate.py`).
    """

    name: str
    run: Callable[..., Program]
    exact: bool = True


@dataclass(frozen=True)
class Stage:
    """The program as a pass left it, and the seconds that the pass took."""

    name: str
    program: Program
    seconds: float

    def __str__(self) -> str:
        return f"# after {self.name} ({1000 * self.seconds:.1f} ms)\n\n{print_program(self.program)}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the program in colours."""
        from fastgrad_grammar.highlight import ProgramLexer, coloured

        return coloured(str(self), ProgramLexer())


SOURCE = "elaborate"  # the name of the stage that the passes start from

PASSES: tuple[Pass, ...] = (
    Pass("shapes", infer_shapes),
    Pass("bounds", prove_bounds),
    Pass("attention", recognise_attention),
    Pass("plan", plan_attention),
    Pass("backward", derive_gradient),
    Pass("lowrank", rewrite_low_rank, exact=False),
    Pass("step", derive_step),
    Pass("training", derive_training),
    Pass("loss", fuse_loss),
    Pass("fuse", fuse_rows),
    Pass("memory", plan_memory),
)


def run(
    program: Program,
    *,
    until: str | None = None,
    target: str = "auto",
    assignment: Assignment | None = None,
    dims: Mapping[str, int] | None = None,
    validate: bool = True,
) -> tuple[Stage, ...]:
    """All stages, the elaborated program first, up to the pass `until` (None: the last), for a target.

    `assignment` is what calibration decided of attentions (`plan_attention`), `dims` sizes for which memory is planned
    in place of declared limits (`plan_memory`). With `validate`, what an exact pass
    changed is run on small random inputs before and after it.

    Raises TfgError where a pass finds the user's program wanting, CompilerBug where a pass leaves an invalid one, or
    one that computes something else, ValueError for an unknown pass.
    """
    names = (SOURCE, *(p.name for p in PASSES))
    if until is not None and until not in names:
        raise ValueError(f"unknown pass {until}: known are {', '.join(names)}")
    stages = [Stage(SOURCE, program, 0.0)]
    for step in PASSES:
        if stages[-1].name == until:
            break
        started = time.perf_counter()
        given = _arguments(step, target, assignment, dims)
        before, program = program, step.run(program, **given)
        seconds = time.perf_counter() - started
        if program is not before:
            verify(program, after=step.name)
        if validate and step.exact:
            # it loads numpy, which `check` does without
            from fastgrad_compiler.validation.validate import validate as keeps_meaning

            keeps_meaning(before, program, step.name, partial(step.run, **given))
        stages.append(Stage(step.name, program, seconds))
    return tuple(stages)


def _arguments(
    step: Pass, target: str, assignment: Assignment | None, dims: Mapping[str, int] | None
) -> dict[str, object]:
    """What a pass is told beside the program."""
    if step.run is plan_attention:
        return {"target": target, "assignment": assignment}
    if step.run is plan_memory:
        return {"dims": dims}
    return {"target": target} if step.run is fuse_rows else {}


def reproduce(before: str, after: str, name: str) -> int:
    """What a reproducer runs: prints what differs between two programs, and between the first and the pass run anew.

    1 where anything does, else 0.
    """
    from fastgrad_compiler.validation.validate import Difference, compare, told  # loads numpy

    step = next(step for step in PASSES if step.name == name)
    old, status = parse_program(before), 0
    for title, new in (("as it was", parse_program(after)), ("as it is now", step.run(old))):
        found = next((each for each in compare(old, new, step.run) if isinstance(each, Difference)), None)
        status = max(status, int(found is not None))
        print(f"{name} {title}: {'no difference' if found is None else told(found)}")
    return status
