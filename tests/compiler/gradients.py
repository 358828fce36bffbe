"""Typed programs from text, inputs for them, and their gradient graphs against autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgrad_compiler.ir.graph import Program, TensorType
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.reference.interpret import run, run_gradient

SIZES = {"b": 2, "n": 5, "m": 4}


def program_of(text: str) -> Program:
    """A typed program; types may be left out behind inputs and weights."""
    program = infer_shapes(parse_program(text))
    verify(program, "shapes")
    return program


def derive(program: Program) -> Program:
    """With its gradient, which is verified and survives its text."""
    derived = derive_gradient(program)
    verify(derived, "backward")
    assert parse_program(print_program(derived)) == derived
    return derived


def sample(types: Sequence[TensorType], *, sizes: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """Floats at least 0.3 from 0, where operations have a kink; ints below 3; bools, never all false."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for type_ in types:
        shape = tuple(dim.evaluate(sizes) for dim in type_.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if type_.dtype == "float":
            tensors.append(noise.sign() * (0.3 + noise.abs()))
        elif type_.dtype == "int":
            tensors.append(torch.randint(3, shape, generator=generator))
        else:
            tensors.append((noise > -0.5).index_fill(-1, torch.tensor([0]), True))
    return tensors


def sample_of(program: Program, graph: str = "main", **sizes: int) -> list[Tensor]:
    """Inputs for a graph, with dims of `SIZES` unless told."""
    return sample([node.tensor for node in program[graph].inputs], sizes={**SIZES, **sizes})


def run_one(program: Program, inputs: Sequence[Tensor], graph: str | None = None) -> Tensor:
    """The single result of a graph without weights."""
    result = run(program, inputs, {}, graph=graph)
    assert isinstance(result, Tensor)
    return result


def assert_gradient(
    program: Program, inputs: list[Tensor], weights: dict[str, Tensor] | None = None, tolerance: float = 1e-10
) -> None:
    """The gradient graph against autograd, for random cotangents; zeros where autograd finds no path."""
    weights = {path: w.detach().requires_grad_() for path, w in (weights or {}).items()}
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    results = run(program, inputs, weights)
    results = results if isinstance(results, tuple) else (results,)
    floats = [result for result in results if result.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in floats]
    wanted = [x for x in inputs if x.is_floating_point()] + list(weights.values())
    expected = torch.autograd.grad(floats, wanted, cotangents, allow_unused=True)
    with torch.no_grad():
        d_inputs, d_weights = run_gradient(program, inputs, weights, cotangents)
    got = [*d_inputs.values(), *(d_weights[path] for path in weights)]
    assert len(got) == len(wanted)
    for x, g, e in zip(wanted, got, expected, strict=True):
        assert g.shape == x.shape
        e = torch.zeros_like(x) if e is None else e
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)
