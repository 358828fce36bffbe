"""Kernels in float32 and bfloat16 against exact attention in float64: never further apart than eps and rounding allow.

The inputs are the worst that are known: rows of q of size R, keys near their negatives, where weights of e^-R come out
of terms that add up to e^R, and values of one sign or of both. From there they are moved at random, and what brings the
error nearer to its bound is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgrad_compiler.approximation.certificates import Certificate, certificate
from fastgrad_compiler.approximation.polynomial import MAX_DEGREE, Family, Polynomial, PrecisionError, fit
from fastgrad_compiler.approximation.rounding import (
    EXACT,
    UNITS,
    Run,
    Sizes,
    _drift,
    _vanished,
    rounding,
    torch_tile,
)
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.decay import log_decay
from fastgrad_compiler.runtime.polynomial_attention import plan
from fastgrad_compiler.targets import PYTORCH
from tests.dense import softmax_attention
from tests.kernels.inputs import make_inputs, run_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = ("output", "dq", "dk", "dv")
HEADS = 4  # each with a start of its own


@dataclass(frozen=True)
class Attack:
    """A kernel with the polynomial that it evaluates, and a run of it."""

    polynomial: Polynomial
    spec: KernelSpec
    dtype: str
    n: int

    def bounds(self) -> Certificate:
        """What is stated, rounding included."""
        p, sizes, run = self.polynomial, Sizes(self.n, self.n), Run("cpu", self.dtype)
        added = rounding(self.spec, sizes, p.bound, p.bound, PYTORCH, run)
        return certificate(p.eps, p.eps_prime, added)


def attack(bound: float, degree: int, dtype: str, precision: str, **options: object) -> Attack | None:
    """None where there is no polynomial that the planner could choose, or none within its bounds."""
    family: Family = "balanced"
    try:
        polynomial = fit(family, degree, bound)
    except PrecisionError:
        return None
    n = int(str(options.pop("n", 96)))
    made: dict[str, Any] = {"causal": True, "chunk": 16} | options
    spec = KernelSpec(2, 2, polynomial.coefficients, precision=precision, **made)
    if not polynomial.positive or polynomial.eps >= 1:
        return None
    found = Attack(polynomial, spec, dtype, n)
    return found if found.bounds().output_rounding < torch.inf else None


def starts(case: Attack, generator: torch.Generator) -> list[Tensor]:
    """q, k, v and the cotangent, [1, HEADS, n, width] in the dtype of the run, with |q.k| <= R."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, d, dv = case.n, case.spec.d, case.spec.dv
    direction = normalize(random(1, HEADS, 1, d), dim=-1)
    spread = torch.tensor([0.0, 0.03, 0.3, 3.0], dtype=torch.float64)[:, None, None]
    q = normalize(direction + spread * random(1, HEADS, n, d), dim=-1)
    k = normalize(-direction + spread * random(1, HEADS, n, d), dim=-1)
    v = random(1, HEADS, n, dv)
    v[:, ::2] = 1.0 + 0.1 * v[:, ::2]
    return [limited(x, case) for x in (q, k, v, random(1, HEADS, n, dv))]


def limited(x: Tensor, case: Attack) -> Tensor:
    """In the dtype of the run."""
    return x.to(DTYPES[case.dtype])


def within(case: Attack, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of norm R and keys of norm 1, a hair below, so that the rounding of the inputs does not matter."""
    room = 1 - 2.0**-6 if case.dtype == "bfloat16" else 1 - 2.0**-20
    queries = case.polynomial.bound * room * normalize(q.double(), dim=-1)
    keys = room * normalize(k.double(), dim=-1)
    return limited(queries, case), limited(keys, case)


def results(case: Attack, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of q, k and v: of the kernel in the dtype of the run, and exact in float64."""
    *inputs, cotangent = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    given = gates(case) if case.spec.forget else None
    out = load_kernel(case.spec)(*leaves, log_gate=given)
    found = [out, *torch.autograd.grad(out, leaves, cotangent)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wider = None if given is None else given.double()
    exact = softmax_attention(*wide, causal=case.spec.causal, near=case.spec.near, log_gate=wider)
    return found, [exact, *torch.autograd.grad(exact, wide, cotangent.double())]


def gates(case: Attack) -> Tensor:
    """Log gates of each head: almost 0, small, large, and such as forget all at some tokens."""
    generator = torch.Generator().manual_seed(case.n)
    sizes = torch.tensor([1e-4, 0.03, 3.0, 0.3], dtype=torch.float64)[:, None]
    found = -sizes * torch.rand(1, HEADS, case.n, generator=generator, dtype=torch.float64)
    found[:, 3, 7::16] = -torch.inf
    return limited(found, case)


def ratios(case: Attack, tensors: list[Tensor], proved: Certificate) -> Tensor:
    """The largest error over its bound, [4, HEADS], in the order of NAMES; 0 where both vanish."""
    found, wanted = results(case, tensors)
    q, k, v, cotangent = (x.detach().double()[0] for x in tensors)
    errors = [(a.detach().double() - b.detach()).abs()[0] for a, b in zip(found, wanted, strict=True)]
    seen = torch.ones(case.n, case.n, dtype=torch.bool)
    seen = seen.tril() if case.spec.causal else seen

    def most(x: Tensor) -> Tensor:
        """Over the keys that a query sees, the last but one dimension of [.., n, m, c]."""
        return x.masked_fill(~seen[..., None], -torch.inf).amax(-2)

    columns = v[:, None].expand(-1, case.n, -1, -1)
    spread, largest = most(columns) + most(-columns), most(columns.abs())
    pulled = cotangent[:, :, None] * columns
    total = pulled.sum(-1, keepdim=True)
    omega = (most(total) + most(-total))[..., 0]
    products = most(pulled.abs().sum(-1, keepdim=True))[..., 0]
    scores = proved.score_gradient * omega + proved.score_rounding * products
    longest = most(k.norm(dim=-1)[:, None, :, None].expand(-1, case.n, -1, 1))[..., 0]
    value = (proved.value_gradient + proved.value_rounding) * cotangent.norm(dim=-1).sum(-1)
    limits = [
        proved.output * spread + proved.output_rounding * largest,
        scores * longest,
        (scores * q.norm(dim=-1)).sum(-1),
        value,
    ]
    sizes = [errors[0], errors[1].norm(dim=-1), *(e.norm(dim=-1).sum(-1) for e in errors[2:])]
    shares = [(size / limit).nan_to_num(nan=0.0) for size, limit in zip(sizes, limits, strict=True)]
    return torch.stack([share.flatten(1).amax(1) if share.ndim > 1 else share for share in shares])


def ascent(case: Attack, steps: int, seed: int = 0) -> Tensor:
    """The largest ratios that were found, [4]; each head climbs one of them by itself."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, cotangent = starts(case, generator)
    best = [*within(case, q, k), v, cotangent]
    proved = case.bounds()
    found = ratios(case, best, proved)
    own = torch.arange(HEADS)
    highest = found.amax(1)
    for step in range(steps):
        size = 2.0 ** -(step % 6)
        moved = [
            limited(x.double() + size * torch.randn(x.shape, generator=generator, dtype=torch.float64), case)
            for x in best
        ]
        tried = [*within(case, *moved[:2]), *moved[2:]]
        there = ratios(case, tried, proved)
        better = there[own, own] > found[own, own]
        best = [torch.where(better[None, :, None, None], a, b) for a, b in zip(tried, best, strict=True)]
        found = torch.where(better, there, found)
        highest = torch.maximum(highest, there.amax(1))
    return highest


def planned(bound: float, degree: int, dtype: str, **options: object) -> Iterator[Attack]:
    """In float32 where there is a bound, and in float64."""
    for precision in ("float32", "float64"):
        case = attack(bound, degree, dtype, precision, **options)
        if case is not None:
            yield case


FAST = ((0.5, 3), (1.0, 4), (2.0, 6), (4.0, 8), (4.0, 12), (8.0, 14), (12.0, 18))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bound", "degree"), FAST)
def test_no_kernel_leaves_its_bound_with_rounding(bound: float, degree: int, dtype: str) -> None:
    cases = list(planned(bound, degree, dtype))
    assert cases, "neither float32 nor float64 serves"
    for case in cases:
        worst = ascent(case, steps=4)
        assert (worst <= 1).all(), dict(zip(NAMES, worst.tolist(), strict=True))
        assert (worst > 0).all(), "nothing was off"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"near": 8},
        {"causal": False, "near": 8},
        {"forget": True},
        {"forget": True, "near": 8},
    ],
    ids=str,
)
def test_other_masks_stay_within_it(options: dict[str, object]) -> None:
    cases = list(planned(3.0, 8, "float32", **options))
    assert [case.spec.precision for case in cases] == ["float32", "float64"]
    for case in cases:
        assert (ascent(case, steps=3) <= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0])
def test_every_degree_that_may_be_chosen(bound: float, dtype: str, causal: bool) -> None:
    for degree, n in itertools.product(range(1, MAX_DEGREE + 1), (96, 400)):
        for case in planned(bound, degree, dtype, causal=causal, n=n, chunk=None):
            worst = ascent(case, steps=4, seed=degree)
            assert (worst <= 1).all(), (degree, n, case.spec.precision, worst)


@pytest.mark.parametrize(("bound", "degree"), [(8.0, 14), (12.0, 18)])
def test_float32_alone_leaves_the_certificate_of_real_arithmetic(bound: float, degree: int) -> None:
    """The defect that the term mends: and float64 mends it."""
    single, double = (
        Attack(p, KernelSpec(2, 2, p.coefficients, True, precision=precision), "float32", 500)
        for p in (fit("balanced", degree, bound),)
        for precision in ("float32", "float64")
    )
    proved = certificate(single.polynomial.eps, single.polynomial.eps_prime, EXACT)
    assert single.bounds().output_rounding == torch.inf
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = starts(single, generator)
    tensors = [*within(single, q, k), v, cotangent]
    assert ratios(single, tensors, proved)[0].max() > 5
    assert ratios(double, tensors, double.bounds()).max() <= 1
    assert double.bounds().output_rounding < 0.01


@pytest.mark.parametrize("packed", [False, True])
def test_running_sums_of_gates_are_as_exact_as_the_bound_takes_them_to_be(packed: bool) -> None:
    """Small gates after many large ones: each running sum is rounded once, not in every addition."""
    n = 16_384
    generator = torch.Generator().manual_seed(0)
    found = -torch.rand(n, generator=generator, dtype=torch.float64)
    found[: n // 2] *= 1000.0
    ids = torch.zeros(1, n, dtype=torch.int64) if packed else None
    sums = log_decay(found[None, None], None, ids)[0, 0].tolist()
    exact, total = [], Fraction(0)
    for gate in found[1:].tolist():
        total += Fraction(gate)
        exact.append(total)
    limit = _drift(Sizes(n, n))
    for i in range(1, n - 1, 97):
        for j in (0, i // 2, i - 1, max(i - 100, 0)):
            difference = Fraction(sums[i + 1]) - Fraction(sums[j + 1])
            assert abs(difference - (exact[i] - exact[j])) <= limit
    assert limit < 1e-8


def test_what_gates_lead_to_0_is_counted() -> None:
    """Far below a roundoff, unless R is large; without gates nothing is added."""
    spec = KernelSpec(4, 3, fit("balanced", 4, 2.0).coefficients, causal=True)
    plain, forgetting = (
        rounding(each, Sizes(4096, 4096), 2.0, 2.0, PYTORCH, Run())
        for each in (spec, replace(spec, forget=True))
    )
    assert 1.0 < forgetting.weights / plain.weights < 3.0
    assert 1.0 < forgetting.slopes / plain.slopes < 3.0
    assert _vanished(spec, Sizes(4096, 4096), 2.0, 2.0)[0] < 1e-30
    assert _vanished(spec, Sizes(4096, 4096), 80.0, 80.0)[0] > 1.0


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("near", [None, 24])
@pytest.mark.parametrize(("d", "dv", "degree"), [(2, 3, 2), (16, 64, 3), (16, 64, 4), (8, 200, 5)])
def test_the_least_tile_is_that_of_the_kernel(
    d: int, dv: int, degree: int, near: int | None, groups: int
) -> None:
    """The bound counts tiles: none may be smaller than it takes them to be."""
    for causal, documents, forget in (
        *((True, False, False), (False, False, False), (False, True, False)),
        *((True, False, True), (True, True, True)),
    ):
        spec = KernelSpec(d, dv, (1.0,) * (degree + 1), causal, near=near, documents=documents, forget=forget)
        for dtype in (torch.float32, torch.float64):
            q, k, v = (torch.empty(1, h, 8, w, dtype=dtype) for h, w in ((groups, d), (1, d), (1, dv)))
            assert torch_tile(spec, groups) <= plan(spec, q, k, v)[0]
        assert torch_tile(spec, groups) == plan(spec, q, k, v)[0], "not larger than it needs to be"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_in_float64_keeps_dtypes_and_large_near_logits(dtype: torch.dtype) -> None:
    """The row maximum is stored in float32, up to 400 here, and the denominator makes its rounding good."""
    p = fit("balanced", 8, 4.0)
    spec = KernelSpec(2, 3, p.coefficients, near=4, near_d=3, precision="float64", chunk=8)
    made = make_inputs(spec, 40, local_size=400.0).to(dtype)
    found = run_kernel(spec, made)
    assert {x.dtype for x in found} == {dtype}
    wanted = run_kernel(spec, made.to(torch.float64))
    unit, least = UNITS[str(dtype).removeprefix("torch.")], torch.finfo(dtype).tiny
    for a, b in zip(
        found, wanted, strict=True
    ):  # O, D and the results are stored, and nothing else is rounded
        assert (a.double() - b).abs().max() <= 4 * unit * b.abs().max() + least


def test_short_sequences_are_exact_without_a_conversion() -> None:
    spec = KernelSpec(2, 3, fit("balanced", 4, 1.0).coefficients, precision="float64")
    plain = replace(spec, precision="float32")
    made = make_inputs(spec, 20).to(torch.float32)
    for a, b in zip(run_kernel(spec, made, 21), run_kernel(plain, made, 21), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(run_kernel(spec, made, 20)[0], run_kernel(plain, made, 20)[0])
