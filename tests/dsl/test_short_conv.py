"""Models with `shift` and short convolutions from text to module, against the interpreter and its gradient graph."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fastgrad_dsl as fg
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.reference.interpret import run, run_gradient
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.models.batches import model_inputs, random_batch
from tests.dsl.models import always_polynomial, disturbed
from tests.grids import wide

SPEC = """
use std

dim b
dim n <= 4096

block layer(x: float[b, n, d], ids: int[b, n]) -> float[b, n, d] {
    h = CONVOLUTION
    q = split_heads(QUERY, 2)
    k = split_heads(h + SHIFT, 2)
    s = causal(unit(q) @ unit(k).T)
    return x + merge_heads(softmax(MASKED) @ split_heads(h, 2))
}

model m(tokens: int[b, n], ids: int[b, n]) -> float[b, n, 11] {
    weight table: float[11, 8] = normal(std = 1.0)
    x = embedding(table, tokens)
    repeat i in 2 {
        x = layer(x, ids) as layers
    }
    return x @ table.T
}

budget {
    at "*" degree = 2
}
"""
KINDS = {
    "plain": {
        "CONVOLUTION": "std.short_conv(std.rms_norm(x)) as first",
        "QUERY": "std.short_conv(h; width = 3) as second",
        "SHIFT": "shift(h; by = 2)",
        "MASKED": "s",
    },
    "packed": {
        "CONVOLUTION": "std.short_conv_packed(std.rms_norm(x), ids) as first",
        "QUERY": "std.short_conv_packed(h, ids; width = 3) as second",
        "SHIFT": "shift(h, ids; by = 2)",
        "MASKED": "documents(s, ids)",
    },
}


@cache
def compiled(kind: str) -> Compiled:
    source = SPEC
    for place, text in KINDS[kind].items():
        source = source.replace(place, text)
    return fg.compile(source, target="torch")


def inputs(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(11, (2, n), generator=generator)
    return [tokens, (torch.rand(2, n, generator=generator) < 0.3).cumsum(1) % 2]


def stage(kind: str, name: str) -> Program:
    return next(each.program for each in compiled(kind).stages if each.name == name)


def model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return disturbed(compiled(kind).module(dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 19])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_what_the_text_says(kind: str, n: int) -> None:
    exact = compiled(kind).reference(model(kind))
    text = run(stage(kind, "elaborate"), inputs(n), exact.state_dict())
    assert isinstance(text, Tensor)
    torch.testing.assert_close(exact(*inputs(n)), text, rtol=1e-11, atol=1e-11)
    polynomial = always_polynomial(compiled(kind), model(kind))
    text = run(compiled(kind).program, inputs(n), polynomial.state_dict())
    assert isinstance(text, Tensor)
    torch.testing.assert_close(polynomial(*inputs(n)), text, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_gradient_graph(kind: str) -> None:
    """Of the program before it is rewritten, so of exact attention."""
    exact, given, program = compiled(kind).reference(model(kind)), inputs(19), stage(kind, "backward")
    assert {"depthwise_weights", "shift"} <= {node.op for graph in program.graphs for node in graph.nodes}
    y, weights = exact(*given), dict(exact.named_parameters())
    assert {f"layers.{i}.{name}.w" for i in (0, 1) for name in ("first", "second")} <= weights.keys()
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(y, list(weights.values()), cotangent)
    _, expected = run_gradient(program, given, exact.state_dict(), [cotangent])
    for name, gradient in zip(weights, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-9)


def test_documents_are_as_if_each_were_alone() -> None:
    packed, (tokens, ids) = compiled("packed").reference(model("packed")), inputs(19)
    together = packed(tokens, ids)
    starts = [0, *(t for t in range(1, 19) if ids[0, t] != ids[0, t - 1]), 19]
    assert len(starts) > 3
    for first, last in pairwise(starts):
        alone = packed(tokens[:1, first:last], ids[:1, first:last])
        torch.testing.assert_close(together[:1, first:last], alone, rtol=1e-11, atol=1e-11)


def test_a_later_token_changes_nothing_before_it() -> None:
    plain, (tokens, ids) = compiled("plain").reference(model("plain")), inputs(19)
    changed = tokens.clone()
    changed[:, 12:] = (tokens[:, 12:] + 1) % 11
    before, after = (plain(each, ids)[:, :12] for each in (tokens, changed))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 33])
def test_any_width_from_one_on_will_do(width: int) -> None:
    signature = "model m(x: float[b, n, 3]) -> float[b, n, 3]"
    text = f"use std\ndim b\ndim n\n{signature} {{\n    return std.short_conv(x; width = {width})\n}}"
    module = fg.compile(text).module(dtype=torch.float64)
    ((_, w),) = module.named_parameters()
    with torch.no_grad():
        w.copy_(torch.randn(width, 3, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x.clone()
    for k in range(width):
        expected[:, k:] += w[k] * x[:, : 40 - k]
    torch.testing.assert_close(module(x), expected)


@pytest.mark.medium
@pytest.mark.parametrize("kind", wide(KINDS, few=["packed"]))
def test_what_pytorch_does_to_modules(kind: str) -> None:
    module, given = model(kind, torch.float32), inputs(19)
    expected = module(*given)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    weights = list(module.parameters())
    gradients = [torch.autograd.grad(y.square().sum(), weights) for y in (fast(*given), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    length = torch.export.Dim("n", min=2, max=4096)
    exported = torch.export.export(module.eval(), tuple(given), dynamic_shapes=({1: length}, {1: length}))
    longer = inputs(40)
    torch.testing.assert_close(exported.module()(*longer), module(*longer))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(*given)
    low = model(kind, torch.bfloat16)(*given)
    assert low.dtype == torch.bfloat16
    for found in (mixed, low):
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_random_batches_have_documents() -> None:
    inputs = model_inputs(compiled("packed").program)
    assert [tensor.documents for tensor in inputs] == [False, True]
    only = fg.compile("dim b\ndim n\nmodel m(x: float[b, n, 4], ids: int[b, n]) -> float[b, n, 4] {\n"
                      "    return depthwise(x, ones(2, 4), ids)\n}\n")  # fmt: skip
    assert [tensor.documents for tensor in model_inputs(only.program)] == [False, True]
    _, ids = random_batch(model_inputs(only.program), {"b": 3, "n": 50}, seed=0)
    assert ((ids[:, 1:] - ids[:, :-1]) >= 0).all()
    assert ids.max() > 0


def test_the_written_code() -> None:
    source = compiled("packed").modules["model.py"]
    assert "shift(h, ids, by=2)" in source
    assert "return depthwise(x, self.w + itself, ids)" in source
    assert "from .functions import check_dim, check_shape, depthwise, shift" in source
    assert ".long()" not in source, "ids are only compared"
    assert "convolution.py" in compiled("packed").modules
