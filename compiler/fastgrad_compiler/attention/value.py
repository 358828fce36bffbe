"""What an attention is: its operands by role, mask, scale, near field, the range of its logits, and what serves it.

One frozen value, read off the attributes of a node and written back as them (`ir/ops.py` lists those). After its
recognition an attention has one form: q [b, h, n, d], k [b, hk, m, d], v [b, hk, m, dv], h a multiple of hk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeVar

from fastgrad_compiler.approximation import polynomial as approximation
from fastgrad_compiler.ir.graph import Attribute, Node
from fastgrad_compiler.ir.masks import FORGET, OPERANDS
from fastgrad_compiler.ir.ops import OPS, STEP_ATTRIBUTES
from fastgrad_compiler.ir.verify import CompilerBug

ATTENTION = ("attention", "poly_attention")
OWN = "own"  # the family of a polynomial that is the model's own: it stands in for nothing, and has no error
QKV, NEAR = ("q", "k", "v"), ("near_q", "near_k")
_OF_APPROXIMATIONS = {
    "positive_from",
    "precision",
    "asserted",
    "proof",
}  # not of own
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: with `causal` those up to its own place, with a `window` of w those of |i - j| < w.

    operands: the masks that read an operand, of `masks.OPERANDS`, in that order; a forget gate is one of them.
    """

    causal: bool = False
    window: int | None = None
    operands: tuple[str, ...] = ()

    @property
    def padding(self) -> bool:
        """Whether an operand says which keys are there."""
        return "padding" in self.operands

    @property
    def documents(self) -> bool:
        """Whether a query sees only keys of its own document."""
        return "documents" in self.operands

    @property
    def forget(self) -> bool:
        """Whether a pair weighs less by the log gates between its key and its query."""
        return FORGET in self.operands

    @staticmethod
    def of(node: Node) -> Mask:
        """That of one of the operations `masks.MASKS`."""
        window = _whole(node["width"]) if node.op == "window" else None
        return Mask(node.op == "causal", window, tuple(each for each in OPERANDS if each == node.op))

    def __and__(self, other: Mask) -> Mask:
        """What is seen through both."""
        windows = [each.window for each in (self, other) if each.window is not None]
        operands = tuple(each for each in OPERANDS if each in (*self.operands, *other.operands))
        return Mask(self.causal or other.causal, min(windows, default=None), operands)


@dataclass(frozen=True, slots=True)
class Range:
    """R of the logits |scale * q.k| on the pairs that a polynomial would serve; `bound` None: nothing is known.

    asserted: it rests on the user's word. source: one of `ranges.SOURCES` where the plan set it, None for what the
    program says. reach: bound of |scale| sum_a |q_a k_a| (None: R is). A guard may have one R for each head.
    """

    bound: float | tuple[float, ...] | None = None
    asserted: bool = False
    proof: tuple[str, ...] = ()
    source: str | None = None
    reach: float | None = None

    @property
    def limit(self) -> float:
        """R, infinite where nothing is known: the largest of the heads'."""
        return inf if self.bound is None else max(self.heads)

    @property
    def heads(self) -> tuple[float, ...]:
        """R of each head, or the one R."""
        return self.bound if isinstance(self.bound, tuple) else (inf if self.bound is None else self.bound,)

    @property
    def origin(self) -> str | None:
        """Where R comes from, one of `ranges.SOURCES`; None where there is none."""
        if self.bound is None:
            return None
        return self.source or ("asserted" if self.asserted else "program")


@dataclass(frozen=True, slots=True)
class Polynomial:
    """The weights p(s) of far pairs, by ascending powers, with the errors that they have in place of exp.

    positive_from, eps, eps_prime: those of `approximation.polynomial`; precision: of the arithmetic at least.
    """

    family: str
    coefficients: tuple[float, ...]
    eps: float | None = None
    eps_prime: float | None = None
    positive_from: float | None = None
    precision: str = "float32"

    @property
    def degree(self) -> int:
        """The power of the last coefficient."""
        return len(self.coefficients) - 1

    @staticmethod
    def of(fitted: approximation.Polynomial, precision: str = "float32") -> Polynomial:
        """One that was fitted to exp."""
        return Polynomial(
            fitted.family,
            fitted.coefficients,
            fitted.eps,
            fitted.eps_prime,
            fitted.positive_from,
            precision,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the plan decided, and why; break_even: the least length at which a polynomial serves, on a GPU another.

    Below it an attention is exact, or if its polynomial is the model's own, computed on all pairs.
    """

    decision: str
    why: str
    break_even: int | None = None
    break_even_gpu: int | None = None


@dataclass(frozen=True)
class Attention:
    """An attention, apart from the names and types of its operands.

    near: block size of the near field; own_near: its pairs have queries and keys of their own, already scaled.
    polynomial: None for exp. verdict: None before `plan`.

    Raises:
        CompilerBug: for what no pass makes.
    """

    mask: Mask = field(default_factory=Mask)
    scale: float = 1.0
    near: int | None = None
    own_near: bool = False
    alibi: bool = False
    range: Range = field(default_factory=Range)
    polynomial: Polynomial | None = None
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        for name, size in (("near", self.near), ("window", self.mask.window)):
            if size is not None and size < 1:
                raise CompilerBug(f"an attention has a {name} of {size}")
        if self.mask.forget and (self.alibi or not self.mask.causal):
            raise CompilerBug("an attention has a forget gate, and is not causal or has slopes too")
        if self.own_near and self.near is None:
            raise CompilerBug("an attention has queries and keys of near pairs, and no near field")
        if self.polynomial is not None and self.unservable:
            raise CompilerBug(
                f"an attention is planned polynomial, which cannot serve its mask {self.unservable}"
            )

    @staticmethod
    def of(node: Node) -> Attention:
        """The value of a node; KeyError for another operation."""
        roles = _tuple(node["roles"])
        found = Attention(
            Mask(bool(node["causal"]), _whole(node.get("window")), tuple(r for r in OPERANDS if r in roles)),
            float(str(node["scale"])),
            _whole(node["near"]),
            "near_q" in roles,
            bool(node.get("alibi", False)),
            Range(
                _bound(node["bound"]),
                bool(node.get("asserted", False)),
                _tuple(node.get("proof")),
                _text(node.get("source")),
                _number(node.get("reach")),
            ),
            _polynomial(node),
            _verdict(node),
        )
        if found.roles != roles:
            raise CompilerBug(f"{node.op} {node.name} has operands {roles}, not {found.roles}")
        return found

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the operands after q, k and v."""
        return (*(NEAR if self.own_near else ()), *self.mask.operands)

    def by_role(self, operands: Sequence[T]) -> dict[str, T]:
        """What belongs to a node's operands (names, tensors, types), by role: q, k, v and then `roles`."""
        return dict(zip((*QKV, *self.roles), operands, strict=True))

    @property
    def is_polynomial(self) -> bool:
        """Whether a polynomial serves it, the model's own or another."""
        return self.polynomial is not None

    @property
    def is_own(self) -> bool:
        """Whether its weights are the model's own polynomial."""
        return self.polynomial is not None and self.polynomial.family == OWN

    @property
    def is_guarded(self) -> bool:
        """Whether a run checks its logits: a polynomial serves it, on a range that the program does not prove."""
        return self.is_polynomial and not self.is_own and self.range.origin != "program"

    @property
    def unservable(self) -> str:
        """The mask that no polynomial serves; empty where there is none."""
        return "window" if self.mask.window is not None else "alibi" if self.alibi else ""

    @property
    def reach(self) -> float | None:
        """Bound of |scale| sum_a |q_a k_a|: R, where nothing else is known."""
        known = self.range.bound is not None and self.range.reach is None
        return self.range.limit if known else self.range.reach

    def served(
        self, fitted: approximation.Polynomial, near: int | None, precision: str = "float32"
    ) -> Attention:
        """With a polynomial that was fitted to exp, and exact within blocks of `near` tokens."""
        return replace(self, polynomial=Polynomial.of(fitted, precision), near=near)

    def attributes(self, op: str) -> dict[str, Attribute]:
        """The attributes of a node of the operation `op`, one of ATTENTION or `poly_attention_backward`."""
        mask, known, polynomial = self.mask, self.range, self.polynomial
        found: dict[str, Attribute] = {
            "roles": self.roles,
            "causal": mask.causal,
            "scale": self.scale,
            "near": self.near,
            "window": mask.window,
            "alibi": self.alibi,
            "bound": known.bound,
            "asserted": known.asserted,
            "proof": known.proof,
        }
        if self.verdict is not None:
            verdict = self.verdict
            found |= {"decision": verdict.decision, "why": verdict.why, "break_even": verdict.break_even}
        if polynomial is not None:
            found |= {
                "family": polynomial.family,
                "degree": polynomial.degree,
                "coefficients": polynomial.coefficients,
                "eps": polynomial.eps,
                "eps_prime": polynomial.eps_prime,
                "positive_from": polynomial.positive_from,
                "precision": polynomial.precision,
                "break_even_gpu": None if self.verdict is None else self.verdict.break_even_gpu,
            }
        if known.source is not None:
            found |= {"source": known.source, "reach": known.reach}
        kept = {*OPS[op].attributes, *OPS[op].optional}
        kept -= _OF_APPROXIMATIONS if self.is_own else set()
        return {key: value for key, value in found.items() if key in kept}

    def on(self, node: Node) -> Node:
        """The node with this value for its attributes, and those of a step form as they are."""
        steps = {key: value for key, value in node.attributes if key in STEP_ATTRIBUTES}
        return replace(node, attributes=tuple(sorted({**self.attributes(node.op), **steps}.items())))


def _polynomial(node: Node) -> Polynomial | None:
    coefficients = node.get("coefficients")
    if not isinstance(coefficients, tuple):
        return None
    return Polynomial(
        _text(node.get("family")) or "",
        tuple(float(str(each)) for each in coefficients),
        _number(node.get("eps")),
        _number(node.get("eps_prime")),
        _number(node.get("positive_from")),
        _text(node.get("precision")) or "float32",
    )


def _verdict(node: Node) -> Verdict | None:
    why = node.get("why")
    if why is None:
        return None
    decided = "polynomial" if node.op == "poly_attention" else str(node.get("decision"))
    return Verdict(decided, str(why), _whole(node.get("break_even")), _whole(node.get("break_even_gpu")))


def _bound(value: Attribute) -> float | tuple[float, ...] | None:
    return tuple(float(str(each)) for each in value) if isinstance(value, tuple) else _number(value)


def _number(value: Attribute) -> float | None:
    return None if value is None else float(str(value))


def _whole(value: Attribute) -> int | None:
    return None if value is None else int(str(value))


def _text(value: Attribute) -> str | None:
    return None if value is None else str(value)


def _tuple(value: Attribute) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, tuple) else ()
