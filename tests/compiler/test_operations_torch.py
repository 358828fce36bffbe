"""What operations mean: every one has a definition, which agrees with torch's own or with autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, attributes
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.reference.operations_torch import DECLINED, TORCH
from fastgrad_compiler.reference.torch_env import Env
from tests.compiler.reference import REFERENCE, Array, reference
from tests.compiler.rule_cases import CASES as RULE_CASES
from tests.compiler.rule_cases import Case

ENV = Env({"n": 5}, torch.float64, torch.device("cpu"))


def apply(op: str, *inputs: Tensor, **values: Attribute) -> Tensor:
    result = TORCH[op](Node("x", op, attributes=attributes(**values)), list(inputs), ENV)
    assert isinstance(result, Tensor)
    return result


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_every_operation_is_defined_or_declined_by_name() -> None:
    assert set(TORCH) | set(DECLINED) == set(OPS)
    assert not set(TORCH) & set(DECLINED)


def test_heads() -> None:
    x = normal(2, 5, 12)
    split = apply("split_heads", x, heads=3)
    same(split, x.view(2, 5, 3, 4).permute(0, 2, 1, 3))
    same(apply("merge_heads", split), x)
    repeated = apply("repeat_heads", split, times=2)
    assert [bool((repeated[:, i] == split[:, i // 2]).all()) for i in range(6)] == [True] * 6


def test_patches_are_those_of_a_convolution() -> None:
    image, kernel = normal(2, 3, 8, 12), normal(7, 3, 4, 4, seed=1)
    patches = apply("patches", image, size=4)
    expected = functional.conv2d(image, kernel, stride=4).flatten(2).mT
    same(patches @ kernel.flatten(1).T, expected)


def test_slices_and_pads() -> None:
    x = normal(5, 3)
    part = apply("slice", x, axis=0, start=1, stop=Dim.of("n") - 1)
    same(part, x[1:4])
    same(apply("pad", part, axis=0, before=1, after=1)[1:4], part)
    same(apply("select", x, axis=-1, index=2), x[:, 2])


def test_embedding_gradient_is_the_transpose_of_embedding() -> None:
    table, ids, cotangent = normal(6, 3).requires_grad_(), torch.tensor([[1, 1, 5]]), normal(1, 3, 3, seed=1)
    (expected,) = torch.autograd.grad(apply("embedding", table, ids), table, cotangent)
    same(apply("embedding_gradient", cotangent, ids, rows=6), expected)


def test_norms() -> None:
    x, w, b = normal(2, 5, 8), normal(8, seed=1), normal(8, seed=2)
    same(apply("layer_norm", x, w, b, eps=1e-5), functional.layer_norm(x, (8,), w, b, 1e-5))
    same(apply("rms_norm", x, w, eps=1e-6), functional.rms_norm(x, (8,), w, 1e-6))
    same(apply("unit", x), functional.normalize(x, dim=-1))
    same(apply("unit", x * 1e-20).norm(dim=-1), (x * 1e-14).norm(dim=-1))


def test_losses() -> None:
    logits, targets = normal(2, 5, 7), torch.randint(7, (2, 5))
    same(
        apply("cross_entropy", logits, targets),
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )
    same(apply("mse", logits, logits + 2), torch.tensor(4.0, dtype=torch.float64))


def test_numbers_of_ints() -> None:
    whole = torch.tensor([1, 2])
    same(apply("div", whole, torch.tensor(4)), torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert apply("cast", whole, dtype="float").dtype == torch.float64
    same(apply("sum", whole.double(), axes=(), keepdim=False), whole.double())
    assert apply("arange", stop=Dim.of("n")).tolist() == [0, 1, 2, 3, 4]


def test_rotary_depends_on_distances_only() -> None:
    q, k = normal(1, 8).expand(6, 8), normal(1, 8, seed=1).expand(6, 8)
    scores = apply("rotary", q, base=100.0) @ apply("rotary", k, base=100.0).T
    same(scores[1:, 1:], scores[:-1, :-1])
    same(apply("rotary", apply("rotary", q, base=100.0), base=100.0, inverse=True), q)
    x = apply("rotary", torch.eye(8, dtype=torch.float64)[:1].expand(3, 8), base=100.0)
    same(x[2, [0, 4]], torch.tensor([math.cos(2), math.sin(2)], dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 3, 7])
def test_depthwise_is_a_convolution_of_each_channel(width: int) -> None:
    x, w = normal(2, 5, 4), normal(width, 4, seed=1)
    padded = functional.pad(x.mT, (width - 1, 0))
    same(apply("depthwise", x, w), functional.conv1d(padded, w.flip(0).T.unsqueeze(1), groups=4).mT)
    later = functional.conv1d(functional.pad(x.mT, (0, width - 1)), w.T.unsqueeze(1), groups=4).mT
    same(apply("depthwise", x, w, reverse=True), later)
    cotangent = normal(2, 5, 4, seed=2)
    (expected,) = torch.autograd.grad(apply("depthwise", x, w.requires_grad_()), w, cotangent)
    same(apply("depthwise_weights", cotangent, x, width=width), expected)


def test_a_shift_stays_in_its_document() -> None:
    x, ids = torch.arange(1.0, 6.0, dtype=torch.float64).view(1, 5, 1), torch.tensor([[4, 4, 7, 4, 4]])
    assert apply("shift", x, ids, by=1).flatten().tolist() == [0, 1, 0, 0, 4]
    assert apply("shift", x, ids, by=-1).flatten().tolist() == [2, 0, 0, 5, 0]
    assert apply("shift", x, by=2).flatten().tolist() == [0, 0, 1, 2, 3]
    assert apply("shift", x, ids, by=3).flatten().tolist() == [0] * 5  # of an id that is there again
    assert apply("shift", x[:, :0], ids[:, :0], by=1).shape == (1, 0, 1)


def test_sinusoid() -> None:
    table = apply("sinusoid", length=Dim.of("n"), width=6)
    assert table.shape == (5, 6)
    angle = 3 * 10000 ** (-2 / 6)
    same(table[3, 2:4], torch.tensor([math.sin(angle), math.cos(angle)], dtype=torch.float64))


def test_alibi() -> None:
    assert apply("alibi", torch.zeros(1, 8, 3, 3))[0, 0].tolist() == [
        [0, -0.5, -1],
        [-0.5, 0, -0.5],
        [-1, -0.5, 0],
    ]
    assert apply("alibi", torch.zeros(1, 8, 3, 3))[0, 7, 2, 0] == -2 / 256


def test_masks() -> None:
    s = torch.zeros(1, 1, 4, 4)
    seen = {
        op: (apply(op, s, **values) == 0)[0, 0].int().tolist()
        for op, values in {"causal": {}, "window": {"width": 2}}.items()
    }
    assert seen["causal"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen["window"] == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert apply("padding", s, torch.tensor([[True, False, True, True]]), fill=-9.0)[0, 0, 3].tolist() == [
        0,
        -9,
        0,
        0,
    ]
    assert apply("documents", s, torch.tensor([[1, 1, 2, 2]]), fill=-9.0)[0, 0, 1].tolist() == [0, 0, -9, -9]
    again = apply("documents", s, torch.tensor([[1, 2, 1, 1]]), fill=-9.0)[0, 0]
    assert again[0].tolist() == [0, -9, -9, -9]  # a document is a run of equal ids
    assert again[3].tolist() == [-9, -9, 0, 0]
    prefix = apply("prefix", s, torch.tensor([3]), fill=-9.0)[0, 0]
    assert prefix[0].tolist() == [0, 0, 0, -9]
    assert prefix[3].tolist() == [0, 0, 0, 0]
    near = apply("near_far", s + 1, s, block=1)[0, 0].int().tolist()
    assert near == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_softmax_of_a_row_that_sees_nothing_is_zero() -> None:
    s = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    assert apply("softmax", s, axis=-1).tolist() == [[0, 0], [1, 0]]


# ---------------------------------------------------------------- against docs/operations.md, written in numpy

SUMS = {
    "matmul",
    "sum",
    "sum_to",
    "mean",
    "depthwise",
    "depthwise_weights",
}  # in any order, so that large terms may cancel or overflow
EDGES = (
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e300,
    -1e300,
    5e-324,
    1.0,
    -745.0,
    710.0,
    2.5,
    -2.5,
    2.0**63,
)


def drawn(case: Case, sizes: dict[str, int], rng: np.random.Generator, *, edges: bool) -> list[Array]:
    """Inputs of a case; `edges` draws floats at the edges of what operations are defined on."""
    found: list[Array] = []
    for node in case.graph.inputs:
        shape = tuple(dim.evaluate(sizes) for dim in node.tensor.shape)
        if node.tensor.dtype == "float":
            noise = rng.normal(size=shape)
            plain = np.abs(noise) if case.positive else noise
            possible = [x for x in EDGES if case.node.op not in SUMS or not 1e3 < abs(x) < math.inf]
            found.append(np.asarray(rng.choice(possible, shape) if edges else plain))
        elif node.tensor.dtype == "int":
            limit = sizes[case.ids] if isinstance(case.ids, str) else case.ids
            found.append(np.asarray(rng.integers(0, limit, shape) if limit else rng.integers(-3, 4, shape)))
        else:
            found.append(np.asarray(rng.random(shape) < 0.7))
    return found


@pytest.mark.sampled(60)
@pytest.mark.parametrize("edges", [False, True], ids=["normal", "edges"])
@pytest.mark.parametrize("op", sorted(set(RULE_CASES) & set(REFERENCE)))
def test_an_operation_is_what_its_specification_says(op: str, edges: bool) -> None:
    rng = np.random.default_rng(0)
    for case in RULE_CASES[op]:
        for n in (2, 4) if case.even else (1, 2, 5):
            sizes = {"b": 2, "n": n, "m": 3}
            arrays = drawn(case, sizes, rng, edges=edges)
            names = [node.name for node in case.graph.inputs]
            read = [arrays[names.index(name)] for name in case.node.inputs]
            expected = reference(op, read, case.values(sizes))
            tensors = [torch.from_numpy(x) for x in read]
            found = TORCH[op](case.node, tensors, Env(sizes, torch.float64, torch.device("cpu")))
            assert isinstance(found, Tensor)
            numbers = found.numpy()
            assert numbers.dtype == expected.dtype
            assert numbers.shape == expected.shape
            np.testing.assert_allclose(
                numbers, expected, rtol=1e-12, atol=1e-320 if edges else 1e-12, err_msg=str(case)
            )


# ---------------------------------------------------------------- attention

PLAIN: dict[str, Attribute] = {
    "roles": (), "causal": False, "scale": 0.3, "near": None, "window": None, "alibi": False,
    "bound": 1.0, "asserted": False, "proof": (),
}  # fmt: skip
POLYNOMIAL: dict[str, Attribute] = {
    "roles": (), "causal": False, "scale": 0.3, "near": None, "bound": 1.0, "coefficients": (1.0, 0.9, 0.6),
}  # fmt: skip
CASES: dict[str, dict[str, Attribute]] = {
    "plain": {},
    "causal": {"causal": True},
    "padding": {"roles": ("padding",)},
    "near": {"near": 2},
    "near, causal": {"near": 2, "causal": True},
    "near with its own logits": {"near": 2, "causal": True, "roles": ("near_q", "near_k", "padding")},
}


def attention_inputs(roles: tuple[str, ...], n: int = 7, m: int = 7) -> list[Tensor]:
    q, k, v = normal(2, 4, n, 3), normal(2, 2, m, 3, seed=1), normal(2, 2, m, 5, seed=2)
    mask = torch.ones(2, m, dtype=torch.bool)
    mask[0, 1] = mask[1, 3:] = False
    extra = {"near_q": normal(2, 4, n, 6, seed=3), "near_k": normal(2, 2, m, 6, seed=4), "padding": mask}
    return [q, k, v, *(extra[role] for role in roles)]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_sdpa(causal: bool) -> None:
    q, k, v = attention_inputs(())
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    same(apply("attention", q, k, v, **{**PLAIN, "causal": causal}), expected)


def test_attention_is_softmax_of_masked_scores() -> None:
    roles = ("near_q", "near_k", "padding")
    q, k, v, near_q, near_k, mask = attention_inputs(roles)
    k, v, near_k = (apply("repeat_heads", x, times=2) for x in (k, v, near_k))
    s = apply("near_far", near_q @ near_k.mT, 0.3 * q @ k.mT, block=2)
    s = apply("padding", apply("window", apply("causal", apply("alibi", s)), width=4), mask)
    values: dict[str, Attribute] = {
        **PLAIN,
        "roles": roles,
        "near": 2,
        "causal": True,
        "window": 4,
        "alibi": True,
    }
    found = apply("attention", *attention_inputs(roles), **values)
    same(found, apply("softmax", s, axis=-1) @ v)


@pytest.mark.parametrize("case", CASES)
def test_polynomial_attention_of_a_long_series_is_softmax_attention(case: str) -> None:
    series = tuple(1 / math.factorial(j) for j in range(30))
    inputs = attention_inputs(tuple(map(str, CASES[case].get("roles", ()))))  # type: ignore[arg-type]
    found = apply("poly_attention", *inputs, **{**POLYNOMIAL, **CASES[case], "coefficients": series})
    torch.testing.assert_close(
        found, apply("attention", *inputs, **{**PLAIN, **CASES[case]}), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("case", CASES)
def test_formulas_of_the_backward_are_the_gradient(case: str) -> None:
    values = {**POLYNOMIAL, **CASES[case]}
    inputs = attention_inputs(tuple(map(str, values["roles"])))  # type: ignore[arg-type]
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    cotangent = normal(2, 4, 7, 5, seed=9)
    expected = torch.autograd.grad(apply("poly_attention", *inputs, **values), floats, cotangent)
    node = Node("x", "poly_attention_backward", attributes=attributes(**values))
    found = TORCH[node.op](node, [*(x.detach() for x in inputs), cotangent], ENV)
    for mine, autograd in zip(found, expected, strict=True):
        same(mine, autograd)


def test_large_near_logits_do_not_overflow() -> None:
    inputs = attention_inputs(("near_q", "near_k", "padding"))
    inputs[3] = inputs[3] * 1000
    values: dict[str, Attribute] = {**POLYNOMIAL, **CASES["near with its own logits"]}
    assert apply("poly_attention", *inputs, **values).isfinite().all()
