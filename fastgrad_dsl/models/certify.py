"""What is proved about a model's attentions with its present weights (docs/mathematics.md, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from torch import nn

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.analysis.weights.ranges import weight_ranges
from fastgrad_compiler.approximation.certificates import Certificate, certificate
from fastgrad_compiler.approximation.polynomial import Errors, errors
from fastgrad_compiler.approximation.rounding import USUAL_LENGTH, Rounding, Run, Sizes, rounding
from fastgrad_compiler.attention.table import AttentionEntry, Lengths, attention_table
from fastgrad_compiler.codegen.attention_kernels import kernel_spec
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.targets import BACKENDS

_WIDEST = 700.0  # R beyond which e^-R is not a float, and no polynomial is close to exp


@dataclass(frozen=True, slots=True)
class AttentionCertificate:
    """One attention of a plan against weights.

    Args:
        path: what users are shown.
        full_path: its calls' labels and its own name.
        decision: "exact" or "polynomial".
        planned: R for which the polynomial was chosen; None for an exact attention.
        range: R of each head that is proved now, from the program or from the weights, with the reasons.
        holds: whether the R proved now is at most the planned one; None for an exact attention.
        eps: of the polynomial on the range proved now; None for an exact attention, and if nothing is proved.
        eps_prime: the same of its derivative.
        certificate: the worst cases that follow, with rounding in a float32 run on a CPU at the longest declared
            lengths; infinite where eps >= 1, None where eps is.
    """

    path: str
    full_path: str
    decision: str
    planned: float | None
    range: LogitRange
    holds: bool | None
    eps: float | None = None
    eps_prime: float | None = None
    certificate: Certificate | None = None

    @property
    def bound(self) -> float:
        """R of the whole attention, as proved now; infinite where nothing is."""
        return self.range.bound


def certify(program: Program, model: nn.Module, target: str = "auto") -> tuple[AttentionCertificate, ...]:
    """A certificate of every attention, in program order, from the weights of `model`, which are only read.

    Attentions whose weights are a polynomial of the model's own replace nothing and are left out. Raises
    ValueError if the model lacks a weight of the program.
    """
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    ranges = weight_ranges(program, weights, centring=False)
    entries = (entry for entry in attention_table(program) if not entry.attention.is_own)
    return tuple(_certified(program, entry, ranges[entry.full_path], target) for entry in entries)


def _certified(
    program: Program, entry: AttentionEntry, found: LogitRange, target: str
) -> AttentionCertificate:
    polynomial = entry.attention.polynomial
    if polynomial is None:
        return AttentionCertificate(entry.path, entry.full_path, "exact", None, found, None)
    planned = entry.attention.range.limit
    now = _errors(polynomial.coefficients, found.bound)
    return AttentionCertificate(
        path=entry.path,
        full_path=entry.full_path,
        decision="polynomial",
        planned=planned,
        range=found,
        holds=found.bound <= planned,
        eps=now.eps if now else None,
        eps_prime=now.eps_prime if now else None,
        certificate=certificate(now.eps, now.eps_prime, _rounding(program, entry, found, target))
        if now
        else None,
    )


def _rounding(program: Program, entry: AttentionEntry, found: LogitRange, target: str) -> Rounding:
    """On the range that is proved now."""
    lengths = Lengths(program)
    n, m = (lengths.longest(dim) or USUAL_LENGTH for dim in (entry.queries, entry.keys))
    spec = kernel_spec(program[entry.graph], entry.node)
    return rounding(spec, Sizes(n, m, entry.groups), found.bound, found.reach, BACKENDS[target], Run())


def _errors(coefficients: tuple[float, ...], bound: float) -> Errors | None:
    return errors(coefficients, bound) if isfinite(bound) and bound <= _WIDEST else None
