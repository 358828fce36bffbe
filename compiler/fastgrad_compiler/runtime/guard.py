"""Guards: an attention whose range of logits is not proved from the program is watched while it runs.

A polynomial was fitted to exp on |s| <= R, and beyond it the error that the plan states does not hold. A guard checks
every call of its attention, counts what it finds, and does what the budget's `on_violation` says. It works inside the
attention's operation, which torch.compile and torch.export take as one step: they find it by its key.

On a CPU the check is read at once, so that a policy acts on the very call. On other devices nothing in a step waits for
the device: counts are kept there, copied without blocking, and looked at when a later call finds the copy done; from
then on `exact` and `raise` act. A replayed graph keeps counting.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_op import NAMESPACE
from .logit_range import Clamp, Pairs, Rows, clamp, norm_bound, rows_of, sampled_range

LOGGER = logging.getLogger("fastgrad.budget")
POLICIES = ("warn", "exact", "clamp", "raise")
ATTRIBUTES = ", int exact_below, str guard"  # of the operations: the tail of their schema
ALWAYS_EXACT = 2**62  # as `exact_below`: every length is below it
CALLS, PROVED, SAMPLED, VIOLATIONS, LARGEST = range(5)  # of a guard's counts; LARGEST is the first head's
Kernel = Callable[..., Any]

# Generated packages hold copies of this file, and the operations of a kernel may be another copy's: all of them share
# one registry, one series of numbers and one class of error.
_SHARED: dict[str, Any] = vars(getattr(torch.ops, NAMESPACE))
_GUARDS: weakref.WeakValueDictionary[str, Any] = _SHARED.setdefault("guards", weakref.WeakValueDictionary())
_NUMBERS: Iterator[int] = _SHARED.setdefault("guard_numbers", itertools.count())


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
        bound: R, one number or one a head.
        source: where R comes from: weights, data or asserted.
        policy: what happens where a logit is beyond R: warn, exact, clamp or raise.
        path: of the attention in the model, which `name_guards` gives.

    Raises:
        ValueError: an unknown policy.

    A copy, also one that was pickled, has a key and counts of its own.
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
        if policy not in POLICIES:
            raise ValueError(f"the policy of a guard is one of {', '.join(POLICIES)}, not {policy!r}")
        self.label, self.bound, self.source, self.policy = label, bound, source, policy
        self.path = label if path is None else path
        self.key = f"{label or 'attention'}#{next(_NUMBERS)}"
        self._counts: dict[torch.device, Tensor] = {}
        self._limits: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._copies: dict[
            torch.device, tuple[Tensor, Any]
        ] = {}  # on their way to the host: counts and an event
        self._reported = 0  # violations that were acted upon
        self._said = False
        self._exact = False  # whether a verdict that came late makes the calls exact
        self._was_exact = False
        _GUARDS[self.key] = self

    def __reduce__(self) -> tuple[object, ...]:
        return _copied, (self.label, self.bound, self.source, self.policy, self.path)

    # ------------------------------------------------------------ what the operations ask

    def forward(self, kernel: Kernel, pairs: Pairs, inputs: Sequence[Any], exact_below: int) -> Any:
        """Run a kernel's forward pass on q, k, v, near_q, near_k, mask and documents, checked and counted."""
        q, *rest = inputs
        rows, limit = self._look(inputs)
        if _waits(q.device):
            if self._count(rows, pairs, limit) and self.policy == "exact":
                self._was_exact = True
                exact_below = ALWAYS_EXACT
        else:
            self._act(q.device)
            self._count_late(rows, pairs, limit)
            exact_below = ALWAYS_EXACT if self._exact else exact_below
        clamped = self._clamp(rows, limit, pairs)
        return kernel(q if clamped is None else clamped.queries(), *rest, exact_below)

    def backward(
        self,
        kernels: tuple[Kernel, Kernel],
        pairs: Pairs,
        gradient: Tensor,
        inputs: Sequence[Any],
        saved: Sequence[Tensor],
        exact_below: int,
    ) -> Any:
        """Run a kernel's backward pass: of what `forward` computed from the same inputs."""
        forward, backward = kernels
        if self.policy == "clamp" and (clamped := self._clamp(*self._look(inputs), pairs)) is not None:
            dq, dk, *others = backward(gradient, clamped.queries(), *inputs[1:], *saved, exact_below)
            return (*clamped.pull(dq, dk), *others)
        if self._was_exact and _waits(inputs[0].device):
            rows, limit = self._look(inputs)
            exact_below = ALWAYS_EXACT if self._checked(rows, pairs, limit)[2] else exact_below
        elif self._was_exact:  # the verdict may have come after the forward pass
            exact_below = ALWAYS_EXACT if self._exact else exact_below
            saved = forward(*inputs, exact_below)
        return backward(gradient, *inputs, *saved, exact_below)

    def _look(self, inputs: Sequence[Any]) -> tuple[Rows, Tensor]:
        q, k, _, _, _, mask, documents = inputs
        rows = rows_of(q, k, mask, documents)
        kind = (q.device, rows.dtype)
        if kind not in self._limits:
            bounds = self.bound if isinstance(self.bound, tuple) else (self.bound,)
            with torch.inference_mode(False):
                self._limits[kind] = torch.tensor(bounds, device=q.device, dtype=rows.dtype)
        return rows, self._limits[kind]

    def _clamp(self, rows: Rows, limit: Tensor, pairs: Pairs) -> Clamp | None:
        """The clamp of a call; None for other policies, and where it is known at once to change nothing."""
        if self.policy != "clamp" or (_waits(rows.q.device) and _proved(rows, pairs, limit)):
            return None
        return clamp(rows, pairs, limit)

    # ------------------------------------------------------------ counting

    def _checked(self, rows: Rows, pairs: Pairs, limit: Tensor) -> tuple[bool, Tensor, bool]:
        """Whether norms prove the range, the largest logit that was seen by head, and whether it is beyond R."""
        largest = norm_bound(rows, pairs)
        if bool((largest <= limit).all()):
            return True, largest, False
        largest = sampled_range(rows, pairs)
        return False, largest, not bool((largest <= limit).all())  # NaN is beyond

    def _count(self, rows: Rows, pairs: Pairs, limit: Tensor) -> bool:
        proved, largest, beyond = self._checked(rows, pairs, limit)
        counts = self._counts_on(rows.q)
        counts[:LARGEST] += torch.tensor((1, proved, not proved, beyond), dtype=counts.dtype)
        torch.maximum(counts[LARGEST:], largest, out=counts[LARGEST:])
        if beyond:
            self._reported += 1
            self._report(largest.tolist())
        return beyond

    def _count_late(self, rows: Rows, pairs: Pairs, limit: Tensor) -> None:
        """The same without waiting for the device: both checks, and the counts in place."""
        largest, sampled = norm_bound(rows, pairs), sampled_range(rows, pairs)
        proved = (largest <= limit).all()
        beyond = ~(proved | (sampled <= limit).all())
        counts = self._counts_on(rows.q)
        counts[:LARGEST] += torch.stack((torch.ones_like(proved), proved, ~proved, beyond)).to(counts.dtype)
        counts[LARGEST:] = torch.maximum(counts[LARGEST:], torch.where(proved, largest, sampled))
        if rows.q.device not in self._copies and not _capturing(rows.q.device):
            self._copies[rows.q.device] = _copy(counts)

    def _counts_on(self, q: Tensor) -> Tensor:
        if q.device not in self._counts:
            dtype = torch.float32 if q.device.type == "mps" else torch.float64
            with torch.inference_mode(False):  # later calls may be outside of it
                self._counts[q.device] = torch.zeros(LARGEST + q.shape[1], device=q.device, dtype=dtype)
        return self._counts[q.device]

    # ------------------------------------------------------------ acting

    def _act(self, device: torch.device) -> None:
        """Do what the policy says where a copy of the counts has come with violations that are new."""
        if device not in self._copies or _capturing(device):
            return
        counts, event = self._copies[device]
        if event is not None and not event.query():
            return
        del self._copies[device]
        if counts[VIOLATIONS] > self._reported:
            self._reported = int(counts[VIOLATIONS])
            self._exact = self._was_exact = self.policy == "exact"
            self._report(counts[LARGEST:].tolist())

    def _report(self, largest: Sequence[float]) -> None:
        """Raise, or say once what is the matter."""
        bounds = self.bound if isinstance(self.bound, tuple) else (self.bound,) * len(largest)
        logit, bound, head = max(
            ((logit, bound, head) for head, (logit, bound) in enumerate(zip(largest, bounds, strict=True))),
            key=lambda found: found[0] / found[1] if found[0] == found[0] else float("inf"),
        )
        message = f"{self.path}: a logit of size {logit:.4g} in head {head} is beyond R = {bound:.4g} ({self.source})"
        if self.policy == "raise":
            raise BudgetViolation(f"{message}: on_violation = raise")
        if not self._said:
            self._said = True
            LOGGER.warning("%s: %s", message, _CONSEQUENCES[self.policy])

    # ------------------------------------------------------------ what users ask

    def status(self, reset: bool = False) -> dict[str, object]:
        """The counts as `budget_status` gives them; waits for the device."""
        found = [counts.tolist() for counts in self._counts.values()]
        calls, proved, sampled, violations = (int(sum(c[i] for c in found)) for i in range(LARGEST))
        heads = [max(values) for values in zip(*(c[LARGEST:] for c in found), strict=False)]
        if reset:
            for counts in self._counts.values():
                counts.zero_()
            self._copies.clear()
            self._reported, self._said, self._exact = 0, False, False
        return {
            "path": self.path,
            "bound": list(self.bound) if isinstance(self.bound, tuple) else self.bound,
            "source": self.source,
            "policy": self.policy,
            "calls": calls,
            "proved": proved,
            "sampled": sampled,
            "violations": violations,
            "largest": max(heads, default=0.0),
            "heads": heads,
        }


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

    An empty key, or one that no guard of this process has, guards nothing; nor is a call checked that is exact because
    it is shorter than `exact_below`. scale, causal and near (0: none) are the kernel's.
    """
    pairs = Pairs(scale, causal, near)

    def run_forward(*inputs: Any) -> Any:
        *given, exact_below, key = inputs
        guard = _guard(key, given, exact_below)
        if guard is None:
            return forward(*given, exact_below)
        return guard.forward(forward, pairs, given, exact_below)

    def run_backward(gradient: Tensor, *inputs: Any) -> Any:
        *given, exact_below, key = inputs
        guard = _guard(key, given, exact_below)
        if guard is None:
            return backward(gradient, *given, exact_below)
        return guard.backward((forward, backward), pairs, gradient, given[:7], given[7:], exact_below)

    return run_forward, run_backward


def _guard(key: str, inputs: Sequence[Any], exact_below: int) -> Any:
    q, k = inputs[:2]
    if not key or max(q.shape[2], k.shape[2]) < exact_below or 0 in (q.numel(), k.numel()):
        return None
    return _GUARDS.get(key)


def name_guards(model: nn.Module) -> None:
    """Give every guard of a model the path of its attention."""
    for path, guard in _guards(model):
        guard.path = path


def budget_status(model: nn.Module, reset: bool = False) -> list[dict[str, object]]:
    """One dict for each guarded attention of a model; `reset` sets its counts back to zero. Waits for the device.

    path, bound (R, or one a head), source and policy; calls that were checked, proved (norms were enough), sampled (a
    sample of the logits was looked at) and violations (of those, with a logit beyond R); largest: the largest |s| that
    was seen, or its bound where that was enough; heads: the same by head.
    """
    return [guard.status(reset) for _, guard in _guards(model)]


def _guards(model: nn.Module) -> Iterator[tuple[str, Guard]]:
    for path, module in model.named_modules():
        for value in vars(module).values():
            for places, guard in _held(value):
                yield ".".join(part for part in (path, guard.label, *places) if part), guard


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


def _proved(rows: Rows, pairs: Pairs, limit: Tensor) -> bool:
    return bool((norm_bound(rows, pairs) <= limit).all())


def _waits(device: torch.device) -> bool:
    """Whether reading a result costs no synchronisation."""
    return device.type == "cpu"


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
