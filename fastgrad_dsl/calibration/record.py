"""What a calibration decided of each attention, as plain data: kept in a checkpoint, and put back by a resumed run.

Polynomials are kept by family, degree and range: `fit` gives the same one to the last bit on every machine.
"""

from __future__ import annotations

import dataclasses
from sys import float_info
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, structs

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.ir.shape_errors import ShapeError
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.planning.decision import Decision
from fastgrad_compiler.planning.plan import Assignment
from fastgrad_dsl.documents.base import Document, Family, Source
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled
    from fastgrad_dsl.documents.calibration import Calibration

Number = Annotated[float, Meta(ge=-float_info.max, le=float_info.max)]
Whole = Annotated[int, Meta(ge=0, le=1 << 62)]
FALSE_RECORD = (TfgError, CompilerBug, ShapeError, ArithmeticError, LookupError, TypeError)
"""What a false record leads to."""


class PolynomialRecord(Document, frozen=True):
    """What `fit` makes it from again."""

    family: Family
    degree: Whole
    bound: Number


class RangeRecord(Document, frozen=True):
    """A LogitRange."""

    source: Source
    heads: tuple[Number, ...]
    reasons: tuple[str, ...]
    centre: tuple[tuple[Number, ...], ...] | None
    norms: tuple[Number, ...] | None


class DecisionRecord(Document, frozen=True):
    """A Decision."""

    why: str
    polynomial: PolynomialRecord | None
    near: Whole | None
    break_even: Whole | None
    break_even_gpu: Whole | None
    range: RangeRecord | None
    own_mean: bool
    heads: tuple[Whole, ...] | None
    precision: Literal["float32", "float64"]


PlanRecord = dict[str, Annotated[tuple[DecisionRecord, ...], Meta(min_length=1)]]
"""The decisions of a plan by full path."""


def plan_record(assignment: Assignment) -> PlanRecord:
    """The record of a plan."""
    return {path: tuple(map(_record, decisions)) for path, decisions in assignment.items()}


def _record(decision: Decision) -> DecisionRecord:
    polynomial, range_ = decision.polynomial, decision.range
    fields = dataclasses.asdict(decision) | {
        "polynomial": polynomial and PolynomialRecord(polynomial.family, polynomial.degree, polynomial.bound),
        "range": range_ and RangeRecord(**dataclasses.asdict(range_)),
    }
    return DecisionRecord(**fields)


def with_recorded_plan(compiled: Compiled, record: PlanRecord, calibration: Calibration | None) -> Compiled:
    """`compiled` with the plan of a record. ValueError if it is not a record of a plan of this program."""
    assignment = {path: tuple(map(_decision, decisions)) for path, decisions in record.items()}
    unknown = assignment.keys() - {entry.full_path for entry in attention_table(compiled.recognised)}
    if unknown:
        raise ValueError(f"the model has no attention {min(unknown)}")
    try:
        return compiled.with_decisions(assignment, calibration)
    except FALSE_RECORD as error:
        raise ValueError(f"the model cannot be planned so: {error}") from None


def _decision(record: DecisionRecord) -> Decision:
    polynomial, range_ = record.polynomial, record.range
    fields = structs.asdict(record) | {
        "polynomial": polynomial and fit(polynomial.family, polynomial.degree, polynomial.bound),
        "range": range_ and LogitRange(**structs.asdict(range_)),
    }
    return Decision(**fields)
