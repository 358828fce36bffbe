"""Bounds are of what runs after the plan: inputs and weights that break every word given move no proved bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.pipeline import run as compiled
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.source import Source
from tests.compiler.captured import captured_logits

N = 12
ASSERTED = "assume_bound(x @ x.T; bound = 0.5)"
NEXT = "return softmax((unit(x) @ unit(x).T) * {gain}) @ x"
MODELS = {
    # what follows rests on means of values that are at least 0, at most 1, of rows within the unit ball
    "at least 0": f"y = softmax({ASSERTED}) @ sigmoid(x)\n    " + NEXT.format(gain="exp(0.0 - y[.., 0:1])"),
    "at most 1": f"y = softmax(causal({ASSERTED})) @ tanh(x)\n    " + NEXT.format(gain="exp(y[.., 0:1])"),
    "rows": f"y = softmax({ASSERTED}) @ unit(x)\n    return softmax(y @ unit(x).T) @ x",
    "spelled out": f"e = exp({ASSERTED})\n    y = (e / sum(e, axis = -1, keepdim = true)) @ sigmoid(x)\n    "
    + NEXT.format(gain="exp(0.0 - y[.., 0:1])"),
    "near": f"y = softmax(near_far(x @ x.T, {ASSERTED}; 2)) @ unit(x)\n    return softmax(y @ unit(x).T) @ x",
    "transposed": f"y = (unit(x).T @ softmax({ASSERTED}).T).T\n    return softmax(y @ unit(x).T) @ x",
    # of a length that is known, the entries of weights and the norms of their rows have bounds of their own
    "columns": "w = unit(x.T).T\n    e = exp(assume_bound(x @ x.T; bound = 0.1))\n    "
    "y = (e / sum(e, axis = -1, keepdim = true)) @ w\n    " + NEXT.format(gain="exp(y[.., 0:1])"),
    "a repeat": f"repeat i in 3 {{\n        x = softmax({ASSERTED}) @ sigmoid(x)\n        "
    "x = softmax((unit(x) @ unit(x).T) * exp(0.0 - x[.., 0:1])) @ x\n    }\n    return x",
}


def stages(body: str, rule: str = 'at "*" degree = 2') -> dict[str, Program]:
    text = f"model m(x: float[2, {N}, 4]) -> float[2, {N}, 4] {{\n    {body}\n}}\nbudget {{\n    {rule}\n}}\n"
    return {
        stage.name: stage.program for stage in compiled(elaborate(Source("m.tfg", text)), until="lowrank")
    }


def flat(program: Program) -> Program:
    """The forward pass as one graph that gives every float node of which something is proved."""
    graph = flatten(program)
    watched = tuple(
        node.name
        for node in graph.nodes
        if node.op != "input"
        and node.bound is not None
        and not node.bound.asserted
        and node.tensor.dtype == "float"
    )
    return replace(
        program, graphs=(replace(graph, outputs=watched),), main=graph.name, objective=None, gradient=None
    )


def inputs() -> list[Tensor]:
    """Of several sizes; rows that are alike, opposite, or far from each other."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in (0.1, 1.0, 1.7, 4.0, 30.0):
        x = torch.randn(2, N, 4, generator=generator, dtype=torch.float64)
        sign = torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0).double()[:, None]
        found += [size * x, size * x.abs(), size * sign * (1 + 0.1 * x)]
    return found


@pytest.mark.parametrize("body", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("degree", [2, 4])
def test_no_proved_bound_is_left(body: str, degree: int) -> None:
    found = stages(body, f'at "*" degree = {degree}')
    served = found["lowrank"]
    entries = attention_table(served)
    assert {entry.node["asserted"] for entry in entries} == {True, False}
    program = flat(served)
    graph = program.graphs[0]
    for x in inputs():
        values = run(program, {"x": x}, {}, dtype=torch.float64)
        for name, value in zip(
            graph.outputs, values if isinstance(values, tuple) else (values,), strict=True
        ):
            bound = graph[name].bound
            assert bound is not None
            assert value.min() >= bound.low - 1e-9, name
            assert value.max() <= bound.high + 1e-9, name
            if value.ndim:
                assert value.norm(dim=-1).max() <= bound.norm + 1e-9, name
        logits = captured_logits(served, {"x": x}, {})
        for entry in entries:
            if not entry.node["asserted"]:
                assert logits[entry.full_path].abs().max() <= float(str(entry.node["bound"])) + 1e-9, (
                    entry.path
                )


@pytest.mark.parametrize(
    ("model", "bound"), [("at least 0", 1.0), ("rows", 1.0), ("near", 1.0), ("transposed", 1.0)]
)
def test_a_mean_of_values_is_no_longer_than_the_longest(model: str, bound: float) -> None:
    _, second = attention_table(stages(MODELS[model])["plan"])
    assert second.node["asserted"] is False
    assert bound <= float(str(second.node["bound"])) <= bound * (1 + 1e-12)  # rounded outwards


def refused(body: str, rule: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(TfgError) as caught:
        stages(body, rule)
    return caught.value.diagnostics


@pytest.mark.parametrize("degree", [1, 3])
def test_odd_degree_on_an_asserted_range_is_refused(degree: int) -> None:
    """Beyond R its weights are negative: the mean of values from [0, 1] was -3.6, and the next R 36 for 1."""
    (found,) = refused(MODELS["at least 0"], f'at "*" degree = {degree}')
    assert found.code == "FG304"
    assert "and |s| <= 0.5 is asserted, not proved" in found.message
    assert any(line.startswith("degree ") and "is positive there" in line for line in found.help)
    assert not any("degree 3" in line or "degree 5" in line for line in found.help)


def test_odd_degree_on_a_proved_range_serves() -> None:
    found = stages(NEXT.format(gain="0.5"), 'at "*" degree = 3')
    (entry,) = attention_table(found["plan"])
    assert (entry.node["degree"], entry.node["asserted"]) == (3, False)
