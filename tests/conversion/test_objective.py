"""Attention transfer: softmax's results, linear memory, and whose weights learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrad_dsl.conversion.inputs import Inputs, Texts
from fastgrad_dsl.conversion.objective import Distillation, exact_attention, relative_error
from fastgrad_dsl.conversion.run import _Work
from fastgrad_dsl.training.stopping import Stop
from tests.conversion.models import DECODER, ENCODER, request


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    shown = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None:
        shown &= mask[:, None, None]
    if causal:
        shown &= torch.ones(scores.shape[-2:]).tril().bool()
    weights = torch.softmax(scores.masked_fill(~shown, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_exact_results_are_those_of_softmax(causal: bool, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 9, 4, generator=generator) for heads in (4, 2, 2))
    mask = torch.arange(9) < torch.tensor([[9], [5], [0]]) if padded else None
    found = exact_attention(q, k, v, mask, causal=causal)
    torch.testing.assert_close(found, dense(q, k, v, mask, causal))


@pytest.mark.parametrize("spec", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_the_original_flows_through_the_converted_model(spec: str, tmp_path: Path) -> None:
    work = _Work(request(tmp_path, spec), shown=_Quiet(), stop=Stop())
    batch, _ = next(work.task.data.validation_batches(48, 2, 1))
    given = work.task.inputs.unpacked(batch)
    seen: list[Tensor] = []
    hook = work.model.register_forward_hook(lambda _, __, result: seen.append(result))
    with torch.no_grad():
        wanted = work.original(*given)
        error = work.transfer.of(work.model, (batch,), ())
        hook.remove()
        torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-5)
        assert error > 1e-3  # the attentions themselves are not there yet
        assert not torch.allclose(
            work.model(*given), wanted, atol=1e-3
        )  # and nothing is left of the watching
    assert len(work.sites) == 2


def test_only_the_attentions_own_weights_get_gradients(tmp_path: Path) -> None:
    work = _Work(request(tmp_path), shown=_Quiet(), stop=Stop())
    batch, _ = next(work.task.data.validation_batches(48, 2, 1))
    for weight in work.model.parameters():
        weight.requires_grad_(True)
    work.transfer.of(work.model, (batch,), ()).backward()
    gradients = {name: weight.grad for name, weight in work.model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(work.new)
    assert all(gradient.any() for gradient in gradients.values() if gradient is not None)


def test_an_attention_learns_apart_from_the_others(tmp_path: Path) -> None:
    work = _Work(request(tmp_path), shown=_Quiet(), stop=Stop())
    batch, _ = next(work.task.data.validation_batches(48, 2, 1))
    before = work.transfer.errors(work.model, batch)
    torch.testing.assert_close(work.transfer.of(work.model, (batch,), ()), before.mean())
    with torch.no_grad():
        for name in work.new:
            if name.startswith("layers.0."):
                work.model.get_parameter(name).add_(1.0)
    after = work.transfer.errors(work.model, batch)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_no_score_matrix_is_kept(tmp_path: Path) -> None:
    """What is saved for the backward pass of the attentions grows with the length, not with its square."""
    work = _Work(request(tmp_path), shown=_Quiet(), stop=Stop())

    def saved(tokens: int) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        batch = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
        for name, weight in work.model.named_parameters():
            weight.requires_grad_(name in work.new)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work.transfer.of(work.model, (batch,), ())
        return sum(sizes)

    assert saved(2048) < 2.2 * saved(1024)


def test_padding_does_not_count() -> None:
    y, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    other = y.clone()
    other[0, 2:] += 100
    assert relative_error(y, target, mask) == relative_error(other, target, mask)
    assert relative_error(y, target, None) < relative_error(other, target, None)


def test_the_error_of_unit_vectors_is_twice_one_minus_their_cosine() -> None:
    y, target = (torch.nn.functional.normalize(torch.randn(7, 5), dim=-1) for _ in range(2))
    cosine = (y * target).sum(-1).mean()
    torch.testing.assert_close(relative_error(y, target, None), 2 - 2 * cosine)


def test_distillation_of_several_results() -> None:
    class Two(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            x = self.scale * (tokens + 1.0).unsqueeze(-1).expand(-1, -1, 2)
            return x, x[:, 0]

    packed = torch.stack((torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.int64)), -1)
    inputs = Inputs(("tokens", "mask"))
    assert Distillation(Two(1.0), inputs).of(Two(1.0), (packed,), ()) == 0
    torch.testing.assert_close(Distillation(Two(1.0), inputs).of(Two(1.5), (packed,), ()), torch.tensor(0.25))


def test_texts_are_cut_and_padded() -> None:
    lines = tuple(torch.arange(1, size + 1, dtype=torch.int32) for size in (3, 6, 2))
    texts = Texts(lines, lines)
    packed, _ = texts.windows([0, 1], 5)
    assert packed[..., 0].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 6]]  # a text that is cut ends as it did
    assert packed[..., 1].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    whole, _ = Texts(lines, lines, padded=False).windows([0, 2], 5)
    assert whole[..., 0].tolist() == [[1, 3], [1, 2]]


class _Quiet:
    def say(self, line: str) -> None: ...

    def phase(self, name: object, options: object, events: object) -> None: ...
