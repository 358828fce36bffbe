"""Guards: an attention whose range of logits is not proved from the program is watched while it runs.

A polynomial was fitted to exp on |s| <= R, and beyond it the error that the plan states does not hold. A guard checks
every call of its attention, counts what it finds, and does what the budget's `on_violation` says. It works inside the
attention's operation, which torch.compile and torch.export take as one step: they find it by its key. A backward pass
asks no guard: which function the forward pass was is saved with it.

On a CPU the check is read at once, so that a policy acts on the very call. On other devices nothing in a step waits for
the device: counts are kept there, copied without blocking, and looked at when a later call finds the copy done; from
then on `exact` and `raise` act. A replayed graph keeps counting.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .attention_op import FLOATS, INPUTS, NAMESPACE
from .guard_key import GuardKey, new_id, read_key
from .logit_range import (
    Clamp,
    Pairs,
    Rows,
    choose_sample,
    clamp,
    norm_bound,
    rows_of,
    sampled_range,
)

LOGGER = logging.getLogger("fastgrad.budget")
ATTRIBUTES = ", int exact_below, str guard"  # of the operations: the tail of their schema
SAVED = FLOATS + INPUTS  # of a tangent's arguments: where what the forward pass saved begins
ALWAYS_EXACT = 2**62  # as `exact_below`: every length is below it
CALLS, PROVED, SAMPLED, UNSETTLED, VIOLATIONS, NORMS, AT_MOST, LARGEST = range(8)
"""Of a guard's counts: numbers of calls, then maxima; LARGEST is the first head's."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
Kernel = Callable[..., Any]

# Generated packages hold copies of this file, and the operations of a kernel may be another copy's: all of them share
# the guards, by id, and one class of error. A guard lives as long as its model; one that was made from a key stays.
_SHARED: dict[str, Any] = vars(getattr(torch.ops, NAMESPACE))
_GUARDS: weakref.WeakValueDictionary[str, Any] = _SHARED.setdefault(
    "guards_by_id", weakref.WeakValueDictionary()
)
_REMADE: dict[str, Any] = _SHARED.setdefault("guards_remade", {})


BudgetViolation: type[RuntimeError] = _SHARED.setdefault(
    "BudgetViolation",
    type(
        "BudgetViolation",
        (RuntimeError,),
        {"__doc__": "A logit is beyond the range that the plan rests on, and the budget says to raise."},
    ),
)


class Guard:
    """Watches one attention.

    Args:
        label: the attention's name below its block's path; empty where it is the block's only one.
        bound: R, finite and at least 0: one number or one a head.
        source: where R comes from: weights, data or asserted.
        policy: what happens where a logit is beyond R: warn, exact, clamp or raise.
        path: of the attention in the model, which `name_guards` gives.

    `key` is what the attention's operation is called with (`GuardKey`). A copy, also one that was pickled, has an id
    and counts of its own.

    Raises:
        ValueError: an unknown policy, a bound that is no range.
    """

    def __init__(
        self,
        label: str = "",
        *,
        bound: float | tuple[float, ...],
        source: str,
        policy: str = "warn",
        path: str | None = None,
    ) -> None:
        self._start(GuardKey(new_id(), bound, source, policy, label, label if path is None else path))
        _GUARDS[self.spec.id] = self

    def _start(self, spec: GuardKey) -> None:
        self.spec, self.key = spec, str(spec)
        self._counts: dict[torch.device, Tensor] = {}
        self._copies: dict[
            torch.device, tuple[Tensor, Any]
        ] = {}  # on their way to the host: counts and an event
        self._reported = 0  # violations that were acted upon
        self._said = False
        self._exact = False  # whether a verdict that came late makes the calls exact
        self._late: list[float] | None = None  # logits of violations that were counted and not acted upon

    @classmethod
    def remade(cls, spec: GuardKey) -> Guard:
        """A guard of an id that another process gave out, or whose model is gone."""
        guard = cls.__new__(cls)
        guard._start(spec)
        return guard

    def __reduce__(self) -> tuple[object, ...]:
        spec = self.spec
        return _copied, (spec.label, spec.bound, spec.source, spec.policy, spec.path)

    def name(self, path: str) -> None:
        """Set the path, in the key too."""
        self.spec = replace(self.spec, path=path)
        self.key = str(self.spec)

    # ------------------------------------------------------------ what the operations ask

    def allows(self, rows: Rows, pairs: Pairs) -> bool:
        """Check and count a call: whether a polynomial may serve it; else it is to be exact."""
        device = rows.q.device
        if not _waits(device):
            self._act(device)
        beyond, largest = self._count(rows, pairs)
        if _waits(device) and bool(beyond):
            self._reported += 1
            self._report(largest.tolist())
            return self.spec.policy != "exact"
        return not self._exact

    def watch(self, norms: Tensor, seen: Tensor) -> None:
        """Check and count a call of a step form, by the bound of all logits by norms, and the largest seen: both [H].

        A step cannot be made exact, since earlier keys are sums by then: the policy `exact` raises as `raise` does.
        """
        device, limit = norms.device, _limits(self.spec.bounds, norms.device, norms.dtype)
        if not _waits(device):
            self._act(device)
        beyond = self._record(self._counts_on(seen[None]), limit, norms, torch.minimum(seen, norms), norms)
        if _waits(device) and bool(beyond):
            self._reported += 1
            self._report(seen.tolist(), step=True)

    # ------------------------------------------------------------ counting

    def _count(self, rows: Rows, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Whether a logit beyond R was seen, and the largest that was, by head; waits for nothing but a CPU.

        A call is proved where norms are enough. It is unsettled where no logit beyond R was seen, and the norms of what
        was not looked at do not exclude one.
        """
        counts, limit = self._counts_on(rows.q), limits(self.spec.bounds, rows)
        norms = norm_bound(rows, pairs)
        proved = (norms <= limit).all()  # not with NaN
        if _waits(rows.q.device) and bool(proved):
            seen = at_most = norms
        else:
            sample = choose_sample(rows, pairs, self._turn(rows, counts))
            seen = torch.where(proved, norms, sampled_range(rows, pairs, sample))
            at_most = torch.where(proved, norms, torch.maximum(seen, sample.unseen))
        return self._record(counts, limit, norms, seen, at_most), seen

    def _record(self, counts: Tensor, limit: Tensor, norms: Tensor, seen: Tensor, at_most: Tensor) -> Tensor:
        """Add a call to the counts; whether a logit beyond R was seen."""
        proved, beyond, device = (norms <= limit).all(), ~(seen <= limit).all(), counts.device
        unsettled = ~(beyond | (at_most <= limit).all())
        calls = torch.stack((torch.ones_like(proved), proved, ~proved, unsettled, beyond))
        counts[:NORMS] += calls.to(counts.dtype)
        maxima = torch.cat((norms.amax().view(1), at_most.amax().view(1), seen))
        counts[NORMS:] = torch.maximum(counts[NORMS:], maxima)
        if not _waits(device) and device not in self._copies and not _capturing(device):
            self._copies[device] = _copy(counts)
        return beyond

    def _turn(self, rows: Rows, counts: Tensor) -> Tensor:
        """Where the evenly spread queries of a call begin: int64, no dimensions.

        By the number of the call. With `exact`, which makes another function of a call, by the bits of the norms:
        equal inputs are served alike, also in a forward pass that is run again for its backward pass.
        """
        if self.spec.policy == "exact":
            return rows.q_norms.contiguous().view(BITS[rows.dtype]).sum()
        return counts[CALLS].to(torch.int64)

    def _counts_on(self, q: Tensor) -> Tensor:
        if q.device not in self._counts:
            dtype = torch.float32 if q.device.type == "mps" else torch.float64
            with torch.inference_mode(False):  # later calls may be outside of it
                self._counts[q.device] = torch.zeros(LARGEST + q.shape[1], device=q.device, dtype=dtype)
        return self._counts[q.device]

    # ------------------------------------------------------------ acting

    def _act(self, device: torch.device) -> None:
        """Do what the policy says where a copy of the counts has come with violations that are new."""
        if _capturing(device) or _in_backward():
            return  # a pass that is run again for its backward pass takes no new verdict
        if self._late is not None:
            largest, self._late = self._late, None
            self._judge(largest)
        if device not in self._copies:
            return
        counts, event = self._copies[device]
        if event is not None and not event.query():
            return
        del self._copies[device]
        if counts[VIOLATIONS] > self._reported:
            self._reported = int(counts[VIOLATIONS])
            self._judge(counts[LARGEST:].tolist())

    def _judge(self, largest: Sequence[float]) -> None:
        self._exact = self.spec.policy == "exact"
        self._report(largest)

    def _report(self, largest: Sequence[float], step: bool = False) -> None:
        """Raise, or say once what is the matter; `step`: of a step form."""
        spec = self.spec
        bounds = spec.bound if isinstance(spec.bound, tuple) else (spec.bound,) * len(largest)
        logit, bound, head = max(
            ((logit, bound, head) for head, (logit, bound) in enumerate(zip(largest, bounds, strict=True))),
            key=lambda found: share_of_range(*found[:2]),
        )
        message = f"{spec.path}: a logit of size {logit:.4g} in head {head} is beyond R = {bound:.4g} ({spec.source})"
        if spec.policy == "raise" or (step and spec.policy == "exact"):
            reason = ", and a step cannot be made exact" if step and spec.policy == "exact" else ""
            raise BudgetViolation(f"{message}: on_violation = {spec.policy}{reason}")
        if not self._said:
            self._said = True
            LOGGER.warning("%s: %s", message, _CONSEQUENCES[spec.policy])

    # ------------------------------------------------------------ what users ask

    def status(self, reset: bool = False, keep_verdict: bool = False) -> dict[str, object]:
        """The counts as `budget_status` gives them; waits for the device."""
        found = [counts.tolist() for counts in self._counts.values()]
        calls, proved, sampled, unsettled, violations = (int(sum(c[i] for c in found)) for i in range(NORMS))
        norms, at_most = (_largest(c[i] for c in found) for i in (NORMS, AT_MOST))
        heads = [_largest(values) for values in zip(*(c[LARGEST:] for c in found), strict=False)]
        if reset:
            for counts in self._counts.values():
                counts.zero_()
            self._copies.clear()
            if not keep_verdict:
                self._said, self._exact, self._late = False, False, None
            elif violations > self._reported:
                self._late = heads
            self._reported = 0
        return {
            "path": self.spec.path,
            "bound": list(self.spec.bound) if isinstance(self.spec.bound, tuple) else self.spec.bound,
            "source": self.spec.source,
            "policy": self.spec.policy,
            "calls": calls,
            "proved": proved,
            "sampled": sampled,
            "unsettled": unsettled,
            "violations": violations,
            "largest": _largest(heads),
            "heads": heads,
            "at_most": at_most,
            "norms": norms,
        }


def share_of_range(logit: float, bound: float) -> float:
    """The size of a logit as a share of R, infinite where it is NaN or R is 0 and it is not."""
    return logit / bound if bound and logit == logit else 0.0 if logit == 0 else math.inf


def _largest(values: Iterable[float]) -> float:
    """The largest, NaN where one is; 0 of none."""
    return max(values, key=lambda value: (value != value, value), default=0.0)


_CONSEQUENCES = {
    "warn": "the error that the plan states does not hold there",
    "exact": "such calls are exact attention",
    "clamp": "queries are scaled down to stay within",
}


def _copied(
    label: str, bound: float | tuple[float, ...], source: str, policy: str, path: str | None
) -> Guard:
    return Guard(label, bound=bound, source=source, policy=policy, path=path)


def guarded(
    forward: Kernel, backward: Kernel, scale: float, causal: bool, near: int
) -> tuple[Kernel, Kernel]:
    """The two passes of a kernel, with the key of a guard as one more attribute (ATTRIBUTES).

    The forward pass gives a flag besides (`exact_flag`), and the backward pass takes it. An empty key guards nothing;
    nor is a call checked that is exact because it is shorter than `exact_below`. scale, causal and near (0: none) are
    the kernel's. ValueError for a text that is no key.
    """
    pairs = Pairs(scale, causal, near)

    def run_forward(*inputs: Any) -> Any:
        *given, exact_below, key = inputs
        flag = exact_flag(given[0], key)
        if not _is_checked(key, given, exact_below):
            return (*forward(*given, exact_below), flag)
        q, k, *_, mask, documents = given
        rows = rows_of(q, k, mask, documents)
        if not guard_of(key).allows(rows, pairs):
            flag.fill_(True)
            return (*forward(*given, ALWAYS_EXACT), flag)
        clamped = _clamp(key, rows, pairs)
        return (*forward(q if clamped is None else clamped.queries(), *given[1:], exact_below), flag)

    def run_backward(gradient: Tensor, *inputs: Any) -> Any:
        *given, flag, exact_below, key = inputs
        if flag.numel() and bool(flag):
            return backward(gradient, *given, ALWAYS_EXACT)
        if not _is_checked(key, given, exact_below) or read_key(key).policy != "clamp":
            return backward(gradient, *given, exact_below)
        clamped = _clamp(key, rows_of(*given[:2], *given[FLOATS:INPUTS]), pairs)
        if clamped is None:
            return backward(gradient, *given, exact_below)
        dq, dk, *others = backward(gradient, clamped.queries(), *given[1:], exact_below)
        return (*clamped.pull(dq, dk), *others)

    return run_forward, run_backward


def guarded_tangent(tangent: Kernel, scale: float, causal: bool, near: int) -> Kernel:
    """The tangent of a kernel whose passes are `guarded`, of the function that its forward pass was."""
    pairs = Pairs(scale, causal, near)

    def run_tangent(*arguments: Any) -> Any:
        *given, flag, exact_below, key = arguments
        moved, inputs, saved = given[:FLOATS], given[FLOATS:SAVED], given[SAVED:]
        if flag.numel() and bool(flag):
            return tangent(*given, ALWAYS_EXACT)
        if not _is_checked(key, inputs, exact_below) or read_key(key).policy != "clamp":
            return tangent(*given, exact_below)
        clamped = _clamp(key, rows_of(*inputs[:2], *inputs[FLOATS:]), pairs)
        if clamped is None:
            return tangent(*given, exact_below)
        dq, *others = moved
        dq = clamped.push(dq, others[0])
        return tangent(dq, *others, clamped.queries(), *inputs[1:], *saved, exact_below)

    return run_tangent


def exact_flag(q: Tensor, key: str) -> Tensor:
    """bool [1], on the CPU: whether a guard made a forward pass exact, saved for the backward pass. Here False.

    Without elements, on q's device, where no guard does so: nothing but the policy `exact` needs the host.
    """
    if key and read_key(key).policy == "exact":
        return torch.zeros((1,), dtype=torch.bool, device="cpu")
    return q.new_empty((0,), dtype=torch.bool)


def _is_checked(key: str, inputs: Sequence[Any], exact_below: int) -> bool:
    q, k = inputs[:2]
    return bool(key) and max(q.shape[2], k.shape[2]) >= exact_below and 0 not in (q.numel(), k.numel())


def guard_of(key: str) -> Any:
    """The guard of a key, made from it where this process has none."""
    spec = read_key(key)
    guard = _GUARDS.get(spec.id) or _REMADE.get(spec.id)
    return guard or _REMADE.setdefault(spec.id, Guard.remade(spec))


def _clamp(key: str, rows: Rows, pairs: Pairs) -> Clamp | None:
    """The clamp of a call, from the key and the inputs alone; None where there is none, or it changes nothing."""
    spec = read_key(key)
    if spec.policy != "clamp":
        return None
    limit = limits(spec.bounds, rows)
    if _waits(rows.q.device) and bool((norm_bound(rows, pairs) <= limit).all()):
        return None
    return clamp(rows, pairs, limit)


def limits(bounds: tuple[float, ...], rows: Rows) -> Tensor:
    """R by head, [H] or [1], beside a call's norms; ValueError where there is not one R, nor one a head."""
    if len(bounds) not in (1, rows.q.shape[1]):
        raise ValueError(f"a guard has {len(bounds)} ranges, and its attention {rows.q.shape[1]} heads")
    return _limits(bounds, rows.q.device, rows.dtype)


@lru_cache(maxsize=4096)
def _limits(bounds: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(bounds, device=device, dtype=dtype)


def name_guards(model: nn.Module) -> None:
    """Give every guard of a model the path of its attention."""
    for path, guard in _guards(model):
        guard.name(path)


def budget_status(
    model: nn.Module, reset: bool = False, keep_verdict: bool = False
) -> list[dict[str, object]]:
    """One dict for each guarded attention of a model. Waits for the device.

    `reset` sets its counts back to zero, and forgets what they led to on devices where a policy acts late; with
    `keep_verdict` only the counts.
    path, bound (R, or one a head), source and policy; calls that were checked, proved (norms were enough), sampled (a
    sample of the logits was looked at), unsettled (of those, without a logit beyond R that was seen, and norms do not
    exclude one) and violations (of those, with one that was seen); largest: the largest |s| that was seen, or its bound
    where norms were enough; heads: the same by head; at_most: no |s| was larger; norms: the largest
    |scale| max ||q|| max ||k|| of a call and head.
    """
    return [guard.status(reset, keep_verdict) for _, guard in _guards(model)]


def _guards(model: nn.Module) -> Iterator[tuple[str, Guard]]:
    for path, module in model.named_modules():
        for value in vars(module).values():
            for places, guard in _held(value):
                yield ".".join(part for part in (path, guard.spec.label, *places) if part), guard


def _held(value: object) -> Iterator[tuple[tuple[str, ...], Guard]]:
    """The guards in an attribute, and where in lists and dicts of guards."""
    if isinstance(value, Guard):
        yield (), value
    elif isinstance(value, list):
        for place, item in enumerate(value):
            for places, guard in _held(item):
                yield (str(place), *places), guard
    elif isinstance(value, dict):
        for key, item in value.items():
            for places, guard in _held(item):
                yield (str(key), *places), guard


def _waits(device: torch.device) -> bool:
    """Whether reading a result costs no synchronisation."""
    return device.type == "cpu"


def _in_backward() -> bool:
    """Whether a backward pass runs, which runs forward passes again that were not kept."""
    return bool(torch._C._current_graph_task_id() != -1)


def _capturing(device: torch.device) -> bool:
    """Whether the calls of now are recorded into a graph, which will run them later."""
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return bool(asked()) if asked is not None else False


def _copy(counts: Tensor) -> tuple[Tensor, Any]:
    """The counts on their way to the host, and an event that says when they are there (None: they are)."""
    if counts.device.type == "cpu":
        return counts.clone(), None
    module = torch.get_device_module(counts.device)
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=counts.device.type in ("cuda", "xpu"))
    host.copy_(counts, non_blocking=True)
    event = module.Event()
    event.record()
    return host, event
