"""Attacks on what attention hides: tokens that hold NaN, Inf or huge numbers, and what they may not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from tests.dense import hidden_pairs
from tests.kernels.inputs import COEFFICIENTS, Inputs, make_inputs

Run = Callable[[KernelSpec, Inputs], list[Tensor]]
"""Output and the gradients of all inputs."""

POLYNOMIAL = KernelSpec(3, 5, COEFFICIENTS[2], scale=0.7, chunk=8)
NEAR = replace(POLYNOMIAL, near=5, near_d=3)
KINDS: dict[str, KernelSpec] = {
    "causal": replace(POLYNOMIAL, causal=True),
    "padding": replace(POLYNOMIAL, padding=True),
    "causal, padding": replace(POLYNOMIAL, causal=True, padding=True),
    "degree 1, causal": replace(POLYNOMIAL, coefficients=COEFFICIENTS[1], causal=True, padding=True),
    "near, causal": replace(NEAR, causal=True),
    "near, padding": replace(NEAR, padding=True),
    "near of the same logits, causal": replace(POLYNOMIAL, near=8, causal=True, padding=True),
    "documents": replace(POLYNOMIAL, documents=True),
    "documents, causal": replace(POLYNOMIAL, causal=True, documents=True, padding=True),
    "near, documents": replace(NEAR, documents=True),
    "near, documents, causal": replace(NEAR, causal=True, documents=True),
    "degree 1, documents": replace(POLYNOMIAL, coefficients=COEFFICIENTS[1], documents=True),
    "forget": replace(POLYNOMIAL, causal=True, forget=True),
    "forget, padding": replace(POLYNOMIAL, causal=True, padding=True, forget=True),
    "forget, near": replace(NEAR, causal=True, padding=True, forget=True),
    "forget, documents": replace(POLYNOMIAL, causal=True, documents=True, padding=True, forget=True),
}
WINDOW = KernelSpec(3, 5, (), scale=0.7, window=4)
WINDOWS: dict[str, KernelSpec] = {
    "window": WINDOW,
    "window, causal": replace(WINDOW, causal=True),
    "window, padding": replace(WINDOW, padding=True),
    "window, documents": replace(WINDOW, documents=True, causal=True),
    "window, forget": replace(WINDOW, causal=True, padding=True, forget=True),
}
LENGTH = 37
DOCUMENT = (9, 20)  # the tokens of the document in the middle
HUGE = {torch.float32: 1e30, torch.float64: 1e200, torch.bfloat16: 1e30}


def inputs_of(spec: KernelSpec, dtype: torch.dtype, groups: int = 1, length: int = LENGTH) -> Inputs:
    """Two rows; documents and hidden keys at the beginning, in the middle and at the end."""
    inputs = make_inputs(spec, length, groups=groups)
    if spec.documents:
        ids = torch.zeros(2, length, dtype=torch.int64)
        ids[:, DOCUMENT[0] : DOCUMENT[1]] = 1
        inputs = replace(inputs, documents=ids)
    if spec.padding:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[:, :3] = mask[:, 11:14] = mask[:, -2:] = False
        inputs = replace(inputs, mask=mask)
    return inputs.to(dtype)


def targets_of(spec: KernelSpec, length: int = LENGTH) -> Iterator[list[int]]:
    """Sets of tokens that some queries do not see."""
    if spec.padding:
        yield [0, 1, 2, 11, 12, 13, length - 2, length - 1]
        yield [12]
    if spec.documents:
        yield list(range(*DOCUMENT))
        yield [DOCUMENT[1] - 1]
    if spec.causal:
        yield [20]
        yield list(range(17, length))
    if spec.window:
        yield [13]


def spoil(spec: KernelSpec, inputs: Inputs, tokens: list[int], value: float, names: str) -> Inputs:
    """The inputs with `value` in a component of these tokens.

    names: of q, k and v, near_q and near_k with q and k, and g for log_gate.
    """
    tensors = []
    for name, tensor in zip(places(spec), inputs.tensors, strict=True):
        copy = tensor.detach().clone()
        if name == "g" and name in names:
            copy[:, :, tokens] = value
        elif name in names:
            copy[:, :, tokens, -1] = value
        tensors.append(copy.requires_grad_())
    return replace(inputs, tensors=tuple(tensors))


def places(spec: KernelSpec) -> str:
    """What each of the inputs belongs to: q, k, v or the gates."""
    return "qkv" + "qk" * (spec.near_d is not None) + "g" * spec.forget


def gates_of(visible: Tensor) -> Tensor:
    """bool [batch, n, gates]: gates between each query's first visible key and its last."""
    return (visible.cumsum(-1).roll(1, -1).index_fill(-1, torch.tensor(0), 0) > 0) & (
        visible.flip(-1).cumsum(-1).flip(-1) > 0
    )


def visible_pairs(spec: KernelSpec, inputs: Inputs) -> Tensor:
    """bool [batch, n, m]: which queries see which keys."""
    (batch, _, n, _), m = inputs.tensors[0].shape, inputs.tensors[1].shape[2]
    hidden = hidden_pairs(n, m, spec.causal, spec.window, inputs.mask, inputs.documents)
    return ~hidden.expand(batch, 1, n, m)[:, 0]


def dirty_rows(visible: Tensor, tokens: list[int], names: str) -> Tensor:
    """bool [batch, n]: queries that may change when the tokens do."""
    dirty = visible[:, :, tokens].any(-1) if set(names) & {"k", "v"} else torch.zeros_like(visible[:, :, 0])
    if "q" in names:
        dirty = dirty.clone()
        dirty[:, tokens] = True
    if "g" in names:
        dirty = dirty | gates_of(visible)[:, :, tokens].any(-1)
    return dirty


def check(
    run: Run,
    spec: KernelSpec,
    inputs: Inputs,
    visible: Tensor,
    tokens: list[int],
    value: float,
    names: str,
    silent: bool = False,
    known: dict[bytes, list[Tensor]] | None = None,
) -> None:
    """Nothing hidden changes anything, bit for bit, and a row that sees what is not a number is none either.

    silent: only with gradients of 0 for rows that may change.
    known: what is found without an attack, by the rows without a gradient; calls with the same inputs share it.
    """
    known = {} if known is None else known
    case = (tokens, value, names)
    attacked = spoil(spec, inputs, tokens, value, names)
    dirty = dirty_rows(visible, tokens, names)
    assert not dirty.all(), case

    cotangent = inputs.cotangent.masked_fill(dirty[:, None, :, None], 0.0)
    expected = _once(known, dirty, lambda: run(spec, replace(inputs, cotangent=cotangent)))
    found = run(spec, replace(attacked, cotangent=cotangent))
    clean = ~dirty[:, None, :].expand(expected[0].shape[:3])
    assert torch.equal(found[0][clean], expected[0][clean]), (case, "output")
    for place, (gradient, other) in enumerate(zip(found[1:], expected[1:], strict=True)):
        assert torch.isfinite(gradient).all(), (case, place)
        assert torch.equal(gradient, other), (case, place)
    of_query = found[1][:, :, :][dirty[:, None].expand(found[1].shape[:3])]
    assert not of_query.any(), (case, "gradient of a dropped query")

    if value != value or abs(value) == float("inf"):
        spoilt = (dirty & visible.any(-1))[:, None, :].expand(found[0].shape[:3])
        assert torch.isnan(found[0][spoilt]).any(-1).all(), (case, "a row that sees it")
    if silent:
        return

    # With gradients of spoilt rows, what these rows do not see is still untouched.
    expected, found = _once(known, torch.zeros_like(dirty), lambda: run(spec, inputs)), run(spec, attacked)
    untouched = ~(visible & dirty[:, :, None]).any(1)  # keys
    if inputs.mask is not None:
        untouched |= ~inputs.mask
    gates = ~(gates_of(visible) & dirty[:, :, None]).any(1)
    for place, (gradient, other) in enumerate(zip(found, expected, strict=True)):
        kept = {"q": ~dirty, "g": gates}.get(("q" + places(spec))[place], untouched)
        keep = kept[:, None, :].expand(gradient.shape[:3])
        assert torch.equal(gradient[keep], other[keep]), (case, place, "with a gradient")


def _once(
    known: dict[bytes, list[Tensor]], dropped: Tensor, make: Callable[[], list[Tensor]]
) -> list[Tensor]:
    key = dropped.numpy().tobytes()
    if key not in known:
        known[key] = make()
    return known[key]


def attack(
    run: Run,
    spec: KernelSpec,
    dtype: torch.dtype,
    groups: int = 1,
    length: int = LENGTH,
    *,
    every: bool = True,
    gates: bool = True,
) -> None:
    """All sets of hidden tokens, with each kind of bad number in each of the inputs; gates: in these too.

    Sums of gates run on beyond a window: there a gate that a query does not see moves its results by their rounding,
    except where a difference of sums is of higher precision than what is computed from it.
    """
    inputs = inputs_of(spec, dtype, groups, length)
    cases = [(float("nan"), "qkv"), (float("inf"), "v"), (HUGE[dtype], "qkv")]
    if every:
        cases += [(float("nan"), x) for x in "qkv"] + [
            (float("-inf"), "k"),
            (HUGE[dtype], "k"),
            (HUGE[dtype], "kv"),
        ]
    if spec.forget and gates and not (spec.window and dtype == torch.float64):
        cases += [(float("nan"), "g"), (float("nan"), "qkvg")]
    visible = visible_pairs(spec, inputs)
    known: dict[bytes, list[Tensor]] = {}
    for tokens in targets_of(spec, length):
        for value, names in cases:
            check(run, spec, inputs, visible, tokens, value, names, known=known)
