"""`Compiled.certify`: what weights prove now of each attention, beside what its plan was made for."""

from __future__ import annotations

from math import inf, isinf

import pytest
import torch
from torch import nn

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.certificates import Certificate, certificate
from fastgrad_compiler.approximation.polynomial import errors
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.certify import AttentionCertificate
from tests.compiler.captured import captured_logits
from tests.dsl.models import INPUTS, NAMES, disturbed, small

LIMITED = """
use std
dim b
dim n <= 8192
model m(x: float[b, n, 16]) -> float[b, n, 16] {
    h = std.layer_norm(x)
    return std.attention(h; heads = 4, qk_dim = 4, bias = true, causal = true, gain = 1.0, learned = true)
}
budget {
    at "*" degree = 2
}
"""
ASSERTED = """
use std
dim b
dim n <= 8192
model m(x: float[b, n, 16]) -> float[b, n, 16] {
    weight wq: float[16, 8] = normal(std = 0.05)
    weight wk: float[16, 8] = normal(std = 0.05)
    h = std.rms_norm(x)
    s = assume_bound(split_heads(h @ wq, 2) @ split_heads(h @ wk, 2).T; 1.0)
    return merge_heads(softmax(causal(s)) @ split_heads(h, 2))
}
budget {
    at "*" degree = 2
}
"""


def exceeding(
    program: Compiled, model: nn.Module, found: tuple[AttentionCertificate, ...], name: str
) -> float:
    """The largest logit of a batch as a share of the R of its head."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        logits = captured_logits(program.program, INPUTS[name], weights)
    assert [each.full_path for each in found] == list(logits)
    shares = (
        s.abs().amax((0, 2, 3)) / torch.tensor(each.range.heads, dtype=torch.float64)
        for each, s in zip(found, logits.values(), strict=True)
    )
    return max(share.max().item() for share in shares)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt"])  # all its polynomials are its own
def test_logits_of_an_example_are_within_what_is_certified(name: str, dtype: torch.dtype) -> None:
    compiled = small(name)
    model = disturbed(compiled.module()).to(dtype)
    found = compiled.certify(model)
    served = {each.path: each for each in compiled.plan if each.full_path in {c.full_path for c in found}}
    assert [each.path for each in found] == list(served)
    assert exceeding(compiled, model, found, name) <= 1
    for each in found:
        planned = served[each.path].node
        if each.decision == "exact":
            assert (each.planned, each.holds, each.eps, each.certificate) == (None, None, None, None)
        else:
            assert each.planned == planned["bound"]
            assert each.holds is True
            assert (each.eps, each.eps_prime) == (planned["eps"], planned["eps_prime"])


def test_polynomials_of_the_model_itself_need_no_certificate() -> None:
    compiled = small("based")
    paths = [each.full_path for each in compiled.certify(compiled.module())]
    assert [path.split(".")[0] for path in paths] == ["near", "near"]
    assert len(compiled.plan) == 4


def test_learned_gains_narrow_the_range_and_the_errors() -> None:
    """tau = 0 halves the gain of every head; the heads part as they learn."""
    compiled = fg.compile(LIMITED, target="torch")
    model = compiled.module()
    (before,) = compiled.certify(model)
    assert before.planned == 1.0
    assert before.holds is True
    assert before.range.source == "weights"
    assert before.range.heads == pytest.approx([0.5] * 4, rel=2e-6)
    model.get_parameter("attention.attend.tau").data[:, 0, 0] = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    (after,) = compiled.certify(model)
    sizes = torch.tensor([-9.0, 0.0, 1.0, 9.0], dtype=torch.float64).sigmoid()
    assert after.range.heads == pytest.approx(sizes.tolist(), rel=2e-6)
    assert after.bound == max(after.range.heads)
    (entry,) = compiled.plan
    coefficients = entry.node["coefficients"]
    assert isinstance(coefficients, tuple)
    for each in (before, after):
        eps, eps_prime = errors([float(str(c)) for c in coefficients], each.bound)
        assert (each.eps, each.eps_prime) == (eps, eps_prime)
        proved, exact = each.certificate, certificate(eps, eps_prime)
        assert proved is not None
        assert (proved.output, proved.score_gradient) == (exact.output, exact.score_gradient)
        assert 0 < proved.output_rounding < 1e-2
    model.get_parameter("attention.attend.tau").data.fill_(-2.0)
    (narrow,) = compiled.certify(model)
    # The largest error of p on its range is reached inside already: on half of it eps is the same.
    assert (narrow.eps or inf) < (before.eps or inf) <= (after.eps or inf) <= float(str(entry.node["eps"]))


def test_an_asserted_range_is_seen_to_hold_and_to_break() -> None:
    compiled = fg.compile(ASSERTED, target="torch")
    model = compiled.module()
    (kept,) = compiled.certify(model)
    assert kept.holds is True
    assert kept.range.source == "weights"
    assert kept.bound < 1 == kept.planned
    with torch.no_grad():
        model.get_parameter("wq").mul_(2 / kept.bound)
    (broken,) = compiled.certify(model)
    assert broken.holds is False
    assert broken.bound == pytest.approx(2.0, rel=1e-5)
    assert (broken.eps or 0) > (kept.eps or inf)
    with torch.no_grad():
        model.get_parameter("wq").mul_(1e4)
    (lost,) = compiled.certify(model)
    assert (lost.holds, lost.eps, lost.certificate) == (False, None, None)


def test_a_range_in_which_weights_may_vanish_has_infinite_worst_cases() -> None:
    compiled = fg.compile(ASSERTED, target="torch")
    model = compiled.module()
    with torch.no_grad():
        model.get_parameter("wq").mul_(6 / compiled.certify(model)[0].bound)
    (found,) = compiled.certify(model)
    assert (found.eps or 0) > 1
    assert found.certificate == Certificate(*[inf] * 7)


def test_rows_without_a_limit_break_an_asserted_range() -> None:
    compiled = fg.compile(ASSERTED.replace("std.rms_norm(x)", "2.0 * x"), target="torch")
    (found,) = compiled.certify(compiled.module())
    assert isinf(found.bound)
    assert (found.holds, found.eps, found.certificate) == (False, None, None)
    assert found.range.reasons[0].startswith("nothing limits the rows of x")


def test_biases_of_keys_count_as_the_kernel_has_them() -> None:
    """A polynomial is evaluated at the logits with their biases, unless the plan has a centre."""
    spec = ASSERTED.replace("h = std", "weight bk: float[8] = zeros()\n    h = std").replace(
        "h @ wk", "(h @ wk + bk)"
    )
    compiled = fg.compile(spec, target="torch")
    model = compiled.module()
    (before,) = compiled.certify(model)
    with torch.no_grad():
        model.get_parameter("bk").fill_(5.0)
    (after,) = compiled.certify(model)
    assert after.bound > 2 * before.bound
    assert after.range.centre is None


def test_a_training_step_is_not_disturbed() -> None:
    compiled = fg.compile(LIMITED, target="torch")
    model = compiled.module()
    out = model(torch.randn(1, 5, 16)).square().mean()
    compiled.certify(model)
    out.backward()
    compiled.certify(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_models_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no weight"):
        fg.compile(LIMITED, target="torch").certify(small("bounded").module())
