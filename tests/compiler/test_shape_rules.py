"""Each shape rule alone: what it accepts runs, and gives the type that it says; what it refuses has a reason.

Operations are run as tests/compiler/reference.py defines them, at sizes that no two dims share. Types and attributes of
every case are also changed at random: a rule then refuses with a diagnostic, or is right again.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, TensorType
from fastgrad_compiler.ir.shapes import SHAPE, ShapeError, infer
from tests.compiler.reference import REFERENCE, Array, reference
from tests.compiler.rule_cases import CASES, Case, evaluated

SIZES = ({"b": 2, "n": 6, "m": 5}, {"b": 3, "n": 8, "m": 7})
DTYPES = {"float": np.float64, "int": np.int64, "bool": np.bool_}
STRUCTURE = {
    "input", "weight", "buffer", "call", "repeat", "item", "repeat_backward", "weight_gradient",
    "poly_attention", "poly_attention_backward",
}  # fmt: skip
"""Tested in test_shapes.py: they have no definition of their own, or the same rule as `attention`."""

CODES = set(
    re.findall(r"^## (FG\d+)", (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8"), re.M)
)


def made(types: list[TensorType], sizes: Mapping[str, int]) -> list[Array]:
    """Inputs of these types; ints are 0, which every table has."""
    return [
        np.full(tuple(dim.evaluate(sizes) for dim in type_.shape), type_.dtype != "int", DTYPES[type_.dtype])
        for type_ in types
    ]


def holds(op: str, found: TensorType, types: list[TensorType], values: Mapping[str, Any]) -> None:
    """The type of the result, at several sizes."""
    for sizes in SIZES:
        concrete = {key: evaluated(value, sizes) for key, value in values.items()}
        if not in_order(op, types, concrete, sizes):
            continue
        result = reference(op, made(types, sizes), concrete)
        assert result.shape == tuple(dim.evaluate(sizes) for dim in found.shape)
        assert result.dtype == DTYPES[found.dtype]


def in_order(op: str, types: list[TensorType], values: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether places that are known at run time only are places of the axis, which the run checks."""
    if op not in ("slice", "select"):
        return True
    whole = types[0].shape[values["axis"]].evaluate(sizes)
    if op == "select":
        return 0 <= int(values["index"]) < whole
    return 0 <= int(values["start"]) <= int(values["stop"]) <= whole


def read_types(case: Case) -> list[TensorType]:
    return [case.graph[name].tensor for name in case.node.inputs]


@pytest.mark.parametrize("op", sorted(CASES))
def test_a_result_has_the_type_that_the_rule_says(op: str) -> None:
    for case in CASES[op]:
        holds(op, case.node.tensor, read_types(case), dict(case.node.attributes))


# ---------------------------------------------------------------- changed types and attributes


def changed_type(rng: np.random.Generator, type_: TensorType) -> TensorType:
    shape = list(type_.shape)
    kind = rng.integers(4)
    if kind == 0:
        return TensorType(str(rng.choice(["float", "int", "bool"])), type_.shape)
    if kind == 1 and shape:
        del shape[int(rng.integers(len(shape)))]
    elif kind == 2:
        shape.insert(int(rng.integers(len(shape) + 1)), Dim.of(int(rng.integers(1, 4))))
    elif shape:
        dims = [Dim.of(1), Dim.of(2), Dim.of(4), Dim.of("b"), Dim.of("n"), Dim.of("m"), Dim.of("n") * 2]
        shape[int(rng.integers(len(shape)))] = dims[int(rng.integers(len(dims)))]
    return TensorType(type_.dtype, tuple(shape))


def changed_value(rng: np.random.Generator, value: Attribute) -> Attribute:
    if isinstance(value, tuple) and value:
        place = int(rng.integers(len(value)))
        return (*value[:place], changed_value(rng, value[place]), *value[place + 1 :])
    if isinstance(value, bool) or value is None or isinstance(value, float | str):
        return value
    if isinstance(value, int):
        return value + int(rng.integers(-3, 4))
    return (Dim.of("m"), value + 1, value * 2)[int(rng.integers(3))] if isinstance(value, Dim) else value


SIZED = {"heads", "times", "classes", "block", "width", "near", "stop", "length", "size", "rows"}
"""Attributes that elaboration lets be 1 at least; `before` and `after` may be 0."""


def sensible(values: Mapping[str, Attribute]) -> bool:
    flat = [
        (key, each)
        for key, value in values.items()
        for each in (value if isinstance(value, tuple) else (value,))
    ]
    least = {"before": 0, "after": 0, "shape": 1, **dict.fromkeys(SIZED, 1)}
    return all(not isinstance(each, int) or each >= least.get(key, each) for key, each in flat)


def refused(error: ShapeError, inputs: int, what: str) -> None:
    """The refusal says why, and points at operands that are there."""
    assert error.code in CODES, what
    assert len(error.message) > 15, what
    assert all(0 <= blame.input < inputs for blame in error.blame), what


@pytest.mark.parametrize("op", sorted(CASES))
def test_a_change_is_refused_with_a_reason_or_runs(op: str) -> None:
    for case in CASES[op]:
        rng = np.random.default_rng(zlib.crc32(str(case).encode()))
        for _ in range(40):
            types, values = read_types(case), dict(case.node.attributes)
            if types and rng.random() < 0.7:
                place = int(rng.integers(len(types)))
                types[place] = changed_type(rng, types[place])
            else:
                key = str(rng.choice(sorted(values))) if values else ""
                values = {k: changed_value(rng, v) if k == key else v for k, v in values.items()}
            if op == "literal" or not sensible(values):
                continue
            what = f"{op} of {', '.join(map(str, types))} with {values}"
            try:
                found = infer(op, tuple(types), values, {"n": 2} if case.even else {})
            except ShapeError as error:
                refused(error, len(types), what)
                continue
            assert isinstance(found, TensorType)
            try:
                holds(op, found, types, values)
            except (ValueError, IndexError, TypeError) as error:
                raise AssertionError(f"{what} is accepted as {found}: {error}") from error


def test_every_rule_is_tested() -> None:
    assert set(SHAPE) == set(CASES) | STRUCTURE
    assert set(CASES) == set(REFERENCE)
