"""What a calibration decided of each attention, as plain data: kept in a checkpoint, and put back by a resumed run.

Polynomials are kept by family, degree and range: `fit` gives the same one to the last bit on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from sys import float_info
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastgrad_compiler.analysis.ranges import SOURCES, LogitRange
from fastgrad_compiler.approximation.polynomial import FAMILIES, fit
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.ir.shape_errors import ShapeError
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning.decision import PRECISIONS, Decision
from fastgrad_compiler.planning.plan import Assignment
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled
    from fastgrad_dsl.documents.calibration import Calibration

LARGEST = float_info.max
FALSE_RECORD = (TfgError, CompilerBug, ShapeError, ArithmeticError, LookupError, TypeError)
"""What a false record leads to."""
_Item = TypeVar("_Item")
_Read = Callable[[Any], _Item]


def plan_record(assignment: Assignment) -> dict[str, list[dict[str, Any]]]:
    """The decisions of a plan by full path; strict JSON can hold them."""
    return {path: [_decision_record(each) for each in decisions] for path, decisions in assignment.items()}


def _decision_record(decision: Decision) -> dict[str, Any]:
    polynomial = decision.polynomial
    return {
        **asdict(replace(decision, polynomial=None)),
        "polynomial": polynomial
        and {"family": polynomial.family, "degree": polynomial.degree, "bound": polynomial.bound},
    }


def with_recorded_plan(
    compiled: Compiled, record: Mapping[str, Any], calibration: Calibration | None
) -> Compiled:
    """`compiled` with the plan of a record. ValueError where it is no record of a plan of this program."""
    assignment = read_plan(record)
    attentions = next(stage.program for stage in compiled.stages if stage.name == "attention")
    unknown = assignment.keys() - {entry.full_path for entry in attention_table(attentions)}
    if unknown:
        raise ValueError(f"the model has no attention {min(unknown)}")
    start = compiled.stages[0].program
    try:
        stages = run(start, target=compiled.target, assignment=assignment, validate=compiled.validate)
    except FALSE_RECORD as error:
        raise ValueError(f"the model cannot be planned so: {error}") from None
    return replace(compiled, stages=stages, assignment=assignment, calibration=calibration)


def read_plan(record: object) -> dict[str, tuple[Decision, ...]]:
    """The decisions of a record. ValueError where it is none."""
    found = {}
    for path, decisions in _mapping(record).items():
        found[path] = tuple(_decision(each) for each in _list(_mapping)(decisions))
        if not found[path]:
            raise ValueError(f"no decision for {path}")
    return found


def _decision(record: Mapping[str, Any]) -> Decision:
    polynomial, range_ = (_optional(_mapping)(record.get(name)) for name in ("polynomial", "range"))
    return Decision(
        _text(record.get("why")),
        None
        if polynomial is None
        else fit(
            _of(*FAMILIES)(polynomial.get("family")),
            _whole(polynomial.get("degree")),
            _number(polynomial.get("bound")),
        ),
        _optional(_whole)(record.get("near")),
        _optional(_whole)(record.get("break_even")),
        None if range_ is None else _range(range_),
        _of(True, False)(record.get("own_mean")),
        _optional(_list(_whole))(record.get("heads")),
        _of(*PRECISIONS)(record.get("precision")),
    )


def _range(record: Mapping[str, Any]) -> LogitRange:
    return LogitRange(
        _of(*SOURCES)(record.get("source")),
        _list(_number)(record.get("heads")),
        _list(_text)(record.get("reasons")),
        _optional(_list(_list(_number)))(record.get("centre")),
        _optional(_list(_number))(record.get("norms")),
    )


# ---------------------------------------------------------------- of what kind a value is


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", _checked(value, isinstance(value, Mapping), "an object"))


def _text(value: Any) -> str:
    return str(_checked(value, isinstance(value, str), "a text"))


def _whole(value: Any) -> int:
    return int(_checked(value, type(value) is int and 0 <= value < 2**62, "a whole number"))


def _number(value: Any) -> float:
    finite = type(value) in (int, float) and abs(value) <= LARGEST
    return float(_checked(value, finite, "a finite number"))


def _optional(read: _Read[_Item]) -> _Read[_Item | None]:
    return lambda value: None if value is None else read(value)


def _list(read: _Read[_Item]) -> _Read[tuple[_Item, ...]]:
    def each(value: object) -> tuple[_Item, ...]:
        items: Sequence[Any] = _checked(value, isinstance(value, list | tuple), "a list")
        return tuple(read(item) for item in items)

    return each


def _of(*known: _Item) -> _Read[_Item]:
    def one(value: object) -> _Item:
        listed = ", ".join(map(str, known))
        is_known = any(type(value) is type(each) and value == each for each in known)
        return cast("_Item", _checked(value, is_known, f"one of {listed}"))

    return one


def _checked(value: Any, holds: bool, wanted: str) -> Any:
    if not holds:
        raise ValueError(f"expected {wanted}, not {value!r:.40}")
    return value
