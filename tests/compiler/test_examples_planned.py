"""Every example's attentions are found, bounded and decided, and mean after recognition what they meant before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.attention.table import is_own
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.plan import attention_table, plan_attention
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.read import read_source
from tests.initial_weights import initial_weights

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.tfg"))


def bounded(path: Path) -> Program:
    """Two layers; an image of 16 patches, where the example has thousands."""
    params = {"depth": 2, "height": 32, "width": 32, "patch": 8} if path.stem == "vit" else {"depth": 2}
    return prove_bounds(elaborate(read_source(str(path)), params=params))


def inputs_of(program: Program) -> dict[str, torch.Tensor]:
    """Small random inputs; a mask hides the last token of the second sequence."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for node in program[program.main].inputs:
        sizes = {name: 2 if name == "b" else 6 for dim in node.tensor.shape for name in dim.names}
        shape = [dim.evaluate(sizes) for dim in node.tensor.shape]
        if node.tensor.dtype == "bool":
            values[node.name] = torch.arange(shape[-1]) < torch.tensor([[shape[-1]], [shape[-1] - 1]])
        elif node.tensor.dtype == "int":
            values[node.name] = torch.randint(0, 9, shape, generator=generator)
        else:
            values[node.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_recognition_keeps_the_meaning_of_an_example(path: Path) -> None:
    before = bounded(path)
    after = recognise_attention(before)
    assert not {"softmax", "causal", "near_far", "normalize_rows"} & {
        node.op for graph in after.graphs for node in graph.nodes
    }
    weights = initial_weights(before, seed=0, dtype=torch.float64)
    assert initial_weights(after).keys() == weights.keys()
    inputs = inputs_of(before)
    torch.testing.assert_close(
        run(after, inputs, weights), run(before, inputs, weights), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_attentions_of_an_example_are_bounded_and_decided(path: Path) -> None:
    entries = attention_table(plan_attention(recognise_attention(bounded(path))))
    assert entries
    for entry in entries:
        assert entry.node["why"]
        assert entry.node.get("decision") in (None if is_own(entry.node) else "polynomial", "exact")
        if path.stem not in (
            "based",
            "gpt",
        ):  # the model's own polynomials and free logits, which no budget limits
            assert isinstance(entry.node["bound"], float)
            assert entry.node["proof"]
        assert entry.place
