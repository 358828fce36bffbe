"""The operations of the language: their parameters, and the IR nodes that each becomes.

Surface of each operation (docs/language.md lists the same); `;` or `,` may stand before the compile-time values:

    reshape(x, (b, n, 4, d / 4))  one entry may be -1; also reshape(x, b, n, 4)
    permute(x, (0, 2, 1))  transpose(x, 1, 2)
    unsqueeze(x, axis)  squeeze(x, axis)  broadcast_to(x, (b, n, d))  pad(x, axis, before, after)
    split_heads(x, heads)  merge_heads(x)  repeat_heads(x, times)  patches(image, size)
    concat(x, y, ..., axis = -1)  stack(x, y, ..., axis = 0)  zeros((n, d))  ones((n, d))  full((n, d), 0.5)
    embedding(table, ids)  one_hot(ids, classes)  positions(n)  arange(n)  float(x)  int(x)
    exp log sqrt rsqrt tanh sigmoid log_sigmoid relu gelu silu softplus erf abs of x
    min(a, b)  max(a, b)  clamp(x, low, high)
    where(condition, a, b)
    sum mean max min of (x, axis = -1, keepdim = false): an axis, a tuple of axes, all by default
    softmax(x, axis = -1)  layer_norm(x, w, b, eps = 1e-5)  rms_norm(x, w, eps = 1e-6)  unit(x)
    causal(s)  window(s, width)  padding(s, mask)  documents(s, ids)  prefix(s, length)  assume_bound(s, bound)
    forget(s, log_gate)  decay(weights, log_gate)
    near_far(local, far; block = w)  polynomial(s; coefficients = (1.0, 1.0, 0.5))  normalize_rows(weights)
    rotary(x, base = 10000.0, stretch = none)  sinusoid(n, d)  alibi(s, heads)  dropout(x, p)
    shift(x, by = 1)  shift(x, ids, by = 1)  depthwise(x, w)  depthwise(x, w, ids)
    cross_entropy(logits, targets; smoothing = 0.0, ignored = none)  mse(a, b)

    fit(balanced, degree = 4, bound = 2.0)  the coefficients of an approximation of exp: compile-time numbers
    rope_llama3(width, base, factor, context, low = 1.0, high = 4.0)  the stretch of a rotary: compile-time numbers
    rope_yarn(width, base, factor, context, fast = 32.0, slow = 1.0, whole = true)  the same

An axis is a number or the name of a dimension (`mean(x, axis = n)`). sqrt, rsqrt, exp, log, tanh, abs, min, max, int
and float of compile-time numbers are compile-time numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastgrad_compiler.approximation.polynomial import MAX_DEGREE, PrecisionError, fit
from fastgrad_compiler.frontend import stretches
from fastgrad_compiler.frontend.values import Several, Tensor, Value
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute
from fastgrad_compiler.ir.masks import GATE, GATED, MASKS, MaskOp


class _Needed:
    """The default of a parameter without one."""


NEEDED = _Needed()


@dataclass(frozen=True, slots=True)
class Parameter:
    """`kind` is a key of `calls.KINDS`; `least`, `most`, `below` and `positive` (above 0) limit numbers."""

    name: str
    kind: str
    default: object = NEEDED
    least: float | None = None
    most: float | None = None
    below: float | None = None
    positive: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether it stands before the `;`."""
        return self.kind in ("tensor", "tensors")


class Emit(Protocol):
    """What an operation's rule may do: add a node at the call's place, count work, or give up with a diagnostic."""

    def node(self, op: str, *operands: Tensor, **attributes: Attribute) -> Tensor:
        """A node typed by the shape rules."""

    def step(self, work: int) -> None:
        """Count work that is no node's."""

    def refuse(self, code: str, message: str) -> Exception:
        """Report what is wrong; the result is to be raised."""


Arguments = Mapping[str, Any]
Rule = Callable[[Emit, Arguments], Value]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the language; `rest` is the parameter that takes all further positional arguments.

    `rule` makes its nodes. Without one it is the node of its name, on the tensors and with the values as attributes.
    """

    name: str
    parameters: tuple[Parameter, ...]
    rule: Rule | None = field(default=None, compare=False)
    rest: str | None = None

    def result(self, emit: Emit, arguments: Arguments) -> Value:
        """What the operation gives for its arguments by name."""
        if self.rule is not None:
            return self.rule(emit, arguments)
        given = [(parameter, arguments[parameter.name]) for parameter in self.parameters]
        operands = [
            each for p, value in given for each in (value if p.kind == "tensors" else (value,)) if p.is_tensor
        ]
        return emit.node(self.name, *operands, **{p.name: value for p, value in given if not p.is_tensor})


X = Parameter("x", "tensor")
W = Parameter("w", "tensor")
SCORES = Parameter("scores", "tensor")
TENSORS = Parameter("tensors", "tensors")
IDS = Parameter("ids", "tensor", None)  # of packed documents
AXIS = Parameter("axis", "axis")
SHAPE = Parameter("shape", "shape")
_ROPE = (
    Parameter("width", "int", least=2, most=1 << 16),
    Parameter("base", "float", positive=True),
    Parameter("factor", "float", positive=True),
    Parameter("context", "int", least=1),
)


def _cast(dtype: str) -> Operation:
    def rule(emit: Emit, a: Arguments) -> Tensor:
        x: Tensor = a["x"]
        return x if x.type.dtype == dtype else emit.node("cast", x, dtype=dtype)

    return Operation(dtype, (X,), rule)


def _reduce(op: str) -> Callable[[Emit, Arguments], Tensor]:
    return lambda emit, a: emit.node(op, a["x"], axes=a["axis"], keepdim=a["keepdim"])


def _amin(emit: Emit, a: Arguments) -> Tensor:
    largest = _reduce("amax")(emit, {**a, "x": emit.node("neg", a["x"])})
    return emit.node("neg", largest)


_OVER_AXES = (X, Parameter("axis", "all_axes", None), Parameter("keepdim", "bool", False))
_PAIR = (Parameter("a", "tensor"), Parameter("b", "tensor"))

OVERLOADS: dict[str, tuple[Operation, Operation]] = {
    "max": (
        Operation("max", _OVER_AXES, _reduce("amax")),
        Operation("max", _PAIR, lambda emit, a: emit.node("maximum", a["a"], a["b"])),
    ),
    "min": (
        Operation("min", _OVER_AXES, _amin),
        Operation("min", _PAIR, lambda emit, a: emit.node("minimum", a["a"], a["b"])),
    ),
}
"""Operations with one operand (over axes) and with two (elementwise)."""


def _transpose(emit: Emit, a: Arguments) -> Tensor:
    axes = list(range(len(a["x"].type.shape)))
    if len(axes) < 2:
        raise emit.refuse("FG205", f"transpose needs two dimensions, and {a['x'].type} has {len(axes)}")
    first, second = a["first"], a["second"]
    axes[first], axes[second] = axes[second], axes[first]
    return emit.node("permute", a["x"], axes=tuple(axes))


def _unsqueeze(emit: Emit, a: Arguments) -> Tensor:
    shape = list(a["x"].type.shape)
    shape.insert(a["axis"] + len(shape) + 1, Dim.of(1))
    return emit.node("reshape", a["x"], shape=tuple(shape))


def _squeeze(emit: Emit, a: Arguments) -> Tensor:
    shape = list(a["x"].type.shape)
    if shape[a["axis"]] != Dim.of(1):
        raise emit.refuse(
            "FG207", f"squeeze of axis {a['axis']} of {a['x'].type}: its size is {shape[a['axis']]}, not 1"
        )
    del shape[a["axis"]]
    return emit.node("reshape", a["x"], shape=tuple(shape))


def _fill(value: float) -> Rule:
    return lambda emit, a: emit.node("fill", shape=a["shape"], value=value)


def _clamp(emit: Emit, a: Arguments) -> Tensor:
    if a["low"] > a["high"]:
        raise emit.refuse(
            "FG218", f"clamp from {a['low']} to {a['high']}: the lower limit is above the upper one"
        )
    low, high = a["low"], a["high"]
    if a["x"].type.dtype == "int":
        for limit in (low, high):
            if not float(limit).is_integer() or abs(limit) >= 2.0**63:
                raise emit.refuse(
                    "FG218", f"clamp of {a['x'].type} at {limit}: a limit of ints is a whole number"
                )
        low, high = int(low), int(high)
    return emit.node("clamp", a["x"], low=low, high=high)


def _alibi(emit: Emit, a: Arguments) -> Tensor:
    scores, heads = a["scores"], a["heads"]
    shape = scores.type.shape
    if heads is not None and len(shape) > 2 and shape[-3] != Dim.of(heads):
        raise emit.refuse("FG203", f"alibi with {heads} heads of {scores.type}: it has {shape[-3]}")
    return emit.node("alibi", scores)


def _fit(emit: Emit, a: Arguments) -> Several:
    emit.step(a["degree"] ** 2)
    try:
        return Several(fit(a["family"], a["degree"], a["bound"]).coefficients)
    except PrecisionError as error:
        raise emit.refuse("FG306", str(error)) from None


def _rotary(emit: Emit, a: Arguments) -> Tensor:
    x, base, stretch = a["x"], a["base"], a["stretch"]
    if stretch is None:
        return emit.node("rotary", x, base=base)
    return emit.node("rotary", x, base=base, stretch=stretch)


def _llama3(emit: Emit, a: Arguments) -> Several:
    if a["low"] >= a["high"]:
        raise emit.refuse("FG218", f"rope_llama3 from {a['low']} to {a['high']} turns: low is below high")
    return _stretched(emit, a, stretches.llama3)


def _yarn(emit: Emit, a: Arguments) -> Several:
    if a["slow"] > a["fast"]:
        raise emit.refuse("FG218", f"rope_yarn from {a['slow']} to {a['fast']} turns: slow is at most fast")
    if a["base"] <= 1:
        raise emit.refuse("FG218", f"rope_yarn with the base {a['base']}: it is above 1")
    return _stretched(emit, a, stretches.yarn)


def _stretched(emit: Emit, a: Arguments, rule: Callable[..., tuple[float, ...]]) -> Several:
    emit.step(a["width"])
    if a["width"] % 2:
        raise emit.refuse("FG208", f"a width of {a['width']}: rotary turns pairs of entries")
    try:
        found = rule(**a)
    except OverflowError:
        raise emit.refuse("FG219", "a stretch of numbers that are too large") from None
    return Several(found)


def _cross_entropy(emit: Emit, a: Arguments) -> Tensor:
    options: dict[str, Attribute] = {"smoothing": a["smoothing"]} if a["smoothing"] else {}
    if a["ignored"] is not None:
        options["ignored"] = a["ignored"]
    return emit.node("cross_entropy", a["logits"], a["targets"], **options)


def _given(operand: Tensor | None) -> tuple[Tensor, ...]:
    """An operand that may be left out."""
    return () if operand is None else (operand,)


def _mask(mask: MaskOp) -> Operation:
    """Over the scores, then the operand or the size that it has."""
    operands = () if mask.operand is None else (Parameter(mask.operand.name, "tensor"),)
    sizes = () if mask.size is None else (Parameter(mask.size, "int", least=1),)
    return Operation(mask.name, (SCORES, *operands, *sizes))


def _gated(name: str, what: str) -> Operation:
    """Over scores or weights, then the log gates."""
    return Operation(name, (Parameter(what, "tensor"), Parameter(GATE.name, "tensor")))


_OPERATIONS = (
    Operation("reshape", (X, SHAPE), rest="shape"),
    Operation("permute", (X, Parameter("axes", "axes")), rest="axes"),
    Operation("transpose", (X, Parameter("first", "axis", -2), Parameter("second", "axis", -1)), _transpose),
    Operation("unsqueeze", (X, Parameter("axis", "new_axis")), _unsqueeze),
    Operation("squeeze", (X, AXIS), _squeeze),
    Operation("broadcast_to", (X, SHAPE), rest="shape"),
    Operation("pad", (X, AXIS, Parameter("before", "int", least=0), Parameter("after", "int", least=0))),
    Operation("split_heads", (X, Parameter("heads", "int", least=1))),
    Operation("merge_heads", (X,)),
    Operation("repeat_heads", (X, Parameter("times", "int", least=1))),
    Operation("patches", (Parameter("image", "tensor"), Parameter("size", "int", least=1))),
    Operation("concat", (TENSORS, AXIS), rest="tensors"),
    Operation("stack", (TENSORS, Parameter("axis", "new_axis")), rest="tensors"),
    Operation("zeros", (SHAPE,), _fill(0.0), "shape"),
    Operation("ones", (SHAPE,), _fill(1.0), "shape"),
    Operation("full", (SHAPE, Parameter("value", "float")), lambda emit, a: emit.node("fill", **a)),
    Operation("embedding", (Parameter("table", "tensor"), Parameter("ids", "tensor"))),
    Operation("one_hot", (Parameter("ids", "tensor"), Parameter("classes", "int", least=1))),
    *(Operation(name, (Parameter("n", "dim"),), lambda emit, a: emit.node("arange", stop=a["n"]))
      for name in ("positions", "arange")),
    *(Operation(name, (X,))
      for name in ("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "gelu", "silu", "log_sigmoid", "softplus",
                   "erf", "abs", "unit")),
    _cast("float"),
    _cast("int"),
    Operation("clamp", (X, Parameter("low", "float"), Parameter("high", "float")), _clamp),
    Operation("where", (Parameter("condition", "tensor"), *_PAIR)),
    *(Operation(name, _OVER_AXES, _reduce(name)) for name in ("sum", "mean")),
    Operation("softmax", (X, Parameter("axis", "axis", -1))),
    Operation("layer_norm", (X, W, Parameter("b", "tensor"), Parameter("eps", "float", 1e-5, least=0))),
    Operation("rms_norm", (X, W, Parameter("eps", "float", 1e-6, least=0))),
    *map(_mask, MASKS.values()),
    *(_gated(name, what) for name, what in GATED.items()),
    Operation("near_far",
              (Parameter("local", "tensor"), Parameter("far", "tensor"), Parameter("block", "int", least=1))),
    Operation("polynomial", (SCORES, Parameter("coefficients", "weight_polynomial"))),
    Operation("fit", (Parameter("family", "family"), Parameter("degree", "int", least=1, most=MAX_DEGREE),
                      Parameter("bound", "float", positive=True)), _fit),
    Operation("normalize_rows", (Parameter("weights", "tensor"),)),
    Operation("assume_bound", (SCORES, Parameter("bound", "float", positive=True))),
    Operation("rotary", (X, Parameter("base", "float", 10000.0, positive=True), Parameter("stretch", "stretch", None)),
              _rotary),
    Operation("rope_llama3", (*_ROPE, Parameter("low", "float", 1.0, positive=True),
                              Parameter("high", "float", 4.0, positive=True)), _llama3),
    Operation("rope_yarn", (*_ROPE, Parameter("fast", "float", 32.0, positive=True),
                            Parameter("slow", "float", 1.0, positive=True), Parameter("whole", "bool", True)), _yarn),
    Operation("shift", (X, IDS, Parameter("by", "int", 1, least=1)),
              lambda emit, a: emit.node("shift", a["x"], *_given(a["ids"]), by=a["by"])),
    Operation("depthwise", (X, W, IDS),
              lambda emit, a: emit.node("depthwise", a["x"], a["w"], *_given(a["ids"]))),
    Operation("sinusoid", (Parameter("n", "dim"), Parameter("d", "dim")),
              lambda emit, a: emit.node("sinusoid", length=a["n"], width=a["d"])),
    Operation("alibi", (SCORES, Parameter("heads", "int", None, least=1)), _alibi),
    Operation("dropout", (X, Parameter("p", "float", least=0, below=1))),
    Operation("cross_entropy", (Parameter("logits", "tensor"), Parameter("targets", "tensor"),
                                Parameter("smoothing", "float", 0.0, least=0, most=1),
                                Parameter("ignored", "int", None)), _cross_entropy),
    Operation("mse", _PAIR),
)  # fmt: skip

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATIONS}
NAMES: frozenset[str] = frozenset(OPERATIONS) | frozenset(OVERLOADS)
