"""The sections of the benchmark at tiny sizes: what they measure, extrapolate, leave out, and write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import anatomy, attention, generation, generation_table, peers, soak, tables, training
from benchmarks.linear_attention import elu_attention
from benchmarks.run import SECTIONS, merge
from benchmarks.settings import ROOT, Settings
from benchmarks.tables import best_of_each
from fastgrad_dsl.bench.contenders import make_inputs

SETTINGS = Settings(target="torch", threads=torch.get_num_threads(), repeats=1, seconds=60.0, quick=True)
GRID = attention.Grid(
    polynomials=((4, 2, None), (4, 2, 16), (32, 4, None)),
    lengths=(32, 64),
    only=((2, 3, 64),),
    memory_lengths=(),
    exact_d=4,
)
DOCUMENTED = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")


def documented(keys: set[str]) -> None:
    """Every key of the JSON stands in docs/benchmark.md."""
    missing = {key for key in keys if not re.search(rf"\b{key}\b", DOCUMENTED)}
    assert not missing


@pytest.fixture(autouse=True)
def without_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak takes a second to measure and has a test of its own."""
    monkeypatch.setattr(attention, "peak_flops", lambda threads: 1e11)


def test_attention_measures_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FROM", 32)
    section: Any = attention.measure(SETTINGS, GRID)
    found = [(cell["d"], cell["name"], cell["n"]) for cell in section["cells"]]
    assert sorted(found) == [
        (2, "degree 3", 64), (4, "SDPA", 32), (4, "SDPA", 64), (4, "degree 2", 32), (4, "degree 2", 64),
        (4, "degree 2, near 16", 32), (4, "degree 2, near 16", 64),
    ]  # fmt: skip
    assert [entry["reason"] for entry in section["skipped"]] == ["rank 58,905 is more than 20,000"]
    assert {entry["name"] for entry in section["slopes"]} == {"degree 2", "degree 2, near 16", "SDPA"}
    for cell in section["cells"]:
        assert cell["measured"]
        assert cell["peak_share_total"] == pytest.approx(cell["flops_total"] / cell["total_s"] / 1e11)
    documented(set(section) | set(section["cells"][0]) | set(section["slopes"][0]))
    json.dumps(section, allow_nan=False)


def test_attention_leaves_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST", 0.0)
    section: Any = attention.measure(SETTINGS, GRID)
    longer = {cell["name"]: cell for cell in section["cells"] if cell["n"] == 64 and cell["d"] == 4}
    assert set(longer) == {"SDPA"}
    assert longer["SDPA"]["extrapolated_from"] == 32
    assert not longer["SDPA"]["measured"]
    once = attention.Grid(GRID.polynomials, GRID.lengths, (), (), exact_d=4, exact_once=64)
    section = attention.measure(SETTINGS, once)
    assert [cell["measured"] for cell in section["cells"] if cell["name"] == "SDPA"] == [True, True]


def test_elu_attention_is_its_definition() -> None:
    inputs = make_inputs(12, 2, 4, 8, dtype=torch.float64)
    q, k = (torch.nn.functional.elu(x) + 1 for x in (inputs.q, inputs.k))
    weights = (q @ k.mT).tril()
    expected = weights / weights.sum(-1, keepdim=True) @ inputs.v
    for chunk in (3, 12):
        torch.testing.assert_close(elu_attention(inputs.q, inputs.k, inputs.v, chunk=chunk), expected)


@pytest.mark.slow
def test_peers_are_measured_or_named_with_the_reason() -> None:
    section: Any = peers.measure(SETTINGS, n=512)
    everyone = [(peer.name, peer.setting) for peer in peers.peers("torch")]
    measured = {(e["name"], e["setting"]): e for e in section["measured"]}
    missing = {(e["name"], e["setting"]): e for e in section["not_available"]}
    assert sorted(everyone) == sorted([*measured, *missing])
    assert {e["package"] for e in section["measured"]} >= {"fastgrad-dsl", "torch", "plain PyTorch"}
    assert all(e["reason"] for e in missing.values())
    errors = {name: e["output_error"] for (name, _), e in measured.items()}
    assert errors["SDPA"] < 1e-5
    assert errors["SDPA"] < errors["degree 4"] < errors["degree 3"] < errors["degree 2"] < 0.05
    assert errors["linear attention, elu features"] > errors["degree 2"]
    documented(set(section) | set(section["measured"][0]) | {"reason"})
    json.dumps(section, allow_nan=False)


def test_a_peer_whose_results_are_wrong_or_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(n: int) -> Any:
        raise ImportError("no module named what\nit needs")

    def infinite(n: int) -> Any:
        return lambda q, k, v: (q.sum() + k.sum() + v) / 0.0

    cases = [peers.Peer("broken", "s", "p", broken), peers.Peer("infinite", "s", "p", infinite)]
    monkeypatch.setattr(peers, "peers", lambda target: cases)
    section: Any = peers.measure(SETTINGS, n=8)
    assert [entry["reason"] for entry in section["not_available"]] == [
        "ImportError: no module named what",
        "ArithmeticError: its results are not finite",
    ]
    assert section["measured"] == []


def test_the_fastest_setting_stands_for_a_function() -> None:
    section = {
        "measured": [
            {"name": n, "setting": s, "total_s": t}
            for n, s, t in (("a", 1, 3.0), ("b", 1, 2.0), ("a", 2, 1.0))
        ]
    }
    assert [(entry["name"], entry["setting"]) for entry in best_of_each(section)] == [("a", 2), ("b", 1)]


def test_training_extrapolates_a_line_and_a_square() -> None:
    rows: list[dict[str, object]] = [
        {"model": "sdpa", "n": n, "seconds": 3.0 * n + 0.5 * n**2} for n in (10, 20)
    ]
    (row,) = training._extrapolations(rows, (10, 20, 40))
    assert row["seconds"] == pytest.approx(3 * 40 + 0.5 * 1600)
    assert (row["n"], row["measured"]) == (40, False)


@pytest.mark.slow
def test_the_anatomy_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "peak_flops", lambda threads: 1e11)
    monkeypatch.setattr(anatomy, "bandwidth", lambda: 1e10)
    section: Any = anatomy.measure(SETTINGS)
    for row in section["rows"]:
        assert set(row["shares"]) == set(section["parts"])
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0
        tokens, width, depth = row["n"], 256, 6
        gates = 8  # one for each key head
        weights = depth * width * (2 * 128 + 2 * width + gates + 3 * 4 * width)
        assert row["flops"] == {"products": 6 * tokens * weights, "loss": 6 * tokens * width * 256}
        assert row["floors"]["products"] == row["flops"]["products"] / 1e11
        assert row["rest_bytes"] > 4 * tokens * width * depth * 20
    documented(set(section) | set(section["rows"][0]))
    assert "| 64" in tables.anatomy(section)


@pytest.mark.medium
def test_training_models_are_what_they_are_called() -> None:
    """SDPA runs the model without its near field, with the same weights by name."""
    tokens = torch.randint(256, (1, 160), generator=torch.Generator().manual_seed(0))
    results = {}
    for name in training.MODELS:
        model, _ = training.make_model(name, "torch")
        with torch.no_grad():
            results[name] = model(tokens)
    same_function = (results["far"] - results["sdpa"]).norm() / results["sdpa"].norm()
    assert same_function < 0.05
    near_field = (results["near"] - results["reference"]).norm() / results["reference"].norm()
    assert near_field < 0.05
    assert (results["reference"] - results["sdpa"]).norm() / results["sdpa"].norm() > 1e-6


def test_merge_keeps_the_other_sections_in_order(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "performance.json"
    merge(file, "compiler", {"runs": 1})
    merge(file, "attention", {"cells": []})
    merge(file, "compiler", {"runs": 2})
    document = json.loads(file.read_text())
    assert document == {"format": 1, "sections": {"attention": {"cells": []}, "compiler": {"runs": 2}}}
    assert list(document["sections"]) == [name for name in SECTIONS if name in document["sections"]]


@pytest.mark.medium
def test_generation_measures_tokens_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"depth": 1, "d_model": 32, "heads": 2, "near": 4}
    models = {"mixer": small, "softmax": {**small, "softmax": True}}
    monkeypatch.setattr(generation, "MODELS", models)
    monkeypatch.setattr(generation, "QUICK_CONTEXTS", (64, 512))
    monkeypatch.setattr(generation, "MOST_STATE", 1.5e6)  # 16 caches of 512 tokens are larger
    section: Any = generation.measure(SETTINGS)
    found = {(row["model"], row["batch"], row["context"]): row for row in section["tokens"]}
    caches = [found["softmax", 1, context]["state_bytes"] for context in generation.QUICK_CONTEXTS]
    assert caches[1] - caches[0] == (512 - 64) * 2 * 32 * 4  # keys and values
    assert found["mixer", 1, 64]["state_bytes"] == found["mixer", 1, 512]["state_bytes"]
    assert {key for key, row in found.items() if row["seconds"] is None} == {("softmax", 16, 512)}
    documented(set(section) | set(section["tokens"][0]) | set(section["prompts"][0]))
    assert "| 16 | 512 |" in generation_table.generation({**section, "quick": True})


@pytest.mark.slow
def test_a_soak_compares_with_float64() -> None:
    section: Any = soak.measure(SETTINGS)
    assert [point["tokens"] for point in section["points"]] == [1024, 2048, 4096]
    assert all(point["difference"] < 1e-4 for point in section["points"])
    assert len({point["state_bytes"] for point in section["points"]}) == 1
    documented(set(section) | set(section["points"][0]))
    assert "| 4,096 |" in soak.soak(section)
