"""The cross entropy of x @ w in chunks of tokens: against PyTorch's of the logits, in every mode, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgrad_compiler.runtime import linear_loss
from fastgrad_compiler.runtime.linear_loss import chunk_rows, linear_cross_entropy

WIDTH, CLASSES, TOKENS = 6, 11, 23
OPTIONS = [
    dict(zip(("smoothing", "ignored"), each, strict=True)) for each in product((0.0, 0.2), (None, 3, -100))
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four tokens, so that the last one is not full."""
    monkeypatch.setattr(linear_loss, "chunk_rows", lambda x, w: 4)


def drawn(dtype: torch.dtype = torch.float64, *, seed: int = 0, ignored: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, CLASSES, (TOKENS,), generator=generator)
    if ignored is not None:
        targets[::3] = ignored
    return {
        "x": normal(TOKENS, WIDTH),
        "w": normal(WIDTH, CLASSES),
        "targets": targets,
        "bias": normal(CLASSES),
    }


def dense(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
    ignored: int | None = None,
) -> Tensor:
    logits = x @ w if bias is None else x @ w + bias
    left_out = -(2**63) if ignored is None else ignored
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return F.cross_entropy(logits, targets, ignore_index=left_out, label_smoothing=smoothing)


def gradients(function: Callable[..., Tensor], given: dict[str, Any], **options: Any) -> list[Tensor]:
    value = function(**given, **options)
    return [value.detach(), *torch.autograd.grad(3 * value, [x for x in given.values() if x.requires_grad])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_the_logits(options: dict[str, Any], bias: bool) -> None:
    inputs = drawn(ignored=options["ignored"])
    if not bias:
        del inputs["bias"]
    for found, expected in zip(
        gradients(linear_cross_entropy, inputs, **options), gradients(dense, inputs, **options), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_numbers_are_as_near_the_truth_as_those_of_pytorch(dtype: torch.dtype) -> None:
    inputs = drawn(dtype)
    wide = {
        name: x.detach().double().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    truth = gradients(dense, wide)
    ours, theirs = gradients(linear_cross_entropy, inputs), gradients(dense, inputs)
    unit = torch.finfo(dtype).eps
    for found, other, expected in zip(ours, theirs, truth, strict=True):
        assert found.dtype == other.dtype == dtype
        size = expected.norm()
        assert (found.double() - expected).norm() <= 1.5 * (other.double() - expected).norm() + unit * size


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 7), st.integers(1, 12), st.integers(0, 99))
def test_any_shape_in_any_chunks(tokens: int, width: int, classes: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * 5
        for shape in ((2, tokens, width), (classes, width))
    )
    inputs = {
        "x": x.requires_grad_(),
        "w": w.requires_grad_(),
        "targets": torch.randint(0, classes, (2, tokens)),
    }
    tied = lambda function: lambda x, w, targets: function(x, w.T, targets)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "chunk_rows", lambda x, w: rows)
        found = gradients(tied(linear_cross_entropy), inputs)
    for one, other in zip(found, gradients(tied(dense), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_what_has_no_gradient_is_left_out() -> None:
    for frozen in (("x",), ("w", "bias"), ("x", "w"), ("x", "w", "bias")):
        inputs = drawn()
        for name in frozen:
            inputs[name].requires_grad_(False)
        if len(frozen) == 3:
            assert not linear_cross_entropy(**inputs).requires_grad
            continue
        for found, expected in zip(
            gradients(linear_cross_entropy, inputs), gradients(dense, inputs), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_a_target_that_is_no_class_is_an_error() -> None:
    inputs = drawn()
    for wrong in (-1, CLASSES, -100):
        inputs["targets"][5] = wrong
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            linear_cross_entropy(**inputs)
    assert linear_cross_entropy(**inputs, ignored=-100).isfinite()


def test_a_loss_of_nothing_is_nan_as_that_of_pytorch() -> None:
    inputs = drawn()
    inputs["targets"][:] = 2
    assert linear_cross_entropy(**inputs, ignored=2).isnan()
    assert dense(**inputs, ignored=2).isnan()


def test_hidden_classes_and_numbers_that_are_not_finite_as_pytorch_has_them() -> None:
    inputs = drawn()
    inputs["targets"][:] = 4
    with torch.no_grad():
        inputs["bias"][2] = -torch.inf
    for found, expected in zip(
        gradients(linear_cross_entropy, inputs), gradients(dense, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        inputs["x"][3, 1] = torch.nan
    assert linear_cross_entropy(**inputs).isnan()


# ---------------------------------------------------------------- modes of PyTorch


def test_torch_func() -> None:
    inputs = drawn()
    x, w, targets = (inputs[name].detach() for name in ("x", "w", "targets"))
    batch = torch.stack([x, 2 * x, x - 1])

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets, smoothing=0.1)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return dense(x, w, targets, smoothing=0.1)

    both = (0, 1)
    for transform in (
        lambda f: torch.func.grad(f, both)(x, w),
        lambda f: torch.func.jvp(f, (x, w), (w[:1].mean() + x, w.square())),
        lambda f: torch.func.vmap(f, (0, None))(batch, w),
        lambda f: torch.func.vmap(torch.func.grad(f, both), (0, None))(batch, w),
        lambda f: torch.func.grad(lambda w: torch.func.vmap(f, (0, None))(batch, w).sum())(w),
        lambda f: torch.func.jacfwd(f)(x, w),
        lambda f: torch.func.jacrev(f, 1)(x, w),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_gradcheck_in_both_modes() -> None:
    inputs = drawn()
    floats = tuple(inputs[name] for name in ("x", "w", "bias"))

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, inputs["targets"], bias)

    assert torch.autograd.gradcheck(loss, floats, check_forward_ad=True, check_batched_grad=True)


def test_second_derivatives_are_refused() -> None:
    inputs = drawn()
    (first,) = torch.autograd.grad(linear_cross_entropy(**inputs), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of the loss"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="second derivatives of the loss"):
        torch.func.hessian(lambda x: linear_cross_entropy(x, inputs["w"], inputs["targets"]))(
            inputs["x"].detach()
        )


@pytest.mark.medium
def test_torch_compile_in_one_graph_and_export() -> None:
    inputs = drawn()
    x, w, targets = (inputs[name] for name in ("x", "w", "targets"))

    class Head(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
            return linear_cross_entropy(x, w, targets)

    compiled = torch.compile(Head(), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (TOKENS, 9):
        found = compiled(x[:length], w, targets[:length])
        expected = dense(x[:length], w, targets[:length])
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
        ):
            torch.testing.assert_close(one, other)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    given = x.detach(), w.detach(), targets
    exported = torch.export.export(Head(), given, dynamic_shapes=({0: tokens}, None, {0: tokens}))
    torch.testing.assert_close(exported.module()(x[:9], w, targets[:9]), dense(x[:9], w, targets[:9]))


def test_checkpointing_changes_nothing() -> None:
    inputs = drawn()
    plain = gradients(linear_cross_entropy, inputs)

    def again(**given: Tensor) -> Tensor:
        found: Tensor = checkpoint(linear_cross_entropy, *given.values(), use_reentrant=False)
        return found

    assert all(map(torch.equal, gradients(again, inputs), plain))


def test_autocast_gives_what_it_gives_of_logits() -> None:
    inputs = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(linear_cross_entropy, inputs), gradients(dense, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.numel())
        return result


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "chunk_rows", chunk_rows)
    monkeypatch.setattr(linear_loss, "LEAST_ENTRIES", 1024)
    x, w = torch.randn(640, 8, requires_grad=True), torch.randn(8, 500, requires_grad=True)
    targets = torch.randint(0, 500, (640,))
    most = chunk_rows(x, w) * 500
    assert most <= 2 * (x.numel() + w.numel()) < x.shape[0] * 500 // 10
    with Largest() as seen:  # it does not see into an operation: the arithmetic by itself
        linear_loss._loss(x.detach(), w.detach(), targets, None, 0.1, 3, True, True)
    assert 0 < seen.entries <= most
    with Largest() as seen:
        linear_cross_entropy(x, w, targets).backward()
    assert seen.entries == x.numel()
    with Largest() as seen:
        dense(x, w, targets).backward()
    assert seen.entries == 640 * 500


def test_a_chunk_is_large_enough_for_a_small_model() -> None:
    assert chunk_rows(torch.empty(100, 4), torch.empty(4, 16)) == linear_loss.LEAST_ENTRIES // 16
