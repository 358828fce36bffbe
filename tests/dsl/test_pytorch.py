"""Models and what PyTorch does to them: torch.func, pickles, the device "meta", sharding (docs/pytorch.md)."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgrad_dsl as fg
from tests.dsl.models import INPUTS, always_polynomial, disturbed, small

BUFFERS = """
dim b
model m(x: float[b, 4]) -> float[b, 4] {
    weight w: float[4] = normal(0, 1)
    repeat i in 2 {
        buffer scale: float[4] = constant(2.0)
        x = x * scale
    }
    return x * w
}
"""
GUARDED = """
dim b
dim n
model m(x: float[b, n, 8]) -> float[b, n, 8] {
    q = split_heads(x, 2)
    s = assume_bound(q @ q.T / 2.0, 2.0)
    return merge_heads(softmax(s) @ q)
}
budget {
    output <= 0.9
    at "*" degree = 2
    on_violation = warn
}
"""


def kernels(name: str) -> Any:
    return always_polynomial(small(name), disturbed(small(name).module()))


# ---------------------------------------------------------------- torch.func


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["bounded", "bert", "based", "spelled_out"])
def test_tangents_of_models(name: str) -> None:
    """In the direction of the gradient the tangent of the loss is the gradient's square, in both kinds of attention."""
    for model in (kernels(name).double(), small(name).reference(kernels(name)).double()):
        weights = {key: x.detach() for key, x in model.named_parameters()}

        def loss(weights: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            out = functional_call(model, weights, tuple(INPUTS[name]))
            return (out[0] if isinstance(out, tuple) else out).square().mean()

        gradients = grad(loss)(weights)
        found = jvp(loss, (weights,), (gradients,))[1]
        expected = sum(g.square().sum() for g in gradients.values())
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-9, atol=1e-12)
        assert expected > 0


@pytest.mark.parametrize("name", ["bounded", "bert"])
@pytest.mark.parametrize("exact", [False, True], ids=["polynomial", "exact"])
def test_gradients_of_samples(name: str, exact: bool) -> None:
    model = kernels(name).double()
    if exact:
        model = small(name).reference(model)
    weights = {key: x.detach() for key, x in model.named_parameters()}

    def loss(weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        out: Tensor = functional_call(model, weights, tuple(x.unsqueeze(0) for x in inputs))
        return out.square().mean()

    inputs = INPUTS[name]
    found = vmap(grad(loss), (None, *(0 for _ in inputs)))(weights, *inputs)
    for place in range(2):
        expected = grad(loss)(weights, *(x[place] for x in inputs))
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key][place], gradient)


def test_jacobians_of_a_model() -> None:
    model = kernels("vit").double()
    (pixels,) = INPUTS["vit"]
    corner = pixels[:1, :, :2, :2].clone()

    def of_corner(corner: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(corner, (0, 14, 0, 10)) + pixels[:1]
        out: Tensor = model(whole)[0]
        return out

    torch.testing.assert_close(jacfwd(of_corner)(corner), jacrev(of_corner)(corner))


def test_second_derivatives_of_the_reference() -> None:
    """The message that refuses them names a way: exact attention, where it is PyTorch's, in PyTorch's formula."""
    model = kernels("spelled_out").double()
    (tokens,) = INPUTS["spelled_out"]
    (name, weight), *_ = ((key, x.detach()) for key, x in model.named_parameters() if x.ndim == 1)

    def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda w: functional_call(model, {name: w}, (tokens,)).square().mean()

    with pytest.raises(RuntimeError, match=r"second derivatives of polynomial attention.*SDPBackend\.MATH"):
        hessian(loss(model))(weight)
    exact = loss(small("spelled_out").reference(model))
    with pytest.raises(RuntimeError, match="not implemented"):
        grad(lambda w: grad(exact)(w).square().sum())(weight)
    with sdpa_kernel(SDPBackend.MATH):
        found = hessian(exact)(weight)
    step = 1e-5
    direction = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    ends = [grad(exact)(weight + sign * step * direction) for sign in (1, -1)]
    torch.testing.assert_close(found @ direction, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- pickles

UNPICKLE = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, loss, guarded = pickle.load(file)
whole = torch.load(sys.argv[2], weights_only=False)
tokens = torch.load(sys.argv[3])
assert [status["calls"] for status in guarded.budget_status()] == [0]
found = [model(tokens), whole(tokens), loss(model(tokens), tokens), guarded(torch.ones(1, 900, 8))]
torch.save((found, guarded.budget_status()), sys.argv[4])
"""


@pytest.mark.medium
def test_pickles_are_read_by_a_new_process(tmp_path: Path) -> None:
    """By pickle and torch.save; a guarded model counts anew, by the same range and policy."""
    compiled, model, (tokens,) = small("bounded"), kernels("bounded"), INPUTS["bounded"]
    guarded: Any = fg.compile(GUARDED, target="torch").module()
    paths = [tmp_path / name for name in ("model.pickle", "model.pt", "tokens.pt", "out.pt")]
    plain = disturbed(compiled.module())
    assert compiled.loss is not None
    guarded(torch.ones(1, 900, 8))
    paths[0].write_bytes(pickle.dumps((plain, compiled.loss, guarded)))
    torch.save(model, paths[1])
    torch.save(tokens, paths[2])
    subprocess.run([sys.executable, "-c", UNPICKLE, *map(str, paths)], check=True)
    expected = [plain(tokens), model(tokens), compiled.loss(plain(tokens), tokens)]
    found, status = torch.load(paths[3])
    assert status == guarded.budget_status()
    assert status[0]["calls"] == 1
    expected.append(guarded(torch.ones(1, 900, 8)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_part(protocol: int) -> None:
    """Also of a block alone, of the exact reference, of several models at once, whose texts are held once."""
    model = kernels("bounded")
    for module in (model, model.layers, small("bounded").reference(model)):
        again = pickle.loads(pickle.dumps(module, protocol))
        assert type(again) is type(module)
        for found, expected in zip(again.state_dict().values(), module.state_dict().values(), strict=True):
            assert torch.equal(found, expected)
    one, three = (len(pickle.dumps([copy.deepcopy(model) for _ in range(n)], protocol)) for n in (1, 3))
    texts = sum(len(text) for text in small("bounded").modules.values())
    assert three - one < texts < one


class Wider(nn.Module):
    """A user's module around a generated one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(11, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(tokens))
        return out


def test_a_module_within_another_and_a_copy() -> None:
    model = Wider(kernels("bounded"))
    expected = model(*INPUTS["bounded"])
    for again in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(*INPUTS["bounded"]), expected)
        assert type(again.inner) is type(model.inner)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        torch.load(buffer, weights_only=True)


def _forward(model: nn.Module, results: Any) -> None:
    results.put(model(torch.zeros(1, 5, dtype=torch.int64)).detach().numpy())


@pytest.mark.slow
def test_a_spawned_process_takes_a_model() -> None:
    context = multiprocessing.get_context("spawn")
    results, model = context.SimpleQueue(), kernels("bounded")
    process = context.Process(target=_forward, args=(model, results))
    process.start()
    found = results.get()
    process.join()
    torch.testing.assert_close(torch.from_numpy(found), model(torch.zeros(1, 5, dtype=torch.int64)).detach())


# ---------------------------------------------------------------- the device "meta"


def on_meta(compiled: fg.Compiled, seed: int = 0) -> Any:
    with torch.device("meta"):
        model = compiled.module(seed)
    assert all(x.is_meta for x in model.parameters())
    return model


@pytest.mark.parametrize("name", ["bounded", "vit", "based"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_after_to_empty_are_those_of_the_seed(name: str, dtype: torch.dtype) -> None:
    compiled = small(name)
    expected = compiled.module(7, dtype=dtype).state_dict()
    for reset in (lambda model: model.reset_parameters(7), lambda model: fg.initialise(model, 7)):
        model = on_meta(compiled).to(dtype).to_empty(device="cpu")
        reset(model)
        found = model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_was_not_reset_is_nan() -> None:
    """Weights and buffers; constants of a plan, which no state_dict has: tests/compiler/test_plan_apply.py."""
    compiled = fg.compile(BUFFERS)
    expected = compiled.module(3)
    model = on_meta(compiled).to_empty(device="cpu")
    assert list(model.state_dict()) == ["w", "scale.0", "scale.1"]
    assert all(tensor.isnan().all() for tensor in model.state_dict().values())
    x = torch.randn(2, 4)
    assert model(x).isnan().all()
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(x), expected(x))
    model.to_empty(device="cpu").reset_parameters(3)
    assert torch.equal(model(x), expected(x))


def test_nothing_is_drawn_on_meta() -> None:
    """Not even from a generator of the user's, nor where the model is used before it has memory."""
    state = torch.get_rng_state()
    model = on_meta(small("bounded"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.zeros(1, 5, dtype=torch.int64, device="meta")).shape == (1, 5, 11)
    model.reset_parameters(1)
    assert all(x.is_meta for x in model.parameters())


# ---------------------------------------------------------------- several processes


def _train(rank: int, store: str, result: str, way: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    compiled = small("bounded")
    assert compiled.loss is not None
    if way == "ddp":
        inner: Any = compiled.module(5)
        model: Any = nn.parallel.DistributedDataParallel(inner)
    else:
        mesh = init_device_mesh("cpu", (2,))
        inner = on_meta(compiled)
        for layer in inner.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(inner, mesh=mesh)
        model.to_empty(device="cpu")
        assert all(x.to_local().isnan().all() for x in model.parameters())
        model.reset_parameters(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        tokens = INPUTS["bounded"][0][rank : rank + 1]
        compiled.loss(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    if way == "ddp":
        state = inner.state_dict()
    else:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, result)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(way: str, tmp_path: Path) -> None:
    """Half of the batch each; sharded from the device "meta" where the way is FSDP2."""
    store, result = str(tmp_path / "store"), str(tmp_path / "state.pt")
    spawn(_train, (store, result, way), nprocs=2)
    compiled, (tokens,) = small("bounded"), INPUTS["bounded"]
    model = compiled.module(5)
    assert compiled.loss is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        compiled.loss(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.load(result)
    assert list(found) == list(model.state_dict())
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
