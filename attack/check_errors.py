"""(c) No queries, keys, values and upstream gradients lead beyond a stated error: output, dQ, dK, dV, in each dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import exp, isinf, sqrt
from typing import Any

import torch
from torch import Tensor

from attack.cases import Case, Finding, built, walk
from attack.check_bounds import assertions_hold
from attack.logits import far_logits
from fastgrad_compiler.approximation.certificates import eta, score_factor
from fastgrad_compiler.codegen.kernel import KernelSpec, load_kernel
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.documents.write import plain
from fastgrad_dsl.models.measure_plan import measure_plan

Entry = Mapping[str, Any]
LENGTHS = (2, 3, 8, 40, 200)
STARTS = 2
SHARP = 4  # of the kinds of starts, the one that reaches the bounds of output and dV
STEPS = 15
LARGEST_RANGE = 40.0
ROUNDING = 1e-12
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TENSORS = ("output", "dq", "dk", "dv")


def check_errors(case: Case) -> None:
    """The certificates of the plan, climbed towards on free tensors; the bounds of a report, on the model itself."""
    entries = [plain(entry) for entry in case.compiled.plan_document.attentions if is_approximated(entry)]
    stated = [entry for entry in entries if entry["eps"] is not None and entry["eps"] < 1]
    stated = [entry for entry in stated if entry["d"] and entry["dv"] and entry["bound"] <= LARGEST_RANGE]
    if not stated:
        return
    rng = case.random("errors")
    for entry in rng.sample(stated, min(2, len(stated))):
        _certificate(entry, rng)
    _report(case)


# ---------------------------------------------------------------- certificates


@dataclass(frozen=True)
class _Slack:
    """What rounding adds in a dtype: shares of max |v|, of sum ||dO||, of A_i (docs/mathematics.md, section 10)."""

    output: float
    value: float
    score: float


def _runs(entry: Entry) -> Iterator[tuple[str, _Slack]]:
    """The dtypes for which a plan states a bound, and its rounding term.

    A plan without one speaks of real arithmetic: then float64 is taken, with what float64 may lose of e^(2 R).
    """
    rounding = entry.get("rounding")
    if rounding is None:
        lost = 1e-13 * exp(2.0 * entry["bound"])
        yield "float64", _Slack(lost, lost, lost)
        return
    for run in rounding["runs"]:
        found = [run[key] for key in ("output", "value_gradient", "score_gradient")]
        if run["device"] == "cpu" and run["dtype"] in DTYPES and None not in found:
            yield run["dtype"], _Slack(*found)


def _certificate(entry: Entry, rng: random.Random) -> None:
    precision = {"precision": entry["precision"]} if entry.get("precision") else {}
    spec = KernelSpec(d=entry["d"], dv=entry["dv"], coefficients=tuple(entry["coefficients"]),
                      causal=entry["causal"], near=entry["near"], scale=entry["scale"], **precision)  # fmt: skip
    for kind in (SHARP, *rng.sample(range(SHARP), STARTS)):
        rows = _Rows.start(entry, rng, kind)
        _measure(entry, spec, rows)
        _climb(entry, rows, rng.choice(TENSORS))
        _measure(entry, spec, rows)


def _measure(entry: Entry, spec: KernelSpec, rows: _Rows) -> None:
    """The kernel in each dtype beside softmax of the very inputs. Raises Finding beyond a bound."""
    for dtype, slack in _runs(entry):
        narrower = 1.0 - 2.0**-7 if dtype == "bfloat16" else 1.0  # whose rounding must lead beyond nothing
        shares = (narrower, narrower, 1.0, 1.0)
        pairs = zip(rows.within(), shares, strict=True)
        given = [(x.detach() * share).to(DTYPES[dtype]) for x, share in pairs]
        found = _results(load_kernel(spec), given)
        exact = _results(partial(_softmax, entry), [x.double() for x in given])
        for name, excess in _ratios(entry, [x.double() for x in given], found, exact, slack).items():
            if excess > 1.0 + 1e-9:
                words = f"{name} is {excess:.4g} of its bound at n = {len(given[0][0, 0])}"
                words = f"{entry['path']}: {words}, R = {entry['bound']:.4g}"
                raise Finding("c", f"certificate, {name} in {dtype}", words)


@dataclass(frozen=True)
class _Rows:
    """Free q, k [1, 1, n, d], v and dO [1, 1, n, dv]; `longest`: no row of q or k may be longer."""

    free: tuple[Tensor, ...]
    longest: float

    @staticmethod
    def start(entry: Entry, rng: random.Random, kind: int) -> _Rows:
        """Rows at the end of the range, in one of several structures."""
        n, scale = rng.choice(LENGTHS[-2:] if kind == SHARP else LENGTHS), abs(entry["scale"]) or 1.0
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        q, k, v, upstream = (torch.randn((1, 1, n, width), generator=generator, dtype=torch.float64)
                             for width in (entry["d"], entry["d"], entry["dv"], entry["dv"]))  # fmt: skip
        if kind == SHARP:  # two scores, where the polynomial is most too large and too small, for one query
            k, v = _sharp(entry, k, v, q)
            upstream[:, :, :-1] = 0.0
        elif kind == 1:  # keys near the negatives of the queries, where exp is smallest
            q, k = q[:, :, :1].expand_as(q).clone(), -q[:, :, :1].expand_as(q) * (1.0 - 0.05 * k.abs())
        elif kind == 2:  # both ends of the range, values of both signs
            q = q[:, :, :1].expand_as(q).clone()
            k = q * torch.where(torch.rand((n, 1), generator=generator) < 0.5, 1.0, -1.0)
            v = v.sign()
        elif kind == 3:
            k, v = q.clone(), v.abs()
        free = tuple(x.contiguous().requires_grad_() for x in (q, k, v, upstream))
        return _Rows(free, sqrt(entry["bound"] / scale))

    def within(self) -> list[Tensor]:
        """The tensors, q and k drawn into the ball in which no logit is beyond R."""
        q, k, v, upstream = self.free
        limit = self.longest * (1.0 - 1e-6)  # so that rounding leads beyond nothing
        held = [x * (limit / x.norm(dim=-1, keepdim=True).clamp(min=limit)) for x in (q * limit, k * limit)]
        return [*held, v, upstream]


def _sharp(entry: Entry, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for which the bounds of output and dV are reached, as `test_certificates.py` has it; q is set."""
    bound, sign = entry["bound"], 1.0 if entry["scale"] >= 0 else -1.0
    s = torch.linspace(-bound, bound, 401, dtype=torch.float64)
    error = sum(c * s**power for power, c in enumerate(entry["coefficients"])) * (-s).exp() - 1.0
    high, low = float(s[error.argmax()]), float(s[error.argmin()])
    share = exp(low) / (exp(low) + exp(high))  # both halves of the weight
    first = torch.arange(k.shape[2])[:, None] < share * k.shape[2]
    along = torch.zeros(k.shape[-1], dtype=torch.float64)
    along[0] = 1.0
    q.copy_(along.expand_as(q))
    one = torch.ones_like(v[..., :1])
    keys = torch.where(first, high, low) * sign / bound * along
    return keys.expand_as(k).clone(), torch.where(first, one, -one).expand_as(v).clone()


def _climb(entry: Entry, rows: _Rows, name: str) -> None:
    """Adam on the share of its bound that an error takes, by dense formulas."""
    dense, exact, none = partial(_dense, entry), partial(_softmax, entry), _Slack(0.0, 0.0, 0.0)
    if rows.free[0].shape[2] > 40:
        return
    adam = torch.optim.Adam(rows.free, lr=0.05)
    for _ in range(STEPS):
        given = rows.within()
        share = _ratios(entry, given, _results(dense, given, True), _results(exact, given, True), none)[name]
        if not isinstance(share, Tensor) or not share.requires_grad or not bool(share.isfinite()):
            return
        adam.zero_grad()
        (-share).backward()
        if any(x.grad is None or not bool(x.grad.isfinite().all()) for x in rows.free):
            return
        adam.step()


Attend = Callable[..., Tensor]


def _results(attend: Attend, given: list[Tensor], again: bool = False) -> dict[str, Tensor]:
    """Output, dq, dk and dv, `again` differentiable."""
    q, k, v, upstream = given
    if not again:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    output = attend(q, k, v)
    found = torch.autograd.grad(output, (q, k, v), upstream, create_graph=again)
    results = dict(zip(TENSORS, (output, *found), strict=True))
    return results if again else {name: x.detach().double() for name, x in results.items()}


def _pairs(entry: Entry, n: int) -> tuple[Tensor, Tensor]:
    """Visible pairs, and those of them that are far."""
    rows, columns = torch.arange(n)[:, None], torch.arange(n)
    seen = columns <= rows if entry["causal"] else torch.ones((n, n), dtype=torch.bool)
    near = entry["near"]
    return seen, seen if near is None else seen & ((rows // near - columns // near).abs() > 1)


def _softmax(entry: Entry, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen, _ = _pairs(entry, q.shape[2])
    scores: Tensor = entry["scale"] * (q @ k.mT)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _dense(entry: Entry, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen, far = _pairs(entry, q.shape[2])
    s = entry["scale"] * (q @ k.mT)
    p = sum(c * s**power for power, c in enumerate(entry["coefficients"]))
    weights = torch.where(far, p, torch.where(seen, s.exp(), 0.0))
    return weights @ v / weights.sum(-1, keepdim=True)


def _ratios(
    entry: Entry, given: list[Tensor], found: Mapping[str, Tensor], exact: Mapping[str, Tensor], slack: _Slack
) -> dict[str, Tensor]:
    """How much of its bound each error takes (docs/mathematics.md, section 7)."""
    q, k, v, upstream = given
    eps, eps_prime, scale = entry["eps"], entry["eps_prime"], abs(entry["scale"])
    seen, _ = _pairs(entry, q.shape[2])
    visible = seen[None, None, :, :, None]
    columns = v[:, :, None]  # [1, 1, 1, m, dv]
    top = torch.where(visible, columns, -torch.inf).amax(3)
    low = torch.where(visible, columns, torch.inf).amin(3)
    largest = torch.maximum(top.abs(), low.abs())
    projected = (upstream @ v.mT)[0, 0]
    omega = torch.where(seen, projected, -torch.inf).amax(-1)
    omega = omega - torch.where(seen, projected, torch.inf).amin(-1)
    products = torch.where(seen, (upstream.abs() @ v.abs().mT)[0, 0], 0.0).amax(-1)
    rows = score_factor(eps, eps_prime) * omega + slack.score * products
    off = {name: found[name] - exact[name] for name in TENSORS}
    size = upstream.norm(dim=-1).sum()
    bounds = {
        "output": (off["output"].abs(), eta(eps) / 2 * (top - low) + slack.output * largest),
        "dq": (off["dq"].norm(dim=-1)[0, 0], rows * scale * k.norm(dim=-1).amax()),
        "dk": (off["dk"].norm(dim=-1).sum(), (rows * scale * q.norm(dim=-1)[0, 0]).sum()),
        "dv": (off["dv"].norm(dim=-1).sum(), (eta(eps) + slack.value) * size),
    }
    tiny = 1e-13 * (1.0 + float(largest.detach().max()) * (1.0 + float(size.detach())) * (1.0 + scale))
    return {name: (error / (bound + tiny)).max() for name, (error, bound) in bounds.items()}


# ---------------------------------------------------------------- reports


def _report(case: Case) -> None:
    """What a report measures of each attention is at most what it calls a bound, where logits are in range."""
    program = case.served
    inputs, weights = case.point.tensors()
    if not _in_range(program, inputs, weights):
        return
    plan = case.compiled.plan_document
    model = built(program, case.point.weights)
    errors = measure_plan(plan, model, [x.detach() for x in inputs], (), None)
    for attention in errors.attentions:
        for name, local in attention.local.items():
            if isinf(local.measured) or local.bound < ROUNDING:
                continue  # nothing is relative to a gradient of 0
            if local.measured > local.bound * (1.0 + 1e-9) + 1e-9:
                words = f"{name} is off by {local.measured:.4g}, its bound is {local.bound:.4g}"
                raise Finding("c", f"report, {name}", f"{attention.path}: {words}")


def _in_range(program: Program, inputs: list[Tensor], weights: Mapping[str, Tensor]) -> bool:
    flat = flatten(program)
    with torch.no_grad():
        values = walk(program, flat, inputs, weights)
        nodes = [node for node in flat.nodes if node.op == "poly_attention" and node.get("bound") is not None]
        for node in nodes:
            given = [values[name] for name in node.inputs]
            logits = far_logits(node, given)
            if not bool((logits.abs() <= float(str(node["bound"]))).all()):
                return False
            if not all(bool(x.isfinite().all()) for x in given if x.is_floating_point()):
                return False
        return assertions_hold(program, values)
