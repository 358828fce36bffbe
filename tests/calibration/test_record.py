"""The plan of a calibration as plain data: the same plan again, and nothing but a diagnostic for a false one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import fastgrad_dsl as fg
from fastgrad_compiler.planning.cost import EXACT, Shape, Way
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration import pace
from fastgrad_dsl.calibration.pace import MachinePace, default_pace, machine_pace
from fastgrad_dsl.calibration.record import PlanRecord, plan_record, with_recorded_plan
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.documents.form import Misfit, built
from fastgrad_dsl.documents.write import plain

SPEC = """use std
dim b
dim n <= 65536
model tiny(tokens: int[b, n]) -> float[b, n, 16] {
    weight table: float[16, 8] = normal(std = 0.5)
    x = embedding(table, tokens)
    x = x + std.attention(std.rms_norm(x); heads = 2, qk_dim = 2, causal = true)
    return x @ table.T
}
budget { output <= 0.1 }
"""


@pytest.fixture(scope="module")
def planned() -> Compiled:
    compiled = fg.compile(SPEC, target="torch")
    tokens = torch.randint(16, (1, 48), generator=torch.Generator().manual_seed(0))
    return replan(compiled, Request(compiled.module(), [(tokens,), (tokens,)], measured_pace=False))


def record_of(planned: Compiled) -> dict[str, Any]:
    assert planned.assignment is not None
    found: dict[str, Any] = json.loads(
        json.dumps(msgspec.to_builtins(plan_record(planned.assignment)), allow_nan=False)
    )
    return found


def read_plan(record: object) -> PlanRecord:
    found: PlanRecord = built(PlanRecord, record)
    return found


@pytest.mark.medium
def test_a_recorded_plan_is_the_same(planned: Compiled) -> None:
    assert any(entry.node.op == "poly_attention" for entry in planned.plan)
    fresh = fg.compile(SPEC, target="torch")
    again = with_recorded_plan(fresh, read_plan(record_of(planned)), planned.calibration)
    assert again.assignment == planned.assignment
    assert [stage.program for stage in again.stages] == [stage.program for stage in planned.stages]
    assert again.modules == planned.modules
    assert again.files == planned.files


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The ways to every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


WRONG: tuple[Any, ...] = (None, "x", -1, 1.5, True, 10**400, 1e308, [], {}, [[0]], {"x": 1}, 2**63, "")


@pytest.mark.medium
def test_a_false_record_is_refused_or_a_plan(planned: Compiled) -> None:
    """Every value of a record in turn made each of WRONG, or removed."""
    record = record_of(planned)
    fresh = fg.compile(SPEC, target="torch", validate=False)
    refused = count = 0
    for path in places(record):
        for wrong in (*WRONG, "removed"):
            false = copy.deepcopy(record)
            inside: Any = false
            for key in path[:-1]:
                inside = inside[key]
            if wrong == "removed":
                del inside[path[-1]]
            else:
                inside[path[-1]] = wrong
            count += 1
            try:
                with_recorded_plan(fresh, read_plan(false), None)
            except ValueError:
                refused += 1
    assert refused > 0.6 * count


@pytest.mark.parametrize("record", [None, [], 1, {"elsewhere": []}, {1: []}, {"layers": [{}]}])
def test_what_is_no_record(record: object) -> None:
    with pytest.raises(Misfit, match=r"expected|missing"):
        read_plan(record)


# ---------------------------------------------------------------- the pace of a machine


def test_a_pace_is_read_as_it_was_kept_or_refused() -> None:
    kept = plain(default_pace("cpp"))
    assert built(MachinePace, json.loads(json.dumps(kept))) == default_pace("cpp")
    for key in kept:
        values: list[Any] = [
            None,
            [],
            {},
            {"overhead": "1", "rate": 1.0},
            {"overhead": 0.0, "rate": 0.0},
            math.nan,
        ]
        for wrong in values:
            with pytest.raises(ValueError, match=r"expected|missing"):
                built(MachinePace, {**kept, key: wrong})
    records: list[Any] = [None, [], "x", {}, 1]
    for record in records:
        with pytest.raises(ValueError, match=r"expected|missing"):
            built(MachinePace, record)


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_forget_gates_take_time(target: str) -> None:
    """With them exact attention has no fused kernel but a native one, and PyTorch's polynomials take longer."""
    cost, shape = default_pace(target), Shape(n=4096, m=4096, d=16, dv=64, heads=8)
    gated = replace(shape, forget=True)
    assert cost.seconds(gated, EXACT) == cost.seconds(replace(shape, documents=True), EXACT)
    assert (cost.seconds(gated, EXACT) > 2 * cost.seconds(shape, EXACT)) == (target == "torch")
    slower = cost.seconds(gated, Way(2)) / cost.seconds(shape, Way(2))
    assert slower == pytest.approx(1.3 if target == "torch" else 1.0)


def test_a_pace_that_cannot_be_kept_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = default_pace("torch")
    monkeypatch.setattr(pace, "_measure", lambda *_: measured)
    monkeypatch.setattr(pace, "cache_folder", lambda: tmp_path)
    failing = OSError(28, "No space left on device")

    def full(*_: object) -> None:
        raise failing

    monkeypatch.setattr(pace, "write_atomically", full)
    assert machine_pace("torch") == measured
    monkeypatch.undo()
    monkeypatch.setattr(pace, "_measure", lambda *_: measured)
    monkeypatch.setattr(pace, "cache_folder", lambda: tmp_path)
    machine_pace("torch")
    (kept,) = tmp_path.iterdir()
    for content in (b"", b"[" * 100_000, b"{}", b"\xff", kept.read_bytes()[:-9]):
        kept.write_bytes(content)
        assert machine_pace("torch") == measured
        assert built(MachinePace, json.loads(kept.read_text())) == measured
