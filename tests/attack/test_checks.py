"""Each check of `make attack` finds a defect that is planted for it, and nothing in a program without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from attack import cases, check_errors, check_guards, check_texts
from attack.cases import Case, Finding
from attack.findings import CHECKS, CRASH, examine, read, smallest
from attack.minimise import minimise
from attack.run import Attack, main
from fastgrad_compiler.analysis.bounds import rules as bound_rules
from fastgrad_compiler.analysis.bounds import step as bound_step
from fastgrad_compiler.analysis.bounds.facts import interval
from fastgrad_compiler.approximation import certificates
from fastgrad_compiler.attention import recognise as attention
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_dsl.commands.terminal import print_report

PLAIN = """dim b
dim n <= 40
model plain(x: float[b, n, 2]) -> float[b, n, 2] {
    weight w: float[2, 2] = normal(std = 1.0)
    k = tanh(x @ w)
    y = softmax(causal(unit(x) @ unit(k).T)) @ x
    return y + exp(tanh(y))
}
budget {
    at "y" degree = 2
}
"""
GUARDED = """dim b
dim n <= 40
model guarded(x: float[b, n, 2]) -> float[b, n, 2] {
    weight w: float[2, 2] = normal(std = 1.0)
    y = softmax(assume_bound((x @ w) @ x.T; bound = 0.5)) @ x
    return y
}
budget {
    at "y" degree = 2
    on_violation = warn
}
"""


def _case(text: str, seed: int = 5, **sizes: int) -> Case:
    return Case(text, sizes or {"b": 2, "n": 7}, seed)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("text", [PLAIN, GUARDED], ids=["plain", "guarded"])
def test_nothing_is_found_where_nothing_is_wrong(check: str, text: str) -> None:
    assert examine(check, _case(text)) is None


def _found(check: str, case: Case) -> Finding:
    with pytest.raises(Finding) as found:
        CHECKS[check](case)
    return found.value


def test_another_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recognised = attention.recognise_attention

    def wrong(program: Program) -> Program:
        """Every recognised attention forgets that it is causal."""
        graphs = [
            graph if not any(node.op == "attention" for node in graph.nodes)
            else type(graph)(graph.name, tuple(
                node.with_attributes(causal=False) if node.op == "attention" else node for node in graph.nodes
            ), graph.outputs, graph.block, graph.span)
            for graph in recognised(program).graphs
        ]  # fmt: skip
        return program.with_graphs(graphs)

    case = _case(PLAIN)
    broken = [
        wrong(stage.program) if stage.name == "attention" else stage.program for stage in case.compiled.stages
    ]
    stages = tuple(
        type(s)(s.name, program, s.seconds) for s, program in zip(case.compiled.stages, broken, strict=True)
    )
    compiled = type(case.compiled)(case.compiled.source, "torch", stages)
    case.__dict__["compiled"] = compiled
    assert _found("a", case).kind == "the interpreter after recognition"


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TORCH["exp"]
    monkeypatch.setitem(TORCH, "exp", lambda node, inputs, env: right(node, [inputs[0].detach()], env))
    assert "gradient" in _found("a", _case(PLAIN)).kind


def test_a_false_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(step: bound_step.Step) -> Any:
        return interval(-0.5, 0.5, step.rank)

    monkeypatch.setitem(bound_rules.BOUND, "tanh", narrow)
    found = _found("b", _case(PLAIN))
    assert found.kind.startswith(("tanh", "exp", "unit", "matmul", "add"))
    assert "is claimed" in found.message


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reader", ["exp({} + 1.0)", "exp(max({}, -2.0))", "tanh({} / 2.0)", "sigmoid({})"])
def test_a_rule_that_forgets_what_a_mask_hides_is_found(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of visible scores these have a range away from what a hidden one becomes."""
    text = PLAIN.replace("exp(tanh(y))", reader.format("causal(unit(x) @ unit(x).T)") + " @ x")
    assert examine("b", _case(text)) is None
    monkeypatch.setattr(bound_rules, "MASK_AWARE", frozenset(bound_rules.BOUND))
    assert "is claimed" in _found("b", _case(text)).message


def test_a_false_certificate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = certificates.eta
    monkeypatch.setattr(check_errors, "eta", lambda eps: 0.8 * whole(eps))
    assert _found("c", _case(PLAIN)).kind.startswith("certificate")


def test_a_blind_guard_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.built

    def blind(*given: Any) -> nn.Module:
        model = right(*given)
        for watching in (value for value in vars(model).values() if type(value).__name__ == "Guard"):
            watching.spec = replace(watching.spec, bound=1e9)
            watching.key = str(watching.spec)
        return model

    monkeypatch.setattr(check_guards, "built", blind)
    assert _found("d", _case(GUARDED)).kind.startswith("missed")


@pytest.mark.parametrize("key", ["decision", "degree", "bound", "range_source", "eps"])
def test_a_plan_that_says_something_else_is_found(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same = check_texts._same_as_program

    def other(plan: list[dict[str, Any]], table: Any) -> None:
        plan[0][key] = "something else"
        same(plan, table)  # type: ignore[arg-type]

    monkeypatch.setattr(check_texts, "_same_as_program", other)
    assert _found("e", _case(PLAIN)).kind == f"{key} of plan"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("print_plan", lambda lines: [line.replace("degree 2", "degree 3") for line in lines]),
        ("print_report", lambda lines: [line.replace("balanced 2", "balanced 3") for line in lines]),
    ],
)
def test_a_table_that_says_something_else_is_found(
    name: str, wrong: Callable[[list[str]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = check_texts._printed
    monkeypatch.setattr(check_texts, "_printed", lambda show: wrong(printed(show)))
    kinds = {"print_plan": "text of check", "print_report": "a row of report"}
    if name == "print_report":
        assert "balanced 2" in "\n".join(
            printed(lambda: print_report(_case(PLAIN).compiled.report(), wide=True))
        )
    assert _found("e", _case(PLAIN)).kind == kinds[name]


def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(case: Case) -> None:
        raise IndexError("out of range")

    monkeypatch.setitem(CHECKS, "e", crash)
    found = examine("e", _case(PLAIN))
    assert found is not None
    assert found.kind.startswith(f"{CRASH}, IndexError")


def test_a_failing_program_becomes_small() -> None:
    text = PLAIN.replace("return y", "u = gelu(y) * 2.0\n    return y")

    def fails(case: Case) -> bool:
        return "exp(" in case.text and "softmax" not in case.text

    assert not fails(_case(text))
    small = minimise(_case(text), lambda case: "exp(" in case.text, seconds=60.0)
    assert "softmax" not in small.text
    assert len(small.text.splitlines()) <= 6
    assert set(small.sizes.values()) == {1}


def test_a_finding_is_kept_in_a_file_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(step: bound_step.Step) -> Any:
        return interval(-0.5, 0.5, step.rank)

    monkeypatch.setitem(bound_rules.BOUND, "tanh", narrow)
    found = examine("b", _case(PLAIN))
    assert found is not None
    small = smallest(found, 5.0)
    assert small.kind == found.kind
    assert len(small.case.text) < len(found.case.text)
    path = tmp_path / f"{small.name}.tfg"
    path.write_text(small.text, encoding="utf-8")
    check, case = read(path)
    assert (check, case.seed, case.sizes) == ("b", small.case.seed, small.case.sizes)
    again = examine(check, case)
    assert again is not None
    assert again.kind == found.kind
    path.write_text(PLAIN, encoding="utf-8")
    with pytest.raises(ValueError, match="line of a kept finding"):
        read(path)


@pytest.mark.medium
def test_a_run_ends_with_a_status_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def narrow(step: bound_step.Step) -> Any:
        return interval(-1e-3, 1e-3, step.rank)

    assert main(["--minutes", "0", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert "seed 3: nothing was found" in capsys.readouterr().out
    monkeypatch.setitem(CHECKS, "a", lambda case: (_ for _ in ()).throw(Finding("a", "planted", "here")))
    arguments = ["--minutes", "0.002", "--seed", "3", "--checks", "a", "--out", str(tmp_path)]
    monkeypatch.setattr("attack.run.MINIMISE", 0.0)
    monkeypatch.setattr(Attack.program, "__defaults__", (0.0,))
    assert main(arguments) == 1
    assert "1 kinds of findings" in capsys.readouterr().out
    assert [path.name.startswith("a_planted") for path in tmp_path.iterdir()] == [True]
