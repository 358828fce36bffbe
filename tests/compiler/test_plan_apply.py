"""Assignments from outside: heads that are served apart and keys that are centred compute the same attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.pipeline import Stage, run
from fastgrad_compiler.planning.decision import Decision
from fastgrad_compiler.reference import interpret
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_grammar.source import Source

SPEC = """
use std
dim b
dim n
model m(x: float[b, n, 32]) -> float[b, n, 32] {{
    repeat i in 2 {{
        x = x + std.attention(std.rms_norm(x); heads = 8, kv_heads = {keys}, qk_dim = 4, causal = {causal}) as layers
    }}
    return x
}}
"""
R = 6.0


def _decision(
    heads: Sequence[int] | None, *, degree: int | None = 16, keys: int = 0, own_mean: bool = False
) -> Decision:
    if degree is None:
        return Decision("exact", heads=None if heads is None else tuple(heads))
    centre = tuple((0.1, -0.2, 0.1, 0.1 * key) for key in range(keys)) or None
    count = 8 if heads is None else len(heads)
    found = LogitRange("data", (R,) * count, ("measured",), centre)
    return Decision(
        "chosen", fit("balanced", degree, R), break_even=0, range=found, own_mean=own_mean,
        heads=None if heads is None else tuple(heads),
    )  # fmt: skip


@cache
def _compiled(decisions: tuple[Decision, ...], *, keys: int = 4, causal: bool = False) -> Compiled:
    source = Source("<text>", SPEC.format(keys=keys, causal=str(causal).lower()))
    stages: tuple[Stage, ...] = run(elaborate(source), until="attention")
    first = attention_table(stages[-1].program)[0]
    return Compiled(
        source, "torch", run(stages[0].program, target="torch", assignment={first.full_path: decisions})
    )


GROUPS = [
    (_decision((0, 1, 2, 3)), _decision((4, 5, 6, 7), degree=None)),
    (_decision((0, 1, 4, 5), keys=2), _decision((2, 3, 6, 7))),
    (_decision((6, 7)), _decision((0, 1, 2, 3, 4, 5), keys=3)),
    (_decision(None, keys=4),),
    (_decision(None, own_mean=True),),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("decisions", GROUPS)
def test_the_same_attention(decisions: tuple[Decision, ...]) -> None:
    """At degree 16 the polynomial is exact to some 1e-5; what is taken apart must be put together in order."""
    compiled = _compiled(decisions)
    model = compiled.module(seed=0, dtype=torch.float64)
    exact = _compiled((Decision("exact"),)).module(seed=0, dtype=torch.float64)
    assert model.state_dict().keys() == exact.state_dict().keys()
    x = torch.randn(2, 13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), exact(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.reference(model)(x), exact(x))
    found = interpret.run(compiled.program, [x], dict(model.state_dict()))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decisions", GROUPS)
def test_the_gradient_graph_follows(decisions: tuple[Decision, ...]) -> None:
    compiled = _compiled(decisions)
    model = compiled.module(seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, 32, dtype=torch.float64, generator=generator).requires_grad_()
    out = model(x)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    out.backward(cotangent)
    inputs, weights = interpret.run_gradient(
        compiled.program, [x.detach()], {k: v.detach() for k, v in model.state_dict().items()}, [cotangent]
    )
    assert x.grad is not None
    torch.testing.assert_close(inputs["x"], x.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.grad, rtol=1e-9, atol=1e-11)


def test_each_group_is_an_attention_of_the_plan() -> None:
    compiled = _compiled(GROUPS[1])
    entries: list[AttentionEntry] = list(compiled.plan)
    assert [entry.node["source"] for entry in entries[:2]] == ["data", "data"]
    assert entries[0].path.endswith("heads_0_to_1_4_to_5")
    assert entries[0].node["bound"] == R
    assert len(entries) == 3  # the second layer is decided by the pass itself


def test_centres_are_constants_and_no_weights() -> None:
    compiled = _compiled(GROUPS[3])
    model = compiled.module(seed=0)
    (centre,) = [buffer for name, buffer in model.named_buffers() if name.endswith("centre")]
    assert centre.shape == (4, 1, 4)
    assert not any("centre" in name for name in model.state_dict())
    assert not any("centre" in name for name in compiled.reference(model).state_dict())
    assert compiled.module(seed=0).to(torch.float64).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centres_survive_the_device_meta(dtype: torch.dtype) -> None:
    """Memory without values is filled with those of the text: no state_dict brings them."""
    compiled = _compiled(GROUPS[1])
    expected = compiled.module(seed=3, dtype=dtype)
    x = torch.randn(2, 13, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        model = compiled.module(seed=3, dtype=dtype)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    assert model(x).isnan().all()
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(x), expected(x))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    model.reset_parameters(3)  # type: ignore[operator]
    assert torch.equal(model(x), expected(x))
    assert len(list(model.buffers())) > 0
