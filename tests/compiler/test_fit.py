"""`fit`, by which a model takes the coefficients of an approximation of exp as its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.own_polynomial import objection
from fastgrad_compiler.approximation.polynomial import FAMILIES, MAX_DEGREE, Family, PrecisionError, fit
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source
from tests.dense import polynomial_attention


def program(expression: str, before: str = "", **options: object) -> Program:
    """A model whose weights have these coefficients."""
    return elaborate(
        Source(
            "m.tfg",
            f"{before}\ndim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {{\n"
            f"    return normalize_rows(polynomial(x @ x.T; coefficients = {expression})) @ x\n}}\n",
        ),
        **options,  # type: ignore[arg-type]
    )


def coefficients(found: Program) -> object:
    (node,) = [node for graph in found.graphs for node in graph.nodes if node.op == "polynomial"]
    return node["coefficients"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("degree", "bound"), [(2, 1.0), (4, 2.0), (6, 7.25)])
def test_values_are_those_of_the_planner(family: Family, degree: int, bound: float) -> None:
    wanted = fit(family, degree, bound).coefficients
    for written in (
        f"fit({family}, {degree}, {bound})",
        f"fit({family}, bound = {bound}, degree = {degree})",
        f'fit("{family}", {degree // 2} * 2, 0.5 * {2 * bound})',
    ):
        found = program(written)
        assert coefficients(found) == wanted
        assert parse_program(print_program(found)) == found


def test_the_bound_may_be_an_int() -> None:
    assert coefficients(program("fit(balanced, 2, 3)")) == fit("balanced", 2, 3.0).coefficients


def test_as_a_param_and_as_a_value_of_a_block() -> None:
    wanted = fit("minimax", 4, 2.0).coefficients
    assert coefficients(program("c", "param c = fit(minimax, degree = 4, bound = 2.0)")) == wanted
    assert coefficients(program("c", "param c = fit(taylor, 2, 1.0)", params={"c": "0,0,1"})) == (
        0.0,
        0.0,
        1.0,
    )
    block = (
        "block own(x: float[b, n, 8]; family: str, degree: int = 2) -> float[b, n, 8] {\n"
        "    return polynomial(x; fit(family, degree, 2.0))\n}\n"
    )
    text = "dim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n    return own(x; {})\n}\n"
    found = elaborate(Source("m.tfg", block + text.replace("{}", '"minimax", 4')))
    assert coefficients(found) == wanted


def test_a_word_that_is_a_name_stands_for_its_value() -> None:
    found = program("fit(balanced, 2, 1.0)", 'param balanced = "taylor"')
    assert coefficients(found) == fit("taylor", 2, 1.0).coefficients


def test_coefficients_are_numbers_of_their_own() -> None:
    found = elaborate(
        Source(
            "m.tfg",
            "model m(x: float[3]) -> float[3] {\n    (a, b, c) = fit(minimax, 2, 1.0)\n"
            "    return x * b if a + c > 1.0 else x\n}\n",
        )
    )
    constants = [node["value"] for graph in found.graphs for node in graph.nodes if node.op == "constant"]
    assert constants == [fit("minimax", 2, 1.0).coefficients[1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("degree", range(2, MAX_DEGREE + 1, 2))
def test_even_degrees_weigh_every_score_by_more_than_zero(family: Family, degree: int) -> None:
    """Whatever float64 can hold, by an exact count of roots: so that no score, however far, is a diagnostic."""
    held = 0
    for bound in (1e-3, 1.0, 4.0, 12.0):
        try:
            found = fit(family, degree, bound).coefficients
        except PrecisionError:
            continue
        held += 1
        assert objection(found) is None
    assert held >= 3


def test_a_block_of_the_file_hides_it() -> None:
    block = "block fit(x: float[b, n, 8]) -> float[b, n, 8] {\n    return 2.0 * x\n}\n"
    text = "dim b\ndim n\nmodel m(x: float[b, n, 8]) -> float[b, n, 8] {\n    return fit(x)\n}\n"
    assert {graph.name for graph in elaborate(Source("m.tfg", block + text)).graphs} == {"fit", "m"}


def test_polynomials_count_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad_compiler.frontend.state.MAX_STEPS", 3000)
    statement = "x = polynomial(x; fit(balanced, 20, 1.0 + 0.001 * i))"
    repeat = f"    repeat i in 50 {{\n        {statement}\n    }}\n"
    text = f"model m(x: float[3]) -> float[3] {{\n{repeat}    return x\n}}\n"
    with pytest.raises(TfgError) as caught:
        elaborate(Source("m.tfg", text))
    assert {each.code for each in caught.value.diagnostics} == {"FG241"}
    elaborate(Source("m.tfg", text.replace("20", "2")))


MODEL = """
use std

dim b
dim n

model m(x: float[b, n, 16]) -> float[b, n, 16] {
    return std.kernel_attention(x; heads = 2, qk_dim = 4, causal = true, gain = 2.0,
                                coefficients = fit(balanced, degree = 4, bound = 2.0))
}
"""


def test_a_compiled_model_weighs_by_it() -> None:
    """Against dense float64, and near softmax: what is given up is the error of the polynomial alone."""
    compiled = fg.compile(MODEL)
    (entry,) = compiled.plan_document["attentions"]
    wanted = fit("balanced", 4, 2.0)
    assert (entry["family"], entry["coefficients"]) == ("own", list(wanted.coefficients))
    model = compiled.module(seed=0, dtype=torch.float64)
    weights = {name.rpartition(".")[2]: weight for name, weight in model.named_parameters()}
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    q, k, v = ((x @ weights[f"w{name}"]).unflatten(-1, (2, -1)).transpose(1, 2) for name in "qkv")
    q, k = 2.0 * functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    y = polynomial_attention(q, k, v, wanted.coefficients, causal=True)
    found = model(x)
    expected = y.transpose(1, 2).flatten(2) @ weights["wo"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of = (x, *weights.values())
    for one, other in zip(
        torch.autograd.grad(found, of, cotangent), torch.autograd.grad(expected, of, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    softmax = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    error = (y - softmax).norm(dim=-1) / v.norm(dim=-1).amax(-1, keepdim=True)
    assert error.max() <= 2 * wanted.eps / (1 - wanted.eps)
