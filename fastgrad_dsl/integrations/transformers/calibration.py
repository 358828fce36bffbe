"""Settings for each head of a Transformers model, from batches of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad_compiler.approximation.polynomial import FAMILIES, Family, Polynomial
from fastgrad_compiler.planning.candidates import highest_degree
from fastgrad_compiler.reference.attention_torch import polynomial as evaluated
from fastgrad_dsl.calibration.calibrate import MARGIN, STRETCH
from fastgrad_dsl.integrations.transformers.attach import attach
from fastgrad_dsl.integrations.transformers.attention import Call, case_of, mean_key, recording
from fastgrad_dsl.integrations.transformers.choice import Case, Limits, least, polynomial_of, step_above
from fastgrad_dsl.integrations.transformers.settings import EXACT, Check, Form, Settings
from fastgrad_dsl.models.spread import entropy_share

ENTRIES = 2**19
"""Of the logits of a call that are looked at: queries are sampled so that it has about as many."""
FITTED = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Shares of a range on which polynomials are fitted: few logits are near its end."""
FIRST = 8.0  # times the limit of the model is the first limit of each head: errors of heads partly cancel
MOST = 0.5  # of a head's error
ROUNDS = 7

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Head:
    """What was found of a key head with its query heads, and what serves it.

    logits: largest size seen, of the keys less their centre; norms: what norms bound it by; entropy: mean over queries
    of that of the weights, divided by the logarithm of the number of keys that each sees, 1 is uniform; error: relative
    L2 error of its output on sampled queries, with the form that was chosen.
    """

    logits: float
    norms: float
    entropy: float
    form: Form
    error: float


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` chose: heads by the path of their attention, settings, and the measured error of the model.

    error: relative L2 error of the model's first output against exact attention, the largest of all batches.
    """

    heads: Mapping[str, tuple[Head, ...]]
    settings: Mapping[str, Settings]
    error: float

    @property
    def served(self) -> float:
        """The share of heads that polynomials serve."""
        forms = [head.form for heads in self.heads.values() for head in heads]
        return sum(form.degree is not None for form in forms) / max(1, len(forms))

    def __str__(self) -> str:
        lines = ["attention head  |s| <=  norms  entropy  served by         error"]
        for path, heads in self.heads.items():
            for number, head in enumerate(heads):
                form = head.form
                text = "exact" if form.degree is None else f"{form.family} {form.degree}, R {form.bound:.3g}"
                sizes = f"{head.logits:7.3g} {head.norms:6.3g} {head.entropy:8.2f}"
                lines.append(f"{path} {number:4}  {sizes}  {text:16} {head.error:.2g}")
        return "\n".join(
            [*lines, f"model: {self.error:.3g} measured, {self.served:.0%} of heads by polynomials"]
        )


@dataclass
class _Seen:
    """Of one attention, over all calls; [h] by key head."""

    case: Case  # of the longest call
    same: bool = True  # whether every query sees the same keys
    logits: Tensor | None = None
    norms: Tensor | None = None
    entropy: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


def calibrate(
    model: Any,
    batches: Sequence[Batch],
    output: float = 0.01,
    *,
    trust: str = "calibrated",
    families: Sequence[Family] = FAMILIES,
    settings: Settings | None = None,
) -> Calibrated:
    """Choose for each head the polynomial of the least degree that keeps the output, and set the model to that.

    Each head gets the least degree whose error is at most a limit, which is eight times `output` at first. Then the
    whole model is measured; where its error is beyond `output` a smaller limit is sought, by halving in seven rounds,
    and all is exact where there is none. Heads of queries that share a key head go together.

    Args:
        model: of Transformers.
        batches: its inputs by name, on its device.
        output: limit of the relative L2 error of the model's first output, of the tokens that are no padding.
        trust: calibrated: errors are measured on sampled queries of the batches, a head may serve logits up to 1.25
            times those seen, and calls are checked by a sample of theirs. certified: errors are certificates, and
            calls are proved to be within the range, which is 1.25 times what the norms of the batches prove.
        families: of polynomials.
        settings: for all else: near, target, exact_below.

    Returns what it found, which is set already.

    Raises:
        ValueError: no batch, an unknown trust, or no attention that can be served.
    """
    if not batches:
        raise ValueError("calibration needs a batch at least")
    if trust not in ("calibrated", "certified"):
        raise ValueError(f"trust is calibrated or certified, not {trust!r}")
    check: Check = "norms" if trust == "certified" else "sample"
    base = replace(settings or Settings(), bound=None, degree=None, beyond="exact", heads=None, check=check)
    attach(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _calibrated(model, batches, output, base, tuple(families))
    finally:
        model.train(training)


def _calibrated(
    model: Any, batches: Sequence[Batch], output: float, base: Settings, families: tuple[Family, ...]
) -> Calibrated:
    names = {module: path for path, module in model.named_modules()}
    ranges = _Ranges(base)
    with recording(ranges):
        wanted = [_output(model, batch) for batch in batches]
    if not ranges.found:
        raise ValueError(
            "the model has no attention that can be served, or it does not use AttentionInterface"
        )
    errors = _Errors(base, ranges, families)
    with recording(errors):
        for batch in batches:
            model(**batch)
    low, high = output / FIRST, min(MOST, FIRST * output)
    limit, best = high, Calibrated({}, {}, inf)
    for _ in range(ROUNDS):
        heads = {names[m]: errors.heads(m, limit) for m in ranges.found}
        if heads != best.heads:
            found = _set(model, heads, base)
            error = max(_error(_output(model, b), exact, b) for b, exact in zip(batches, wanted, strict=True))
            if error <= output:
                best = Calibrated(heads, found, error)
        if heads != best.heads:
            high = limit
        elif limit == high:
            break
        else:
            low = limit
        limit = sqrt(low * high)
    if best.error == inf:
        heads = {names[m]: errors.heads(m, 0.0) for m in ranges.found}
        best = Calibrated(heads, {}, 0.0)
    return replace(best, settings=_set(model, best.heads, base))


def _set(model: Any, heads: Mapping[str, tuple[Head, ...]], base: Settings) -> dict[str, Settings]:
    found = {path: replace(base, heads=tuple(head.form for head in own)) for path, own in heads.items()}
    attach(model, found)
    return found


def _output(model: Any, batch: Batch) -> Tensor:
    """The first floating tensor of a model's output that is no loss."""
    out = model(**batch)
    values = out.values() if isinstance(out, Mapping) else out
    found = [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0]
    return found[0].double()


def _error(found: Tensor, wanted: Tensor, batch: Batch) -> float:
    """The relative L2 error; of the tokens that are no padding where the output has tokens."""
    mask = batch.get("attention_mask")
    difference = found - wanted
    if mask is not None and mask.dim() == 2 and wanted.shape[:2] == mask.shape:
        shown = mask.bool().unsqueeze(-1)
        difference, wanted = difference * shown, wanted * shown
    size = float(wanted.norm())
    return float(difference.norm()) / size if size else (inf if float(difference.norm()) else 0.0)


# ---------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class _Rows:
    """Sampled queries of a call in float64: logits [b, H, r, n], of keys less their centre, and what each sees."""

    logits: Tensor
    visible: Tensor
    far: Tensor
    v: Tensor


def _rows(call: Call, keys: Tensor, near: int | None) -> _Rows:
    batch, heads, n, _ = call.q.shape
    count = max(1, min(n, ENTRIES // (batch * heads * n)))
    places = torch.linspace(n - 1, 0, count, dtype=torch.float64, device=call.q.device).round().long()
    q = call.q[:, :, places].double() * call.scale
    k, v = (x.double().repeat_interleave(call.groups, 1) for x in (keys, call.v))
    tokens = torch.arange(n, device=q.device)
    visible = torch.ones(1, 1, len(places), n, dtype=torch.bool, device=q.device)
    if call.seen.causal:
        visible = visible & (tokens <= places[:, None])
    if call.seen.padding is not None:
        visible = visible & call.seen.padding[:, None, None] & call.seen.padding[:, None, places, None]
        v = v.masked_fill(~call.seen.padding[:, None, :, None], 0.0)
    if call.seen.documents is not None:
        ids = call.seen.documents
        visible = visible & (ids[:, None, places, None] == ids[:, None, None])
    far = visible
    if near is not None:
        far = visible & ((places[:, None] // near - tokens // near).abs() > 1)
    return _Rows((q @ k.mT).masked_fill(~visible, 0.0), visible, far, v)


class _Ranges:
    """Sizes of logits, norms, entropies and mean keys of all attentions."""

    def __init__(self, base: Settings) -> None:
        self.base = base
        self.found: dict[nn.Module, _Seen] = {}

    def record(self, call: Call) -> None:
        """Note a call."""
        case = case_of(call, self.base, centred=True)
        seen = self.found.setdefault(call.module, _Seen(case))
        seen.case = max(seen.case, case, key=lambda each: each.n)
        seen.same = seen.same and call.seen.everyone_alike
        seen.keys.append(mean_key(call.k.double(), call.seen.padding).mean(0)[:, 0])
        rows = _rows(call, call.k, None)
        seen.entropy.append(_by_key_head(_entropy(rows), call, mean=True))

    def centre(self, module: nn.Module) -> Tensor | None:
        """[h, 1, d]: the mean of the keys of all calls; None where each sequence's own mean is taken."""
        seen = self.found[module]
        return None if seen.same and self.base.centre else torch.stack(seen.keys).mean(0)[:, None]


class _Errors:
    """Ranges of logits of keys less their centre, and what polynomials do to the output of each head."""

    def __init__(self, base: Settings, ranges: _Ranges, families: tuple[Family, ...]) -> None:
        self.base, self.ranges, self.families = base, ranges, families
        self.rows: dict[nn.Module, list[_Rows]] = {}
        self.known: dict[tuple[nn.Module, int, Polynomial], float] = {}

    def record(self, call: Call) -> None:
        """Keep sampled logits, and note ranges."""
        seen, k = self.ranges.found[call.module], call.k.double()
        centre = self.ranges.centre(call.module)
        keys = k - (mean_key(k, call.seen.padding) if centre is None else centre)
        rows = _rows(call, keys, self.base.near)
        self.rows.setdefault(call.module, []).append(rows)
        largest = _by_key_head(rows.logits.masked_fill(~rows.far, 0.0).abs().amax((2, 3)), call)
        shown = (
            keys if call.seen.padding is None else keys.masked_fill(~call.seen.padding[:, None, :, None], 0.0)
        )
        queries = call.q.double().norm(dim=-1).amax(2).unflatten(1, (-1, call.groups)).amax(2)
        norms = (queries * shown.norm(dim=-1).amax(2)).amax(0) * abs(call.scale)
        seen.logits = largest if seen.logits is None else torch.maximum(seen.logits, largest)
        seen.norms = norms if seen.norms is None else torch.maximum(seen.norms, norms)

    def heads(self, module: nn.Module, limit: float) -> tuple[Head, ...]:
        """What serves each key head within a limit of its error."""
        seen, centre = self.ranges.found[module], self.ranges.centre(module)
        assert seen.logits is not None
        assert seen.norms is not None
        entropy = torch.stack(seen.entropy).mean(0).tolist()
        sizes, norms = seen.logits.tolist(), seen.norms.tolist()
        found = []
        for head, (size, norm) in enumerate(zip(sizes, norms, strict=True)):
            certified = self.base.check == "norms"
            reach = MARGIN * (norm if certified else size)
            polynomial, error = (self._certified if certified else self._measured)(module, head, reach, limit)
            form = EXACT
            if polynomial is not None:
                taken = None if centre is None else tuple(centre[head, 0].tolist())
                limit_of_head = max(reach, polynomial.bound)
                form = Form(polynomial.degree, polynomial.family, polynomial.bound, limit_of_head, taken)
            found.append(Head(size, norm, entropy[head], form, error))
        return tuple(found)

    def _certified(
        self, module: nn.Module, head: int, reach: float, limit: float
    ) -> tuple[Polynomial | None, float]:
        """The least degree whose certificate keeps the limit, and its error on the batches."""
        case, bound = self.ranges.found[module].case, step_above(reach)
        if bound is None or not limit:
            return None, 0.0
        limits = Limits(limit, self.base.gradient)
        found = [least(family, bound, limits, case) for family in self.families]
        best = min((each for each in found if each), key=lambda each: each.degree, default=None)
        return best, 0.0 if best is None else self._error(module, head, best)

    def _measured(
        self, module: nn.Module, head: int, reach: float, limit: float
    ) -> tuple[Polynomial | None, float]:
        """The least degree with an error within the limit on the batches, and the least error of that degree.

        No weight is negative, whatever the logit.
        """
        d = self.ranges.found[module].case.d
        bounds = dict.fromkeys(step_above(share * reach) for share in FITTED)
        for degree in range(1, highest_degree(d) + 1) if limit else ():
            fitted = [polynomial_of(f, degree, b, d) for f in self.families for b in bounds if b is not None]
            tried = [each for each in fitted if each is not None and each.positive_from is None]
            errors = [(self._error(module, head, polynomial), polynomial) for polynomial in tried]
            error, polynomial = min(errors, key=lambda pair: pair[0], default=(inf, None))
            if polynomial is not None and error <= limit:
                return polynomial, error
        return None, 0.0

    def _error(self, module: nn.Module, head: int, polynomial: Polynomial) -> float:
        key = (module, head, polynomial)
        if key not in self.known:
            groups = self.ranges.found[module].case.groups
            heads = slice(head * groups, (head + 1) * groups)
            self.known[key] = _output_error(self.rows[module], heads, polynomial)
        return self.known[key]


def _by_key_head(x: Tensor, call: Call, mean: bool = False) -> Tensor:
    """[h] of [b, H]."""
    grouped = x.unflatten(1, (-1, call.groups))
    found: Tensor = grouped.mean((0, 2)) if mean else grouped.amax((0, 2))
    return found


def _entropy(rows: _Rows) -> Tensor:
    """[b, H]: the mean entropy of rows of weights, as a share of that of equal ones; rows of one key are left out."""
    return entropy_share(rows.logits, rows.visible, (-1,))


def _output_error(calls: Sequence[_Rows], heads: slice, polynomial: Polynomial) -> float:
    """The relative L2 error of some heads' output on sampled queries, logits stretched."""
    errors, sizes = 0.0, 0.0
    for rows in calls:
        logits = STRETCH * rows.logits[:, heads]
        exact = _output_of(logits.exp(), rows, heads)
        weights = torch.where(rows.far, evaluated(polynomial.coefficients, logits), logits.exp())
        errors += float((_output_of(weights, rows, heads) - exact).square().sum())
        sizes += float(exact.square().sum())
    return sqrt(errors / sizes) if sizes else 0.0


def _output_of(weights: Tensor, rows: _Rows, heads: slice) -> Tensor:
    shown = weights.masked_fill(~rows.visible, 0.0)
    total = shown.sum(-1, keepdim=True)
    found: Tensor = (shown / torch.where(total == 0, 1.0, total)) @ rows.v[:, heads]
    return found
