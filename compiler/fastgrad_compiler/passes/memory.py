"""The pass `memory`: calls whose values are made again in the backward pass, so that a step keeps the budget's bytes.

A call that is made again has the attribute `recompute`: True, or in how many first iterations of the repeat around it.
Where the whole sequence does not fit in any such way, the program has the length of pieces that do (`Memory.piece`).
What the program computes is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, floor, log10

from fastgrad_compiler.ir.graph import LOSS, Graph, Memory, Node, Program
from fastgrad_compiler.planning.activations import ALWAYS, Decisions
from fastgrad_compiler.planning.memory import Search, in_bytes
from fastgrad_compiler.planning.pieces import in_pieces, lengths, no_pieces
from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest


def plan_memory(program: Program, dims: Mapping[str, int] | None = None) -> Program:
    """The program with the cheapest plan that fits; as it is where its budget does not limit memory.

    dims: sizes of run-time dims, in place of their declared limits. Raises TfgError FG313 where a size is not known,
    FG314 where nothing fits, FG416 for sizes that the file does not allow.
    """
    budget = program.budget
    if budget is None or budget.memory is None:
        return program
    sizes = sizes_of(program, dims or {})
    search, limit = Search(program, sizes), budget.memory
    plan = Memory(tuple(sorted(sizes.items())))
    options = search.options()
    chosen = next((each for each in options if each.held.peak <= limit), None)
    if chosen is not None:
        graphs = tuple(_marked(graph, chosen.decisions) for graph in program.graphs)
        return replace(program, graphs=graphs, memory=plan)
    least, reason = options[-1].held.peak, no_pieces(program)
    if reason is None:
        for tokens in lengths(program, sizes):
            found = in_pieces(program, sizes, tokens)
            if found.peak <= limit:
                return replace(program, memory=replace(plan, piece=tokens))
            least = min(least, found.peak)
    raise TfgError([_refusal(program, sizes, least, reason)])


def _marked(graph: Graph, decisions: Decisions) -> Graph:
    """The graph with the decisions on its calls; one that gives results has those of the one that gives the loss."""
    own = {
        node: times
        for (name, node), times in decisions.items()
        if graph.name in (name, name.removesuffix(LOSS))
    }
    if not own:
        return graph
    return replace(graph, nodes=tuple(_with(node, own.get(node.name)) for node in graph.nodes))


def _with(node: Node, times: int | None) -> Node:
    return (
        node
        if times is None or node.op != "call"
        else node.with_attributes(recompute=True if times >= ALWAYS else times)
    )


# ---------------------------------------------------------------- sizes


def sizes_of(program: Program, given: Mapping[str, int]) -> dict[str, int]:
    """A size of each run-time dim: as given, else its declared limit, else 1 for a batch.

    Raises TfgError FG313 for another dim without a limit, FG416 for sizes that the file does not allow.
    """
    names = [dim.name for dim in program.dims]
    for name in given:
        if name not in names:
            help_ = nearest(name, names)
            raise TfgError.of("FG416", f"model {program.name} has no dim {name}", *([help_] if help_ else []))
    sizes: dict[str, int] = {}
    for dim in program.dims:
        size = given.get(dim.name, dim.at_most)
        if size is None and is_batch(program, dim.name):
            size = dim.multiple_of
        if size is None:
            message = f"memory is limited, but nothing says how large {dim.name} gets"
            help_ = f"declare a limit, dim {dim.name} <= 16384, or give a size, --dim {dim.name}=16384"
            raise TfgError([Diagnostic("FG313", message, dim.span, "no limit", help=(help_,))])
        if size < 1 or size % dim.multiple_of or (dim.at_most is not None and size > dim.at_most):
            wanted = f"at least 1, at most {dim.at_most}" if dim.at_most is not None else "at least 1"
            multiple = f", a multiple of {dim.multiple_of}" if dim.multiple_of > 1 else ""
            raise TfgError.of("FG416", f"dim {dim.name} is {size}, but the file declares {wanted}{multiple}")
        sizes[dim.name] = size
    return sizes


def is_batch(program: Program, name: str) -> bool:
    """Whether a dim counts samples: it is the first axis of inputs of several axes, and no other axis."""
    shapes = [node.tensor.shape for node in program[program.main].inputs]
    first = any(len(shape) > 1 and name in shape[0].names for shape in shapes)
    return first and not any(name in dim.names for shape in shapes for dim in shape[1:])


# ---------------------------------------------------------------- refusal


def _refusal(program: Program, sizes: Mapping[str, int], least: float, reason: str | None) -> Diagnostic:
    budget = program.budget
    assert budget is not None
    at = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    message = (
        f"a training step of {program.name} at {at} takes {in_bytes(least)} at least (an estimate), over "
    )
    help_ = [f"a larger budget: memory <= {_rounded_up(least):.2g}"]
    longest = max(
        (name for name in sizes if not is_batch(program, name)), key=lambda name: sizes[name], default=None
    )
    if longest is not None:
        help_.append(
            f"fewer tokens: a lower limit of dim {longest}, or --dim {longest}={max(sizes[longest] // 2, 1)}"
        )
    if reason is not None:
        help_.append(f"the sequence cannot run in pieces, which would hold less: {reason}")
    return Diagnostic(
        "FG314", message + in_bytes(budget.memory or 0.0), budget.span, "the budget", help=tuple(help_)
    )


def _rounded_up(value: float) -> float:
    """To two digits that are not below it."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit) * unit
