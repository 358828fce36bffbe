"""Ranges proved from weights: no logit leaves them, not even where an ascent looks for one, and they are no wider
than they must be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf, isinf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.elaborate import elaborate
from fastgrad_compiler.graph import Node, Program
from fastgrad_compiler.interpret import initial_weights
from fastgrad_compiler.ops import OPS
from fastgrad_compiler.passes.attention_table import ATTENTION, attention_table, is_own
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.ranges import LogitRange
from fastgrad_compiler.text import parse_program
from fastgrad_compiler.weight_ranges import weight_ranges
from fastgrad_compiler.weight_rows import product_norm, spectral_norm
from fastgrad_compiler.weight_rules import DECLINED, ROWS, UNREAD
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.compiler.attention_variants import VARIANTS
from tests.compiler.captured import captured_logits
from tests.compiler.test_examples_planned import inputs_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.tfg"))
SIZES: dict[str, object] = {"depth": 2, "height": 32, "width": 32, "patch": 8}


@dataclass(frozen=True)
class Spec:
    """A model `m` of x, and of `more`; `reached` is the share of each head's R that an ascent over inputs finds."""

    body: str
    reached: float
    more: str = ""
    rank: str = "float[b, n, 16]"


def written(projected: str, *, heads: int = 4, scale: float = 0.5, norm: str = "std.rms_norm(x)") -> str:
    """An attention written out, whose queries and keys [b, heads, n, d] are made of h."""
    return f"""
    h = {norm}
    {projected}
    return merge_heads(softmax(causal({scale} * (q @ k.T))) @ split_heads(h, {heads}))"""


TWO = "weight wq: float[16, 16] = xavier()\n    weight wk: float[16, 16] = xavier()\n    "
HEADS = "q = split_heads({}, 4)\n    k = split_heads({}, 4)"
SPECS = {
    "rms norm": Spec("return std.attention(std.rms_norm(x); heads = 4)", 0.98),
    "layer norm": Spec("return std.attention(std.layer_norm(x); heads = 4)", 0.75),
    "biases": Spec("return std.attention(std.rms_norm(x); heads = 4, bias = true, causal = true)", 0.85),
    "biases behind a layer norm": Spec(
        "return std.attention(std.layer_norm(x); heads = 4, bias = true)", 0.8
    ),
    "rotary": Spec("return std.attention(std.rms_norm(x); heads = 4, rope = 100.0)", 0.65),
    "rotary with biases": Spec(
        "return std.attention(std.rms_norm(x); heads = 2, rope = 9.0, bias = true)", 0.5
    ),
    "grouped": Spec("return std.attention(std.rms_norm(x); heads = 4, kv_heads = 2)", 0.98),
    "grouped with biases": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, kv_heads = 1, bias = true)", 0.9
    ),
    "other widths": Spec("return std.attention(std.rms_norm(x); heads = 2, qk_dim = 3, v_dim = 5)", 0.98),
    "wide heads": Spec("return std.attention(std.rms_norm(x); heads = 2, qk_dim = 24)", 0.98),
    "cross": Spec(
        "return std.cross_attention(std.rms_norm(x), std.rms_norm(y); heads = 4)",
        0.98,
        ", y: float[b, m, 12]",
    ),
    "gain": Spec("return std.attention(std.rms_norm(x); heads = 4, gain = 1.5)", 0.98),
    "learned gain": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, gain = 2.0, learned = true)", 0.98
    ),
    "near field": Spec(
        "return std.attention(std.rms_norm(x); heads = 4, gain = 2.0, learned = true, near = 1, causal = true)",
        0.98,
    ),
    "windows": Spec("return std.attention(std.rms_norm(x); heads = 4, window = 2)", 0.98),
    "tied projections": Spec(
        written(
            "weight w: float[16, 16] = xavier()\n    q = split_heads(h @ w, 4)\n    k = split_heads(h @ w, 4)"
        ),
        0.98,
    ),
    "heads by reshape": Spec(
        written(
            TWO + "q = permute(reshape(h @ wq, (b, n, 4, 4)), (0, 2, 1, 3))\n    "
            "k = permute(reshape(h @ wk, (b, n, 4, 4)), (0, 2, 1, 3))"
        ),
        0.98,
    ),
    "one fused weight": Spec(
        written(
            "weight w: float[16, 48] = xavier()\n    y = h @ w\n    q = split_heads(y[.., 0:16], 4)\n    "
            "k = split_heads(y[.., 16:32], 4)"
        ),
        0.98,
    ),
    "a weight for each head": Spec(
        written(
            "weight wq: float[4, 4, 4] = normal()\n    q = split_heads(h, 4) @ wq\n    k = split_heads(h, 4)"
        ),
        0.98,
    ),
    "normalised queries": Spec(
        written(
            TWO + "weight qn: float[4] = ones()\n    weight kn: float[4] = ones()\n    "
            "q = rms_norm(split_heads(h @ wq, 4), qn)\n    k = rms_norm(split_heads(h @ wk, 4), kn)"
        ),
        0.98,
    ),
    "partly rotated": Spec(
        written(
            TWO
            + "u = split_heads(h @ wq, 4)\n    q = concat(rotary(u[.., 0:2], 9.0), u[.., 2:4]; axis = -1)\n    "
            "k = split_heads(h @ wk, 4)"
        ),
        0.5,
    ),
    "scales of entries": Spec(
        written(
            TWO + "weight s: float[16] = normal()\n    " + HEADS.format("(h * s) @ wq", "(-h / 2.0) @ wk")
        ),
        0.98,
    ),
    "a row scaled twice": Spec(
        written(
            TWO + "weight s: float[4, 1, 4] = normal()\n    q = split_heads(h @ wq, 4) * exp(s)\n    "
            "k = split_heads(h @ wk, 4)"
        ),
        0.98,
    ),
    "a sum of projections": Spec(
        written(TWO + HEADS.format("h @ wq + h @ wk + h @ wq + h @ wk + h @ wq", "h @ wk - 0.1 * h")), 0.25
    ),
    "bounded activations": Spec(written(TWO + HEADS.format("tanh(h @ wq)", "sigmoid(h) @ wk")), 0.1),
    "shrinking functions": Spec(written(TWO + HEADS.format("gelu(h @ wq)", "relu(h) @ wk")), 0.25),
    "clamped": Spec(written(TWO + HEADS.format("clamp(x; low = -1.0, high = 2.0) @ wq", "h @ wk")), 0.5),
    "gated": Spec(written(TWO + HEADS.format("(h * sigmoid(x)) @ wq", "(h * tanh(h @ wk)) @ wk")), 0.3),
    "larger and chosen": Spec(
        written(TWO + HEADS.format("max(h @ wq, h)", "where(h < 0.5, h, 2.0 * h) @ wk")), 0.25
    ),
    "mixed after an attention": Spec(
        "y = std.attention(std.rms_norm(x); heads = 4) as first\n    return std.attention(y; heads = 4) as second",
        0.08,
    ),
    "mixed with biases": Spec(
        "y = std.attention(std.rms_norm(x); heads = 4, kv_heads = 2, bias = true) as first\n    "
        "return std.attention(y; heads = 4, kv_heads = 2, bias = true) as second",
        0.08,
    ),
    "rows scaled by one factor": Spec(
        written(TWO + HEADS.format("(h * tanh(x[.., 0:1])) @ wq", "h @ wk")), 0.9
    ),
    "rows with offsets scaled": Spec(
        written(TWO + HEADS.format("(h * tanh(x[.., 0:1])) @ wq", "h @ wk"), norm="std.layer_norm(x)"), 0.5
    ),
    "short rows cut from long ones": Spec(
        "y = std.attention(reshape(std.rms_norm(x), (b, 4 * n, 4)); heads = 1)\n    return reshape(y, (b, n, 16))",
        0.1,
    ),
    "halves by index": Spec(
        written(
            "weight w: float[16, 32] = xavier()\n    u = permute(reshape(h @ w, (b, n, 2, 16)), (2, 0, 1, 3))\n    "
            "q = split_heads(u[0, ..], 4)\n    k = split_heads(u[1, ..], 4)"
        ),
        0.98,
    ),
    "a class token": Spec(
        "weight t: float[16] = normal()\n    c = concat(std.rms_norm(x), broadcast_to(t, (b, 1, 16)); axis = -2)\n    "
        "return std.attention(c; heads = 2)[:, 0:n]",
        0.1,
    ),
    "repeated keys": Spec(
        written(
            TWO + "q = split_heads(h @ wq, 4)\n    k = repeat_heads(split_heads((h @ wk)[.., 0:8], 2), 2)"
        ),
        0.98,
    ),
    "normalised heads": Spec(
        "y = merge_heads(unit(split_heads(x, 4)))\n    return std.attention(y; heads = 2, bias = true)", 0.6
    ),
    "places": Spec(
        written(TWO + "weight p: float[3, 16] = normal()\n    " + HEADS.format("(h + p) @ wq", "h @ wk + p")),
        0.7,
        rank="float[b, 3, 16]",
    ),
    "dropout": Spec(written(TWO + HEADS.format("dropout(h; p = 0.5) @ wq", "h @ wk")), 0.3),
    "no batch": Spec(
        "weight wq: float[16, 5] = xavier()\n    weight wk: float[16, 5] = xavier()\n    "
        "weight w: float[16] = ones()\n    h = rms_norm(x, w)\n    "
        "return softmax((h @ wq) @ (h @ wk).T) @ h",
        0.98,
        rank="float[n, 16]",
    ),
}


def spec_program(
    body: str, signature: str = "x: float[b, n, 16]", result: str = "float[b, n, 16]"
) -> Program:
    """A model of this body whose attentions are recognised."""
    text = (
        f"use std\ndim b\ndim n\ndim m\nmodel m({signature}) -> {result} {{\n    {body}\n}}\n"
        'budget {\n    at "*" exact\n}\n'
    )
    return run(elaborate(Source("spec.tfg", text)), until="attention")[-1].program


@cache
def program_of(name: str) -> Program:
    spec = SPECS[name]
    return spec_program(spec.body, f"x: {spec.rank}{spec.more}", spec.rank)


def weights_of(program: Program, size: float, seed: int = 0) -> dict[str, Tensor]:
    """Initial weights moved by random amounts, then scaled: nothing is a plain one or zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    weights = initial_weights(program, seed, torch.float64)
    return {
        path: size * (w + 0.5 * torch.randn(w.shape, generator=generator, dtype=torch.float64))
        for path, w in weights.items()
    }


def drawn(program: Program, batch: int, seed: int, tokens: int = 3) -> dict[str, Tensor]:
    """Float inputs, of three tokens or as many as the program says."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": batch, "n": tokens, "m": 4}
    return {
        node.name: torch.randn(
            [d.evaluate(sizes) for d in node.tensor.shape], generator=generator, dtype=torch.float64
        )
        for node in program[program.main].inputs
    }


def shares(ranges: dict[str, LogitRange], logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """|s| as a share of its head's R, [.., heads, n, m]."""
    return {
        path: s.abs() / torch.tensor(ranges[path].heads, dtype=torch.float64)[:, None, None]
        for path, s in logits.items()
    }


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


def ascended(program: Program, weights: dict[str, Tensor], ranges: dict[str, LogitRange]) -> Tensor:
    """The largest share of R that gradient ascent over the inputs finds, for each head of the last attention.

    Each head has sequences of its own; the second token is the query, the first the key.
    """
    path = list(ranges)[-1]
    heads, starts = len(ranges[path].heads), 6
    inputs = {key: x.requires_grad_() for key, x in drawn(program, heads * starts, 1, 2).items()}
    ascent = torch.optim.Adam(inputs.values(), lr=0.1, maximize=True)
    best = torch.zeros(heads, dtype=torch.float64)
    for _ in range(150):
        found = shares(ranges, captured_logits(program, inputs, weights))
        for each, share in found.items():
            assert share.max() <= 1, each
        own = found[path][..., 1, 0]
        own = (
            own.reshape(starts, heads, heads).diagonal(dim1=1, dim2=2) if own.dim() > 1 and heads > 1 else own
        )
        best = torch.maximum(best, own.detach().reshape(-1, heads).amax(0))
        ascent.zero_grad()
        own.sum().backward()
        ascent.step()
    return best


@pytest.mark.parametrize("name", SPECS)
def test_an_ascent_comes_near_the_range_and_not_beyond(name: str) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0, 3)
    best = ascended(program, weights, weight_ranges(program, weights, centring=False))
    assert best.min() >= SPECS[name].reached


# ---------------------------------------------------------------- whole models


@cache
def example(path: Path) -> Program:
    """Two layers; BERT with free logits."""
    known: dict[str, dict[str, object]] = {"vit": SIZES, "bert": {"depth": 2, "gain": None}}
    params = known.get(path.stem, {"depth": 2})
    return run(elaborate(read_source(str(path)), params=params), until="attention")[-1].program


@pytest.mark.parametrize("size", [1.0, 3.0])
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
    assert all(len(found.heads) == 16 and not isinf(found.bound) for found in ranges.values())
    widest = max(ranges, key=lambda path: ranges[path].bound)
    assert widest == "layers.7.attend._attention"


# ---------------------------------------------------------------- what is said


def only(program: Program, weights: dict[str, Tensor], *, centring: bool = True) -> LogitRange:
    (found,) = weight_ranges(program, weights, centring=centring).values()
    return found


def test_without_a_norm_nothing_is_proved() -> None:
    program = spec_program("return std.attention(x; heads = 4)")
    found = only(program, weights_of(program, 1.0))
    assert found == LogitRange("weights", (inf,) * 4, ("nothing limits the rows of x (spec.tfg:5)",))


def test_a_residual_stream_of_unknown_size_is_lost_and_a_norm_finds_it_again() -> None:
    program = spec_program(
        "x = x + std.rms_norm(x)\n    y = std.attention(x; heads = 2) as lost\n"
        "    return std.attention(std.rms_norm(x + y); heads = 2) as found"
    )
    lost, found = weight_ranges(program, weights_of(program, 1.0)).values()
    assert isinf(lost.bound)
    assert not isinf(found.bound)


def test_embeddings_are_bounded_by_their_longest_row() -> None:
    program = spec_program(
        "weight table: float[9, 16] = normal()\n    weight places: float[50, 16] = normal()\n"
        "    x = embedding(table, ids) + embedding(places, positions(n)) + sinusoid(n, 16)\n"
        "    return std.attention(x; heads = 1)",
        "ids: int[b, n]",
    )
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    longest = [weights[name].norm(dim=-1).max() for name in ("table", "places")]
    product = spectral_norm(weights["attention.wq"] @ weights["attention.wk"].T)
    expected = (longest[0] + longest[1] + 8**0.5) ** 2 * product / 4
    assert found.bound == pytest.approx(expected.item(), rel=2e-6)
    assert "row norm at most" in found.reasons[0]
    assert "the longest row of `table`" in found.reasons[0]


def test_the_reasons_name_weights_and_numbers() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    row = 4 * weights["rms_norm.w"].abs().max().item()
    head = max(range(4), key=found.heads.__getitem__)
    assert found.reasons[0] == (
        f"row norm at most {row:.4g} through the rms norm `rms_norm.w` (sqrt(d) max|gamma|)"
    )
    assert found.reasons[1].startswith(
        f"head {head}, the widest: sigma(W_q W_k^T) of `attention.wq`, `attention.wk`"
    )
    assert found.reasons[1].endswith(f"|s| is at most {found.bound:.4g}")
    assert found.reasons[2] == f"R of the other heads goes down to {min(found.heads):.4g}"


def test_the_form_of_a_head_is_the_norm_of_its_product_and_at_most_that_of_the_factors() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    gamma, wq, wk = (weights[name] for name in ("rms_norm.w", "attention.wq", "attention.wk"))
    for head, found in enumerate(only(program, weights).heads):
        columns = slice(4 * head, 4 * head + 4)
        left, right = gamma[:, None] * wq[:, columns], gamma[:, None] * wk[:, columns]
        assert found == pytest.approx(16 / 2 * torch.linalg.matrix_norm(left @ right.T, 2).item(), rel=2e-6)
        assert found < 0.999 * 16 / 2 * (spectral_norm(left) * spectral_norm(right)).item()


def test_a_key_head_serves_its_own_query_heads() -> None:
    program = program_of("grouped")
    weights = weights_of(program, 1.0)
    before = only(program, weights).heads
    weights["attention.wk"][:, 4:] *= 2
    after = only(program, weights).heads
    assert after == pytest.approx((before[0], before[1], 2 * before[2], 2 * before[3]), rel=1e-9)


def test_what_the_program_proves_stays_where_weights_say_no_less() -> None:
    program = program_of("gain")
    found = only(program, weights_of(program, 1.0))
    (entry,) = attention_table(program)
    assert (found.source, found.heads, found.reasons) == ("program", (1.5,) * 4, entry.node["proof"])


def test_no_head_exceeds_what_the_program_proves() -> None:
    """One head of small weights, under a clamp of the logits that the others would leave."""
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    weights["attention.wq"][:, :4] *= 1e-3
    clamped = with_attention(program, bound=2.0, proof=("a clamp",))
    found = only(clamped, weights)
    assert found.source == "weights"
    assert found.heads[1:] == (2.0,) * 3
    assert found.heads[0] < 0.1
    assert found.reasons[-1] == "no head exceeds 2, which the program proves"


@pytest.mark.parametrize("foreign", [{"asserted": True}, {"source": "data"}, {"source": "weights"}])
def test_a_bound_that_the_program_does_not_prove_is_not_used(foreign: dict[str, bool | str]) -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    assert only(with_attention(program, bound=0.01, **foreign), weights) == only(program, weights)


def with_attention(program: Program, **values: object) -> Program:
    """The program with attributes of its attentions set."""

    def changed(node: Node) -> Node:
        return node.with_attributes(**values) if node.op in ATTENTION else node  # type: ignore[arg-type]

    return program.with_graphs(replace(g, nodes=tuple(map(changed, g.nodes))) for g in program.graphs)


def test_assumed_rows_prove_nothing() -> None:
    program = spec_program("return std.attention(assume_bound(x; 1.0); heads = 1)")
    assert isinf(only(program, weights_of(program, 1.0)).bound)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_form_of_attention_has_a_range(variant: object) -> None:
    found = only(parse_program(variant.text), {})  # type: ignore[attr-defined]
    assert set(found.heads) == {inf}
    assert found.reasons


def test_slopes_are_no_part_of_a_range() -> None:
    program = spec_program(
        "h = std.rms_norm(x)\n    q = split_heads(h, 2)\n    return merge_heads(softmax(alibi(q @ q.T)) @ q)"
    )
    found = only(program, weights_of(program, 1.0))
    assert isinf(found.bound)
    assert found.reasons == ("the slopes of alibi grow with the distance of a pair",)


def test_weights_of_any_precision_are_read_as_they_are() -> None:
    program = program_of("biases")
    weights = {path: w.bfloat16().requires_grad_() for path, w in weights_of(program, 1.0).items()}
    doubled = {path: w.detach().double() for path, w in weights.items()}
    assert weight_ranges(program, weights) == weight_ranges(program, doubled)


def test_weights_of_another_model_are_refused() -> None:
    program = program_of("rms norm")
    weights = weights_of(program, 1.0)
    with pytest.raises(ValueError, match=r"there is no weight attention\.wq"):
        weight_ranges(program, {"rms_norm.w": weights["rms_norm.w"]})
    with pytest.raises(ValueError, match=r"weight rms_norm.w is float\[16\], not of shape \(3,\)"):
        weight_ranges(program, weights | {"rms_norm.w": torch.ones(3)})


@pytest.mark.parametrize("broken", [float("nan"), inf, 1e300])
@pytest.mark.parametrize("name", ["rms norm", "rotary", "biases", "gain"])
def test_diverged_weights_prove_nothing(name: str, broken: float) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0)
    weights["attention.wq"][0] = broken
    found = only(program, weights)
    assert found.bound == (1.5 if name == "gain" else inf)
    assert name == "gain" or "hold entries that are not finite, or too large" in found.reasons[-1]


# ---------------------------------------------------------------- centres


@pytest.mark.parametrize("name", ["biases", "biases behind a layer norm", "grouped with biases"])
def test_keys_are_centred_where_that_narrows_the_range(name: str) -> None:
    program = program_of(name)
    weights = weights_of(program, 1.0)
    plain, centred = (only(program, weights, centring=centring) for centring in (False, True))
    assert plain.centre is None
    assert centred.bound < 0.99 * plain.bound
    assert centred.reasons[-1] == (
        "subtracting from the keys of a head what they share, which softmax ignores, narrows R from "
        f"{plain.bound:.4g} to {centred.bound:.4g}"
    )
    groups = 1 if "grouped" in name else 4
    shared = weights["attention.bk"]
    if "layer" in name:
        shared = shared + weights["layer_norm.b"] @ weights["attention.wk"]
    expected = shared.reshape(groups, -1)
    torch.testing.assert_close(torch.tensor(centred.centre, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ["rms norm", "rotary", "rotary with biases", "gain"])
def test_keys_that_share_nothing_are_not_centred(name: str) -> None:
    program = program_of(name)
    assert only(program, weights_of(program, 1.0)).centre is None


def test_centred_keys_can_beat_what_the_program_proves() -> None:
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    weights["attention.bk"] *= 10
    plain, centred = (only(program, weights, centring=centring) for centring in (False, True))
    proved = (min(plain.heads) + centred.bound) / 2
    found = only(with_attention(program, bound=proved, proof=("a clamp",)), weights)
    assert found.heads == centred.heads
    assert found.reasons[-1].endswith(f"from {proved:.4g} to {centred.bound:.4g}")


def test_a_small_gain_is_said_and_not_taken() -> None:
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    weights["attention.bk"] *= 1e-3
    found = only(program, weights)
    assert found.centre is None
    assert found.reasons[-1].startswith("centred keys would narrow R from")


@pytest.mark.parametrize("off", [0.0, 0.7])
def test_the_range_is_that_of_the_centre_of_the_plan(off: float) -> None:
    """Also where the weights have moved on since the plan was made."""
    program = program_of("biases")
    weights = weights_of(program, 1.0)
    found = only(program, weights)
    centre = tuple(tuple(entry + off for entry in row) for row in found.centre or ())
    planned = with_attention(program, centre=centre, bound=0.01)
    again = only(planned, weights)
    assert again.centre == centre
    assert again.reasons[-1] == "R is that of keys less the centre of the plan"
    if off == 0:
        assert again.heads == pytest.approx(found.heads, rel=1e-12)
    best = ascended(planned, weights, {"attention.attend._attention": again})
    assert best.min() > 0.8


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
