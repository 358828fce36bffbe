"""Claims that were false once, of whole compiled models: what the text means, in plain PyTorch, is what runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastgrad_dsl as fg
from fastgrad_dsl.api.compiled import Compiled

N = 40
MODEL = """
dim b
dim n
model m(q: float[b, n, 4], k: float[b, n, 4], v: float[b, n, 3]) -> float[b, n, 3] {{
    s = q @ k.T
    u = unit(q) @ unit(k).T
    return {body}
}}
"""


def less_largest(s: Tensor) -> Tensor:
    return s - s.amax(-1, keepdim=True)


def near_far(local: Tensor, far: Tensor, block: int) -> Tensor:
    blocks = torch.arange(N) // block
    return torch.where((blocks[:, None] - blocks).abs() <= 1, local, far)


def whole(x: Tensor) -> Tensor:
    return x.long().to(x.dtype)


Body = Callable[[Tensor, Tensor, Tensor], Tensor]
BODIES: dict[str, Body] = {
    "softmax(near_far(s - max(s; axis = -1, keepdim = true), u; 8)) @ v": lambda s, u, v: (
        near_far(less_largest(s), u, 8).softmax(-1) @ v
    ),
    "softmax(near_far(s, u - max(u; axis = -1, keepdim = true); 8)) @ v": lambda s, u, v: (
        near_far(s, less_largest(u), 8).softmax(-1) @ v
    ),
    "softmax(near_far(s, u; 8) - max(near_far(s, u; 8); axis = -1, keepdim = true)) @ v": lambda s, u, v: (
        near_far(s, u, 8).softmax(-1) @ v
    ),
    "softmax(float(int(2.5 * s))) @ v": lambda s, u, v: whole(2.5 * s).softmax(-1) @ v,
    "float(int(softmax(s))) @ v": lambda s, u, v: whole(s.softmax(-1)) @ v,
    "float(softmax(float(s))) @ v": lambda s, u, v: s.softmax(-1) @ v,
}


@pytest.mark.parametrize(("body", "meant"), BODIES.items(), ids=BODIES)
def test_module_and_reference_are_the_text(body: str, meant: Body) -> None:
    found = fg.compile(MODEL.format(body=body), target="torch")
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, N, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, N, 3, generator=generator, dtype=torch.float64)
    u = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
    expected = meant(q @ k.mT, u, v)
    model = found.module(dtype=torch.float64)
    for served in (model, found.reference(model)):
        torch.testing.assert_close(served(q, k, v), expected, rtol=1e-10, atol=1e-12)


GAIN = """
dim b
dim n
model m(x: float[b, n, 8]) -> float[b, n, 8] {{
    weight tau: float[] = ones()
    return softmax(causal((unit(x) @ unit(x).T) {gain})) @ x
}}
budget {{
    at "*" degree = 2
    on_violation = raise
}}
"""


def asserted(gain: str) -> Compiled:
    return fg.compile(GAIN.format(gain=gain), target="torch")


@pytest.mark.parametrize(
    ("gain", "tau"),
    [
        ("* (0.5 * assume_bound(tau; bound = 2.0))", 25.0),
        ("/ (1.5 + assume_bound(tau; bound = 0.5))", -1.49),
    ],
)
def test_asserted_gain_is_guarded_and_said(gain: str, tau: float) -> None:
    found = asserted(gain)
    (entry,) = found.plan_document["attentions"]
    assert (entry["bound"], entry["asserted"], entry["range_source"], entry["guarded"]) == (
        1.0, True, "asserted", True,
    )  # fmt: skip
    assert any("assumed in the file, not proved" in line for line in entry["proof"])
    model = found.module(dtype=torch.float64)
    x = torch.randn(1, 700, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        dict(model.named_parameters())["tau"].fill_(0.25)
        model(x)
        dict(model.named_parameters())["tau"].fill_(tau)
    with pytest.raises(fg.BudgetViolation):
        model(x)


def test_certified_trust_refuses_what_only_a_word_limits() -> None:
    text = GAIN.format(gain="* assume_bound(tau; bound = 1.0)").replace(
        "budget {", "budget {\n    trust = certified"
    )
    with pytest.raises(fg.TfgError) as caught:
        fg.compile(text)
    (refused,) = caught.value.diagnostics
    assert refused.code == "FG301"
    assert "`trust = certified` does not count what assume_bound says" in refused.message
    planned = fg.compile(text.replace('at "*" degree = 2', "output <= 0.5")).plan_document["attentions"][0]
    assert (planned["decision"], planned["bound"], planned["guarded"]) == ("exact", None, False)
