"""What a training step holds whose sequences run in pieces, one after the other (`runtime/in_turn.py`).

Of a piece there are its activations, those of the step form; of all pieces what each leaves for later ones, which is
sums of features and the last tokens that are seen. Each piece runs twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, lcm, prod

from fastgrad_compiler.analysis.means import problem
from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.calls import reachable, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program, integer
from fastgrad_compiler.planning.activations import BYTES, Activations
from fastgrad_compiler.runtime.monomials import rank

SUM_BYTES = 8  # sums of features are float64


@dataclass(frozen=True)
class InPieces:
    """Bytes of a step in pieces of so many tokens: what pieces leave, and the most at once."""

    tokens: int
    left: float
    peak: float


def no_pieces(program: Program) -> str | None:
    """Why a training step cannot run in pieces; None where it can."""
    if program.step is None or program.along is None:
        return "the model has no step form, which `fastgrad stages --along` tells the reason of"
    if program.objective is None:
        return "the file has no objective"
    guarded = any(
        Attention.of(node).is_guarded
        for graph in reachable(program.by_name, [program.step])
        for node in graph.nodes
        if node.op in ATTENTION
    )
    if guarded and program.on_violation in ("exact", "clamp"):
        return f"with on_violation = {program.on_violation} a guard may change attentions whose keys are in many pieces"
    found = problem(program[program.objective], program.along)
    return None if found is None else found.message


def lengths(program: Program, sizes: Mapping[str, int]) -> Iterator[int]:
    """Lengths of pieces, the longest first: a power of two times what near fields and dims ask for."""
    assert program.along is not None
    declared = next((dim.multiple_of for dim in program.dims if dim.name == program.along), 1)
    blocks = {integer(node["near"]) for graph in program.graphs for node in graph.nodes if node.get("near")}
    unit = lcm(declared, *blocks)
    length = unit
    while 2 * length < sizes[program.along]:
        length *= 2
    while length >= unit:
        if length < sizes[program.along]:
            yield length
        length //= 2


def in_pieces(program: Program, sizes: Mapping[str, int], tokens: int) -> InPieces:
    """What a step holds in pieces of so many tokens; `no_pieces` is None."""
    assert program.along is not None
    assert program.step is not None
    assert program.objective is not None
    whole = sizes[program.along]
    activations = Activations(program, {**sizes, program.along: tokens})
    model = activations.held(program.step, {})
    loss = activations.held(program.objective, {})
    count = ceil(whole / tokens)
    left = again = work = 0.0
    for graph, node, times in _looking_back(program, program.step, 1):
        each, once = _left(activations, graph, node, whole)
        left += times * (count * each + once)
        again += times * once  # keys of all pieces so far, put one after the other
        work = max(work, 2 * each + _work(activations, graph, node))
    peak = max(model.peak, model.own + loss.peak)
    return InPieces(tokens, left, left + again + peak + work)


def _looking_back(program: Program, name: str, times: int) -> Iterator[tuple[Graph, Node, int]]:
    for node in program[name].nodes:
        if node.get("state"):
            yield program[name], node, times
        for callee, count in runs(node):
            yield from _looking_back(program, callee, times * count)


def _left(activations: Activations, graph: Graph, node: Node, whole: int) -> tuple[float, float]:
    """Bytes that each piece leaves at a node, and that all pieces leave together whatever their length."""
    shapes = [
        [dim.evaluate(activations.sizes) for dim in graph[name].tensor.shape] for name in node.inputs[:3]
    ]
    if node.op not in ATTENTION:
        tokens = integer(node["by"]) if node.op == "shift" else shapes[1][0] - 1
        return BYTES["float"] * tokens * prod(shapes[0]) / shapes[0][-2], 0.0
    attention = Attention.of(node)
    _, k, v = shapes
    heads, d, dv = prod(k[:-2]), k[-1], v[-1]
    row = BYTES["float"] * heads * (d + dv + (d if "near_k" in attention.roles else 0))
    if node.op == "poly_attention":
        assert attention.polynomial is not None
        sums = SUM_BYTES * heads * rank(d, attention.polynomial.degree) * (dv + 1)
        return sums + 2 * (attention.near or 0) * row, 0.0
    if attention.mask.window is not None and not attention.alibi:
        return (attention.mask.window - 1) * row, 0.0
    return 0.0, whole * row


def _work(activations: Activations, graph: Graph, node: Node) -> float:
    """What an attention by sums of features works on: numerators and denominators, and their gradients, in float64."""
    if node.op != "poly_attention":
        return 0.0
    *rows, _ = [dim.evaluate(activations.sizes) for dim in graph[node.inputs[0]].tensor.shape]
    dv = graph[node.inputs[2]].tensor.shape[-1].evaluate(activations.sizes)
    return 3.0 * SUM_BYTES * prod(rows) * (dv + 1)
