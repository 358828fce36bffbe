"""Guards of compiled models: where they stand, what `budget_status` says, and each policy at work in a whole model."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.torch import emit_package
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.models.measure import Served, measure_errors
from tests.dsl.models import small
from tests.grids import wide

SPEC = """
param heads = 2
param groups = 1
dim b
dim n

block attend(x: float[b, n, d]) -> float[b, n, d] {
    weight wq: float[d, d]
    weight wk: float[d, d / groups]
    weight wv: float[d, d / groups]
    q = split_heads(x @ wq, heads)
    k = split_heads(x @ wk, heads / groups)
    v = split_heads(x @ wv, heads / groups)
    s = assume_bound(q @ k.T / 2.0, 2.0)
    return merge_heads(softmax(MASK) @ v)
}

model m(x: float[b, n, 8]MORE) -> float[b, n, 8] {
    repeat i in 2 {
        x = x + attend(xPASS) as layers
    }
    return x
}

budget {
    output <= 0.9
    at "*" degree = 2
    on_violation = POLICY
}
"""
MASKS = {
    "free": ("s", ""),
    "causal": ("causal(s)", ""),
    "padding": ("padding(s, mask)", "mask: bool[b, n]"),
    "near": ("causal(near_far(q @ k.T / 3.0, s; 2))", ""),
    "documents": ("documents(causal(s), ids)", "ids: int[b, n]"),
}


@cache
def compiled(policy: str, mask: str = "free", target: str = "torch", groups: int = 1) -> Compiled:
    expression, more = MASKS[mask]
    text = SPEC.replace("MASK", expression).replace("POLICY", policy)
    text = text.replace("8]MORE", f"8], {more}" if more else "8]")
    text = text.replace("xPASS", f"x, {more.partition(':')[0]}" if more else "x")
    if more:
        text = text.replace("attend(x: float[b, n, d])", f"attend(x: float[b, n, d], {more})")
    return fg.compile(text, target=target, params={"groups": groups})


def modules(
    found: Compiled, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """A model whose kernels run at every length, queries scaled, and the exact model with its weights."""
    files = dict(found.modules)
    files["model.py"] = re.sub(r"exact_below=\d+", "exact_below=0", files["model.py"])
    model: nn.Module = package_from_texts(files).MODEL(0).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("wq"):
                weight.mul_(scale)
    return model, found.reference(model)


def inputs(mask: str, n: int = 7, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    found = [torch.randn(batch, n, 8, generator=generator, dtype=dtype)]
    if mask == "padding":
        found.append(torch.arange(n) < torch.tensor([n, max(1, n - 2)])[:batch, None])
    if mask == "documents":
        found.append((torch.arange(n) >= n // 2).long().expand(batch, n).contiguous())
    return found


def outcome(model: Any, given: list[Tensor]) -> list[Tensor]:
    out = model(*given)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> bool:
    return all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(found, expected, strict=True))


def status(model: Any, *names: str) -> list[Any]:
    return [tuple(one[name] for name in names) for one in model.budget_status()]


COUNTS = ("calls", "proved", "sampled", "violations")
OUT = 40.0
masks = pytest.mark.parametrize("mask", MASKS)
POLICIES = ("warn", "exact", "clamp", "raise")


# ---------------------------------------------------------------- where guards are


def test_paths_are_those_of_the_plan() -> None:
    found = fg.compile(
        """
        dim b
        dim n
        block twice(x: float[b, n, 4]) -> float[b, n, 4] {
            y = softmax(assume_bound(x @ x.T, 1.0)) @ x
            z = softmax(assume_bound(y @ y.T, 2.0)) @ y
            return z
        }
        block once(x: float[b, n, 4]) -> float[b, n, 4] {
            return softmax(assume_bound(x @ x.T, 3.0)) @ x
        }
        model m(x: float[b, n, 4]) -> float[b, n, 4] {
            x = twice(x)
            x = softmax(assume_bound(x @ x.T, 4.0)) @ x
            repeat i in 3 {
                x = once(x) as layers
                x = softmax(assume_bound(x @ x.T, 5.0)) @ x
            }
            return x
        }
        budget { at "*" degree = 2 }
        """,
        target="torch",
    )
    plan = {entry.path: entry.node["bound"] for entry in found.plan}
    assert len(plan) == 9
    assert dict(status(found.module(), "path", "bound")) == plan
    assert all(row == ("asserted", "warn", 0) for row in status(found.module(), "source", "policy", "calls"))


def test_only_ranges_that_are_not_proved_are_guarded() -> None:
    found = small("bounded")
    assert "Guard" not in found.modules["model.py"]
    assert found.module().budget_status() == []  # type: ignore[operator]
    assert compiled("warn").reference(compiled("warn").module()).budget_status() == []  # type: ignore[operator]


def test_a_source_and_ranges_by_head() -> None:
    """What a later pass sets on a node is what the guard is made of."""
    program = compiled("exact").program
    graphs = (
        replace(
            graph,
            nodes=tuple(
                node.with_attributes(source="weights", bound=(1.0, 2.0))
                if node.op == "poly_attention"
                else node
                for node in graph.nodes
            ),
        )
        for graph in program.graphs
    )
    text = emit_package(program.with_graphs(graphs), source="m.tfg")["model.py"]
    assert 'Guard(bound=(1.0, 2.0), source="weights", policy="exact")' in text


def test_two_models_count_apart() -> None:
    first, _ = modules(compiled("warn"))
    others = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), type(first)(0).double()]
    before = list(first.state_dict())
    first(*inputs("free"))
    assert status(first, "calls") == [(1,), (1,)]
    for other in others:
        assert status(other, "calls") == [(0,), (0,)]
        assert status(other, "path") == status(first, "path") == [("layers.0",), ("layers.1",)]
        other(*inputs("free"))
        assert status(other, "calls") == [(1,), (1,)]
    assert list(first.state_dict()) == before
    assert not any("guard" in name for name in before)
    assert status(first, "calls") == [(1,), (1,)]
    first.budget_status(reset=True)  # type: ignore[operator]
    assert status(first, "calls") == [(0,), (0,)]


# ---------------------------------------------------------------- policies


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("mask", "policy"),
    wide(product(MASKS, POLICIES), few=[*product(MASKS, ("exact",)), *product(("causal",), POLICIES)]),
)
def test_in_range_the_model_is_as_without_guards(mask: str, policy: str) -> None:
    model, _ = modules(compiled(policy, mask), 1e-3)
    files = dict(compiled(policy, mask).modules)
    files["model.py"] = re.sub(
        r", guard=[^)]*\)", ")", re.sub(r"exact_below=\d+", "exact_below=0", files["model.py"])
    )
    plain = package_from_texts(files).MODEL(0).double()
    plain.load_state_dict(model.state_dict())
    given = inputs(mask)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, given), outcome(plain, given), strict=True))
    assert status(model, *COUNTS) == [(1, 1, 0, 0)] * 2


@masks
@pytest.mark.parametrize(("n", "batch"), [(1, 1), (7, 2), (12, 1)])
def test_exact_is_the_exact_model(mask: str, n: int, batch: int, caplog: pytest.LogCaptureFixture) -> None:
    model, reference = modules(compiled("exact", mask), OUT)
    given = inputs(mask, n, batch)
    found = outcome(model, given)
    far = mask != "near" or n > 4
    assert status(model, "violations") == [(int(far),)] * 2
    assert not far or same(found, outcome(reference, given))
    outcome(model, given)
    assert len(caplog.records) == 2 * far  # each attention says it once


def test_exact_with_shared_keys() -> None:
    model, reference = modules(compiled("exact", groups=2), OUT)
    assert same(outcome(model, inputs("free")), outcome(reference, inputs("free")))


@masks
def test_warn_goes_on(mask: str, caplog: pytest.LogCaptureFixture) -> None:
    model, reference = modules(compiled("warn", mask), OUT)
    given = inputs(mask)
    first = outcome(model, given)
    assert same(outcome(model, given), first, 0.0)
    assert not same(first, outcome(reference, given), 1e-3)
    assert status(model, *COUNTS) == [(2, 0, 2, 2)] * 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["layers.0", "layers.1"]


@masks
def test_raise_names_the_path(mask: str) -> None:
    model, _ = modules(compiled("raise", mask), OUT)
    with pytest.raises(
        fg.BudgetViolation, match=r"^layers\.0: a logit of size [\d.]+ in head \d is beyond R = 2 \("
    ):
        model(*inputs(mask))
    assert status(model, "violations") == [(1,), (0,)]


@pytest.mark.sampled(2)
@masks
def test_clamp_has_its_gradient(mask: str) -> None:
    model, _ = modules(compiled("clamp", mask), OUT)
    x, *masks_ = inputs(mask, 5, 1)
    assert torch.autograd.gradcheck(lambda x: model(x, *masks_), (x.requires_grad_(),))
    assert all(row[0] for row in status(model, "violations"))
    assert not same([model(x, *masks_)], [modules(compiled("warn", mask), OUT)[0](x, *masks_)], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["exact", "clamp"])
def test_lower_precision(policy: str, dtype: torch.dtype) -> None:
    model, _ = modules(compiled(policy, "causal"), OUT, dtype)
    double = copy.deepcopy(model).double()
    found = outcome(model, inputs("causal", 9, dtype=dtype))
    expected = outcome(double, [x.double() for x in inputs("causal", 9, dtype=dtype)])
    assert found[0].dtype == dtype
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert max(errors) < {torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    assert status(model, "violations") == [(1,), (1,)]


@pytest.mark.medium
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("policy", POLICIES)
def test_the_native_target_keeps_the_policies(policy: str) -> None:
    given = inputs("causal", 9)
    model, _ = modules(compiled(policy, "causal", "cpp"), OUT)
    plain, _ = modules(compiled(policy, "causal", "torch"), OUT)
    if policy == "raise":
        with pytest.raises(fg.BudgetViolation):
            model(*given)
        return
    assert same(outcome(model, given), outcome(plain, given))
    assert status(model, *COUNTS) == status(plain, *COUNTS) == [(1, 0, 1, 1)] * 2


@pytest.mark.medium
@pytest.mark.parametrize("policy", ["exact", "clamp"])
def test_torch_compile_in_one_graph(policy: str) -> None:
    model, _ = modules(compiled(policy, "causal"), OUT)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 12):
        found, expected = outcome(fast, inputs("causal", n)), outcome(model, inputs("causal", n))
        assert same(found, expected)
    assert status(fast, *COUNTS) == [(4, 0, 4, 4)] * 2


def test_measured_errors_of_a_guarded_model() -> None:
    """A report compares with the exact model, whatever the guard does; with `exact` there is no error left."""
    given = inputs("causal", 9)
    served = [Served(f"layers.{i}", 0.1, 0.1, 0.5) for i in range(2)]
    errors = {}
    for policy in ("warn", "exact", "clamp", "raise"):
        model, reference = modules(compiled(policy, "causal"), OUT)
        errors[policy] = measure_errors(model, given, [], None, served).output
        if policy == "raise":
            continue
        distance = (model(*given) - reference(*given)).norm() / reference(*given).norm()
        assert errors[policy] == pytest.approx(distance.item(), abs=1e-9)
    assert errors["exact"] < 1e-9 < errors["clamp"]
    assert errors["raise"] == errors["warn"] > 1e-9
