"""What a program's plan of memory is expected to cost, and the other plans that there were, as a document."""

from __future__ import annotations

from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.memory import Search, recomputed
from fastgrad_compiler.planning.pieces import in_pieces, lengths, no_pieces
from fastgrad_dsl.documents.plan import MemoryPoint, StepMemory


def memory_document(program: Program) -> StepMemory | None:
    """The plan of memory; None where the budget does not limit it."""
    if program.memory is None or program.budget is None or program.budget.memory is None:
        return None
    sizes, piece, limit = dict(program.memory.sizes), program.memory.piece, program.budget.memory
    search = Search(program, sizes)
    decided = recomputed(program)
    points = [
        MemoryPoint(bytes=option.held.peak, time=search.time(option.held.again), piece=None, chosen=False)
        for option in search.options()
    ]
    twice = search.time(search.forward)
    if no_pieces(program) is None:
        found = [in_pieces(program, sizes, tokens) for tokens in lengths(program, sizes)]
        points += [
            MemoryPoint(bytes=each.peak, time=twice, piece=each.tokens, chosen=False) for each in found
        ]
    if piece is None:
        held = search.held(decided)
        peak, again = held.peak, held.again
        gap = search.time(again) / search.time(search.least_again(limit)) - 1.0
    else:
        peak, again, gap = in_pieces(program, sizes, piece).peak, search.forward, None
    time = search.time(again)
    rest = [point for point in points if (point.bytes, point.time) != (peak, time)]
    chosen = MemoryPoint(bytes=peak, time=time, piece=piece, chosen=True)
    again_calls = {f"{graph}.{node}": times for (graph, node), times in decided.items()}
    return StepMemory(
        limit=limit, sizes=sizes, piece=piece, bytes=peak, unlimited=search.held({}).peak, time=time, gap=gap,
        recomputed=again_calls, points=tuple(sorted([*rest, chosen], key=lambda point: (point.time, point.bytes))),
    )  # fmt: skip
