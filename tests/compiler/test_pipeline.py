"""The pipeline: passes in their order, every stage kept, and verified after each pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgrad_compiler import pipeline
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.pipeline import Pass, run

ORDER = [
    "elaborate",
    "shapes",
    "bounds",
    "attention",
    "plan",
    "backward",
    "lowrank",
    "step",
    "training",
    "loss",
    "fuse",
    "memory",
]


def program() -> Program:
    return parse_program(
        "main main\ngraph main {\n    %x = input() : float[4]\n    %y = exp(%x)\n    return %y\n}\n"
    )


def test_stages_are_kept_in_order() -> None:
    stages = run(program())
    assert [stage.name for stage in stages] == ORDER
    assert stages[0].program == program()
    assert stages[1].program["main"]["y"].tensor.shape == program()["main"]["x"].tensor.shape
    assert all(stage.seconds >= 0 for stage in stages)


@pytest.mark.parametrize("until", ORDER)
def test_it_stops_after_a_pass(until: str) -> None:
    assert [stage.name for stage in run(program(), until=until)] == ORDER[: ORDER.index(until) + 1]


def test_an_unknown_pass() -> None:
    with pytest.raises(ValueError, match="unknown pass shape: known are elaborate, shapes"):
        run(program(), until="shape")


@pytest.mark.parametrize("position", range(len(pipeline.PASSES)))
def test_what_any_pass_leaves_is_verified(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that loses the node that the graph returns is told by its name, and no later pass sees the damage."""
    step = pipeline.PASSES[position]

    def careless(given: Program) -> Program:
        done = step.run(given)
        main = done["main"]
        return done.with_graphs(
            [replace(main, nodes=main.nodes[:-1]), *(g for g in done.graphs if g is not main)]
        )

    passes = (*pipeline.PASSES[:position], Pass(step.name, careless), *pipeline.PASSES[position + 1 :])
    monkeypatch.setattr(pipeline, "PASSES", passes)
    with pytest.raises(CompilerBug, match=f"after {step.name}: "):
        run(program())
