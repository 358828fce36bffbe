"""Whole models in float32 where rounding rules: planned in float64 arithmetic, and within their certificate."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import fastgrad_dsl as fg
from tests.dense import softmax_attention

SPEC = """dim n <= 4096
model m(q: float[1, n, 2], k: float[1, n, 2], v: float[1, n, 2]) -> float[1, n, 2] {
    return softmax(causal(GAIN * (unit(q) @ unit(k).T))) @ v
}
budget {
    output <= 0.02
    gradient <= 0.2
    RULE
}
"""


def spec(gain: float, rule: str = "") -> str:
    return SPEC.replace("GAIN", str(gain)).replace("RULE", rule)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("gain", "precision"), [(0.5, "float32"), (2.0, "float32"), (8.0, "float64"), (12.0, "float64")]
)
def test_the_module_keeps_its_certificate(gain: float, precision: str) -> None:
    """Keys near the negatives of the queries; the exact model on the same float32 inputs in float64."""
    compiled = fg.compile(spec(gain), target="torch")
    (entry,) = compiled.plan_document["attentions"]
    assert (entry["decision"], entry["precision"]) == ("polynomial", precision)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1400, 2, generator=generator) for _ in range(3))
    q, k = q.new_tensor([1.0, 0.0]) + 0.05 * q, k.new_tensor([-1.0, 0.0]) + 0.05 * k
    out = compiled.module()(q, k, v)
    queries, keys = (normalize(x.double(), dim=-1) for x in (q, k))
    exact = softmax_attention(queries, keys, v.double(), scale=gain, causal=True)
    proved = entry["certificate"]
    limit = proved["output_of_value_range"] * (v.amax() - v.amin())
    limit = limit + proved["output_rounding_of_largest_value"] * v.abs().amax()
    error = (out.double() - exact).abs().max()
    assert 1e-7 < error <= limit, "nothing was approximated, or too much"


def test_a_longer_file_has_more_rounding() -> None:
    short, long, undeclared = (
        fg.compile(spec(2.0).replace("n <= 4096", text), target="torch").plan_document["attentions"][0]
        for text in ("n <= 2048", "n <= 32768", "n")
    )
    sizes = [each["rounding"] for each in (short, long, undeclared)]
    assert [found["n"] for found in sizes] == [2048, 32768, 65536]
    assert [found["declared"] for found in sizes] == [True, True, False]
    assert sizes[0]["weights"] < sizes[1]["weights"] < sizes[2]["weights"]
    assert all(found["holds_to"] > 1_000_000 for found in sizes)


def test_a_pinned_degree_is_computed_in_float64_where_rounding_is_more_than_its_eps() -> None:
    for degree, precision in ((4, "float32"), (8, "float64")):
        rule = f'at "*" degree = {degree}'
        (entry,) = fg.compile(spec(1.0, rule), target="torch").plan_document["attentions"]
        assert entry["precision"] == precision
        assert entry["eps"] > entry["rounding"]["weights"] * (1 if degree == 4 else 0)
        assert ("computed in float64" in entry["why"]) == (precision == "float64")


def test_a_limit_that_only_rounding_misses_is_refused() -> None:
    """No arithmetic of at most float64, whose results are stored in float32, is so precise."""
    rule = 'at "*" degree = 10\n    at "*" relative <= 1e-7'
    with pytest.raises(fg.TfgError) as caught:
        fg.compile(spec(0.5, rule), target="torch")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FG305"
    assert "of rounding" in diagnostic.message
