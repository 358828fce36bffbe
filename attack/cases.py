"""One case of an attack: a program, the sizes of its dims, and inputs and weights drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from attack.meaning import Watch, meaning
from attack.operations import IDS
from fastgrad_compiler.codegen.torch import emit_package
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import weights as weights_of
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.reference.interpret import bind_dims
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_grammar.source import Source

JUMPS = frozenset(["cast", "less", "less_equal", "equal"])
"""Operations whose results jump: two ways to compute a program may land on either side."""

Array = np.ndarray[Any, np.dtype[Any]]
Sizes = Mapping[str, int]


class Finding(Exception):
    """A claim that does not hold: the check's letter, the kind of claim (equal for equal defects), what was seen."""

    def __init__(self, check: str, kind: str, message: str) -> None:
        super().__init__(f"({check}) {kind}: {message}")
        self.check, self.kind, self.message = check, kind, message


class Undecided(Exception):
    """Nothing can be said of a case, and why: a value that is not finite, a jump between two floats."""


@dataclass(frozen=True)
class Case:
    """`seed` decides inputs, weights and whatever a check draws."""

    text: str
    sizes: Sizes
    seed: int

    def random(self, salt: str = "") -> random.Random:
        """A generator of this case."""
        return random.Random(f"{self.seed} {salt}")

    @cached_property
    def compiled(self) -> fg.Compiled:
        """The compiled program, for the target torch."""
        return fg.compile(f"{self.text}\n", target="torch")

    @property
    def elaborated(self) -> Program:
        """The program before any pass."""
        return self.compiled.stages[0].program

    def stage(self, name: str) -> Program:
        """The program after a pass."""
        return next(stage.program for stage in self.compiled.stages if stage.name == name)

    @cached_property
    def served(self) -> Program:
        """The last stage, whose polynomials serve at every length and whose guards only warn."""
        return without_break_even(self.compiled.program, "warn")

    @cached_property
    def point(self) -> Point:
        """Moderate inputs and weights."""
        return draw(self, self.random("point"), moderate)

    def __hash__(self) -> int:
        return hash((self.text, self.seed))


def without_break_even(program: Program, policy: str) -> Program:
    """The program with polynomials that serve at every length, and this policy of guards."""
    graphs = [replace(graph, nodes=tuple(_always(node) for node in graph.nodes)) for graph in program.graphs]
    budget = None if program.budget is None else replace(program.budget, on_violation=policy)
    return replace(program.with_graphs(graphs), budget=budget)


def _always(node: Node) -> Node:
    return node.with_attributes(break_even=1) if node.get("break_even") is not None else node


def built(program: Program, weights: Mapping[str, Array], target: str = "torch", **options: Any) -> nn.Module:
    """The emitted module of a program in float64, with these weights, in evaluation."""
    files = emit_package(program, source="attack", backends=BACKENDS[target], **options)
    model: nn.Module = package_from_texts(files).MODEL(0)
    model = model.double().eval()
    with torch.no_grad():
        for path, held in (*model.named_parameters(), *model.named_buffers()):
            if path in weights:
                held.copy_(torch.as_tensor(weights[path]))
    return model


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Point:
    """Inputs by name and weights by path."""

    inputs: Mapping[str, Array]
    weights: Mapping[str, Array]

    def moved(self, change: Callable[[Array], Array]) -> Point:
        """Every float changed."""
        return Point(_floats(self.inputs, change), _floats(self.weights, change))

    def tensors(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Inputs in order and weights, as leaves with a gradient where they are floats."""
        inputs = {name: torch.tensor(value) for name, value in self.inputs.items()}
        weights = {name: torch.tensor(value) for name, value in self.weights.items()}
        for tensor in (*inputs.values(), *weights.values()):
            tensor.requires_grad_(tensor.is_floating_point())
        return [*inputs.values()], weights


def _floats(values: Mapping[str, Array], change: Callable[[Array], Array]) -> dict[str, Array]:
    return {name: change(value) if value.dtype == np.float64 else value for name, value in values.items()}


Fill = Callable[[random.Random, tuple[int, ...]], Array]


def moderate(rng: random.Random, shape: tuple[int, ...]) -> Array:
    """Normal entries, the scale of each tensor its own."""
    return rng.choice((0.3, 1.0, 1.0, 2.0)) * _normal(rng, shape)


def wild(rng: random.Random, shape: tuple[int, ...]) -> Array:
    """Structured entries of a size between 1e-3 and 1e3."""
    scale = 10.0 ** rng.uniform(-3, 3) if rng.random() < 0.6 else rng.choice((0.1, 1.0, 10.0))
    return scale * _STRUCTURES[rng.randrange(len(_STRUCTURES))](rng, shape)


def _normal(rng: random.Random, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(rng.getrandbits(64)).standard_normal(shape)


def _one_hot_rows(rng: random.Random, shape: tuple[int, ...]) -> Array:
    found = np.zeros(shape)
    if shape and shape[-1]:
        found[..., rng.randrange(shape[-1])] = rng.choice((1.0, -1.0))
    return found


def _equal_rows(rng: random.Random, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(_normal(rng, shape[-1:]), shape).copy()


def _opposite_rows(rng: random.Random, shape: tuple[int, ...]) -> Array:
    found = _equal_rows(rng, shape)
    if len(shape) > 1:
        found[..., rng.randrange(2) :: 2, :] *= -1.0
    return found


_STRUCTURES: tuple[Fill, ...] = (
    _normal,
    _normal,
    lambda rng, shape: np.zeros(shape),
    lambda rng, shape: np.full(shape, rng.choice((1.0, -1.0))),
    _one_hot_rows,
    _equal_rows,
    _opposite_rows,
    lambda rng, shape: np.round(2.0 * _normal(rng, shape)) / 2.0,
    lambda rng, shape: np.sign(_normal(rng, shape)),
)


def draw(case: Case, rng: random.Random, fill: Fill) -> Point:
    """Inputs of the case's sizes and weights of the program's shapes."""
    program = case.elaborated
    inputs = {}
    for node in program[program.main].inputs:
        shape = tuple(dim.evaluate(case.sizes) for dim in node.tensor.shape)
        inputs[node.name] = fill(rng, shape) if node.tensor.dtype == "float" else _discrete(rng, node, shape)
    weights = {
        path: fill(rng, tuple(dim.constant or 0 for dim in node.tensor.shape))
        for path, node in weights_of(program)
    }
    return Point(inputs, weights)


def _discrete(rng: random.Random, node: Node, shape: tuple[int, ...]) -> Array:
    """Masks, documents (runs of ids) and tokens."""
    draws = np.random.default_rng(rng.getrandbits(64))
    if node.tensor.dtype == "bool":
        return draws.random(shape) < rng.choice((0.0, 0.5, 0.8, 0.8, 1.0))
    if rng.random() < 0.5:
        return np.cumsum(draws.random(shape) < 0.3, axis=-1) % IDS
    return draws.integers(0, IDS, shape)


# ---------------------------------------------------------------- runs


def run_meaning(program: Program, point: Point, watch: Watch | None = None) -> list[Array]:
    """What the text means of a point: the oracle's results."""
    return meaning(program, point.inputs, point.weights, watch)


Rule = Callable[[Node, list[Tensor], Env], Tensor]


def by_torch(node: Node, given: list[Tensor], env: Env) -> Tensor:
    """A node's value by the rules of the torch interpreter."""
    found = TORCH[node.op](node, given, env)
    assert isinstance(found, Tensor)
    return found


def walk(
    program: Program,
    flat: Graph,
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    rule: Rule = by_torch,
) -> dict[str, Tensor]:
    """Every node of a flat program by name, by a rule, with gradients."""
    env = Env(bind_dims(program, program[program.main], inputs), torch.float64, torch.device("cpu"))
    values: dict[str, Tensor] = dict(zip((node.name for node in flat.inputs), inputs, strict=True))
    for node in flat.nodes:
        if node.op in ("weight", "buffer"):
            values[node.name] = weights[str(node["label"])]
        elif node.op != "input":
            values[node.name] = rule(node, [values[name] for name in node.inputs], env)
    return values


def run_module(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a module."""
    results = model(*inputs)
    return list(results) if isinstance(results, tuple) else [results]


def sizes_of(text: str, rng: random.Random) -> dict[str, int]:
    """Small sizes of the run-time dims of a program, edges among them."""
    found = {}
    for dim in elaborate(Source("<attack>", text)).dims:
        choices = (1, 1, 2, 3) if dim.name == "b" else (1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 20, 36)
        size = rng.choice(choices) * dim.multiple_of
        found[dim.name] = size if dim.at_most is None else min(size, dim.at_most)
    return found
