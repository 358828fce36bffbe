"""A sequence in pieces on several ranks gives what one process gives: results, gradients of weights and of inputs."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad_dsl as fg
from fastgrad_compiler.runtime.piece_run import PieceRun
from fastgrad_compiler.runtime.pieces import Layout, served
from fastgrad_dsl.api.loader import package_from_texts
from fastgrad_dsl.distributed import exchange as exchanges
from fastgrad_dsl.training.ranks import Mesh
from tests.dsl.ranks import RANKS, Case, run_cases, spawn
from tests.dsl.test_memory import Peak

pytestmark = pytest.mark.medium

N = 13
TOKENS = ("x", "ids", "keys")
EVEN = ((7, 6), (5, 4, 4), (4, 3, 3, 3))
RAGGED = ((1, 5, 7), (1, 1, 1, 10))
INPUTS = "x: float[b, n, 4], ids: int[b, n], keys: bool[b, n], memory: float[b, m, 4]"
POLYNOMIAL = "polynomial(q @ k.T; (1.0, 0.3, 0.5))"
NEAR = f"near_far(exp(r @ k.T), {POLYNOMIAL}; 2)"
ATTENDING = "x = x + normalize_rows({}) @ (x @ w_v)"
GATES = "log_sigmoid(mean(x; axis = -1))"

PIECES = {
    "exact": "x = x + softmax(causal(q @ k.T)) @ (x @ w_v)",
    "exact heads": "x = x + std.attention(x; heads = 2, kv_heads = 1, causal = true, rope = 100.0)",
    "exact documents": "x = x + softmax(causal(documents(q @ k.T, ids))) @ (x @ w_v)",
    "exact padding": "x = x + softmax(causal(padding(q @ k.T, keys))) @ (x @ w_v)",
    "exact forget": f"x = x + softmax(causal(forget(q @ k.T, {GATES}))) @ (x @ w_v)",
    "exact near": "x = x + softmax(causal(near_far(r @ k.T, q @ k.T; block = 2))) @ (x @ w_v)",
    "window": "x = x + softmax(causal(window(q @ k.T; width = 3))) @ (x @ w_v)",
    "alibi": "h = split_heads(x, 2)\nx = x + merge_heads(softmax(alibi(causal(h @ h.T))) @ h) @ w_v",
    "polynomial": ATTENDING.format(f"causal({POLYNOMIAL})"),
    "near": ATTENDING.format(f"causal({NEAR})"),
    "gates": ATTENDING.format(f"decay(causal({POLYNOMIAL}), {GATES})"),
    "near gates": ATTENDING.format(f"decay(causal({NEAR}), {GATES})"),
    "documents": ATTENDING.format(f"causal(documents({POLYNOMIAL}, ids))"),
    "near documents": ATTENDING.format(f"causal(documents({NEAR}, ids))"),
    "padding": ATTENDING.format(f"causal(padding({POLYNOMIAL}, keys))"),
    "near gates padding": ATTENDING.format(f"decay(causal(padding({NEAR}, keys)), {GATES})"),
    "all": ATTENDING.format(f"decay(causal(documents(padding({NEAR}, keys), ids)), {GATES})"),
    "grouped heads": "x = x + std.kernel_attention(x; heads = 2, kv_heads = 1, qk_dim = 2, causal = true, near = 2, "
    "near_rope = 100.0, forget = true)",
    "layers": "repeat i in 2 {\nx = x + std.mixer(std.rms_norm(x); heads = 2, qk_dim = 2, near = 2) as mixers\n}",
    "convolution": "x = x + std.short_conv(x; width = 4)",
    "packed convolution": "x = x + std.short_conv_packed(x, ids; width = 4)",
    "shift": "x = x + 0.5 * shift(x; by = 2)",
    "rotary": "x = rotary(x; base = 100.0)",
    "sinusoid": "x = x + sinusoid(n, 4)",
    "positions": "x = x + 0.1 * unsqueeze(float(positions(n)); axis = -1)",
    "learned positions": "weight t: float[40, 4] = normal(std = 1.0)\nx = x + t[1:n + 1]",
    "memory": "x = x + shift(x)\ny = std.rms_norm(memory)\nx = x + softmax(x @ tanh(y).T) @ y",
    "memory by a polynomial": "x = x + shift(x)\n"
    "x = x + normalize_rows(polynomial(x @ memory.T; (1.0, 1.0, 0.5))) @ memory",
}
SINGLE = ("polynomial", "near gates padding", "exact", "window")  # in float32, too


def source(body: str) -> str:
    lines = ["weight w_q: float[4, 4] = normal(std = 0.5)", "weight w_k: float[4, 4] = normal(std = 0.5)"]
    lines += ["weight w_r: float[4, 4] = normal(std = 0.5)", "weight w_v: float[4, 4] = normal(std = 0.5)"]
    lines += [
        "q = x @ w_q",
        "k = x @ w_k",
        "r = x @ w_r",
        *body.split("\n"),
        "return x + 0.1 * (q + k + r) @ w_v",
    ]
    inside = "\n".join(f"    {line}" for line in lines)
    return f"use std\ndim b\ndim n\ndim m\nmodel m({INPUTS}) -> float[b, n, 4] {{\n{inside}\n}}\n"


def case(
    name: str,
    body: str,
    lengths: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    n: int = N,
    target: str = "torch",
) -> Case:
    compiled = fg.compile(source(body), target=target, validate=False)
    assert compiled.stepped().along == "n", name
    generator = torch.Generator().manual_seed(len(body) + n)
    inputs = {
        "x": torch.randn(2, n, 4, generator=generator, dtype=torch.float64).to(dtype),
        "ids": torch.randint(0, 4, (2, n), generator=generator).sort(1).values % 3,
        "keys": torch.rand(2, n, generator=generator) > 0.3,
        "memory": torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).to(dtype),
    }
    model = package_from_texts(compiled.modules).MODEL(0).to(dtype)
    given = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    upstream = torch.randn(2, n, 4, generator=generator, dtype=torch.float64).to(dtype)
    out: Tensor = model(**given)
    (out * upstream).sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    gradients |= {key: x.grad for key, x in given.items() if x.grad is not None}
    weights = {key: p.detach() for key, p in model.state_dict().items()}
    texts = compiled.modules
    return Case(name, texts, weights, inputs, TOKENS, upstream, out.detach(), gradients, lengths, dtype)


Found = dict[tuple[str, tuple[int, ...]], tuple[float, float, int, int]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Found, dict[str, Any]]]:
    """What each rank found: see `ranks.run_cases`."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case(name, body, EVEN + RAGGED, torch.float64) for name, body in PIECES.items()]
    cases += [case(f"{name} float32", PIECES[name], EVEN, torch.float32) for name in SINGLE]
    cases += [
        case(f"near of {4 * n}", PIECES["near gates padding"], ((n, n, n, n),), torch.float64, 4 * n)
        for n in (8, 16)
    ]
    torch.save(cases, folder / "cases.pt")
    spawn(run_cases, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def found(ranks: list[tuple[Found, dict[str, Any]]]) -> list[Found]:
    """By rank and case: the errors of results and gradients, the bytes that it sent, and the exchanges."""
    return [cases for cases, _ in ranks]


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_the_whole(name: str, found: list[Found]) -> None:
    for lengths in EVEN + RAGGED:
        for rank in range(len(lengths)):
            out, gradient, *_ = found[rank][name, lengths]
            assert out < 1e-11, (lengths, rank)
            assert gradient < 1e-11, (lengths, rank)


@pytest.mark.parametrize("name", SINGLE)
def test_pieces_in_float32(name: str, found: list[Found]) -> None:
    for lengths in EVEN:
        for rank in range(len(lengths)):
            out, gradient, *_ = found[rank][f"{name} float32", lengths]
            assert max(out, gradient) < 1e-5, (lengths, rank)


def test_bytes_do_not_depend_on_the_length(found: list[Found]) -> None:
    for rank in range(RANKS):
        short, long = (found[rank][f"near of {4 * n}", (n, n, n, n)][2:] for n in (8, 16))
        assert short == long


def test_bytes_of_an_attention(found: list[Found]) -> None:
    """The first of four ranks sends its sums to two, and a halo of two tokens to the next; gradients are the last's.

    Of each of two sequences sums of 15 features by 5 columns and a decay; of a token k, v, the near key, a gate, all in
    float64, and one byte of the mask.
    """
    sums, halo, masks = 2 * 8 * (15 * 5 + 1), 2 * 2 * 8 * (4 + 4 + 4 + 1), 2 * 2
    sent = [found[rank]["near of 32", (8, 8, 8, 8)][2] for rank in range(RANKS)]
    assert sent[0] == 2 * sums + halo + masks
    assert sent[-1] == 2 * sums + halo
    assert (
        sent[1] == sent[2] == (2 + 1) * sums + 2 * halo + masks
    )  # one way to one rank, the other way to two


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 16])
def test_sums_of_many_ranks(count: int, gates: bool, later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes: all earlier sums, each decayed by what is between, in log2 rounds, rounded up."""
    generator = torch.Generator().manual_seed(count)
    sums = torch.randn(count, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    logs = -torch.rand(count, 2, 3, 1, generator=generator, dtype=torch.float64)
    logs[count // 2, :, 0] = -torch.inf  # a document begins
    barrier, here = threading.Barrier(count), threading.local()
    rows: list[tuple[Tensor, list[int]]] = [(sums[0], [])] * count
    rounds = [0] * count

    def exchange(own: Tensor, sent: list[int], given: list[int], group: object) -> Tensor:
        rows[here.rank] = own, sent
        rounds[here.rank] += sum(sent)
        barrier.wait(60)
        found = [own[:0]]
        for source, size in enumerate(given):
            packed, splits = rows[source]
            found.append(packed.split(splits)[here.rank])
            assert len(found[-1]) == size
        barrier.wait(60)
        return torch.cat(found)

    def run(rank: int) -> Tensor:
        here.rank = rank
        layout = exchanges.RankLayout((1,) * count, rank, None)
        return layout.sum_of_others(sums[rank], logs[rank] if gates else None, later=later)

    monkeypatch.setattr(exchanges, "_exchange", exchange)
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(run, range(count)))
    wanted = torch.zeros_like(sums[0])
    for rank in reversed(range(count)) if later else range(count):
        torch.testing.assert_close(found[rank], wanted, rtol=1e-12, atol=1e-12)
        decayed = wanted * logs[rank].exp().unsqueeze(-1) if gates else wanted
        wanted = decayed + sums[rank]
    assert max(rounds) == math.ceil(math.log2(count))


class Alone(PieceRun):
    """One of the ranks of a layout, without the others."""

    def __init__(self, layout: Layout) -> None:
        self.alone = layout

    def enter(self, tokens: int, batch: int | None, device: torch.device) -> Layout:
        return self.alone


def test_a_piece_keeps_what_the_whole_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the backward pass, of as many tokens: what is read of sums, in float64, is made again, and takes more."""

    def nothing(own: Tensor, sent: list[int], given: list[int], group: object) -> Tensor:
        return own.new_zeros((sum(given), *own.shape[1:]))

    monkeypatch.setattr(exchanges, "_exchange", nothing)
    model = fg.compile(source(PIECES["grouped heads"]), target="torch", validate=False).module()
    x, ids = torch.randn(2, 512, 4), torch.zeros(2, 512, dtype=torch.int64)
    kept = []
    for pieces in (nullcontext(), served(Alone(exchanges.RankLayout((512,) * 3, 1, None)))):
        with pieces, Peak() as counted:
            out = model(x, ids, ids == 0, x)
            kept.append(counted.now)
            out.sum().backward()
    sequences, heads, width = 2, 2, 2
    assert kept[1] - kept[0] < sequences * 512 * heads * (width + 1) * 8


def test_sums_are_sent_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are begun before they can arrive, and waited for when they are needed."""
    may_arrive = threading.Event()

    def exchange(own: Tensor, sent: list[int], given: list[int], group: object) -> Tensor:
        assert may_arrive.wait(10)
        return torch.full((sum(given), *own.shape[1:]), 3.0)

    monkeypatch.setattr(exchanges, "_exchange", exchange)
    end = exchanges.RankLayout((1, 1), 1, None).begin_sum(torch.ones(1, 1, 2, 2), None)
    may_arrive.set()
    assert torch.equal(end(), torch.full((1, 1, 2, 2), 3.0))


def test_a_kernel_runs_while_sums_are_sent() -> None:
    """In both passes."""
    seen: list[str] = []

    class Recorded(exchanges.RankLayout):
        def begin_sum(self, sums: Tensor, log_decay: Tensor | None, *, later: bool = False) -> Any:
            seen.append("begins")
            end = super().begin_sum(sums, log_decay, later=later)

            def ended() -> Tensor:
                seen.append("ends")
                return end()

            return ended

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(["kernel"] if func.namespace == "fastgrad" else [])
            return func(*args, **(kwargs or {}))

    compiled = fg.compile(source(PIECES["near gates"]), target="torch", validate=False)
    x, ids = torch.randn(1, 4, 4), torch.zeros(1, 4, dtype=torch.int64)
    with served(Alone(Recorded((4,), 0, None))), Operations():
        compiled.module()(x, ids, ids == 0, x).sum().backward()
    assert seen == ["begins", "kernel", "ends"] * 2


def test_what_is_within_a_rank_is_sent_nowhere(found: list[Found]) -> None:
    for name in ("rotary", "sinusoid", "positions", "learned positions"):
        assert {found[rank][name, EVEN[2]][2:] for rank in range(RANKS)} == {(0, 0)}


# ---------------------------------------------------------------- whole models


def test_the_objective_and_its_gradients(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    for _, found in ranks:
        assert max(found["of a file"]) < 1e-11


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_with_data_parallel(how: str, ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """Two by two processes give the gradients of one, with weights that are on each or in parts."""
    for _, found in ranks:
        assert found[how] < 1e-11


def test_blocks_that_run_again(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """The same gradients, bit for bit, and a layer more keeps its input and its weights instead of all its values."""
    for _, found in ranks:
        assert found["made again"]["equal"]
        layer = found["made again"]["layer"]
        assert layer[True] < 0.4 * layer[False]


def test_heads_and_hidden_widths_in_parts(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """Each of five blocks of two layers sums up its result and its input's gradient; halves of two ranks are sent."""
    for _, found in ranks:
        assert found["tensor parallel"]["errors"] < 1e-11
        assert found["tensor parallel"]["sent"] == 2 * 2 * 5
        assert 0.5 < found["tensor parallel"]["share"] < 0.52  # norms are whole
        assert found["tensor parallel"]["refused"] == "2 heads or entries cannot be divided among 4 ranks"


@pytest.mark.parametrize("mesh", [Mesh(1, 2, 2), Mesh(2, 1, 2)])
def test_training_with_heads_in_parts(mesh: Mesh, ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """And the rest of the weights in parts over pieces of sequences, or over sequences; whole ones stay alike."""
    for _, found in ranks:
        errors = found["trained"][mesh]
        assert max(errors.values()) < 1e-11
        assert errors["copies"] == 0.0


def test_a_polynomial_in_place_of_exp(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """Whatever the length: one process is exact below the break-even length, and both are within the budget."""
    for _, found in ranks:
        assert found["in place of exp"] < 1e-11
        assert 1e-11 < found["eps"] < 1e-2


def test_with_guards(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    for _, found in ranks:
        assert found["guarded"] < 1e-11


def test_what_was_compiled_runs_without_it(ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    for _, found in ranks:
        assert found["compiled"] < 1e-11


REFUSED = {
    "no step form": "[FG502] model Bert has no step form, and so it cannot run on a piece of a sequence",
    "no token": "a rank has no token of the sequence",
    "too long": "20 tokens, but the model is declared for at most 16",
    "other sequences": "the ranks have pieces of different numbers of sequences: [1, 2, 1, 2]",
    "few tokens": "3 tokens are too few for 4 ranks",
    "within another": "context_parallel is within another one",
    "exact": "a guard of the policy exact cannot change an attention whose keys are in several pieces",
    "clamp": "a guard of the policy clamp cannot change an attention whose keys are in several pieces",
    "no mean": "[FG501] no value in pieces along n: an objective is a sum of means over tokens there",
    "two dims": "context_parallel takes one dimension of a mesh",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, ranks: list[tuple[Found, dict[str, Any]]]) -> None:
    """By every rank alike, so that none waits for another."""
    for _, found in ranks:
        assert found["refused"][what].startswith(REFUSED[what])
