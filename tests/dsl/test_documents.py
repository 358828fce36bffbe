"""Models on packed documents: near the exact one, the same as on each document alone, no gradient across boundaries."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_compiler.interpret import run
from fastgrad_dsl.batches import model_inputs, random_batch
from fastgrad_dsl.compiled import Compiled
from tests.dsl.models import always_polynomial, disturbed

LENGTHS = [13, 1, 24, 10]
N = sum(LENGTHS)
BOUNDARIES = list(itertools.pairwise([0, *itertools.accumulate(LENGTHS)]))


def packed(scores: str, budget: str = 'budget { at "*" degree = 4 }') -> Compiled:
    """Two layers of attention of width 16; `scores` is what softmax sees, from `near` and `far` ones."""
    return fg.compile(
        f"""
dim b
dim n

block layer(x: float[b, n, d], ids: int[b, n]; heads: int) -> float[b, n, d] {{
    weight wq: float[d, d] = xavier()
    weight wk: float[d, d] = xavier()
    weight wv: float[d, d] = xavier()
    q = split_heads(x @ wq, heads)
    k = split_heads(x @ wk, heads)
    near = 0.5 * q @ k.T
    far = 0.8 * unit(q) @ unit(k).T
    return x + merge_heads(softmax({scores}) @ split_heads(x @ wv, heads))
}}

model m(x: float[b, n, 16], ids: int[b, n]) -> float[b, n, 16] {{
    repeat i in 2 {{
        x = layer(x, ids; heads = 4) as layers
    }}
    return x
}}

{budget}
"""
    )


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, N, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [torch.repeat_interleave(torch.tensor([5, 2, 5, 3 + r]), torch.tensor(LENGTHS)) for r in range(2)]
    return x, torch.stack(rows)


CASES = {
    "causal": "causal(documents(far, ids))",
    "unmasked": "documents(far, ids)",
    "causal near": "causal(documents(near_far(near, far; 4), ids))",
    "unmasked near": "documents(near_far(near, far; 4), ids)",
}


@pytest.mark.parametrize("scores", CASES.values(), ids=CASES)
def test_close_to_the_reference_in_output_and_gradient(scores: str) -> None:
    compiled = packed(scores)
    assert [entry.node.op for entry in compiled.plan] == ["poly_attention"] * 2
    model = disturbed(compiled.module(dtype=torch.float64))
    polynomial, reference = always_polynomial(compiled, model), compiled.reference(model)
    x, ids = inputs()
    found, expected = polynomial(x, ids), reference(x, ids)
    interpreted = run(compiled.program, [x, ids], model.state_dict(), dtype=torch.float64)
    torch.testing.assert_close(found, interpreted, rtol=1e-10, atol=1e-10)
    # Weights are off by eps each, their derivative by eps'; the two layers add up, and the residual only helps.
    eps, slope = (sum(float(str(entry.node[key])) for entry in compiled.plan) for key in ("eps", "eps_prime"))
    assert 0 < (found - expected).norm() / expected.norm() < eps
    for f, e in zip(
        torch.autograd.grad(found.square().sum(), list(polynomial.parameters())),
        torch.autograd.grad(expected.square().sum(), list(reference.parameters())),
        strict=True,
    ):
        assert (f - e).norm() / e.norm() < slope


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scores", [*CASES.values(), "window(causal(documents(near, ids)); 5)"])
def test_no_gradient_crosses_a_boundary(scores: str, exact: bool) -> None:
    compiled = packed(scores, "" if "window" in scores else 'budget { at "*" degree = 4 }')
    module = disturbed(compiled.module(dtype=torch.float64))
    model = compiled.reference(module) if exact else always_polynomial(compiled, module)
    x, ids = inputs()
    x.requires_grad_()
    out = model(x, ids)
    for start, stop in BOUNDARIES:
        (gradient,) = torch.autograd.grad(out[:, start:stop].square().sum(), x, retain_graph=True)
        assert gradient[:, start:stop].abs().amin(-1).gt(0).all()
        assert not gradient[:, :start].any()
        assert not gradient[:, stop:].any()


@pytest.mark.parametrize("scores", [CASES["causal"], CASES["unmasked"], "window(documents(far, ids); 6)"])
def test_equals_the_model_on_each_document(scores: str) -> None:
    """Also where two have the same id. No near field here: its blocks are counted from the row's beginning."""
    compiled = packed(scores, "" if "window" in scores else 'budget { at "*" degree = 4 }')
    model = always_polynomial(compiled, disturbed(compiled.module(dtype=torch.float64)))
    x, ids = inputs()
    whole = model(x, ids)
    for start, stop in BOUNDARIES:
        alone = model(x[:, start:stop], torch.zeros_like(ids[:, start:stop]))
        torch.testing.assert_close(whole[:, start:stop], alone, rtol=1e-10, atol=1e-11)


def test_random_batches_hold_documents_of_many_tokens() -> None:
    """A report without data measures on documents, and not on runs of ids drawn one by one."""
    found = model_inputs(packed(CASES["causal"]).program)
    assert [tensor.documents for tensor in found] == [False, True]
    _, ids = random_batch(found, {"b": 8, "n": 256})
    begins = ids.diff(dim=1)
    assert begins.ge(0).all()
    assert 1 <= begins.gt(0).sum(1).float().mean() <= 6


def test_reports_measure_packed_models() -> None:
    """The kernels' inputs are watched with the ids; the bound of each attention holds."""
    compiled = packed(CASES["causal near"])
    x, ids = inputs()
    report = compiled.report(always_polynomial(compiled, compiled.module(dtype=torch.float64)), [x, ids])
    for entry in report["attentions"]:
        assert 0 < entry["errors"]["output"]["measured"] <= entry["errors"]["output"]["bound"]
        assert 0 < entry["errors"]["gradient"]["measured"] <= entry["errors"]["gradient"]["bound"]


def test_report_of_a_model_with_a_window() -> None:
    """A window's kernel is an operation of the same family, and is not measured: it approximates nothing."""
    text = """
    dim b
    dim n <= 8192
    model m(x: float[b, n, 24]) -> float[b, n, 24] {
        q = split_heads(x, 3)
        y = softmax(causal(unit(q) @ unit(q).T)) @ q
        w = softmax(window(causal(unit(q) @ unit(q).T), 40)) @ q
        return merge_heads(y + w)
    }
    budget { output <= 0.3 }
    """
    compiled = fg.compile(text)
    assert [entry.node.op for entry in compiled.plan] == ["poly_attention", "attention"]
    x = torch.randn(1, 600, 24, generator=torch.Generator().manual_seed(0))
    served, exact = (
        entry["errors"]["output"] for entry in compiled.report(compiled.module(0), (x,))["attentions"]
    )
    assert 0 < served["measured"] <= served["bound"]
    assert exact["measured"] == 0
