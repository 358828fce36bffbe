"""Models whose attention weighs by a polynomial of its own, from the file to the module, against dense float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastgrad_dsl as fg
from fastgrad_compiler.planning.cost import Shape, Way
from fastgrad_compiler.planning.target_cost import dense_break_even
from fastgrad_compiler.reference.interpret import run
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.functional import polynomial_attention as kernel
from fastgrad_grammar.format import format_source
from fastgrad_grammar.source import Source
from tests.dense import polynomial_attention

TAYLOR, EVEN = (1.0, 1.0, 0.5), (0.0, 0.0, 1.0, 0.0, 0.25)
N = 37


@dataclass(frozen=True)
class Case:
    """The body of a model of q, k, v (and mask), and the dense function that it must equal."""

    body: str
    dense: Callable[..., Tensor]
    keys: str = "float[b, 4, n, {}]"
    mask: bool = False
    documents: bool = False
    recognised: bool = True

    @property
    def spec(self) -> str:
        """The file."""
        k, v = (self.keys.format(width) for width in (6, 5))
        mask = f", mask: bool[b, {'m' if 'm' in self.keys else 'n'}]" if self.mask else ""
        mask += ", ids: int[b, n]" if self.documents else ""
        signature = f"q: float[b, 4, n, 6], k: {k}, v: {v}{mask}"
        return f"dim b\ndim n\ndim m\n\nmodel own({signature}) -> float[b, 4, n, 5] {{\n{self.body}\n}}\n"

    def inputs(self) -> list[Tensor]:
        """Inputs in float64; a masked row keeps only its first keys, or none."""
        generator = torch.Generator().manual_seed(0)
        heads, tokens = (2 if "2, n" in self.keys else 4), (29 if "m" in self.keys else N)
        shapes = [(3, 4, N, 6), (3, heads, tokens, 6), (3, heads, tokens, 5)]
        found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if self.mask:
            found.append(torch.arange(tokens) < torch.tensor([[tokens], [7], [0]]))
        if self.documents:
            found.append((torch.arange(N) // torch.tensor([[10], [1], [N]])).long())
        return found


def dense(**options: Any) -> Callable[..., Tensor]:
    """Dense attention with these options and Taylor's polynomial unless told."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        settings = {"coefficients": TAYLOR, **options}
        return polynomial_attention(q, k, v, settings.pop("coefficients"), mask=mask, **settings)

    return function


def near_with_unit_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(q.k / 2) in blocks of 5, Taylor's polynomial of 3 times the cosine beyond."""
    unit_q, unit_k = (functional.normalize(x, dim=-1) for x in (q, k))
    return polynomial_attention(
        unit_q, unit_k, v, TAYLOR, scale=3.0, causal=True, near=5, near_q=q / 2, near_k=k
    )


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Within 4 tokens."""
    places = torch.arange(N)
    scores = q @ k.mT
    weights = (1 + scores + scores**2 / 2) * ((places[:, None] - places).abs() < 4)
    return weights / weights.sum(-1, keepdim=True) @ v


CASES = {
    "unmasked": Case("return normalize_rows(polynomial(q @ k.T; (1.0, 1.0, 0.5))) @ v", dense()),
    "causal weights": Case(
        "return normalize_rows(causal(polynomial(0.5 * q @ k.T; (1.0, 1.0, 0.5)))) @ v",
        dense(scale=0.5, causal=True),
    ),
    "causal scores, even powers": Case(
        "return normalize_rows(polynomial(causal(q @ k.T); coefficients = (0, 0, 1, 0, 0.25, 0))) @ v",
        dense(coefficients=EVEN, causal=True),
    ),
    "degree 6": Case(
        "return normalize_rows(causal(polynomial(-0.3 * (q @ k.T); (1, 0.9, 0.5, 0.2, 0.1, 0.01, 0.01)))) @ v",
        dense(coefficients=(1, 0.9, 0.5, 0.2, 0.1, 0.01, 0.01), scale=-0.3, causal=True),
    ),
    "padding, one row of nothing else": Case(
        "return normalize_rows(padding(polynomial(q @ k.T; (1.0, 1.0, 0.5)), mask)) @ v", dense(), mask=True
    ),
    "padding of scores, causal weights": Case(
        "return normalize_rows(causal(polynomial(padding(q @ k.T, mask); (1.0, 1.0, 0.5)))) @ v",
        dense(causal=True),
        mask=True,
    ),
    "grouped": Case(
        "w = causal(polynomial(q @ repeat_heads(k, 2).T; (1.0, 1.0, 0.5)))\n"
        "return normalize_rows(w) @ repeat_heads(v, 2)",
        dense(causal=True),
        keys="float[b, 2, n, {}]",
    ),
    "cross": Case(
        "return normalize_rows(padding(polynomial(q @ k.T; (1.0, 1.0, 0.5)), mask)) @ v",
        dense(),
        keys="float[b, 4, m, {}]",
        mask=True,
    ),
    "exp nearby": Case(
        "s = q @ k.T\nw = near_far(exp(s), polynomial(s; (1.0, 1.0, 0.5)); 4)\nreturn normalize_rows(causal(w)) @ v",
        dense(causal=True, near=4),
    ),
    "exp nearby, unmasked": Case(
        "s = 0.5 * q @ k.T\nw = near_far(exp(s), polynomial(s; (1.0, 1.0, 0.5)); 3)\nreturn normalize_rows(w) @ v",
        dense(scale=0.5, near=3),
    ),
    "exp of other scores nearby": Case(
        "near = exp(0.5 * q @ k.T)\nfar = polynomial(3.0 * unit(q) @ unit(k).T; (1.0, 1.0, 0.5))\n"
        "return normalize_rows(causal(near_far(near, far; block = 5))) @ v",
        near_with_unit_far,
    ),
    "over its sum": Case(
        "w = polynomial(causal(q @ k.T); (1.0, 1.0, 0.5))\nreturn w / sum(w, axis = -1, keepdim = true) @ v",
        dense(causal=True),
    ),
    "documents": Case(
        "w = documents(polynomial(q @ k.T; (1.0, 1.0, 0.5)), ids)\nreturn normalize_rows(w) @ v",
        lambda q, k, v, ids: polynomial_attention(q, k, v, TAYLOR, documents=ids),
        documents=True,
    ),
    "documents, causal, exp nearby": Case(
        "s = q @ k.T\nw = near_far(exp(s), polynomial(s; (1.0, 1.0, 0.5)); 4)\n"
        "return normalize_rows(documents(causal(w), ids)) @ v",
        lambda q, k, v, ids: polynomial_attention(q, k, v, TAYLOR, documents=ids, causal=True, near=4),
        documents=True,
    ),
    "a window, dense": Case(
        "return normalize_rows(window(polynomial(q @ k.T; (1.0, 1.0, 0.5)), 4)) @ v",
        windowed,
        recognised=False,
    ),
    "masked twice, dense": Case(
        "w = polynomial(padding(q @ k.T, mask); (1.0, 1.0, 0.5))\nreturn normalize_rows(window(w, 99)) @ v",
        dense(),
        mask=True,
        recognised=False,
    ),
}


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result for these inputs, and the gradients of the float ones for a fixed cotangent."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    result = function(*given)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=result.dtype)
    return [result, *torch.autograd.grad(result, [x for x in given if x.requires_grad], cotangent)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_module_and_reference_are_the_dense_function(case: Case) -> None:
    compiled = fg.compile(case.spec)
    assert [entry["family"] for entry in compiled.plan_document["attentions"]] == ["own"] * case.recognised
    model = compiled.module(dtype=torch.float64)
    inputs = case.inputs()
    expected = with_gradients(case.dense, inputs)
    for way in (model, compiled.reference(model)):
        for found, wanted in zip(with_gradients(way, inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for stage in compiled.stages:
        torch.testing.assert_close(run(stage.program, inputs, {}), expected[0], rtol=1e-9, atol=1e-9)


def test_a_kernel_runs_at_every_length() -> None:
    compiled = fg.compile(CASES["causal weights"].spec)
    assert "exact_below=0" in compiled.modules["model.py"]
    q, k, v = (x[:, :, :1] for x in CASES["causal weights"].inputs())
    model = compiled.module(dtype=torch.float64)
    torch.testing.assert_close(model(q, k, v), v)
    expected = kernel(q, k, v, degree=2, family="taylor", causal=True, scale=0.5, target="torch")
    torch.testing.assert_close(model(q, k, v), expected)


SHORT_OR_LONG = """use std
dim b
dim n

model m(x: float[b, n, 16]) -> float[b, n, 16] {
    return std.kernel_attention(x; heads = 2, qk_dim = 10, causal = true, coefficients = fit(taylor, 4, 1.0))
}
"""


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_below_its_break_even_all_pairs_are_met(target: str) -> None:
    """The lengths are those of the cost model, the plan says them, and the values are those of states."""
    compiled = fg.compile(SHORT_OR_LONG, target=target)
    (entry,) = compiled.plan_document["attentions"]
    even, on_gpu = entry["break_even"], entry["break_even_gpu"]
    shape, way = Shape(n=1, m=1, d=10, dv=8), Way(4)
    assert even == dense_break_even(target, shape, way) > 100
    assert on_gpu == dense_break_even(target, shape, way, on_gpu=True)
    assert entry["why"] == (
        f"exact: the model's own polynomial; on all pairs below {even:,} tokens ({on_gpu:,} on a GPU), "
        "where that is faster (estimate)"
    )
    assert f"exact_below={even}, exact_below_gpu={on_gpu})" in compiled.modules["model.py"]
    assert f"of degree 4 and rank 1001; on all pairs below {even} tokens" in compiled.modules["model.py"]
    model = compiled.module(dtype=torch.float64)
    weights = {name.rpartition(".")[2]: weight for name, weight in model.named_parameters()}
    for n in (even - 1, even):
        x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        q, k, v = ((x @ weights[f"w{name}"]).unflatten(-1, (2, -1)).transpose(1, 2) for name in "qkv")
        y = polynomial_attention(q, k, v, entry["coefficients"], scale=10**-0.5, causal=True)
        expected = y.transpose(1, 2).flatten(2) @ weights["wo"]
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- whole models

MODEL = """use std

param coefficients: floats = (1.0, 1.0, 0.5)

dim b
dim n <= 4096

model mixed(tokens: int[b, n]) -> float[b, n, 16] {
    weight table: float[16, 16] = normal(std = 0.5)
    x = embedding(table, tokens)
    y = std.rms_norm(x)
    x = x + std.kernel_attention(y; 4, kv_heads = 2, qk_dim = 4, causal = true, coefficients = coefficients) as own
    x = x + std.attention(std.rms_norm(x); heads = 2, causal = true, gain = 1.0) as served
    y = std.rms_norm(x) as last_norm
    x = x + std.kernel_attention(y; heads = 2, qk_dim = 4, causal = true, near = 8, rope = 100.0) as local
    return std.rms_norm(x) @ table.T
}

objective loss(logits: float[b, n, 16], targets: int[b, n]) = cross_entropy(logits, targets)

budget {
    output <= 0.1
    near = 16
    at "served" degree = 2
}
"""


@pytest.fixture(scope="module")
def mixed() -> Compiled:
    return fg.compile(MODEL)


def test_the_plan_says_that_it_is_exact(mixed: Compiled) -> None:
    own, served, local = mixed.plan_document["attentions"]
    for entry, near in ((own, None), (local, 8)):
        assert (entry["decision"], entry["family"], entry["degree"], entry["rank"]) == (
            "polynomial",
            "own",
            2,
            15,
        )
        assert entry["why"].startswith("exact: the model's own polynomial")
        assert (entry["eps"], entry["eps_prime"], entry["bound"], entry["near"]) == (0.0, 0.0, None, near)
        assert entry["coefficients"] == list(TAYLOR)
        assert (entry["break_even"], entry["break_even_gpu"]) == (0, 0)
        assert set(entry["certificate"].values()) == {0.0}
    assert (served["family"], served["near"]) == ("balanced", 16)
    json.loads(mixed.files["plan.json"], parse_constant=pytest.fail)


def test_the_report_compares_what_is_approximated_alone(mixed: Compiled) -> None:
    """Beyond the break-even of the served attention, which the model's own polynomials come before and after."""
    served = mixed.plan_document["attentions"][1]
    n = served["break_even"] + 100
    batch = [torch.randint(16, (1, n), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    model = mixed.module(dtype=torch.float64)
    report = mixed.report(model, batch)
    zero = {"bound": 0.0, "estimate": 0.0, "measured": 0.0}
    own, found, local = report["attentions"]
    assert own["errors"] == local["errors"] == dict.fromkeys(("output", "dq", "dk", "dv", "gradient"), zero)
    assert 0 < found["errors"]["output"]["measured"] <= found["errors"]["output"]["bound"]
    assert 0 < found["errors"]["gradient"]["measured"] <= found["errors"]["gradient"]["bound"]
    exact = mixed.reference(model)(batch[0])
    error = (model(batch[0]) - exact).norm() / exact.norm()
    assert report["whole"]["output"]["measured"] == pytest.approx(error.item(), rel=1e-6)
    assert report["whole"]["output"]["bound"] is None


def test_a_model_of_its_own_polynomials_has_no_error() -> None:
    compiled = fg.compile(MODEL.replace("    x = x + std.attention", "    # x").split("budget {")[0])
    assert len(compiled.plan) == 2
    batch = [torch.randint(16, (2, 50), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    whole = compiled.report(compiled.module(), batch)["whole"]
    assert whole["output"] == whole["gradient"] == {"bound": 0.0, "estimate": 0.0, "measured": 0.0}
    assert whole["loss"] == whole["exact_loss"]


def test_coefficients_from_outside() -> None:
    for given in ("0,0,1", "(0, 0, 1.0)", [0, 0, 1], (0.0, 0.0, 1.0)):
        compiled = fg.compile(MODEL, params={"coefficients": given})
        assert compiled.plan_document["attentions"][0]["coefficients"] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("1,x", "FG402"),
        ("none", "FG402"),
        ([], "FG402"),
        (2.0, "FG402"),
        ([1e999, 1, 1], "FG403"),
        ("1,1", "FG242"),
    ],
    ids=str,
)
def test_coefficients_that_do_not_fit(given: object, code: str) -> None:
    with pytest.raises(fg.TfgError) as caught:
        fg.compile(MODEL, params={"coefficients": given})
    assert code in {diagnostic.code for diagnostic in caught.value.diagnostics}


def test_layout_of_a_polynomial() -> None:
    text = (
        "model m(s: float[b, 3]) -> float[b, 3] {\n    return polynomial(s,coefficients=(1.0 ,1.0,0.5))\n}\n"
    )
    expected = text.replace("(s,coefficients=(1.0 ,1.0,0.5))", "(s; coefficients = (1.0, 1.0, 0.5))")
    assert format_source(Source("m.tfg", text)) == expected
