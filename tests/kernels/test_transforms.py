"""torch.func and forward mode on attention: jvp, linearize, jacobians, vmap, grad, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.exact_attention import exact_attention
from fastgrad_compiler.runtime.guard import Guard
from fastgrad_compiler.targets import BACKENDS
from tests import dense
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs, named

Attention = Callable[..., Tensor]
SPECS = {
    "unmasked": KernelSpec(3, 4, COEFFICIENTS[3], scale=0.5, chunk=8),
    "causal": KernelSpec(3, 4, COEFFICIENTS[2], causal=True, chunk=4),
    "padding": KernelSpec(3, 4, COEFFICIENTS[2], padding=True, chunk=4),
    "near": KernelSpec(3, 4, COEFFICIENTS[3], near=5, chunk=8),
    "causal near": KernelSpec(3, 4, COEFFICIENTS[2], True, True, near=4, near_d=2, chunk=4),
    "packed": KernelSpec(3, 4, COEFFICIENTS[2], chunk=4, documents=True, padding=True),
    "causal packed": KernelSpec(3, 4, COEFFICIENTS[4], causal=True, chunk=4, documents=True),
    "packed near": KernelSpec(3, 4, COEFFICIENTS[2], near=4, near_d=2, chunk=4, documents=True),
    "linear": KernelSpec(3, 4, COEFFICIENTS[1], causal=True),
    "forget": KernelSpec(3, 4, COEFFICIENTS[2], causal=True, chunk=4, forget=True),
    "forget near": KernelSpec(3, 4, COEFFICIENTS[2], True, True, near=4, near_d=2, chunk=4, forget=True),
    "forget packed": KernelSpec(3, 4, COEFFICIENTS[2], True, True, chunk=4, documents=True, forget=True),
}
WINDOWS = {
    "window": KernelSpec(3, 4, (), window=5),
    "causal window": KernelSpec(3, 4, (), causal=True, window=3, padding=True, documents=True),
    "forget window": KernelSpec(3, 4, (), causal=True, window=5, padding=True, forget=True),
}


def of_tensors(attend: Attention, inputs: Inputs, **options: object) -> Attention:
    """attend as a function of q, k, v and of near_q, near_k and log_gate where they are."""

    def function(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        masks = {"mask": inputs.mask, "documents": inputs.documents}
        return attend(q, k, v, **named(more), **masks, **options)

    return function


def kernel_and_dense(
    spec: KernelSpec, inputs: Inputs, exact: bool = False, backends: str = "torch"
) -> tuple[Attention, Attention]:
    kernel = load_kernel(spec, BACKENDS[backends])
    options: dict = {"scale": spec.scale, "causal": spec.causal, "near": spec.near, "window": spec.window}
    if spec.window is not None:
        return of_tensors(kernel, inputs), of_tensors(dense.softmax_attention, inputs, **options)
    reference = (
        dense.softmax_attention
        if exact
        else partial(dense.polynomial_attention, coefficients=spec.coefficients)
    )
    exact_below = {"exact_below": 1000 if exact else 0}
    return of_tensors(kernel, inputs, **exact_below), of_tensors(reference, inputs, **options)


def detached(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in inputs.tensors)


def random_like(tensors: tuple[Tensor, ...], seed: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in tensors)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("n", [1, 41])
@pytest.mark.parametrize("exact", [False, True], ids=["polynomial", "exact"])
@pytest.mark.parametrize("name", SPECS)
def test_tangents_are_those_of_the_dense_formula(
    name: str, exact: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six tiles meet each kind of state and window."""
    monkeypatch.setattr("fastgrad_compiler.runtime.tangent.TILE", 8)
    spec = SPECS[name]
    inputs = make_inputs(spec, n, heads=2, groups=2)
    kernel, reference = kernel_and_dense(spec, inputs, exact)
    primals = detached(inputs)
    tangents = random_like(primals)
    found, expected = (jvp(f, primals, tangents) for f in (kernel, reference))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert expected[1].abs().max() > 0 or n == 1


@pytest.mark.parametrize("name", WINDOWS)
def test_tangents_of_windows(name: str) -> None:
    inputs = make_inputs(WINDOWS[name], 41, groups=2)
    kernel, reference = kernel_and_dense(WINDOWS[name], inputs)
    primals = detached(inputs)
    tangents = random_like(primals)
    torch.testing.assert_close(jvp(kernel, primals, tangents), jvp(reference, primals, tangents))


@pytest.mark.parametrize("name", ["unmasked", "near"])
def test_tangents_of_cross_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad_compiler.runtime.tangent.TILE", 8)
    for n, m in ((9, 38), (38, 9)):
        inputs = make_inputs(SPECS[name], n, m)
        kernel, reference = kernel_and_dense(SPECS[name], inputs)
        primals = detached(inputs)
        tangents = random_like(primals)
        torch.testing.assert_close(jvp(kernel, primals, tangents), jvp(reference, primals, tangents))


EXACT = {
    "causal": {"causal": True},
    "near": {"near": 4},
    "window": {"window": 5},
    "scale": {"scale": -0.7, "causal": True},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", ["causal", "padding", "packed", "near"])
def test_tangents_of_exact_attention(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks of queries, and for whatever PyTorch's fused kernel served."""
    monkeypatch.setattr("fastgrad_compiler.runtime.exact_blocks.WORK_BYTES", 4096)
    inputs = make_inputs(SPECS[name], 41, groups=2)
    primals = detached(inputs)
    tangents = random_like(primals)
    given = {"scale": 0.5} | options
    found, expected = (
        jvp(of_tensors(f, inputs, **given), primals, tangents)
        for f in (exact_attention, dense.softmax_attention)
    )
    torch.testing.assert_close(found, expected)


def test_tangent_of_some_inputs() -> None:
    """What has no tangent counts as constant: each input's share adds up to the whole."""
    inputs = make_inputs(SPECS["causal near"], 11)
    kernel, _ = kernel_and_dense(SPECS["causal near"], inputs)
    primals = detached(inputs)
    tangents = random_like(primals)
    shares = []
    for place, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):

        def of_one(x: Tensor, place: int = place) -> Tensor:
            return kernel(*primals[:place], x, *primals[place + 1 :])

        shares.append(jvp(of_one, (primal,), (tangent,))[1])
        assert shares[-1].abs().max() > 0.01
    torch.testing.assert_close(sum(shares), jvp(kernel, primals, tangents)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tangents_in_other_precisions(dtype: torch.dtype, precision: str) -> None:
    spec = replace(SPECS["causal near"], precision=precision)
    inputs = make_inputs(spec, 41)
    kernel, reference = kernel_and_dense(spec, inputs)
    primals = tuple(x.to(dtype) for x in detached(inputs))
    tangents = random_like(primals)
    found = jvp(kernel, primals, tangents)[1]
    expected = jvp(reference, *(tuple(x.double() for x in given) for given in (primals, tangents)))[1]
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    ["causal near", *(pytest.param(name, marks=pytest.mark.slow) for name in ("causal", "packed", "window"))],
)
@pytest.mark.usefixtures("native")
def test_tangents_of_the_target_cpp(name: str) -> None:
    """The forward pass is C++'s, and its saved denominators and maxima serve the tangent."""
    spec = (SPECS | WINDOWS)[name]
    inputs = make_inputs(spec, 41, groups=2)
    kernel, reference = kernel_and_dense(spec, inputs, backends="cpp")
    primals = detached(inputs)
    tangents = random_like(primals)
    torch.testing.assert_close(jvp(kernel, primals, tangents), jvp(reference, primals, tangents))


@pytest.mark.parametrize("policy", ["warn", "exact", "clamp"])
def test_tangents_of_guarded_attention(policy: str) -> None:
    """Of the function that the guard makes of the call, by finite differences."""
    spec = SPECS["causal"]
    inputs = make_inputs(spec, 11, groups=2)
    guard = Guard(bound=(0.5, 0.6, 0.7, 0.8), source="data", policy=policy)
    kernel = of_tensors(load_kernel(spec), inputs, guard=guard.key)
    q, k, v = detached(inputs)
    primals = q, k * torch.linspace(0.8, 1.2, 11, dtype=k.dtype)[:, None], v
    tangents = random_like(primals)
    step = 1e-6
    ends = [
        kernel(*(x + sign * step * dx for x, dx in zip(primals, tangents, strict=True))) for sign in (1, -1)
    ]
    found = jvp(kernel, primals, tangents)[1]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)
    assert guard.status()["violations"] == 3
    other = jvp(of_tensors(load_kernel(spec), inputs), primals, tangents)[1]
    assert torch.equal(found, other) == (policy == "warn")


@pytest.mark.parametrize("spoilt", ["key", "tangent of a key", "tangent of a value", "tangent of a query"])
@pytest.mark.parametrize("name", ["padding", "causal packed", "near"])
def test_tangents_do_not_leak(name: str, spoilt: str) -> None:
    """A token that holds NaN, or whose tangent does, makes the rows NaN that see it, and no others."""
    spec = replace(SPECS[name], padding=True)
    inputs = make_inputs(spec, 23)
    assert inputs.mask is not None
    inputs.mask[:, 2], inputs.mask[:, 12] = False, True
    kernel, reference = kernel_and_dense(spec, inputs)
    primals = detached(inputs)
    tangents = random_like(primals)
    expected = jvp(reference, primals, tangents)[1]
    hidden = dense.hidden_pairs(23, 23, spec.causal, None, inputs.mask, inputs.documents)
    place = {"key": 1, "tangent of a query": len(primals)}.get(spoilt, len(primals) + 1 + ("value" in spoilt))
    for token in (2, 12):
        dirty = [x.clone() for x in (*primals, *tangents)]
        dirty[place][0, :, token] = torch.nan
        found = jvp(kernel, tuple(dirty[: len(primals)]), tuple(dirty[len(primals) :]))[1]
        rows = torch.zeros(2, 23, dtype=torch.bool)
        own = (torch.arange(23) == token) & ~hidden[0, 0].all(-1)
        rows[0] = own if "query" in spoilt else ~hidden[0, 0, :, token]
        seen = rows[:, None].expand(found.shape[:3])
        assert found[seen].isnan().all()
        torch.testing.assert_close(found[~seen], expected[~seen])


def test_forward_mode_of_autograd() -> None:
    inputs = make_inputs(SPECS["near"], 3, batch=1, heads=1)
    kernel, reference = kernel_and_dense(SPECS["near"], inputs)
    primals = detached(inputs)
    tangents = random_like(primals)
    found = []
    for function in (kernel, reference):
        with forward_ad.dual_level(), torch.no_grad():
            duals = map(forward_ad.make_dual, primals, tangents)
            found.append(forward_ad.unpack_dual(function(*duals)))
    torch.testing.assert_close(found[0].primal, found[1].primal)
    torch.testing.assert_close(found[0].tangent, found[1].tangent)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(kernel, inputs.tensors, check_forward_ad=True, **batched)


@pytest.mark.parametrize("name", ["causal near", "packed", "window"])
def test_jacobians(name: str) -> None:
    """jacrev maps the backward pass, jacfwd and linearize the tangent, vjp takes one."""
    spec = (SPECS | WINDOWS)[name]
    inputs = make_inputs(spec, 6, batch=1)
    kernel, reference = kernel_and_dense(spec, inputs)
    primals = detached(inputs)
    tangents = random_like(primals)
    places = tuple(range(len(primals)))
    expected = jacrev(reference, places)(*primals)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(kernel, places)(*primals), expected)
    _, linear = linearize(kernel, *primals)
    torch.testing.assert_close(linear(*tangents), jvp(reference, primals, tangents)[1])
    torch.testing.assert_close(
        vjp(kernel, *primals)[1](inputs.cotangent), vjp(reference, *primals)[1](inputs.cotangent)
    )


SECOND = {
    "hessian": lambda f, x: hessian(f)(x),
    "forward over reverse": lambda f, x: jvp(grad(f), (x,), (x,)),
    "reverse over forward": lambda f, x: grad(lambda y: jvp(f, (y,), (x,))[1])(x),
    "reverse over reverse": lambda f, x: grad(lambda y: grad(f)(y).square().sum())(x),
    "forward over forward": lambda f, x: jvp(lambda y: jvp(f, (y,), (x,))[1], (x,), (x,)),
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("name", ["causal", "exact"])
def test_second_derivatives_are_refused(name: str, second: Callable) -> None:
    inputs = make_inputs(SPECS["causal"], 5, batch=1)
    _, k, v = detached(inputs)
    attend = load_kernel(SPECS["causal"]) if name == "causal" else partial(exact_attention, causal=True)
    with pytest.raises(RuntimeError, match="second derivatives of polynomial attention"):
        second(lambda q: attend(q, k, v).square().sum(), inputs.tensors[0].detach())


def test_a_backward_pass_within_a_dual_level_is_refused() -> None:
    """Forward mode over loss.backward(), without torch.func."""
    inputs = make_inputs(SPECS["causal"], 5, batch=1)
    q, k, v = inputs.tensors
    with forward_ad.dual_level():
        out = load_kernel(SPECS["causal"])(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        with pytest.raises(RuntimeError, match="second derivatives of polynomial attention"):
            torch.autograd.grad(out.square().sum(), k)


@pytest.mark.parametrize("name", SPECS | WINDOWS)
def test_vmap_is_a_loop(name: str) -> None:
    """Over all inputs, masks and documents too, at several places, and over some with the others shared."""
    spec = (SPECS | WINDOWS)[name]
    several = [make_inputs(spec, 9, groups=2, seed=seed) for seed in range(3)]
    masks = {
        key: torch.stack([getattr(x, key) for x in several])
        for key in ("mask", "documents")
        if getattr(several[0], key) is not None
    }
    stacked = [torch.stack(tensors) for tensors in zip(*map(detached, several), strict=True)]
    attend = load_kernel(spec)

    def call(given: dict[str, Tensor]) -> Tensor:
        return attend(*(given[key] for key in "qkv"), **{k: x for k, x in given.items() if k not in "qkv"})

    given = dict(zip("qkv", stacked, strict=False)) | named(stacked[3:]) | masks
    expected = torch.stack([call({k: x[i] for k, x in given.items()}) for i in range(3)])
    torch.testing.assert_close(vmap(call)(given), expected)
    moved = {k: x.movedim(0, 1) for k, x in given.items()}
    torch.testing.assert_close(vmap(call, 1, 1)(moved), expected.movedim(0, 1))
    shared = {k: x if k == "q" else x[0] for k, x in given.items()}
    expected = torch.stack([call(shared | {"q": q}) for q in shared["q"]])
    in_dims = ({k: 0 if k == "q" else None for k in given},)
    torch.testing.assert_close(vmap(call, in_dims)(shared), expected)
    twice = vmap(vmap(call))({k: x[:, None].expand(3, 2, *x.shape[1:]) for k, x in given.items()})
    torch.testing.assert_close(
        twice,
        torch.stack([call({k: x[i] for k, x in given.items()}) for i in range(3)])[:, None].expand(
            3, 2, *twice.shape[2:]
        ),
    )


@pytest.mark.parametrize("policy", ["warn", "exact", "clamp"])
def test_vmap_of_guarded_attention(policy: str) -> None:
    """One call for all, in whose backward pass the guard's flag is as in its forward pass."""
    spec = SPECS["causal"]
    inputs = make_inputs(spec, 9)
    guard = Guard(bound=0.5, source="data", policy=policy)
    attend = load_kernel(spec)
    q, k, v = (x[:, None] for x in detached(inputs))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, guard=guard.key).square().sum()

    found = vmap(grad(loss, (0, 1, 2)))(q, k, v)
    expected = grad(loss, (0, 1, 2))(*(x[:, 0] for x in (q, k, v)))
    torch.testing.assert_close([x[:, 0] for x in found], list(expected))
    assert guard.status()["violations"] == 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(12, 20)
        self.attend = load_kernel(SPECS["causal"])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (2, 10)).transpose(-2, -3).split((3, 3, 4), -1)
        return self.attend(q, k, v).transpose(-2, -3).flatten(-2)


def test_gradients_of_samples() -> None:
    """vmap(grad(functional_call)) gives what a loop over samples and loss.backward() do."""
    layer, x = Layer(), torch.randn(4, 9, 12)
    weights: dict[str, Tensor] = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x.unsqueeze(0),)).square().mean()

    found, losses = vmap(grad_and_value(loss), (None, 0))(weights, x)
    for place, sample in enumerate(x):
        expected = torch.autograd.grad(loss(weights, sample), list(weights.values()))
        torch.testing.assert_close([g[place] for g in found.values()], list(expected))
    torch.testing.assert_close(losses.mean(), layer(x).square().mean())


def test_ensembles() -> None:
    """vmap over the weights of several models."""
    layers = [Layer() for _ in range(3)]
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        nn.init.normal_(layer.project.weight)
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(2, 9, 12)
    found = vmap(lambda weights: functional_call(layers[0], weights, (x,)))(stacked)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_are_compiled(transform: str) -> None:
    """torch.compile of a transform gives what it gives eagerly: no tangent is lost on the way."""
    inputs = make_inputs(SPECS["causal"], 9)
    q, k, v = (x.float() for x in detached(inputs))
    attend = load_kernel(SPECS["causal"])

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v).square().sum()

    functions = {
        "grad": grad(loss),
        "jvp": lambda q: jvp(loss, (q,), (torch.ones_like(q),))[1],
        "vmap": vmap(loss),
    }
    x = q[:, None] if transform == "vmap" else q
    if transform == "vmap":
        k, v = k[:1], v[:1]
    expected = functions[transform](x)
    compiled = torch.compile(functions[transform], backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert expected.abs().max() > 0


def test_opcheck_of_derivatives() -> None:
    """The operations of both derivatives as those of the forward pass (test_torch_features.py)."""
    spec = SPECS["forget near"]
    inputs = make_inputs(spec, 9)
    load_kernel(spec)
    from fastgrad_compiler.codegen.kernel import kernel_name

    operations = torch.ops.fastgrad
    given = (*detached(inputs), inputs.mask, None)
    results = getattr(operations, kernel_name(spec))(*given, 0, "")
    torch.library.opcheck(
        getattr(operations, f"{kernel_name(spec)}_backward"), (inputs.cotangent, *given, *results, 0, "")
    )
    torch.library.opcheck(
        getattr(operations, f"{kernel_name(spec)}_tangent"),
        (*random_like(detached(inputs)), *given, *results, 0, ""),
    )
