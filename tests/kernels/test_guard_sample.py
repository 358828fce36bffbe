"""What a guard's sample sees for certain (docs/guards.md), with every mask; and that its bounds are bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.runtime.guard import Guard
from fastgrad_compiler.runtime.logit_range import (
    LONGEST,
    SAMPLED,
    SPREAD,
    Pairs,
    Rows,
    choose_sample,
    norm_bound,
    rows_of,
    sampled_range,
)
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs

BASE = KernelSpec(d=3, dv=2, coefficients=COEFFICIENTS[2], scale=-0.7)
SPECS = {
    "plain": BASE,
    "causal": replace(BASE, causal=True),
    "near": replace(BASE, near=3),
    "causal near": replace(BASE, near=3, causal=True),
    "padding": replace(BASE, padding=True),
    "documents": replace(BASE, documents=True),
    "all": replace(BASE, near=2, causal=True, padding=True, documents=True),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
GROUPS = 2  # query heads that share a key head


def served(spec: KernelSpec, inputs: Inputs, n: int, m: int) -> Tensor:
    """bool [b, n, m]: the pairs that the polynomial serves."""
    i, j = torch.arange(n)[:, None], torch.arange(m)
    found = torch.ones(2, n, m, dtype=torch.bool)
    if spec.causal:
        found &= j <= i
    if spec.near is not None:
        found &= (i // spec.near - j // spec.near).abs() > 1
    if inputs.mask is not None:
        found &= inputs.mask[:, None]
    if inputs.documents is not None:
        runs = torch.nn.functional.pad(
            (inputs.documents[:, 1:] != inputs.documents[:, :-1]).cumsum(1), (1, 0)
        )
        found &= runs[:, :, None] == runs[:, None]
    return found


def sizes(spec: KernelSpec, inputs: Inputs) -> Tensor:
    """[b, h, G, n, m]: |s| of the pairs that the polynomial serves, 0 of others."""
    q, k = (x.detach() for x in inputs.tensors[:2])
    logits = (spec.scale * q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT).abs()
    return torch.where(served(spec, inputs, q.shape[2], k.shape[2])[:, None, None], logits, 0.0)


def varied(spec: KernelSpec, n: int, m: int | None = None, seed: int = 0) -> Inputs:
    """Queries and keys of many lengths, few of them long; documents of many tokens."""
    inputs = make_inputs(spec, n, m, groups=GROUPS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in inputs.tensors[:2]:
            x.mul_(torch.rand(x.shape[:-1], generator=generator, dtype=x.dtype).pow(-0.3).unsqueeze(-1))
    if inputs.documents is None:
        return inputs
    return replace(inputs, documents=(torch.arange(n) * 3 // n).expand(2, n).contiguous())


def rows_and_pairs(spec: KernelSpec, inputs: Inputs) -> tuple[Rows, Pairs]:
    q, k = (x.detach() for x in inputs.tensors[:2])
    return rows_of(q, k, inputs.mask, inputs.documents), Pairs(spec.scale, spec.causal, spec.near or 0)


def check(spec: KernelSpec, inputs: Inputs, guard: Guard) -> dict[str, object]:
    """What the guard has counted after one more call."""
    masks = {"mask": inputs.mask, "documents": inputs.documents}
    load_kernel(spec)(*inputs.tensors[:3], **masks, guard=guard.key)
    return guard.status()


def longest(norms: Tensor) -> Tensor:
    """bool like norms [b, h, n]: the LONGEST of each sequence and head."""
    return norms >= norms.topk(LONGEST).values[..., -1:]


@specs
@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_the_longest_queries_and_keys_are_seen(spec: KernelSpec, seed: int) -> None:
    """Every pair of such a query, and every pair of such a key: each is beyond R alone, and is found."""
    inputs = varied(spec, 60, seed=seed)
    rows, pairs = rows_and_pairs(spec, inputs)
    found = sizes(spec, inputs)
    queries = longest(rows.by_key_head(rows.q_norms))
    keys = longest(rows.k_norms)
    covered = queries.unsqueeze(-1) | keys[:, :, None, None]
    certain = torch.where(covered, found, 0.0).amax((0, 3, 4)).flatten()
    for turn in range(9):
        sample = choose_sample(rows, pairs, torch.tensor(turn))
        largest = sampled_range(rows, pairs, sample)
        truth = found.amax((0, 3, 4)).flatten()
        assert (largest >= certain * (1 - 1e-12)).all()
        assert (largest <= truth * (1 + 1e-12)).all()
        assert (torch.maximum(largest, sample.unseen) >= truth * (1 - 1e-12)).all()
        assert (norm_bound(rows, pairs) >= sample.unseen).all()


@specs
@pytest.mark.parametrize("which", ["query", "key"])
def test_one_pair_beyond_the_range_is_counted(spec: KernelSpec, which: str) -> None:
    """The least of the eight longest, in one head of one sequence, and the pair of it that is least likely seen."""
    inputs = varied(spec, 60)
    rows, _ = rows_and_pairs(spec, inputs)
    found = sizes(spec, inputs)[1, 1, 1]
    norms = rows.by_key_head(rows.q_norms)[1, 1, 1] if which == "query" else rows.k_norms[1, 1]
    for place in norms.topk(LONGEST).indices.tolist():
        row = found[place] if which == "query" else found[:, place]
        other = int(row.argmax())
        if row[other] == 0.0:
            continue
        i, j = (place, other) if which == "query" else (other, place)
        quiet = inputs.to(torch.float64)
        with torch.no_grad():
            q, k, _ = quiet.tensors
            moved = (
                q if which == "key" else k
            )  # the other one's direction, and not its length, makes the logit large
            index = (1, 3, i) if which == "key" else (1, 1, j)
            along = k[1, 1, j] if which == "key" else q[1, 3, i]
            moved[index] = along / along.norm() * moved[index].norm()
        size = sizes(spec, quiet)[1, 1, 1, i, j].item()
        guard = Guard(bound=(9e9, 9e9, 9e9, size * (1 - 1e-9)), source="data")
        assert check(spec, quiet, guard)["violations"] == 1
        guard = Guard(
            bound=(9e9, 9e9, 9e9, sizes(spec, quiet)[:, 1, 1].max().item() * (1 + 1e-9)), source="data"
        )
        assert check(spec, quiet, guard)["violations"] == 0


@pytest.mark.parametrize(("n", "m"), [(1, 50), (SAMPLED, 50), (50, 1), (50, SAMPLED), (SAMPLED, SAMPLED)])
@pytest.mark.parametrize("name", ["plain", "near", "padding"])
def test_few_queries_or_few_keys_are_seen_whole(name: str, n: int, m: int) -> None:
    inputs = varied(SPECS[name], n, m)
    rows, pairs = rows_and_pairs(SPECS[name], inputs)
    sample = choose_sample(rows, pairs, torch.tensor(0))
    truth = sizes(SPECS[name], inputs).amax((0, 3, 4)).flatten()
    assert torch.allclose(sampled_range(rows, pairs, sample), truth, rtol=1e-12, atol=0.0)
    assert not sample.unseen.any()


@specs
@pytest.mark.parametrize("n", [17, 60, 61])
def test_calls_take_turns(spec: KernelSpec, n: int) -> None:
    """In ceil(n / SPREAD) calls every query was looked at, wherever the pair that is beyond R may be."""
    inputs = varied(spec, n)
    rows, pairs = rows_and_pairs(spec, inputs)
    turns = -(-n // SPREAD)
    seen = torch.zeros(rows.q_norms.shape, dtype=torch.bool)
    for turn in range(turns):
        sample = choose_sample(rows, pairs, torch.tensor(turn))
        assert sample.queries is not None
        assert sample.queries.shape[-1] == SAMPLED
        seen.scatter_(2, sample.queries.flatten(1, 2), True)
    assert seen.all()
    largest = sizes(spec, inputs).max().item()
    guard = Guard(bound=largest * (1 - 1e-9), source="data")
    for _ in range(turns):
        status = check(spec, inputs, guard)
    assert status["violations"] >= 1  # type: ignore[operator]
    assert status["largest"] == pytest.approx(largest, rel=1e-12)


@pytest.mark.sampled(3)
@specs
def test_what_is_counted_is_a_bound(spec: KernelSpec) -> None:
    """largest <= the truth <= at_most <= norms; a call that is neither unsettled nor a violation is in range."""
    settled = 0
    for seed in range(8):
        inputs = varied(spec, 40, seed=seed)
        truth = sizes(spec, inputs).max().item()
        q = inputs.tensors[0]
        norms = abs(spec.scale) * (
            rows_and_pairs(spec, inputs)[0].k_norms.amax(-1).repeat_interleave(GROUPS, 1)
        )
        norms = (norms * q.norm(dim=-1).amax(-1)).max().item()
        for bound in (0.9 * truth, truth, 1.1 * truth, 1.5 * truth, norms * 1.01):
            guard = Guard(bound=bound, source="data")
            status = {
                name: float(str(value))
                for name, value in check(spec, inputs, guard).items()
                if name in NUMBERS
            }
            assert status["norms"] == pytest.approx(norms, rel=1e-12)
            assert status["at_most"] <= status["norms"] * (1 + 1e-12)
            assert truth <= status["at_most"] * (1 + 1e-12)
            assert status["proved"] or status["largest"] <= truth * (1 + 1e-12)
            assert status["proved"] + status["sampled"] == status["calls"] == 1
            assert status["sampled"] >= status["unsettled"] + status["violations"]
            if not status["unsettled"] and not status["violations"]:
                assert truth <= bound * (1 + 1e-12)
                settled += not status["proved"]
    assert settled


NUMBERS = ("calls", "proved", "sampled", "unsettled", "violations", "largest", "at_most", "norms")


@pytest.mark.parametrize("groups", [1, 3])
def test_work_of_a_sample(groups: int) -> None:
    """24 rows of logits a head, and nothing else that multiplies matrices."""
    n, d = 200, 16
    q, k = torch.randn(2, 2 * groups, n, d), torch.randn(2, 2, n, d)
    rows, pairs = rows_of(q, k, None, None), Pairs(0.25, True, 0)
    with FlopCounterMode(display=False) as counter:
        sampled_range(rows, pairs, choose_sample(rows, pairs, torch.tensor(3)))
    assert counter.get_total_flops() == 2 * 2 * groups * 24 * 2 * n * d


def test_heavy_tails_are_found() -> None:
    """Keys of a Student t distribution (3 degrees of freedom): the largest logit of a call is seen."""
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(40):
        q, k = torch.randn(2, 1, 2, 512, 16, generator=generator)
        tails = torch.randn(3, 1, 2, 512, 1, generator=generator).square().mean(0).sqrt()
        rows = rows_of(q, k / tails, None, None)
        pairs = Pairs(0.25, True, 0)
        truth = 0.25 * (rows.q @ rows.k.mT).tril().abs().amax((0, 2, 3))
        sample = choose_sample(rows, pairs, torch.tensor(0))
        found += bool((sampled_range(rows, pairs, sample) >= truth * 0.9999).all())
    assert found == 40
