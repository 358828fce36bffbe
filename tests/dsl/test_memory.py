"""Budgets of memory on models that run: what is measured beside what is expected, and gradients that stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad_dsl as fg
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.memory import Search, recomputed
from fastgrad_compiler.runtime import in_turn
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.documents.write import to_json
from fastgrad_dsl.models.memory import memory_document
from fastgrad_dsl.report.page import render_html
from tests.compiler.test_memory import DEEP
from tests.grids import wide

SMALL = """
use std
dim b
dim n <= 512
block layer(x: float[b, n, d]) -> float[b, n, d] {
    x = x + std.mixer(std.rms_norm(x); heads = 2, near = 8)
    return x + dropout(std.swiglu(std.rms_norm(x) as norm; hidden = 2 * d); p = 0.25)
}
model m(tokens: int[b, n]) -> float[b, n, 32] {
    weight table: float[32, 16] = normal(std = 0.5)
    x = embedding(table, tokens)
    repeat i in 4 { x = layer(x) as layers }
    return x @ table.T
}
objective loss(y: float[b, n, 32], t: int[b, n]) = cross_entropy(y, t)
"""


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made within it and held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.now -= size


def limited(text: str, memory: float, n: int, **options: Any) -> Compiled:
    """Compiled with a budget of so many bytes at n tokens."""
    budget = f"\nbudget {{\n    memory <= {memory!r}\n}}\n"
    return fg.compile(text + budget, dims={"n": n}, validate=False, **{"target": "torch", **options})


def expected(program: Program) -> float:
    document = memory_document(program)
    assert document is not None
    return document.bytes


def of_small(compiled: Compiled, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    tokens, targets = torch.randint(0, 32, (2, 1, n), generator=generator)
    return compiled.module(seed=0), tokens, targets


def gradients(compiled: Compiled, n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The loss, and the gradients of weights, with the same dropout each time."""
    model, tokens, targets = of_small(compiled, n)
    model.to(dtype).train()
    assert compiled.loss is not None
    torch.manual_seed(3)
    value = compiled.loss.of(model, (tokens,), (targets,))
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **found}


@pytest.mark.parametrize("share", wide((2.0, 0.8, 0.6, 0.45), few=(2.0, 0.45)))
def test_peak_is_as_expected(share: float) -> None:
    text = DEEP.replace("float[b, n, 16]", "float[b, n, 32]")
    n = 2048
    largest = Search(fg.compile(text, target="torch", validate=False).program, {"b": 1, "n": n}).held({}).peak
    compiled = limited(text, share * largest, n)
    assert compiled.program.memory is not None
    assert compiled.program.memory.piece is None
    assert bool(recomputed(compiled.program)) == (share < 1)
    model = compiled.module(seed=0)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x, t = torch.randn(2, 1, n, 32)
    assert compiled.loss is not None
    compiled.loss.of(model, (x,), (t,)).backward()
    with Peak() as measured:
        compiled.loss.of(model, (x,), (t,)).backward()
    assert expected(compiled.program) == pytest.approx(measured.peak, rel=0.1)


def some_limits(n: int) -> Iterator[float]:
    program = fg.compile(SMALL, target="torch", validate=False).program
    for option in Search(program, {"b": 1, "n": n}).options()[1:]:
        yield option.held.peak


def test_made_again_is_the_same() -> None:
    """Bit for bit, dropout included."""
    kept = gradients(limited(SMALL, 1e12, 64), 64)
    for limit in list(some_limits(64))[::2]:
        compiled = limited(SMALL, limit, 64)
        assert recomputed(compiled.program)
        found = gradients(compiled, 64)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], kept[key]) for key in kept)


def in_pieces_of(tokens: int, n: int = 512) -> Compiled:
    """SMALL, without dropout, as it is planned where only pieces of so many tokens fit."""
    compiled = limited(SMALL.replace("p = 0.25", "p = 0.0"), 1e12, n)
    last = compiled.stages[-1]
    assert last.program.memory is not None
    program = replace(last.program, memory=replace(last.program.memory, piece=tokens))
    return replace(compiled, stages=(*compiled.stages[:-1], replace(last, program=program)))


def test_pieces_are_the_whole() -> None:
    compiled, whole = in_pieces_of(64), limited(SMALL.replace("p = 0.25", "p = 0.0"), 1e12, 512)
    for n in (150, 64, 1):
        kept = gradients(whole, n)
        found = gradients(compiled, n)
        for key, x in kept.items():
            torch.testing.assert_close(found[key], x, rtol=1e-9, atol=1e-12)


def test_pieces_give_back_what_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each run of each: what a piece leaves for later ones would keep its freed memory from the system."""
    asked: list[int] = []
    monkeypatch.setattr(in_turn, "_TRIM", asked.append)
    gradients(in_pieces_of(64), 150)
    assert asked == [0] * (2 * 3)


def test_nothing_else_changes() -> None:
    """Results, without gradients and under torch.func, and code that was written and loaded."""
    compiled = limited(SMALL, next(some_limits(64)), 64)
    model, tokens, _ = of_small(compiled, 64)
    plain = limited(SMALL, 1e12, 64).adopt(model).eval()
    model.eval()
    assert torch.equal(model(tokens), plain(tokens))
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))

    def total(weights: dict[str, Tensor], of: nn.Module) -> Tensor:
        results: Tensor = torch.func.functional_call(of, weights, (tokens,))
        return results.square().mean()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    first, second = (torch.func.grad(total)(weights, each) for each in (model, plain))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_written_and_loaded(tmp_path: Path) -> None:
    compiled = limited(SMALL, next(some_limits(64)), 64)
    compiled.write(tmp_path / "build")
    code = (tmp_path / "build" / "model.py").read_text(encoding="utf-8")
    assert "recomputed(" in code
    loaded = fg.load(tmp_path / "build").train()
    model, tokens, _ = of_small(compiled, 64)
    loaded.load_state_dict(model.state_dict())
    for each in (loaded, model.train()):
        torch.manual_seed(1)
        each(tokens).square().mean().backward()
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_documents() -> None:
    for compiled in (limited(SMALL, next(some_limits(64)), 64), in_pieces_of(64)):
        memory = compiled.plan_document.memory
        assert memory is not None
        (chosen,) = (point for point in memory.points if point.chosen)
        assert (chosen.bytes, chosen.time, chosen.piece) == (memory.bytes, memory.time, memory.piece)
        assert memory.bytes <= memory.limit
        assert memory.time >= 1
        report = compiled.report()
        assert report.memory == memory
        assert "memory" in to_json(report)
        assert "Time of a training step against its memory" in render_html(report)
    assert fg.compile(SMALL, target="torch", validate=False).plan_document.memory is None
