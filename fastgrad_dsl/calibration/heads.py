"""What each head of a pretrained model could be: its logits on data, and the errors and times of each form.

Errors are measured on sampled rows, and hold for no other data. A polynomial may be fitted on less than the range of
the logits, where few of them are near its end; then no certificate holds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastgrad_compiler.analysis.ranges import LogitRange
from fastgrad_compiler.approximation.polynomial import Family, Polynomial
from fastgrad_compiler.attention.table import AttentionEntry, attention_table
from fastgrad_compiler.planning.candidates import MAX_RANK, fits
from fastgrad_compiler.planning.cost import EXACT, Shape, Way, shape_of
from fastgrad_compiler.planning.decision import Decision
from fastgrad_compiler.planning.target_cost import cost_of
from fastgrad_compiler.runtime.attention_op import compute_dtype
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_dsl.calibration.calibrate import STRETCH, Tell
from fastgrad_dsl.calibration.capture import Call, Subject, capture
from fastgrad_dsl.calibration.logits import Logits, measure_logits
from fastgrad_dsl.calibration.replan import silenced
from fastgrad_dsl.calibration.samples import Exact, LocalErrors, Sample, exact_rows, polynomial_errors, sample
from fastgrad_dsl.documents.plan import approximated_of
from fastgrad_dsl.models.measure import whole_errors
from fastgrad_dsl.models.spread import entropy_share

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled

DEGREES = (2, 4, 6)  # even ones: no weight is negative, whatever the logit
FITTED: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # ranges that are tried
FAMILIES: tuple[Family, ...] = ("minimax", "balanced")
WINDOWS = (8, 16, 32, 64, 128, 256)

Kind: TypeAlias = Literal["exact", "window", "polynomial"]


@dataclass(frozen=True)
class HeadForm:
    """One thing that a head could be. error: relative L2 of its output; time: of both passes, of exact attention.

    size: of a window in tokens, of a polynomial its degree, 0 of exact attention; rank: features of a polynomial.
    """

    kind: Kind
    size: int
    error: float
    time: float
    rank: int = 0
    polynomial: Polynomial | None = None

    @property
    def affordable(self) -> bool:
        """Whether the rank is one that the compiler plans with."""
        return self.rank <= MAX_RANK

    def __str__(self) -> str:
        if self.kind == "exact":
            return "exact"
        if self.kind == "window":
            return f"window {self.size}"
        return f"degree {self.size}, rank {self.rank:,}"


WHOLE = HeadForm("exact", 0, 0.0, 1.0)


@dataclass(frozen=True)
class HeadFound:
    """A query head: the ends of its logits, the entropy of its weights as a share of that of equal ones, all forms."""

    path: str
    head: int
    least: float
    largest: float
    entropy: float
    forms: tuple[HeadForm, ...]

    def best(self, limit: float, kind: Kind | None = None) -> HeadForm:
        """The cheapest affordable form within a limit of the error; of one kind, or exact."""
        fitting = [f for f in self.forms if f.error <= limit and f.affordable and kind in (None, f.kind)]
        return min([WHOLE, *fitting], key=lambda form: form.time)

    def needed(self, limit: float) -> HeadForm | None:
        """The polynomial of the least degree within a limit of the error, whatever its rank."""
        return next((f for f in self.forms if f.kind == "polynomial" and f.error <= limit), None)


@dataclass(frozen=True)
class Heads:
    """All heads of a model at a limit of their errors, and the plan that polynomials and exact attention make of them.

    output: the measured relative L2 error of the whole model's output with that plan, on the last batch; groups: of the
    heads of an attention, by path, as the plan serves them apart.
    """

    limit: float
    tokens: int
    heads: tuple[HeadFound, ...]
    groups: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]
    output: float

    @property
    def paths(self) -> tuple[str, ...]:
        """The attentions in the order of the program."""
        return tuple(dict.fromkeys(head.path for head in self.heads))

    def share(self, degree: int) -> float:
        """The share of heads with a polynomial of at most a degree within the limit, whatever its rank."""
        needed = [head.needed(self.limit) for head in self.heads]
        return sum(form is not None and form.size <= degree for form in needed) / max(1, len(needed))


def find_heads(
    compiled: Compiled, model: nn.Module, batches: Sequence[Sequence[Tensor]], limit: float, tell: Tell
) -> Heads:
    """Measure each head of a model on batches of its inputs and targets.

    Raises TfgError FG427 where the exact model gives what is not finite.
    """
    dtype = compute_dtype(*model.parameters())
    weights = {name: _cast(weight, dtype) for name, weight in model.state_dict().items()}
    subject = Subject(compiled.recognised, weights, compiled.loss)
    runs = []
    for place, batch in enumerate(batches):
        tell(f"exact run {place + 1} of {len(batches)}")
        runs.append(capture(subject, [_cast(x, dtype) for x in batch]))
    found: list[HeadFound] = []
    planned: dict[str, tuple[Decision, ...]] = {}
    entries = [
        e for e in attention_table(subject.program) if not (e.attention.is_own or e.attention.unservable)
    ]
    for entry in entries:
        tell(entry.path)
        measured = _Measured(entry, [run.calls[entry.full_path] for run in runs], compiled.target)
        heads = list(measured.heads())
        found += heads
        planned[entry.full_path] = measured.decisions(heads, limit)
    output = 0.0
    if any(each.polynomial is not None for decisions in planned.values() for each in decisions):
        tell("the model with its heads apart")
        apart = replace(compiled.with_decisions(planned), target="torch")
        served = apart.module(seed=0, dtype=dtype)
        served.load_state_dict(model.state_dict())
        count = len(apart.plan_document.inputs)
        inputs, targets = batches[-1][:count], batches[-1][count:]
        approximated = approximated_of(apart.plan_document)
        with silenced():  # fits on less than the range of the logits are judged by their errors
            output, _ = whole_errors(
                served, tuple(inputs), tuple(targets), apart.loss if targets else None, approximated
            )
    groups = {
        entry.path: tuple((_words(each), each.heads or ()) for each in planned[entry.full_path])
        for entry in entries
    }
    tokens = max((run.calls[e.full_path].inputs[0].shape[-2] for run in runs for e in entries), default=0)
    return Heads(limit, tokens, tuple(found), groups, output)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _words(decision: Decision) -> str:
    found = decision.polynomial
    return "exact" if found is None else f"{found.family} {found.degree} on {found.bound:g}"


# ---------------------------------------------------------------- one attention


class _Measured:
    """One attention on all batches."""

    def __init__(self, entry: AttentionEntry, calls: Sequence[Call], target: str) -> None:
        self.entry, self.calls, self.target = entry, calls, target
        self.logits: Logits = measure_logits(calls, None)
        self.rows = [sample(call, stretch=STRETCH) for call in calls]
        self.exact = [exact_rows(rows) for rows in self.rows]
        q, k = calls[0].inputs[:2]
        self.count, self.key_heads = q.shape[1], k.shape[1]
        self.n, self.m = (max(call.inputs[place].shape[-2] for call in calls) for place in (0, 1))

    def heads(self) -> Iterator[HeadFound]:
        """Each head with all of its forms: windows, then polynomials by degree, then exact."""
        entropy = torch.stack([_entropy(call) for call in self.calls]).mean(0).tolist()
        windows = [self._window(width) for width in WINDOWS if width < self.m]
        polynomials = [self._degree(degree) for degree in DEGREES]
        for head in range(self.count):
            forms = [column[head] for column in (*windows, *polynomials)]
            ends = self.logits.least[head], self.logits.largest[head]
            yield HeadFound(self.entry.path, head, *ends, entropy[head], (*forms, WHOLE))

    def _shape(self) -> Shape:
        entry = self.entry
        return shape_of(entry.attention, self.n, self.m, entry.d or 1, entry.dv or 1)

    def _time(self, shape: Shape, way: Way) -> float:
        cost = cost_of(self.target, shape, way)
        return cost.seconds(shape, way) / cost.seconds(self._shape(), EXACT)

    def _window(self, width: int) -> list[HeadForm]:
        errors = [
            _window_errors(rows, exact, width) for rows, exact in zip(self.rows, self.exact, strict=True)
        ]
        time = self._time(replace(self._shape(), window=width), EXACT)
        return [HeadForm("window", width, error, time) for error in _by_head(errors, self.count)]

    def _degree(self, degree: int) -> list[HeadForm]:
        """For each head the polynomial of a degree whose error is least."""
        time, size = self._time(self._shape(), Way(degree)), rank(self.entry.d or 1, degree)
        best = [HeadForm("polynomial", degree, inf, time, size)] * self.count
        for polynomial in _polynomials(degree):
            errors = [
                polynomial_errors(rows, exact, polynomial.coefficients, near=None, centre=self._centre(rows))
                for rows, exact in zip(self.rows, self.exact, strict=True)
            ]
            for head, error in enumerate(_by_head(errors, self.count)):
                if error < best[head].error:
                    best[head] = replace(best[head], error=error, polynomial=polynomial)
        return best

    def _centre(self, rows: Sample) -> Tensor | None:
        """What is taken from the keys, [b or 1, H, 1, d]; None where that gains nothing."""
        if not self.logits.centring:
            return None
        if self.logits.mean:
            return rows.k.mean(2, keepdim=True)
        centre = torch.tensor(self.logits.centre, dtype=torch.float64)
        return centre.repeat_interleave(self.count // self.key_heads, 0)[None, :, None]

    def decisions(self, heads: Sequence[HeadFound], limit: float) -> tuple[Decision, ...]:
        """Groups of heads that one polynomial serves, or exact attention; heads that share keys go together."""
        groups = self.count // self.key_heads
        by_form: dict[Polynomial | None, list[int]] = {}
        for key in range(self.key_heads):
            own = range(key * groups, (key + 1) * groups)
            forms = [_polynomial_within(heads[head], limit) for head in own]
            chosen = (
                None if None in forms else max(forms, key=lambda f: (f.degree, f.bound) if f else (0, 0.0))
            )
            by_form.setdefault(chosen, []).extend(own)
        apart = len(by_form) > 1
        return tuple(self._decision(form, tuple(own), apart) for form, own in by_form.items())

    def _decision(self, form: Polynomial | None, heads: tuple[int, ...], apart: bool) -> Decision:
        own = heads if apart else None
        if form is None:
            return Decision("no polynomial that can be afforded is within the limit", heads=own)
        keys = dict.fromkeys(head // (self.count // self.key_heads) for head in heads)
        centring = self.logits.centring
        centre = self.logits.centre if centring and not self.logits.mean else None
        served = LogitRange(
            "data",
            (form.bound,) * len(heads),
            ("the fit with the least error on the batches",),
            None if centre is None else tuple(centre[key] for key in keys),
        )
        mean = centring and self.logits.mean
        why = "least measured error"
        return Decision(why, form, break_even=1, break_even_gpu=1, range=served, own_mean=mean, heads=own)


def _polynomial_within(head: HeadFound, limit: float) -> Polynomial | None:
    """That of the least degree within a limit and a rank that can be afforded."""
    form = head.needed(limit)
    return form.polynomial if form is not None and form.affordable else None


def _polynomials(degree: int) -> list[Polynomial]:
    """Those of a degree that are positive everywhere."""
    fitted = [p for family in FAMILIES for bound in FITTED for p in fits(family, bound, (degree,))]
    return [p for p in fitted if isinstance(p, Polynomial) and p.positive and p.positive_from is None]


def _by_head(errors: Sequence[LocalErrors], count: int) -> list[float]:
    total = sum(errors[1:], errors[0])
    return [total.output_error([head]) for head in range(count)]


def _window_errors(rows: Sample, exact: Exact, width: int) -> LocalErrors:
    """What a window of keys less than `width` places away does to the output; gradients are left out."""
    places = torch.arange(rows.k.shape[-2], device=rows.k.device)
    shown = rows.visible & ((rows.rows[:, None] - places).abs() < width)
    logits = (exact.logits + rows.gates).masked_fill(~shown, -inf)
    found = torch.softmax(logits, -1).nan_to_num(0.0) @ rows.v
    squares, size = ((x * x).sum((0, 2, 3)) for x in (found - exact.output, exact.output))
    return LocalErrors(squares, size, *[torch.zeros_like(squares)] * 4)


def _entropy(call: Call) -> Tensor:
    """[H]: the mean entropy of rows of weights, as a share of that of equal ones; rows of one key are left out."""
    rows = sample(call)
    return entropy_share(rows.logits() + rows.gates, rows.visible, (0, 2))
