"""How often a guard's sample misses a call that is beyond its range: the table of docs/guards.md.

    python -m benchmarks.guard_misses [--trials 50]

Each call has two heads of width 32 and is beyond R in one pair at least. That a miss is counted as `unsettled` is
checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.runtime.guard import LOGGER, Guard
from fastgrad_compiler.runtime.logit_range import Pairs, rows_of

WIDTH, HEADS = 32, 2
SCALE = WIDTH**-0.5
LENGTHS = (512, 2048, 4096)
MASKS = {
    "none": Pairs(SCALE, False, 0),
    "causal": Pairs(SCALE, True, 0),
    "causal, near 64": Pairs(SCALE, True, 64),
}
REPEATED = 32  # times that a call is made, with another sample each time
BLOCK = 512  # queries whose logits are computed at a time, to know the truth


@dataclass(frozen=True)
class Call:
    """q, k [1, HEADS, n, WIDTH] and R, which one |s| at least is beyond."""

    q: Tensor
    k: Tensor
    bound: float


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    """[1, HEADS, n, WIDTH]."""
    return torch.randn(1, HEADS, n, WIDTH, generator=generator)


def student(n: int, generator: torch.Generator, freedom: int = 3) -> Tensor:
    """The same with lengths of heavy tails: a multivariate Student t distribution."""
    squares = torch.randn(freedom, 1, HEADS, n, 1, generator=generator).square().mean(0)
    return gaussian(n, generator) / squares.sqrt()


def largest(q: Tensor, k: Tensor, pairs: Pairs) -> float:
    """The largest |s| that the polynomial serves."""
    best, keys = 0.0, torch.arange(k.shape[2])
    for first in range(0, q.shape[2], BLOCK):
        queries = torch.arange(first, min(first + BLOCK, q.shape[2]))[:, None]
        sizes = (pairs.scale * q[0, :, first : first + BLOCK] @ k[0].mT).abs()
        if pairs.causal:
            sizes.masked_fill_(keys > queries, 0.0)
        if pairs.near:
            sizes.masked_fill_((queries // pairs.near - keys // pairs.near).abs() <= 1, 0.0)
        best = max(best, sizes.max().item())
    return best


def tails(q: Tensor, k: Tensor, pairs: Pairs, generator: torch.Generator) -> Call:
    """The largest logit is 1.1 R."""
    return Call(q, k, largest(q, k, pairs) / 1.1)


def planted(q: Tensor, k: Tensor, pairs: Pairs, generator: torch.Generator, *, both: bool) -> Call:
    """R is 1.25 times the largest logit, and one pair more is at 1.5 R: its query and key point the same way.

    both: they are equally long, as short as two can be. Else the query keeps its length.
    """
    bound = 1.25 * largest(q, k, pairs)
    query, key = _pair(q.shape[2], pairs, generator)
    product = 1.5 * bound / abs(pairs.scale)
    direction = k[0, 1, key] / k[0, 1, key].norm()
    length = product**0.5 if both else float(q[0, 1, query].norm())
    q[0, 1, query], k[0, 1, key] = length * direction, product / length * direction
    return Call(q, k, bound)


def hidden(q: Tensor, k: Tensor, pairs: Pairs, generator: torch.Generator) -> Call:
    """All are equally long, and one query points the way of a key. R is between its logit and all others."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    others = largest(q, k, pairs)
    query, key = _pair(q.shape[2], pairs, generator)
    q[0, 1, query] = k[0, 1, key]
    return Call(q, k, (others + abs(pairs.scale)) / 2)


def _pair(n: int, pairs: Pairs, generator: torch.Generator) -> tuple[int, int]:
    """The places of a query and of a key that it meets by the polynomial, with every mask."""
    query = int(torch.randint(n // 2, n, (), generator=generator))
    return query, int(torch.randint(0, query - 2 * max(pairs.near, 1), (), generator=generator))


Case = Callable[[int, Pairs, torch.Generator], Call]
CASES: dict[str, Case] = {
    "keys Student t": lambda n, p, g: tails(gaussian(n, g), student(n, g), p, g),
    "queries and keys Student t": lambda n, p, g: tails(student(n, g), student(n, g), p, g),
    "one pair, key longer": lambda n, p, g: planted(gaussian(n, g), gaussian(n, g), p, g, both=False),
    "one pair, both longer": lambda n, p, g: planted(gaussian(n, g), gaussian(n, g), p, g, both=True),
    "one pair among Student t": lambda n, p, g: planted(student(n, g), student(n, g), p, g, both=True),
    "one pair, all equally long": lambda n, p, g: hidden(gaussian(n, g), gaussian(n, g), p, g),
}


def misses(case: Case, n: int, pairs: Pairs, trials: int) -> tuple[float, float]:
    """Shares of calls that are missed when they are made once, and REPEATED times."""
    once = often = 0
    for trial in range(trials):
        call = case(n, pairs, torch.Generator().manual_seed(trial))
        guard = Guard(bound=call.bound, source="data")
        rows = rows_of(call.q, call.k, None, None)
        for turn in range(REPEATED):
            guard.allows(rows, pairs)
            status = guard.status()
            assert status["violations"] or status["unsettled"] == turn + 1, "a miss that is not told"
            if status["violations"]:
                break
            once += turn == 0
        else:
            often += 1
    return once / trials, often / trials


def table(trials: int) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| calls, {trials} each | mask | " + " | ".join(f"n = {n:,}" for n in LENGTHS) + " |"
    yield "| --- | --- |" + " --- |" * len(LENGTHS)
    for name, case in CASES.items():
        for mask, pairs in MASKS.items():
            shares = [misses(case, n, pairs, trials) for n in LENGTHS]
            cells = [f"{100 * once:.0f} %, {100 * often:.0f} %" for once, often in shares]
            yield f"| {name} | {mask} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="calls of each kind")
    LOGGER.disabled = True
    for line in table(parser.parse_args().trials):
        print(line, flush=True)


if __name__ == "__main__":
    main()
