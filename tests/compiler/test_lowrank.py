"""The low-rank rewrite: what a polynomial serves, forward and backward; what is planned exact stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import CompilerBug, verify
from fastgrad_compiler.passes.attention_backward import BLOCK
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.passes.lowrank import rewrite_low_rank
from fastgrad_compiler.reference.interpret import run_gradient
from tests.compiler.attention_variants import VARIANTS, Variant
from tests.compiler.gradients import assert_gradient, derive, program_of, run_one, sample_of

PLANNED = (
    ', decision = "polynomial", why = "eps meets the budget", family = "taylor", degree = 2, '
    "coefficients = (1.0, 1.0, 0.5), eps = 0.4, eps_prime = 1.0, break_even = 550"
)
SERVED = [v for v in VARIANTS if v.window is None and not v.alibi]
UNSERVED = [v for v in VARIANTS if v not in SERVED]


def planned(variant: Variant, plan: str = PLANNED) -> Program:
    """The variant with a plan's decision on its attention."""
    return derive(program_of(replace(variant, more=plan).text))


def rewrite(program: Program) -> Program:
    """The rewritten program, which is verified and survives its text."""
    rewritten = rewrite_low_rank(program)
    verify(rewritten, "lowrank")
    assert parse_program(print_program(rewritten)) == rewritten
    return rewritten


def ops(program: Program) -> set[str]:
    """Every operation that occurs."""
    return {node.op for graph in program.graphs for node in graph.nodes}


@pytest.mark.parametrize("variant", SERVED, ids=lambda variant: variant.name)
def test_polynomial_attention_and_its_gradient(variant: Variant) -> None:
    """The rewritten gradient is the exact gradient of the rewritten forward."""
    before = planned(variant)
    after = rewrite(before)
    assert "attention" in ops(before)
    assert not {"attention", "softmax"} & ops(after)
    assert {"poly_attention", "poly_attention_backward"} <= ops(after)
    assert BLOCK not in {graph.block for graph in after.graphs}
    inputs = [x * 0.3 if x.is_floating_point() else x for x in sample_of(after)]
    assert_gradient(after, inputs)
    with torch.no_grad():
        assert not torch.allclose(run_one(after, inputs), run_one(before, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", SERVED, ids=lambda variant: variant.name)
def test_rewriting_and_deriving_commute(variant: Variant) -> None:
    program = program_of(replace(variant, more=PLANNED).text)
    one, other = rewrite(derive_gradient(program)), derive_gradient(rewrite(program))
    inputs = sample_of(program)
    cotangents = [torch.ones_like(run_one(one, inputs))]
    first, second = (run_gradient(p, inputs, {}, cotangents)[0] for p in (one, other))
    assert first.keys() == second.keys()
    for name, g in first.items():
        assert torch.equal(g, second[name])


def test_the_plan_stays_on_the_node() -> None:
    (node,) = [n for n in rewrite(planned(VARIANTS[1]))["main"].nodes if n.op == "poly_attention"]
    assert node["coefficients"] == (1.0, 1.0, 0.5)
    assert node["why"] == "eps meets the budget"
    assert node["break_even"] == 550
    assert node["causal"] is True


@pytest.mark.parametrize("plan", ["", ', decision = "exact", why = "asked for"'], ids=["unplanned", "exact"])
def test_exact_attention_stays(plan: str) -> None:
    program = planned(VARIANTS[0], plan)
    assert rewrite(program) == program


def test_each_attention_by_its_own_decision() -> None:
    """Two attentions of equal types, one rewritten: each call of a backward follows its own."""
    call = "attention(%q, %k, %v, alibi = false, asserted = false, bound = none, causal = true, near = none"
    rest = "proof = (), roles = (), scale = 0.7, window = none"
    program = derive(
        program_of(
            f"""
            program p
            main main
            graph main {{
                %q = input() : float[b, 4, n, 3]
                %k = input() : float[b, 4, n, 3]
                %v = input() : float[b, 4, n, 2]
                %exact = {call}, {rest}, decision = "exact")
                %served = {call}, {rest}{PLANNED})
                %y = add(%exact, %served)
                return %y
            }}
            """
        )
    )
    assert sum(graph.block == BLOCK for graph in program.graphs) == 2
    after = rewrite(program)
    assert sum(graph.block == BLOCK for graph in after.graphs) == 1
    assert {"attention", "poly_attention", "softmax", "poly_attention_backward"} <= ops(after)
    assert_gradient(after, [x * 0.3 for x in sample_of(after)])


@pytest.mark.parametrize("variant", UNSERVED, ids=lambda variant: variant.name)
def test_a_mask_that_no_polynomial_serves_is_a_bug_of_the_plan(variant: Variant) -> None:
    with pytest.raises(CompilerBug, match="cannot serve its mask"):
        rewrite_low_rank(planned(variant))
