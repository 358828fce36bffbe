"""The passes `training` and `loss`: what they recognise, what they leave, and that the loss stays what it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler import pipeline
from fastgrad_compiler.analysis.means import problem
from fastgrad_compiler.ir.graph import Graph, Program, loss_form
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.pipeline import Pass
from fastgrad_compiler.reference.interpret import run
from fastgrad_compiler.runtime.pieces import served

FILE = """
use std

dim b
dim n

{blocks}
model m(x: float[b, n, 4]) -> {result} {{
    weight w: float[4, 9] = normal()
    weight c: float[9] = normal()
    weight t: float[] = normal(mean = 2.0)
    {body}
}}

objective loss({arguments}) = {objective}
"""
LOGITS = "float[b, n, 9]"
PLAIN = "cross_entropy(z, targets)"
RECOGNISED = {
    "a product": ("return x @ w", PLAIN),
    "a tied weight": ("weight e: float[9, 4] = normal()\n    return x @ e.T", PLAIN),
    "a weight that is computed": ("return x @ tanh(w)", PLAIN),
    "a bias": ("return x @ w + c", PLAIN),
    "a bias on the left": ("return c + x @ w", PLAIN),
    "two biases": ("return x @ w + c + c", PLAIN),
    "a factor": ("return 0.5 * (x @ w)", PLAIN),
    "a temperature": ("return (x @ w + c) / t", PLAIN),
    "a bias after a factor": ("return (x @ w + c) * t + c", PLAIN),
    "a factor in the objective": ("return x @ w", "cross_entropy(3.0 * z, targets) / 2.0"),
    "the last tokens": ("return x @ w + c", "cross_entropy(z[:, 1:], targets[:, 1:])"),
    "smoothing": ("return x @ w", "cross_entropy(z, targets; smoothing = 0.1)"),
    "ignored targets": ("return x @ w", "cross_entropy(z, targets; ignored = 2)"),
    "both": ("return x @ w", "cross_entropy(z, targets; smoothing = 0.3, ignored = -100)"),
    "a block at the end": ("return std.linear(x; out = 9) as head", PLAIN),
    "a block of a block": ("return last(x) as head", PLAIN),
    "a block that is used elsewhere too": ("return last(std.linear(tanh(x); out = 4)) as head", PLAIN),
    "the same width": ("weight s: float[4, 4] = normal()\n    return x @ s", PLAIN),
}  # fmt: skip
LEFT = {
    "logits with another use": ("return x @ w", "cross_entropy(z, targets) + 1e-3 * mean(z * z)"),
    "logits that are capped": ("return 30.0 * tanh(x @ w)", PLAIN),
    "fewer classes than the width": ("weight s: float[4, 3] = normal()\n    return x @ s", PLAIN),
    "a bias of each token": ("return x @ w + mean(x; axis = -1, keepdim = true) * c", PLAIN),
    "a factor of each token": ("return (x @ w) * mean(x; axis = -1, keepdim = true)", PLAIN),
    "a slice of classes": ("return x @ w", "cross_entropy(z[.., :5], min(targets, 4))"),
    "a number over them": ("return t / (x @ w)", PLAIN),
    "another loss": ("return x @ w", "mse(z, z + 1.0)"),
    "a loss that a block computes": ("return x @ w", "scored(z, targets)"),
}
BLOCKS = """
block last(x: float[b, n, d]) -> float[b, n, 9] { return std.linear(x * x; out = 9) as inner }
block scored(z: float[b, n, c], targets: int[b, n]) -> float[] { return cross_entropy(z, targets) }
"""


def text(body: str, objective: str) -> str:
    classes = next((size for size in (4, 3) if f"weight s: float[4, {size}]" in body), 9)
    result = f"float[b, n, {classes}]"
    arguments = f"z: {result}, targets: int[b, n]"
    return FILE.format(blocks=BLOCKS, result=result, body=body, arguments=arguments, objective=objective)


def operations(program: Program, graph: str) -> set[str]:
    """Of a graph and what it calls."""
    found: set[str] = set()
    for node in program[graph].nodes:
        found |= operations(program, str(node["graph"])) if node.op == "call" else {node.op}
    return found


def values(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize(("body", "objective"), RECOGNISED.values(), ids=RECOGNISED.keys())
def test_the_loss_is_recognised_and_stays_what_it_was(body: str, objective: str) -> None:
    compiled = fg.compile(text(body, objective), target="torch")
    program = compiled.program
    assert program.training == loss_form("m")
    assert "linear_cross_entropy" in operations(program, program.training)
    assert "cross_entropy" not in operations(program, program.training)
    model: Any = compiled.module(seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (2, 5), generator=generator)
    assert compiled.loss is not None
    weights = [p for p in model.parameters() if p.requires_grad]

    expected = compiled.loss(model(x), targets)
    found = model.loss(x, targets)
    torch.testing.assert_close(found, expected)
    interpreted = run(program, [x, targets], values(model), graph=program.training)
    torch.testing.assert_close(interpreted, expected.detach())
    torch.testing.assert_close(compiled.loss.of(model, (x,), (targets,)), found, rtol=0, atol=0)
    pairs = zip(
        torch.autograd.grad(found, weights, allow_unused=True),
        torch.autograd.grad(expected, weights, allow_unused=True),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("body", "objective"), LEFT.values(), ids=LEFT.keys())
def test_what_is_no_such_loss_is_left_as_it_is(body: str, objective: str) -> None:
    compiled = fg.compile(text(body, objective), target="torch")
    assert compiled.program.training is None
    assert not hasattr(compiled.module(), "loss")
    assert compiled.loss is not None
    x, targets = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)
    model = compiled.module()
    assert torch.equal(compiled.loss.of(model, (x,), (targets,)), compiled.loss(model(x), targets))


def test_a_model_that_gives_its_loss_makes_no_logits() -> None:
    source = """
    dim n
    model m(x: float[n, 4], ids: int[n]) -> float[] {
        weight w: float[4, 9] = normal()
        z = x @ w
        return cross_entropy(z, ids; smoothing = 0.1)
    }
    """
    assert "linear_cross_entropy" in operations(fg.compile(source).program, "m")
    kept = source.replace("smoothing = 0.1)", "smoothing = 0.1) + mean(z)")
    assert "linear_cross_entropy" not in operations(fg.compile(kept).program, "m")
    twice = source.replace("smoothing = 0.1)", "smoothing = 0.1) + cross_entropy(x @ w, ids)")
    assert "cross_entropy" not in operations(fg.compile(twice).program, "m")


def test_the_stages_show_it_and_are_read_back() -> None:
    stages = {stage.name: stage.program for stage in fg.compile(text(*RECOGNISED["a bias"])).stages}
    before, after = (print_program(stages[name]) for name in ("training", "loss"))
    assert 'training "m@loss"' in before
    assert "linear_cross_entropy" not in before
    assert "%loss = linear_cross_entropy(%x, %w, %targets, %c)" in after
    for printed in (before, after):
        assert print_program(parse_program(printed)) == printed


def test_a_wrong_rewrite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Translation validation runs the graph of the loss before and after."""
    step = next(each for each in pipeline.PASSES if each.name == "loss")

    def without_bias(graph: Graph) -> Graph:
        nodes = (
            replace(n, inputs=n.inputs[:3]) if n.op == "linear_cross_entropy" else n for n in graph.nodes
        )
        return replace(graph, nodes=tuple(nodes))

    def faulty(program: Program) -> Program:
        return program.with_graphs(map(without_bias, step.run(program).graphs))

    passes = (Pass("loss", faulty) if each is step else each for each in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    with pytest.raises(CompilerBug, match=r"m@loss\.loss"):
        fg.compile(text(*RECOGNISED["a bias"]))


# ---------------------------------------------------------------- what a user meets


def test_targets_are_checked() -> None:
    model: Any = fg.compile(text(*RECOGNISED["a product"])).module()
    with pytest.raises(ValueError, match=r"targets has shape \[2, 4\], expected \[2, 5\]"):
        model.loss(torch.ones(2, 5, 4), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        model.loss(torch.ones(2, 5, 4), torch.full((2, 5), 9))


def test_hooks_and_wrappers_see_a_forward_pass() -> None:
    compiled = fg.compile(text(*RECOGNISED["a block at the end"]))
    model: Any = compiled.module()
    seen: list[int] = []
    x, targets = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)
    assert compiled.loss is not None
    expected = compiled.loss.of(model, (x,), (targets,))
    for watched in (model, model.head):
        handle = watched.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(compiled.loss.of(model, (x,), (targets,)), expected)
        handle.remove()
    assert len(seen) == 2
    wrapped: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled.loss.of(wrapped, (x,), (targets,)), expected)
    compiled.loss.of(model, (x,), (targets,))
    assert len(seen) == 2


def test_options_of_a_loss_are_checked() -> None:
    for options, code in (
        ("smoothing = 1.5", "FG218"),
        ("smoothing = -0.1", "FG218"),
        ("ignored = 1.5", "FG"),
    ):
        with pytest.raises(fg.TfgError, match=code):
            fg.compile(text("return x @ w", f"cross_entropy(z, targets; {options})"))


def test_pieces_of_a_sequence_are_refused() -> None:
    compiled = fg.compile(text(*RECOGNISED["a product"]))
    model: Any = compiled.module()
    pieces: Any = object()
    with served(pieces), pytest.raises(RuntimeError, match=r"in pieces, `compiled\.loss"):
        model.loss(torch.ones(2, 5, 4), torch.zeros(2, 5, dtype=torch.long))


def test_an_objective_that_leaves_targets_out_is_no_mean_over_ranks() -> None:
    for objective, refused in ((PLAIN, False), ("cross_entropy(z, targets; ignored = -100)", True)):
        program = fg.compile(text("return x @ w", objective)).program
        assert program.objective is not None
        assert (problem(program[program.objective], "n") is not None) == refused
