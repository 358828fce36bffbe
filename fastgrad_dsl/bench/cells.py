"""One measured, or extrapolated, time of one attention at one length, and its entry in the JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fastgrad_dsl.bench.contenders import Contender
from fastgrad_dsl.bench.timing import Timing, quadratic


@dataclass(frozen=True)
class Cell:
    """`source`: the length from which the time was extrapolated by n^2, None where it was measured."""

    contender: Contender
    n: int
    timing: Timing
    source: int | None = None

    @property
    def degree(self) -> int | None:
        """None for exact attention."""
        return self.contender.degree

    @property
    def measured(self) -> bool:
        """Whether it was measured at this length."""
        return self.source is None

    def document(self, peak: float | None) -> dict[str, object]:
        """Its entry in the JSON (docs/benchmark.md); `peak` in flops a second gives the shares of it."""
        work = self.contender.flops(self.n)
        shares: list[float | None] = [None, None]
        if peak is not None and self.measured:
            shares = [work.forward / self.timing.forward / peak, work.total / self.timing.total / peak]
        return {
            **asdict(self.contender),
            "name": self.contender.name,
            "rank": self.contender.rank,
            "chunk": self.contender.chunk,
            "n": self.n,
            **self.timing.entry(),
            "measured": self.measured,
            "extrapolated_from": self.source,
            "flops_forward": work.forward,
            "flops_total": work.total,
            "peak_share_forward": shares[0],
            "peak_share_total": shares[1],
        }


def extrapolated(cell: Cell, n: int) -> Cell:
    """That of exact attention at another length, by n^2 from a measured one."""
    return Cell(cell.contender, n, quadratic(cell.timing, cell.n, n), cell.n)
