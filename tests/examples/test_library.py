"""Every block of the library and every example elaborates, verifies and runs; attention obeys its options."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.reference.attention_torch import near_mask
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.format import format_source
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.dense import polynomial_attention
from tests.examples.plain import rotate
from tests.initial_weights import initial_weights

ROOT = Path(__file__).parents[2]
LIBRARY = sorted(Path(str(files("fastgrad_grammar").joinpath("std"))).glob("*.tfg"))
EXAMPLES = sorted((ROOT / "examples").glob("*.tfg"))

X, MEMORY, MASK = "x: float[b, n, 24]", "memory: float[b, m, 20]", "mask: bool[b, {}]"
TOKENS = "tokens: int[b, n]"
USES = {
    "layer_norm": (X, "x"),
    "rms_norm": (X, "x; eps = 1e-5"),
    "linear": (X, "x; 24, bias = false"),
    "embed": (TOKENS, "tokens; 9, 24"),
    "mlp": (X, 'x; 48, activation = "silu", bias = false'),
    "swiglu": (X, "x; 48"),
    "geglu": (X, "x; 48"),
    "gelu_tanh": (X, "x"),
    "real_places": (MASK.format("n"), "mask"),
    "mean_pool": (f"{X}, {MASK.format('n')}", "x, mask"),
    "short_conv": (X, "x"),
    "short_conv_packed": (f"{X}, ids: int[b, n]", "x, ids; width = 2"),
    "attention": (X, "x; 4"),
    "attention_padded": (f"{X}, {MASK.format('n')}", "x, mask; 4"),
    "cross_attention": (f"{X}, {MEMORY}", "x, memory; 4"),
    "cross_attention_padded": (f"{X}, {MEMORY}, {MASK.format('m')}", "x, memory, mask; 4, gain = 1.0, bias = true"),
    "kernel_attention": (X, "x; 4, causal = true, near = 2"),
    "mixer": (X, "x; 4, qk_dim = 4, near = 2"),
    "transformer_layer": (X, 'x; 4, 48, causal = true, activation = "relu", rope = 10000.0'),
    "transformer_layer_padded": (f"{X}, {MASK.format('n')}", "x, mask; 4, 48, pre_norm = true"),
    "llama_layer": (X, "x; 4, kv_heads = 2, hidden = 48"),
    "decoder_layer": (f"{X}, memory: float[b, m, 24], {MASK.format('m')}", "x, memory, mask; 4, 48"),
    "gpt": (TOKENS, "tokens; vocab = 24, context = 16, width = 16, depth = 2, heads = 2, gain = 1.0, near = 2"),
    "llama": (TOKENS, "tokens; vocab = 24, width = 16, depth = 2, heads = 4, kv_heads = 2"),
    "bert": (f"{TOKENS}, {MASK.format('n')}", "tokens, mask; vocab = 24, context = 16, width = 16, heads = 2"),
    "vit": ("images: float[b, 3, 16, 8]", "images; classes = 24, d = 12, depth = 2, heads = 2, size = 4"),
    "encoder_decoder": (f"source: int[b, m], {MASK.format('m')}, target: int[b, n]",
                        "source, mask, target; vocab = 24, width = 16, depth = 2, heads = 2, gain = 1.0, near = 2"),
}  # fmt: skip
RESULTS = {"vit": "float[b, 24]", "mean_pool": "float[b, 24]", "real_places": "int[b, n]"}
SHARED = (
    "attend",
    "attend_padded",
    "attend_forgetting",
    "attend_capped",
)  # called by blocks of attention, or of Gemma 2


def example(tensor: str, generator: torch.Generator) -> Tensor:
    """A tensor for one parameter of a signature: b = 2, n = 7, m = 5."""
    match = re.fullmatch(r"\w+: (\w+)\[(.*)\]", tensor)
    assert match
    sizes = {"b": 2, "n": 7, "m": 5}
    shape = [sizes.get(dim) or int(dim) for dim in match[2].split(", ")]
    if match[1] == "int":
        return torch.randint(9, shape, generator=generator)
    if match[1] == "bool":
        return torch.arange(shape[1]) < torch.tensor([shape[1], 2])[:, None]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def library_model(tensors: str, call: str, block: str) -> Program:
    result = RESULTS.get(block, "float[b, n, 24]")
    return elaborate(
        Source("<text>", f"use std\ndim b\ndim n <= 16\ndim m\nmodel used({tensors}) -> {result} {{\n"
                         f"    return std.{block}({call})\n}}\n")
    )  # fmt: skip


@pytest.mark.parametrize("path", [*LIBRARY, *EXAMPLES], ids=lambda path: path.name)
def test_files_are_formatted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert format_source(Source(str(path), text)) == text


def test_the_documentation_names_every_block() -> None:
    blocks = {
        name
        for path in LIBRARY
        for name in re.findall(r"^block (\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert blocks == {*USES, *SHARED}
    page = (ROOT / "docs" / "standard-library.md").read_text(encoding="utf-8")
    assert [name for name in blocks if f"`{name}" not in page] == []


@pytest.mark.parametrize("block", USES)
def test_a_block_runs(block: str) -> None:
    tensors, call = USES[block]
    program = library_model(tensors, call, block)
    verify(program, "elaborate")
    assert parse_program(print_program(program)) == program
    generator = torch.Generator().manual_seed(0)
    inputs = [example(tensor, generator) for tensor in re.split(r", (?=\w+:)", tensors)]
    result = run(program, inputs, initial_weights(program, 0, torch.float64))
    assert isinstance(result, Tensor)
    shapes = {"float[b, n, 24]": (2, 7, 24), "float[b, 24]": (2, 24), "int[b, n]": (2, 7)}
    assert result.shape == shapes[RESULTS.get(block, "float[b, n, 24]")]
    assert result.isfinite().all()
    assert result.double().std() > 1e-6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_elaborates(path: Path) -> None:
    program = elaborate(read_source(path))
    verify(program, "elaborate")
    assert program.objective is not None
    assert (program.budget is None) == (path.stem in ("based", "gpt"))  # nothing to approximate
    assert parse_program(print_program(program)) == program


def test_real_places_and_means_leave_padding_out() -> None:
    mask = torch.tensor([[True, True, True, True], [False, True, False, True]])
    text = "use std\ndim b\ndim n\nmodel used(mask: bool[b, n]) -> int[b, n] {\n    return std.real_places(mask)\n}\n"
    places = run(elaborate(Source("<text>", text)), [mask], {})
    assert isinstance(places, Tensor)
    assert places.tolist() == [[1, 2, 3, 4], [0, 1, 0, 2]]
    program = library_model(f"{X}, {MASK.format('n')}", "x, mask", "mean_pool")
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    means = run(program, [x, torch.cat((mask[1:], nothing))], {})
    assert isinstance(means, Tensor)
    assert torch.allclose(means[0], (x[0, 1] + x[0, 3]) / 2, rtol=1e-12)
    assert means[1].abs().max() == 0


def test_gelu_by_tanh_is_pytorchs() -> None:
    x = 3 * torch.randn(2, 7, 24, dtype=torch.float64)
    result = run(library_model(X, "x", "gelu_tanh"), [x], {})
    assert isinstance(result, Tensor)
    assert torch.allclose(result, functional.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-15)


OPTIONS = [
    {},
    {"causal": True},
    {"kv_heads": 2, "qk_dim": 8, "v_dim": 10},
    {"gain": 1.5},
    {"gain": 1.5, "learned": True, "rope": 100.0},
    {"gain": 2.0, "near": 2, "causal": True, "rope": 100.0},
    {"gain": 2.0, "near": 3},
    {"window": 3},
    {"window": 3, "causal": True, "bias": True},
    {"gain": 1.5, "bias": True},  # free logits do not see the bias of k
]
FORGETTING = [
    {"forget": True},
    {"forget": True, "kv_heads": 2, "gain": 1.5, "learned": True},
    {"forget": True, "gain": 2.0, "near": 2, "rope": 100.0, "causal": True, "bias": True},
    {"forget": True, "window": 3},
]


@pytest.mark.parametrize(
    ("options", "padded"),
    [
        *((each, padded) for each in OPTIONS for padded in (False, True)),
        *((each, False) for each in FORGETTING),
    ],
    ids=str,
)
def test_options_of_attention(options: dict, padded: bool) -> None:
    values = ", ".join(f"{key} = {str(value).lower()}" for key, value in {"heads": 4, **options}.items())
    signature = f"{X}, {MASK.format('n')}" if padded else X
    block, call = ("attention_padded", "x, mask; ") if padded else ("attention", "x; ")
    program = library_model(signature, call + values, block)
    generator = torch.Generator().manual_seed(0)
    weights = {
        path.removeprefix(f"{block}."): torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for path, w in initial_weights(program).items()
    }
    x = example(X, generator)
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None] if padded else torch.ones(2, 7, dtype=torch.bool)
    found = run(program, [x, mask][: 1 + padded], {f"{block}.{path}": w for path, w in weights.items()})
    torch.testing.assert_close(found, attention(weights, x, mask, options), rtol=1e-11, atol=1e-11)


def attention(weights: dict[str, Tensor], x: Tensor, mask: Tensor, options: dict) -> Tensor:
    """Self-attention of 4 heads, by the page of the library."""
    groups = options.get("kv_heads", 4)
    q, k, v = (
        (x @ weights[f"w{name}"] + weights.get(f"b{name}", 0)).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("q", 4), ("k", groups), ("v", groups))
    )
    if "rope" in options:
        q, k = rotate(q, options["rope"]), rotate(k, options["rope"])
    k, v = (each.repeat_interleave(4 // groups, 1) for each in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if "gain" in options:
        tau = next((w for path, w in weights.items() if path.endswith("tau")), torch.tensor(math.inf))
        gain = options["gain"] * tau.sigmoid()
        far = gain * (functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT)
        near = (
            near_mask(torch.arange(7), 7, options["near"])
            if "near" in options
            else torch.zeros(7, 7, dtype=torch.bool)
        )
        scores = torch.where(near, scores, far)
    if options.get("forget"):
        scores = scores + forgotten(weights, x).repeat_interleave(4 // groups, 1)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    seen = mask[:, None, None]
    if options.get("causal") or options.get("forget"):
        seen = seen & (distance >= 0)
    if "window" in options:
        seen = seen & (distance.abs() < options["window"])
    weighted = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0) @ v
    return weighted.transpose(1, 2).flatten(2) @ weights["wo"] + weights.get("bo", 0)


def forgotten(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The sum of the log gates after key j up to query i, term by term: [b, key heads, 7, 7]."""
    gates = (x @ weights["wf"] + weights["bf"]).sigmoid().log().transpose(1, 2)
    sums = torch.zeros(*gates.shape, 7, dtype=gates.dtype)
    for i in range(7):
        for j in range(i):
            sums[..., i, j] = gates[..., j + 1 : i + 1].sum(-1)
    return sums


def forgetting(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, coefficients: tuple[float, ...], near: int
) -> Tensor:
    """Causal weights that are a polynomial, or exp nearby, times e^gates, over their sum."""
    k, v, gates = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v, gates))
    s = q @ k.mT * q.shape[-1] ** -0.5
    w = torch.stack([c * s**power for power, c in enumerate(coefficients)]).sum(0)
    if near:
        w = torch.where(near_mask(torch.arange(7), 7, near), s.exp(), w)
    w = (w * gates.exp()).tril()
    return w / w.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_short_convolution_adds_the_tokens_before(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for block, more in (("short_conv", ""), ("short_conv_packed", ", ids: int[b, n]")):
        program = library_model(X + more, f"x{', ids' if more else ''}; {width}", block)
        inputs = [example(tensor, generator) for tensor in re.split(r", (?=\w+:)", X + more)]
        weights = initial_weights(program, 0, torch.float64)
        assert {path: tuple(w.shape) for path, w in weights.items()} == {f"{block}.w": (width, 24)}
        assert 0.5 < float(weights[f"{block}.w"].std()) * width**0.5 < 1.5
        w = torch.randn(width, 24, generator=generator, dtype=torch.float64)
        found = run(program, inputs, {f"{block}.w": w})
        x, expected = inputs[0], inputs[0].clone()
        for t in range(7):
            for k in range(min(width, t + 1)):
                one = inputs[1][:, t - k : t + 1] if more else torch.zeros(2, 1)
                seen = (one == one[:, :1]).all(1, keepdim=True)
                expected[:, t] += w[k] * x[:, t - k] * seen
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


KERNEL_OPTIONS = [
    {"qk_dim": 5},
    {"kv_heads": 2, "v_dim": 3, "causal": True, "rope": 100.0},
    {"causal": True, "near": 2, "coefficients": (0.0, 0.0, 1.0)},
    {"coefficients": (1.0, 0.5, 0.25, 0.1, 0.1)},
    {"kv_heads": 2, "forget": True},
    {"causal": True, "kv_heads": 2, "gain": 2.0, "coefficients": "fit(balanced, degree = 4, bound = 2.0)"},
    {"causal": True, "near": 2, "rope": 100.0, "gain": 1.5, "coefficients": "fit(minimax, 2, bound = 1.5)"},
    {"forget": True, "gain": 1.0, "coefficients": "fit(taylor, 4, 1.0)"},
    {"near": 2, "forget": True, "causal": True, "coefficients": (0.0, 0.0, 1.0)},
    {"causal": True, "near": 2, "near_rope": 100.0, "kv_heads": 2},
    {"causal": True, "near": 2, "near_rope": 100.0, "gain": 2.0},
]


def test_the_mixer_is_a_convolution_and_a_polynomial_with_gates_and_positions_nearby() -> None:
    program = library_model(X, "x; heads = 4, qk_dim = 6, near = 2", "mixer")
    options = "heads = 4, qk_dim = 6, causal = true, near = 2, near_rope = 1e4, forget = true"
    attention = f"kernel_attention(std.short_conv(x); {options})"
    model = f"use std\ndim b\ndim n\nmodel m({X}) -> float[b, n, 24] {{ return std.{attention} }}"
    parts = elaborate(Source("parts", model))
    weights, x = initial_weights(program, 0, torch.float64), example(X, torch.Generator().manual_seed(0))
    same = dict(zip(initial_weights(parts), weights.values(), strict=True))
    torch.testing.assert_close(run(program, [x], weights), run(parts, [x], same), rtol=0, atol=0)


@pytest.mark.parametrize("options", KERNEL_OPTIONS, ids=str)
def test_options_of_kernel_attention(options: dict) -> None:
    values = ", ".join(f"{key} = {str(value).lower()}" for key, value in options.items())
    program = library_model(X, f"x; heads = 4, {values}", "kernel_attention")
    generator = torch.Generator().manual_seed(0)
    weights = {
        path: torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for path, w in initial_weights(program).items()
    }
    x = example(X, generator)
    groups = options.get("kv_heads", 4)
    q, k, v = (
        (x @ weights[f"kernel_attention.w{name}"]).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("q", 4), ("k", groups), ("v", groups))
    )
    if "rope" in options:
        q, k = rotate(q, options["rope"]), rotate(k, options["rope"])
    assert (q.shape[-1], v.shape[-1]) == (options.get("qk_dim", 16), options.get("v_dim", 6))
    given = {key: options[key] for key in ("causal", "near") if key in options}
    coefficients = options.get("coefficients", (1.0, 1.0, 0.5))
    if isinstance(coefficients, str):
        family, degree, bound = re.findall(r"[a-z]+(?=,)|[\d.]+", coefficients)
        coefficients = fit(family, int(degree), float(bound)).coefficients
    scale = q.shape[-1] ** -0.5
    if "gain" in options or "near_rope" in options:  # the near field has free scores, and its own positions
        near_q, near_k = (
            rotate(each, options["near_rope"]) if "near_rope" in options else each for each in (q, k)
        )
        given |= {"near_q": near_q * scale, "near_k": near_k}
    if "gain" in options:
        q, k = options["gain"] / scale * functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    if "forget" in options:
        own = {path.removeprefix("kernel_attention."): w for path, w in weights.items()}
        y = forgetting(q, k, v, forgotten(own, x), coefficients, options.get("near", 0))
    else:
        y = polynomial_attention(q, k, v, coefficients, scale=scale, **given)
    expected = y.transpose(1, 2).flatten(2) @ weights["kernel_attention.wo"]
    torch.testing.assert_close(run(program, [x], weights), expected, rtol=1e-11, atol=1e-11)
