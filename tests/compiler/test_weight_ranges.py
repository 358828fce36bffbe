"""Ranges proved from weights: no logit leaves them, not even where an ascent looks for one, and they are no wider
than they must be.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from fastgrad_compiler.analysis.weights.ranges import weight_ranges
from fastgrad_compiler.analysis.weights.rows import product_norm, spectral_norm
from fastgrad_compiler.analysis.weights.rules import DECLINED, ROWS, UNREAD
from fastgrad_compiler.attention.table import attention_table, is_own
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.compiler.captured import captured_logits
from tests.compiler.test_examples_planned import inputs_of
from tests.compiler.weight_specs import (
    HEADS,
    SPECS,
    TWO,
    ascended,
    drawn,
    only,
    program_of,
    shares,
    spec_program,
    weights_of,
    written,
)
from tests.initial_weights import initial_weights

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.tfg"))
SIZES: dict[str, object] = {"depth": 2, "height": 32, "width": 32, "patch": 8}


@pytest.mark.sampled(30)
@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", SPECS)
def test_no_logit_leaves_its_range(name: str, size: float) -> None:
    program = program_of(name)
    for seed in range(3):
        weights = weights_of(program, size, seed)
        ranges = weight_ranges(program, weights, centring=False)
        inputs = {key: 10.0**seed * x for key, x in drawn(program, 20, seed).items()}
        for path, share in shares(ranges, captured_logits(program, inputs, weights)).items():
            assert len(ranges[path].heads) == share.shape[-3]
            assert share.max() <= 1, path


@pytest.mark.parametrize("name", SPECS)
def test_offsets_alone_are_within_the_range(name: str) -> None:
    """Norms of weight 0 leave what biases and places make of the logits."""
    program = program_of(name)
    weights = weights_of(program, 1.0)
    still = {path: 0 * w if path.endswith(("norm.w", "norm_2.w")) else w for path, w in weights.items()}
    ranges = weight_ranges(program, still, centring=False)
    for path, s in captured_logits(program, drawn(program, 4, 0), still).items():
        assert (s.abs() <= torch.tensor(ranges[path].heads)[:, None, None] + 1e-12).all(), path


@pytest.mark.parametrize("name", ["biases", "biases behind a layer norm", "grouped with biases"])
def test_the_range_of_constant_queries_and_keys_is_their_product(name: str) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0)
    still = {path: 0 * w if path.endswith("norm.w") else w for path, w in weights.items()}
    found = only(program, still, centring=False)
    (s,) = captured_logits(program, drawn(program, 1, 0), still).values()
    assert found.heads == pytest.approx(s.abs().amax((0, 2, 3)).tolist(), rel=2e-6)


def test_dropout_scales_what_it_leaves_in_training() -> None:
    weights = weights_of(program_of("dropout"), 1.0)
    bodies = (written(TWO + HEADS.format(f"dropout(h; p = {p}) @ wq", "h @ wk")) for p in (0.0, 0.75))
    kept, dropped = (only(spec_program(body), weights) for body in bodies)
    assert dropped.bound >= 4 * kept.bound


@pytest.mark.sampled(12)
@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPECS)
def test_an_ascent_comes_near_the_range_and_not_beyond(name: str, is_long: bool) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0, 3)
    reached = SPECS[name].reached
    ranges = weight_ranges(program, weights, centring=False)
    best = ascended(program, weights, ranges, math.inf if is_long else reached)
    assert best.min() >= reached


# ---------------------------------------------------------------- whole models


@cache
def example(path: Path) -> Program:
    """Two layers; BERT with free logits."""
    known: dict[str, dict[str, object]] = {"vit": SIZES, "bert": {"depth": 2, "gain": None}}
    params = known.get(path.stem, {"depth": 2})
    return run(elaborate(read_source(str(path)), params=params), until="attention")[-1].program


@pytest.mark.medium
@pytest.mark.parametrize("size", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_logit_of_an_example_leaves_its_range(path: Path, size: float) -> None:
    program = example(path)
    weights = weights_of(program, size)
    ranges = weight_ranges(program, weights, centring=False)
    entries = [entry for entry in attention_table(program) if not is_own(entry.node)]
    assert list(ranges) == [entry.full_path for entry in entries]
    for name, share in shares(ranges, captured_logits(program, inputs_of(program), weights)).items():
        assert share.max() <= 1, name


def test_an_image_cannot_leave_the_range_of_a_vision_transformer() -> None:
    """Ascent over pixels, through a projection, places and a layer norm."""
    path = next(path for path in EXAMPLES if path.stem == "vit")
    params = {**SIZES, "depth": 1, "height": 16, "d_model": 16, "heads": 2}
    text = path.read_text(encoding="utf-8").replace(", gain = 1.0", "")
    text = text.replace("output <= 0.1", 'at "*" exact').replace("gradient <= 0.25", "")
    program = run(elaborate(Source("vit.tfg", text), params=params), until="attention")[-1].program
    weights = weights_of(program, 1.0)
    ranges = weight_ranges(program, weights, centring=False)
    image = torch.randn(
        1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    ascent = torch.optim.Adam([image], lr=0.1, maximize=True)
    best = 0.0
    for _ in range(100):
        (share,) = shares(ranges, captured_logits(program, [image], weights)).values()
        assert share.max() <= 1
        best = max(best, share.max().item())
        ascent.zero_grad()
        share.amax((-2, -1)).sum().backward()
        ascent.step()
    assert best > 0.6


def test_later_stages_have_the_same_ranges() -> None:
    text = (
        "use std\ndim b\ndim n <= 4096\nmodel m(x: float[b, n, 16]) -> float[b, n, 16] {\n"
        "    return std.attention(std.rms_norm(x); heads = 2, qk_dim = 4, gain = 1.0, learned = true)\n}\n"
        'budget {\n    at "*" degree = 2\n}\n'
    )
    stages = {stage.name: stage.program for stage in run(elaborate(Source("spec.tfg", text)))}
    weights = weights_of(stages["attention"], 1.0)
    first, *others = (weight_ranges(stages[name], weights) for name in ("attention", "plan", "lowrank"))
    assert others == [first, first]
    (found,) = first.values()
    assert found.source == "weights"
    sizes = weights["attention.attend.tau"].sigmoid().flatten().tolist()
    assert found.heads == pytest.approx(sizes, rel=2e-6)


def test_a_deep_model_is_walked_layer_by_layer() -> None:
    text = (
        "use std\ndim b\ndim n\nmodel m(x: float[b, n, 64]) -> float[b, n, 64] {\n    repeat i in 24 {\n"
        "        x = x + std.attention(std.rms_norm(x) as norm; heads = 16) as layers\n    }\n    return x\n}\n"
        'budget {\n    at "*" exact\n}\n'
    )
    program = run(elaborate(Source("spec.tfg", text)), until="attention")[-1].program
    weights = initial_weights(program)
    weights["norm.7.w"] = 3 * weights["norm.7.w"]
    ranges = weight_ranges(program, weights)
    assert len(ranges) == 24
    assert all(len(found.heads) == 16 and not math.isinf(found.bound) for found in ranges.values())
    widest = max(ranges, key=lambda path: ranges[path].bound)
    assert widest == "layers.7.attend.y"


# ---------------------------------------------------------------- tables


def test_every_operation_has_a_rule_or_is_declined() -> None:
    assert ROWS.keys() | DECLINED.keys() == OPS.keys()
    assert not ROWS.keys() & DECLINED.keys()
    assert UNREAD.keys() <= ROWS.keys()


@pytest.mark.parametrize(("k", "w"), [(7, 3), (3, 7), (5, 5), (1, 4)])
def test_norms_of_matrices(k: int, w: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 4, k, w, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(spectral_norm(left), torch.linalg.matrix_norm(left, 2))
    torch.testing.assert_close(product_norm(left, right), torch.linalg.matrix_norm(left @ right.mT, 2))


@pytest.mark.parametrize("chosen", ["where(s < 0.5, s, 9.0 * s)", "s * float(int(2.0 * s))"])
def test_what_the_last_bits_of_weights_decide_is_not_computed(chosen: str) -> None:
    """A weight of 0.5 less one rounding of float64 is 0.5 in float32: what is chosen by it is another thing there."""
    program = spec_program(written(TWO + f"weight s: float[1] = ones()\n    q = split_heads((h @ wq) * ({chosen}), 4)\n"
                                   "    k = split_heads(h @ wk, 4)"))  # fmt: skip
    weights = weights_of(program, 1.0)
    weights["s"] = torch.tensor([0.5 - 2.0**-54], dtype=torch.float64)
    wide = {**weights, "s": torch.tensor([0.5], dtype=torch.float64)}
    (s,) = captured_logits(program, drawn(program, 8, 0), wide).values()
    found = only(program, weights, centring=False)
    assert s.abs().max() <= found.bound
