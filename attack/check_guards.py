"""(d) Guards see every violation that docs/guards.md promises, report no other, and do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attack.cases import (
    JUMPS,
    Case,
    Finding,
    Point,
    built,
    by_torch,
    draw,
    moderate,
    run_module,
    walk,
    wild,
    without_break_even,
)
from attack.logits import far_logits, served_pairs
from fastgrad_compiler.attention.table import attention_table, is_guarded
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import ON_VIOLATION, Graph, Node, Program
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_compiler.runtime.guard import BudgetViolation

POINTS = 3
MARGIN = 1e-9  # logits within this share of R are on neither side
LONGEST = 8
ALL = 16


@dataclass(frozen=True)
class Call:
    """One call of a guarded attention: |s| [.., H, n, m] of the pairs that it serves, and the norms of its rows."""

    logits: Tensor
    queries: Tensor
    keys: Tensor


def _among_longest(norms: Tensor) -> Tensor:
    """True for the rows of the LONGEST largest norms of a sequence and head; not for those that tie with another."""
    if norms.shape[-1] <= LONGEST:
        return torch.ones_like(norms, dtype=torch.bool)
    return norms > norms.topk(LONGEST + 1).values[..., -1:]


PROMISES: dict[str, Callable[[Call], Tensor]] = {
    "up to 16 tokens every pair": lambda call: torch.tensor(call.logits.shape[-2] <= ALL),
    "a query among the 8 of largest norm": lambda call: _among_longest(call.queries)[..., :, None],
    "a key among the 8 of largest norm": lambda call: _among_longest(call.keys)[..., None, :],
}
"""By what is promised: the pairs whose violation is always seen; broadcasts to the logits."""


def check_guards(case: Case) -> None:
    """Each policy on some points, where the program has a guarded attention."""
    program = case.served
    if not any(is_guarded(entry.node) for entry in attention_table(program)):
        return
    rng = case.random("guards")
    policy = rng.choice(ON_VIOLATION)
    for _ in range(POINTS):
        point = draw(case, rng, rng.choice((moderate, wild)))
        for each in dict.fromkeys(("warn", policy)):
            guarded = without_break_even(case.compiled.program, each)
            _Attack(guarded, flatten(guarded), each).on(point)


@dataclass
class _Attack:
    """The text's own run of a program under a policy, beside the module's."""

    program: Program
    flat: Graph
    policy: str
    calls: dict[str, tuple[Node, Call]] = field(default_factory=dict)
    uncertain: bool = False  # whether what the guard does depends on a sample that nothing promises

    def on(self, point: Point) -> None:
        """Compare what the guards say and do with the logits."""
        inputs, weights = point.tensors()
        with torch.no_grad():
            values = walk(self.program, self.flat, inputs, weights, self._rule)
            results = [values[name] for name in self.flat.outputs]
            if not all(bool(call.logits.isfinite().all()) for _, call in self.calls.values()):
                return
            model = built(self.program, point.weights)
            try:
                found = run_module(model, inputs)
            except BudgetViolation as error:
                self._raised(str(error))
                return
        if self.policy == "raise" and any(_promised(node, call) for node, call in self.calls.values()):
            raise Finding("d", "raise stays silent", self._words())
        if self.policy != "raise":
            self._status(model)
            self._compare(found, results)

    def _rule(self, node: Node, given: list[Tensor], env: Env) -> Tensor:
        """What docs/guards.md says of a guarded attention under the policy; of other nodes the usual value."""
        if not is_guarded(node):
            return by_torch(node, given, env)
        call = _call(node, given)
        self.calls[node.name] = (node, call)
        if self.policy == "clamp":  # in every call, whatever its logits are
            return by_torch(node, [_clamped(node, given), *given[1:]], env)
        if self.policy == "exact" and _beyond(node, call):
            self.uncertain |= not _promised(node, call)
            exact = node.with_attributes(window=None, alibi=False, decision="exact")
            return by_torch(replace(exact, op="attention"), given, env)
        return by_torch(node, given, env)

    # ------------------------------------------------------------ what the guards say

    def _raised(self, message: str) -> None:
        if self.policy != "raise":
            raise Finding("d", f"{self.policy} raises", message)
        if not any(_beyond(node, call, -MARGIN) for node, call in self.calls.values()):
            raise Finding("d", "raise without a violation", f"{message}; {self._words()}")

    def _status(self, model: nn.Module) -> None:
        """Counts of one call each, by path."""
        status: list[dict[str, Any]] = model.budget_status()  # type: ignore[operator]
        entries = [entry for entry in attention_table(self.program) if is_guarded(entry.node)]
        by_path = {each["path"]: each for each in status}
        for entry in entries:
            if entry.full_path not in self.calls or self.uncertain:
                continue
            node, call = self.calls[entry.full_path]
            if entry.path not in by_path:
                raise Finding("d", "a guard is missing", f"{entry.path} is not among {sorted(by_path)}")
            said = by_path[entry.path]
            if said["calls"] == 0:
                continue  # nothing reads the attention, or it has no pairs
            if said["violations"] == 0 and (names := _promised(node, call)):
                raise Finding("d", f"missed: {names[0]}", f"{entry.path}: {self._words()}; {said}")
            if said["violations"] and not _beyond(node, call, -MARGIN):
                raise Finding("d", "a violation that is none", f"{entry.path}: {self._words()}; {said}")
            largest = float(call.logits.max()) if call.logits.numel() else 0.0
            least = largest - MARGIN * max(largest, _limit(node))
            if call.logits.shape[-2] <= ALL and said["largest"] < least:
                words = f"{entry.path}: {said['largest']:.6g} of {largest:.6g}"
                raise Finding("d", "largest is too small", words)

    def _compare(self, found: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """What the module gives is what the policy says; where that does not hang on a sample."""
        close = [
            abs(float(call.logits.max()) - _limit(node)) <= MARGIN * _limit(node)
            for node, call in self.calls.values()
            if call.logits.numel()
        ]
        if self.uncertain or any(close) or len(self.calls) != 1 or self.policy not in ("exact", "clamp"):
            return
        if any(node.op in JUMPS for node in self.flat.nodes):
            return
        for one, other in zip(found, results, strict=True):
            size = float(other.double().abs().max()) if other.numel() else 0.0
            if not bool(other.double().isfinite().all()) or size > 1e6:
                return
            off = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
            if not off <= 1e-6 * (1.0 + size):
                words = f"off by {off:.3g}, of {size:.3g}; {self._words()}"
                raise Finding("d", f"what {self.policy} computes", words)

    def _words(self) -> str:
        return ", ".join(
            f"{name}: |s| up to {float(call.logits.max()) if call.logits.numel() else 0.0:.4g}, R = {_limit(node):.4g}"
            for name, (node, call) in self.calls.items()
        )


def _call(node: Node, given: list[Tensor]) -> Call:
    q, k = given[:2]
    logits = far_logits(node, given).abs()
    k_norms = k.norm(dim=-1)
    roles = node["roles"]
    if isinstance(roles, tuple) and "padding" in roles:
        mask = given[3 + roles.index("padding")]
        k_norms = torch.where(mask[:, None], k_norms, 0.0)
    groups = q.shape[-3] // k.shape[-3]
    return Call(logits, q.norm(dim=-1), k_norms.repeat_interleave(groups, -2))


def _limit(node: Node) -> float:
    return float(str(node["bound"]))


def _beyond(node: Node, call: Call, margin: float = MARGIN) -> bool:
    return bool((call.logits > _limit(node) * (1.0 + margin)).any())


def _promised(node: Node, call: Call) -> list[str]:
    """The promises by which a violation of this call is always seen."""
    beyond = call.logits > _limit(node) * (1.0 + MARGIN)
    return [name for name, seen in PROMISES.items() if bool((beyond & seen(call)).any())]


def _clamped(node: Node, given: list[Tensor]) -> Tensor:
    """Queries times min(1, R / (|scale| K ||q||)), K the largest norm of a key that a query may see."""
    q, call = given[0], _call(node, given)
    shown = served_pairs(node.with_attributes(near=None), given, call.logits).expand_as(call.logits)
    largest = torch.where(shown, call.keys[..., None, :], 0.0).amax(-1)
    reach = abs(float(str(node["scale"]))) * largest * call.queries
    factor = torch.where(reach > _limit(node), _limit(node) / reach, 1.0)
    return q * factor[..., None]
