"""Dense rows against the kernels: the errors of candidates are those of the attention that would run."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad_dsl as fg
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.value import Attention, Mask
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_dsl.calibration.calibrate import _gain
from fastgrad_dsl.calibration.candidates import whole_errors
from fastgrad_dsl.calibration.capture import Call, Errors, Run, Subject, capture, probe
from fastgrad_dsl.calibration.logits import measure_logits
from fastgrad_dsl.calibration.replan import _Measured
from fastgrad_dsl.calibration.samples import exact_rows, polynomial_errors, sample, sample_rows
from fastgrad_dsl.models.batches import model_inputs, random_batch

HEAD = "use std\ndim b\ndim n\n"
LAYER = "x = x + std.{block}(std.rms_norm(x){mask}; heads = 4, kv_heads = 2, qk_dim = 4{options}) as layers"
MODEL = (
    HEAD
    + "model m(x: float[b, n, 16]{inputs}) -> float[b, n, 16] {{\n    {layer}\n    return x @ x.T @ x\n}}\n"
)


def _spec(options: str = "", *, padded: bool = False) -> str:
    block, mask, inputs = (
        ("attention_padded", ", mask", ", mask: bool[b, n]") if padded else ("attention", "", "")
    )
    return MODEL.format(inputs=inputs, layer=LAYER.format(block=block, mask=mask, options=options))


CASES = {
    "unmasked": _spec(),
    "causal": _spec(", causal = true"),
    "padding": _spec(padded=True),
    "near and far": _spec(", causal = true, gain = 1.0, near = 4"),
    "rope": _spec(", causal = true, rope = 100.0"),
    "forget": _spec(", forget = true"),
    "forget, near and far": _spec(", forget = true, gain = 1.0, near = 4"),
}


def _subject(spec: str, n: int, seed: int = 0) -> tuple[Subject, tuple[Tensor, ...], Run]:
    compiled = fg.compile(spec)
    program: Program = next(stage.program for stage in compiled.stages if stage.name == "attention")
    batch = random_batch(model_inputs(program), {"b": 2, "n": n}, seed)
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    model = compiled.module(seed=0, dtype=torch.float64)
    subject = Subject(program, dict(model.state_dict()), None)
    return subject, batch, capture(subject, batch)


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_a_causal_attention_without_a_positive_scale_is_captured(scale: float) -> None:
    """PyTorch's fused kernel has no answer there."""
    head = f"weight w: float[16, 16] = normal()\n    y = split_heads(x @ w, 4)\n    s = {scale} * (y @ y.T)"
    spec = MODEL.format(inputs="", layer=f"{head}\n    x = merge_heads(softmax(causal(s)) @ y)")
    _, batch, run = _subject(spec, 9)
    (call,) = run.calls.values()
    assert (call.node["causal"], call.node["scale"]) == (True, scale)
    dense = TORCH["attention"](call.node, list(call.inputs), Env({}, torch.float64, batch[0].device))
    assert isinstance(dense, Tensor)
    assert torch.allclose(call.output, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 17])
def test_all_rows_give_the_errors_of_the_kernel(case: str, n: int) -> None:
    _, _, run = _subject(CASES[case], n)
    (call,) = run.calls.values()
    rows = sample(call)
    assert len(rows.rows) == n
    bound = max(max(measure_logits([call], None).magnitudes), 0.1)
    polynomial = fit("balanced", 2, bound)
    found = polynomial_errors(rows, exact_rows(rows), polynomial.coefficients, near=None)
    _, output, gradient = whole_errors(call, polynomial.coefficients, None, None)
    assert found.output_error(range(4)) == pytest.approx(output, rel=1e-6, abs=1e-9)
    assert found.gradient_error(range(4)) == pytest.approx(
        gradient, rel=0.35, abs=1e-9
    )  # the scale of q is folded in


@pytest.mark.parametrize("case", ["near and far", "forget, near and far"])
def test_near_pairs_do_not_hide_what_a_polynomial_does_to_its_own_queries(case: str) -> None:
    """Their logits and gradients are others: docs/training.md, "The budget"."""
    _, _, run = _subject(CASES[case], 33)
    (call,) = run.calls.values()
    rows, polynomial = sample(call), fit("minimax", 1, 1.0)
    found = polynomial_errors(rows, exact_rows(rows), polynomial.coefficients, near=None)
    assert found.scores_error(range(4)) > 2 * found.gradient_error(range(4))
    assert bool((found.scores < found.gradient).all())


class _Largest(TorchDispatchMode):
    """The most entries of a tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.numel())
        return result


MASKS = {
    "none": Attention(near=3),
    "causal": Attention(Mask(True), near=64),
    "window": Attention(Mask(window=9)),
    "operands": Attention(Mask(True, None, ("padding", "documents")), near=5),
    "gates": Attention(Mask(True, None, ("forget", "padding")), near=5),
}


@pytest.mark.parametrize("mask", MASKS)
def test_sampled_rows_are_made_without_the_others(mask: str) -> None:
    """Those of all rows, at a length at which all pairs would be hundreds of times more."""
    attention, n = MASKS[mask], 1500
    roles = {
        "forget": -torch.rand(2, 1, n, generator=torch.Generator().manual_seed(1)),
        "padding": torch.arange(n).expand(2, n) % 11 != 3,
        "documents": torch.arange(n).expand(2, n) // torch.tensor([[100], [450]]),
    }
    q, k, v = torch.randn(3, 2, 1, n, 2, generator=torch.Generator().manual_seed(0))
    inputs = (q, k, v, *(roles[role] for role in attention.roles))
    call = Call(attention.on(Node("y", "attention", ("q", "k", "v"))), inputs, v, v)
    rows = torch.tensor([0, 7, 749, n - 1])
    with _Largest() as largest:
        found = sample_rows(call, rows)
        near = found.near_pairs(50)
    assert largest.entries <= 2 * len(rows) * n
    every = sample_rows(call, torch.arange(n))
    assert torch.equal(found.visible, every.visible[:, :, rows])
    assert torch.equal(found.near, every.near[rows])
    assert torch.equal(near, every.near_pairs(50)[rows])
    assert torch.equal(found.gates, every.gates[:, :, rows] if "forget" in attention.roles else every.gates)


def test_a_near_field_of_the_rewrite_leaves_its_pairs_exact() -> None:
    _, _, run = _subject(CASES["causal"], 16)
    (call,) = run.calls.values()
    rows = sample(call)
    polynomial = fit("balanced", 2, 2.0)
    exact = exact_rows(rows)
    found = [polynomial_errors(rows, exact, polynomial.coefficients, near=near) for near in (None, 2, 8)]
    errors = [each.output_error(range(4)) for each in found]
    assert errors[0] > errors[1] > errors[2] == pytest.approx(0.0, abs=1e-12)


def test_centring_changes_no_exact_weight_and_narrows_shared_keys() -> None:
    """Keys with a large part in common: their mean taken away, small ranges remain, and the exact rows are the same."""
    spec = HEAD + (
        "model m(q: float[b, 2, n, 4], k: float[b, 2, n, 4], v: float[b, 2, n, 4]) -> float[b, 2, n, 4] {\n"
        "    weight w: float[4] = ones()\n    return softmax((q * w) @ k.T) @ v\n}\n"
    )
    compiled = fg.compile(spec)
    program = next(stage.program for stage in compiled.stages if stage.name == "attention")
    torch.manual_seed(0)
    q, v = torch.randn(1, 2, 9, 4).double(), torch.randn(1, 2, 9, 4).double()
    k = 0.1 * torch.randn(1, 2, 9, 4).double() + 2
    (call,) = capture(Subject(program, {"w": torch.ones(4).double()}, None), (q, k, v)).calls.values()
    logits = measure_logits([call], None)
    assert logits.mean
    assert logits.centring
    assert logits.centred is not None
    assert max(logits.centred) < 0.2 * max(logits.magnitudes)
    rows = sample(call)
    polynomial = fit("balanced", 10, max(logits.centred))
    centre = rows.k.mean(2, keepdim=True)
    found = polynomial_errors(rows, exact_rows(rows), polynomial.coefficients, near=None, centre=centre)
    assert found.output_error((0, 1)) < 1e-6
    assert found.gradient_error((0, 1)) < 1e-5


def test_ranges_are_those_of_the_visible_far_pairs() -> None:
    _, _, run = _subject(CASES["causal"], 16)
    (call,) = run.calls.values()
    q, k = call.inputs[:2]
    scores = float(str(call.node["scale"])) * q @ k.repeat_interleave(2, 1).mT
    seen = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), 0.0)
    logits = measure_logits([call], None)
    torch.testing.assert_close(torch.tensor(logits.magnitudes).double(), seen.abs().amax((0, 2, 3)))
    assert sum(map(sum, logits.counts)) == 2 * 4 * 16 * 17 // 2
    far = measure_logits([call], 4)
    assert max(far.magnitudes) <= max(logits.magnitudes)
    assert measure_logits([call], 16).magnitudes == (0.0,) * 4


@pytest.mark.parametrize("case", ["causal", "near and far"])
def test_gains_are_what_an_error_does_to_the_model(case: str) -> None:
    """Many probes against the effect itself: a small error of the attention is put in, and the model runs again."""
    subject, batch, run = _subject(CASES[case], 12)
    ((path, call),) = run.calls.items()
    polynomial = fit("balanced", 4, 2.0)
    errors, output, gradient = whole_errors(call, polynomial.coefficients, None, None)
    found = probe(subject, batch, run, {path: errors}, range(200))[path]
    output_gain = _gain([p.output for p in found], output)
    gradient_gain = _gain([p.gradient for p in found], gradient)
    moved_output, moved_gradient = _effect(subject, batch, run, errors, polynomial.coefficients)
    assert output_gain.low <= moved_output / output <= output_gain.high
    assert gradient_gain.low <= moved_gradient / gradient <= gradient_gain.high


def _effect(
    subject: Subject, batch: tuple[Tensor, ...], run: Run, errors: Errors, coefficients: tuple[float, ...]
) -> tuple[float, float]:
    """Relative changes of output and weights' gradients when the polynomial runs instead."""
    from fastgrad_compiler.reference.interpret import run as interpret
    from fastgrad_dsl.calibration.candidates import kernel_of
    from fastgrad_dsl.calibration.capture import exact
    from fastgrad_dsl.models.measure import projection

    (call,) = run.calls.values()
    results = []
    for attend in (
        lambda path, node, tensors: exact(node, tensors),
        lambda path, node, tensors: kernel_of(call, coefficients, None, None)(*tensors),
    ):
        weights = {name: w.detach().requires_grad_() for name, w in subject.weights.items()}
        out = interpret(subject.program, list(batch), weights, attend=attend)
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad((projection(out) * out).sum(), list(weights.values()))
        results.append((out.detach(), torch.cat([g.flatten() for g in gradients])))
    (out, gradient), (other, moved) = results
    return ((other - out).norm() / out.norm()).item(), ((moved - gradient).norm() / gradient.norm()).item()


def test_an_infinite_error_is_expected_again() -> None:
    assert _Measured((1e-3, inf, 2e-3), held_out=1).expected == inf


PADDED = """use std
dim b
dim n <= 8192
dim k <= 8192
model m(x: float[b, n, 16], mem: float[b, k, 16], mask: bool[b, k]) -> float[b, n, 16] {
    y = std.cross_attention_padded(x, mem, mask; heads = 2, qk_dim = 4) as att
    return x + y
}
budget {
    output <= 0.1
    gradient <= 0.3
}
"""


@pytest.mark.medium
def test_what_padding_holds_decides_nothing() -> None:
    compiled = fg.compile(PADDED, target="torch")
    model = compiled.module()

    def planned(fill: float) -> tuple[object, object]:
        generator = torch.Generator().manual_seed(3)
        batches = []
        for _ in range(2):
            x, memory = (torch.randn(1, n, 16, generator=generator) for n in (210, 230))
            mask = torch.rand(1, 230, generator=generator) < 0.8
            batches.append((x, torch.where(mask.unsqueeze(-1), memory * 0.3, fill), mask))
        found = compiled.calibrate(model, batches, measured_pace=False)
        return found.plan_document, found.calibration

    plan, calibration = planned(0.0)
    assert plan["attentions"][0]["decision"] == "polynomial"  # type: ignore[index]
    assert planned(1e3) == (plan, calibration)
    assert planned(1e30) == (plan, calibration)
    with pytest.raises(
        fg.TfgError, match=r"FG427.*exact model"
    ):  # 0 * NaN in the gradient of the weights of keys
        planned(nan)
