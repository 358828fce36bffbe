"""Forget gates, end to end: against the text as it is written, dense and in float64, forward and backward."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.ir.masks import LEAST_LOG_GATE
from fastgrad_compiler.reference.interpret import run, run_gradient
from fastgrad_compiler.runtime import decay, functions
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands.terminal import print_plan
from fastgrad_dsl.models.batches import model_inputs, random_batch
from fastgrad_dsl.models.measure_plan import measure_plan
from tests.dsl.models import always_polynomial
from tests.grids import wide
from tests.native.compilers import NEEDS_COMPILER

SPEC = """
dim b
dim n <= 4096

model m(
    q: float[b, 4, n, 3],
    k: float[b, 2, n, 3],
    v: float[b, 2, n, 5],
    f: float[b, 4, n],
    shared: float[b, 2, n],
    mask: bool[b, n],
    ids: int[b, n],
) -> float[b, 4, n, 5] {
    K = repeat_heads(k, 2)
    V = repeat_heads(v, 2)
    s = q @ K.T
    u = 0.7 * unit(q) @ repeat_heads(unit(k), 2).T
    own = min(f, 0.0)
    g = squeeze(repeat_heads(unsqueeze(min(shared, 0.0), -1), 2), -1)
    y = EXPRESSION
    return y
}
"""
FLOATS = 5  # of the inputs
P = "(1.0, 1.0, 0.5)"
MASKED = {
    "causal": "softmax(causal(forget(u, g))) @ V",
    "padding": "softmax(padding(causal(forget(u, g)), mask)) @ V",
    "documents": "softmax(documents(causal(forget(u, g)), ids)) @ V",
    "near": "softmax(causal(forget(near_far(u, u; 4), g))) @ V",
    "near, of other scores": "softmax(causal(forget(near_far(s, u; 4), g))) @ V",
    "all": "softmax(padding(documents(causal(forget(near_far(s, u; 4), g)), ids), mask)) @ V",
    "a gate for each query head": "softmax(padding(documents(causal(forget(u, own)), ids), mask)) @ V",
}
EXACT = {
    "window": "softmax(window(causal(forget(s, g)); 5)) @ V",
    "window with all masks": "softmax(padding(documents(window(causal(forget(s, own)); 9), ids), mask)) @ V",
}
OWN = {
    "own": f"normalize_rows(decay(causal(polynomial(s; {P})), g)) @ V",
    "own, documents and padding": (
        f"normalize_rows(padding(documents(causal(decay(polynomial(s; {P}), own)), ids), mask)) @ V"
    ),
    "own, near": f"normalize_rows(decay(causal(near_far(exp(s), polynomial(u; {P}); 4)), g)) @ V",
}
WRITTEN = {
    "not causal": "softmax(forget(s, g)) @ V",
    "of any sign": "softmax(causal(forget(s, f))) @ V",
    "decay of softmax": "decay(softmax(causal(s)), own) @ V",
    "twice": "softmax(causal(forget(forget(u, g), own))) @ V",
}
LENGTHS = (1, 37, 300)


@cache
def compiled(expression: str, degree: int = 0, target: str = "torch") -> Compiled:
    """Of degree 0 for exact attention."""
    budget = f'budget {{ at "*" degree = {degree} }}\n' if degree else ""
    return fg.compile(SPEC.replace("EXPRESSION", expression) + budget, target=target)


def draw(n: int, dtype: torch.dtype = torch.float64, least: float = -math.inf) -> tuple[list[Tensor], Tensor]:
    """Inputs and a cotangent: gates of all sizes, 0 and the `least` among them; padding and documents at random."""
    generator, b = torch.Generator().manual_seed(n), 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gates(heads: int) -> Tensor:
        sizes = 10.0 ** (3.0 * torch.rand(b, heads, 1, generator=generator, dtype=torch.float64) - 3.0)
        found = -normal(b, heads, n).abs() * sizes
        chosen = torch.rand(found.shape, generator=generator)
        return found.masked_fill(chosen < 0.02, least).masked_fill(chosen > 0.9, 0.0)

    floats = [normal(b, 4, n, 3), normal(b, 2, n, 3), normal(b, 2, n, 5), gates(4), gates(2)]
    mask = torch.rand(b, n, generator=generator) < 0.8
    ids = (torch.rand(b, n, generator=generator) < 0.1).cumsum(1)
    return [*(x.to(dtype).requires_grad_() for x in floats), mask, ids], normal(b, 4, n, 5).to(dtype)


def results(out: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output and the gradients of the float inputs, zeros for those that are not read."""
    found = torch.autograd.grad(out, inputs[:FLOATS], cotangent, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs[:FLOATS], found, strict=True)),
    ]


def of_module(case: Compiled, n: int, least: float = -math.inf) -> list[Tensor]:
    inputs, cotangent = draw(n, least=least)
    return results(always_polynomial(case, case.module())(*inputs), inputs, cotangent)


def of_text(case: Compiled, n: int, least: float = -math.inf) -> list[Tensor]:
    """As it is written, before any pass, by dense definitions in float64."""
    inputs, cotangent = draw(n, least=least)
    out = run(case.stages[0].program, inputs, {})
    assert isinstance(out, Tensor)
    return results(out, inputs, cotangent)


def of_plan(case: Compiled, n: int, least: float = -math.inf) -> list[Tensor]:
    """The program after all passes, by dense definitions, and its gradient graph."""
    inputs, cotangent = draw(n, least=least)
    given = [x.detach() for x in inputs]
    out = run(case.program, given, {})
    assert isinstance(out, Tensor)
    gradients, _ = run_gradient(case.program, given, {}, [cotangent])
    return [out, *gradients.values()]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    names = ("output", "q", "k", "v", "f", "shared")
    for name, one, other in zip(names, found, wanted, strict=True):
        size = max(float(other.abs().max()), 1e-3)
        assert float((one.double() - other.double()).abs().max()) <= tolerance * size, name


@pytest.mark.parametrize(
    ("case", "n"),
    wide(
        product(MASKED | EXACT | OWN, LENGTHS),
        few=[*product(MASKED | EXACT | OWN, LENGTHS[:2]), *product(("all", "window", "own"), LENGTHS[2:])],
    ),
)
def test_is_the_text_as_it_is_written(case: str, n: int) -> None:
    """Exact attention, and polynomials of the model's own, whose weights as written may become 0 in a whole row."""
    found = compiled((MASKED | EXACT | OWN)[case])
    (entry,) = found.plan
    assert entry.attention.mask.forget
    least = -5.0 if case in OWN else -math.inf
    wanted = of_text(found, n, least)
    agree(of_module(found, n, least), wanted)
    agree(of_plan(found, n, least), wanted)


@pytest.mark.parametrize("case", OWN)
def test_an_own_polynomial_leaves_out_what_a_row_has_in_common(case: str) -> None:
    """Rows that see only what is forgotten have shares all the same, in the kernels as in the dense definition."""
    found = compiled(OWN[case])
    for n in LENGTHS:
        agree(of_module(found, n), of_plan(found, n))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "degree"),
    wide(product(MASKED, (1, 2, 3)), few=[("causal", 1), ("all", 3), *product(MASKED, (2,))]),
)
def test_is_the_polynomial_of_the_plan(case: str, degree: int) -> None:
    found = compiled(MASKED[case], degree)
    (entry,) = found.plan
    assert entry.attention.polynomial is not None
    for n in LENGTHS:
        agree(of_module(found, n), of_plan(found, n))


@pytest.mark.parametrize("case", WRITTEN)
def test_gates_that_are_no_attentions_run_as_they_are_written(case: str) -> None:
    found = compiled(WRITTEN[case])
    assert not any(entry.attention.mask.forget for entry in found.plan)
    for n in (1, 2, 37):
        wanted = of_text(found, n)
        agree(of_module(found, n), wanted)
        agree(of_plan(found, n), wanted)


@pytest.mark.medium
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("degree", [0, 2])
def test_in_bfloat16(case: str, degree: int) -> None:
    """What is not much less than the largest entry: gates are bfloat16 numbers, whose running sums are float64."""
    found = compiled(MASKED[case], degree)
    inputs, cotangent = draw(37, torch.bfloat16)
    given = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = run(found.program, given, {})
    assert isinstance(out, Tensor)
    wanted = results(out, given, cotangent.double())
    narrow = results(always_polynomial(found, found.module())(*inputs), inputs, cotangent)
    assert {x.dtype for x in narrow} == {torch.bfloat16}
    agree(narrow, wanted, 0.03)


@pytest.mark.medium
@NEEDS_COMPILER
@pytest.mark.parametrize("degree", [0, 2])
def test_on_the_target_cpp(degree: int) -> None:
    for case in ("causal", "all", "a gate for each query head"):
        found = compiled(MASKED[case], degree, "cpp")
        agree(of_module(found, 37), of_plan(found, 37))


# ---------------------------------------------------------------- certificates


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", ["causal", "all"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_errors_stay_below_their_bounds(case: str, degree: int) -> None:
    """Of output and gradients on random inputs, as a report measures them; that of the gates by the same sums of dS."""
    found = compiled(MASKED[case], degree)
    plan = found.plan_document
    for n in (37, 300):
        for dtype in (torch.float64, torch.float32):
            inputs, _ = draw(n, dtype)
            model = always_polynomial(found, found.module())
            measured = measure_plan(plan, model, [x.detach() for x in inputs], (), None)
            (attention,) = measured.attentions
            assert {"output", "dq", "dk", "dv"} <= attention.local.keys()
            for name, local in attention.local.items():
                assert math.isinf(local.measured) or local.measured <= local.bound, (name, n, dtype)
        assert of_gates(found, n) <= 1.0


def of_gates(case: Compiled, n: int) -> float:
    """The largest error of a log gate's gradient over the bound of docs/mathematics.md, section 7."""
    from fastgrad_compiler.approximation.certificates import score_factor

    inputs, cotangent = draw(n)
    (entry,) = case.plan
    polynomial = entry.attention.polynomial
    assert polynomial is not None
    assert polynomial.eps is not None
    assert polynomial.eps_prime is not None
    errors = (of_module(case, n)[-1] - of_text(case, n)[-1]).abs()
    projected = cotangent @ inputs[2].detach().repeat_interleave(2, 1).mT
    hidden = ~torch.ones(n, n, dtype=torch.bool).tril()
    most = projected.masked_fill(hidden, -math.inf).amax(-1)
    least = projected.masked_fill(hidden, math.inf).amin(-1)
    omega = (most - least).unflatten(1, (2, 2)).sum(2)
    later = omega.flip(-1).cumsum(-1).flip(-1)
    bound = score_factor(polynomial.eps, polynomial.eps_prime) * later
    return float((errors / bound.clamp(min=1e-300)).max())


# ---------------------------------------------------------------- what surrounds a plan


def test_the_kernel_is_called_with_its_gates() -> None:
    text = compiled(MASKED["all"], 2).modules["model.py"]
    call = re.search(r"polynomial_attention\((.*?)\)\n", text, re.DOTALL)
    assert call is not None
    assert re.search(r"log_gate=\w+, mask=mask, documents=ids, exact_below=", call[1])
    (exact,) = re.findall(r"exact_attention\(.*\)", compiled(MASKED["documents"]).modules["model.py"])
    assert "log_gate=" in exact


def rounding_of(expression: str) -> float:
    """What rounding adds to a weight, relatively."""
    found = compiled(expression, 2).plan_document.attentions[0].rounding
    assert found is not None
    assert found.weights is not None
    return found.weights


def test_a_plan_names_the_gate() -> None:
    found = compiled(MASKED["all"], 2)
    (entry,) = found.plan_document.attentions
    assert entry.roles == ("near_q", "near_k", "forget", "padding", "documents")
    assert (
        entry.eps
        == compiled(MASKED["causal"].replace("forget(u, g)", "u"), 2).plan_document.attentions[0].eps
    )
    assert rounding_of(MASKED["causal"]) > rounding_of(MASKED["causal"].replace("forget(u, g)", "u"))


def test_a_gate_that_is_no_attentions_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(compiled(WRITTEN["of any sign"]).program, "m.tfg")
    head, gate, why = capsys.readouterr().out.splitlines()
    assert head == "m.tfg: model m, 0 attentions"
    assert gate == "  forget  as it is written, on all pairs  (<text>:20)"
    assert why.startswith(
        "      this gate belongs to no attention: nothing proves that f (<text>:9) is at most 0"
    )
    print_plan(compiled(MASKED["causal"]).program, "m.tfg")
    assert "forget" not in capsys.readouterr().out


def test_guards_watch_the_scores_inside() -> None:
    """R is that of the scores, which the user asserts; gates are no part of it."""
    case = compiled("softmax(causal(forget(assume_bound(s; 1.5), g))) @ V", 2)
    inputs, _ = draw(20)
    with torch.no_grad():
        inputs[0].mul_(1e-3)
        inputs[4].mul_(1e3)
    module = always_polynomial(case, case.module())
    module(*inputs)
    (status,) = module.budget_status()  # type: ignore[operator]
    assert status["largest"] < 0.1
    with torch.no_grad():
        inputs[0].mul_(1e5)
    module(*inputs)
    (status,) = module.budget_status()  # type: ignore[operator]
    assert status["largest"] > 1.5


def test_random_batches_have_gates_of_both_kinds() -> None:
    batch = random_batch(model_inputs(compiled(MASKED["causal"]).program), {"b": 2, "n": 9})
    assert [x.dtype for x in batch[3:5]] == [torch.float32] * 2


def test_the_least_log_gate_is_one_number() -> None:
    assert decay.LEAST == LEAST_LOG_GATE
    gates = torch.tensor([0.0, 2 * LEAST_LOG_GATE, -math.inf], dtype=torch.float64)
    sums = functions.apply_forget(torch.zeros(3, 3, dtype=torch.float64), gates)
    assert sums.tolist() == [[0, 0, 0], [LEAST_LOG_GATE, 0, 0], [2 * LEAST_LOG_GATE, LEAST_LOG_GATE, 0]]
