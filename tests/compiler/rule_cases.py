"""Cases of every operation, from which each rule table is tested: types of inputs, and the operation over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, Program
from tests.compiler.gradients import program_of


@dataclass(frozen=True)
class Case:
    """`expression` over inputs %a, %b, ... of these types; ints are below `ids` where that is given (a dim or number).

    `positive`: floats must be above 0 for the result to be a number.
    """

    types: tuple[str, ...]
    expression: str
    ids: str | int | None = None
    positive: bool = False

    @property
    def program(self) -> Program:
        """The typed program of the one operation, %y."""
        return _program(self)

    @property
    def even(self) -> bool:
        """Whether n is declared a multiple of 2."""
        return "n/2" in self.expression or ("rotary" in self.expression and "n]" in self.types[0])

    @property
    def graph(self) -> Graph:
        """Its graph."""
        return self.program["main"]

    @property
    def node(self) -> Node:
        """The operation's node."""
        return self.graph["y"]

    def values(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The attributes without dims."""
        return {key: evaluated(value, sizes) for key, value in self.node.attributes}

    def __str__(self) -> str:
        return f"{self.expression} of {', '.join(self.types)}"


@cache
def _program(case: Case) -> Program:
    lines = [f"%{name} = input() : {type_}" for name, type_ in zip("abcdefgh", case.types, strict=False)]
    body = "\n    ".join([*lines, f"%y = {case.expression}", "return %y"])
    dims = "dim n % 2\n" if case.even else ""
    return program_of(f"program p\nmain main\n{dims}\ngraph main {{\n    {body}\n}}\n")


def evaluated(value: Any, sizes: Mapping[str, int]) -> Any:
    """An attribute with its dims as numbers."""
    if isinstance(value, Dim):
        return value.evaluate(sizes)
    return tuple(evaluated(part, sizes) for part in value) if isinstance(value, tuple) else value


F, G, IDS, B = "float[b, n, 4]", "float[n, 1]", "int[b, n]", "bool[b, n]"
S, T, R = "float[b, 2, n, n]", "float[b, n, m]", "float[b, 3, n, m]"
Q, K, V, NQ, NK = (
    "float[b, 4, n, 3]", "float[b, 2, n, 3]", "float[b, 2, n, 5]", "float[b, 4, n, 2]", "float[b, 2, n, 2]",
)  # fmt: skip


def _each(
    names: str, *cases: tuple[tuple[str, ...], str], positive: bool = False
) -> dict[str, tuple[Case, ...]]:
    """The same cases for several operations, whose name stands for OP."""
    return {
        name: tuple(Case(types, text.replace("OP", name), positive=positive) for types, text in cases)
        for name in names.split()
    }


def _attention(extra: str, *types: str) -> Case:
    names = ", ".join(f"%{name}" for name in "abcdefgh"[: 3 + len(types)])
    plain = {
        "roles": "()", "causal": "false", "scale": "0.6", "near": "none", "window": "none", "alibi": "false",
        "bound": "1.0", "asserted": "false", "proof": "()",
    }  # fmt: skip
    plain |= dict(part.split(" = ") for part in extra.split("; ") if part)
    text = ", ".join(f"{key} = {value}" for key, value in plain.items())
    return Case((Q, K, V, *types), f"attention({names}, {text})")


CASES: dict[str, tuple[Case, ...]] = {
    "constant": tuple(
        Case((), f"constant(value = {value})") for value in ("2.5", "-3", "true", "9007199254740993")
    ),
    "fill": (Case((F,), "fill(shape = [n, 4], value = -0.5)"),),
    "literal": (Case((), 'literal(label = "l", values = ((1.0, -2.0), (0.5, 3.0)))'),),
    "arange": (Case((F,), "arange(stop = <2*n>)"), Case((), "arange(stop = 3)")),
    "sinusoid": (
        Case((F,), "sinusoid(length = <n>, width = 5)"),
        Case((F,), "sinusoid(length = 3, width = <n>)"),
    ),
    "reshape": (
        Case((F,), "reshape(%a, shape = [b*n, 2, 2])"),
        Case((F,), "reshape(%a, shape = [b, 4*n])"),
        Case((F,), "reshape(%a, shape = [b, n/2, 8])"),
        Case(("float[6, 3, 4]",), "reshape(%a, shape = [6, 2, 6])"),
        Case(("float[6, 8]",), "reshape(%a, shape = [3, 2, 8])"),
        Case(("float[6, 8]",), "reshape(%a, shape = [12, 4])"),
        Case(("float[6, 8]",), "reshape(%a, shape = [3, 16])"),
        Case(("float[1, 1]",), "reshape(%a, shape = [])"),
        Case(("float[]",), "reshape(%a, shape = [1, 1])"),
        Case((IDS,), "reshape(%a, shape = [b, n, 1])"),
    ),
    "permute": (Case((F,), "permute(%a, axes = (1, 2, 0))"), Case((F,), "permute(%a, axes = (0, -1, -2))")),
    "split_heads": (Case((F,), "split_heads(%a, heads = 2)"),),
    "merge_heads": (Case((F,), "merge_heads(%a)"), Case(("float[b, 2, n, 3]",), "merge_heads(%a)")),
    "repeat_heads": (Case(("float[b, 2, n, 3]",), "repeat_heads(%a, times = 3)"),),
    "concat": (
        Case((F, "float[b, m, 4]", F), "concat(%a, %b, %c, axis = -2)"),
        Case((F, "float[b, n, 2]"), "concat(%a, %b, axis = 2)"),
        Case((F,), "concat(%a, axis = -1)"),
    ),
    "stack": (
        Case((F, F), "stack(%a, %b, axis = 0)"),
        Case((F, F, F), "stack(%a, %b, %c, axis = -1)"),
        Case(("float[]", "float[]"), "stack(%a, %b, axis = 0)"),
    ),
    "slice": (
        Case((F,), "slice(%a, axis = -1, start = 1, stop = 3)"),
        Case((F,), "slice(%a, axis = 1, start = 1, stop = <n>)"),
        Case((F,), "slice(%a, axis = 1, start = 0, stop = <n - 1>)"),
    ),
    "select": (
        Case((F,), "select(%a, axis = -1, index = 2)"),
        Case((F,), "select(%a, axis = 1, index = <n - 1>)"),
    ),
    "pad": (
        Case((F,), "pad(%a, after = 1, axis = -2, before = 2)"),
        Case((F,), "pad(%a, after = 0, axis = 2, before = 0)"),
    ),
    "patches": (Case(("float[b, 3, 4, 6]",), "patches(%a, size = 2)"),),
    "broadcast_to": (
        Case((G,), "broadcast_to(%a, shape = [2, n, 4])"),
        Case(("float[]",), "broadcast_to(%a, shape = [n, 3])"),
    ),
    "sum_to": (
        Case((F,), "sum_to(%a, shape = [n, 1])"),
        Case((F,), "sum_to(%a, shape = [])"),
        Case((F,), "sum_to(%a, shape = [b, n, 4])"),
    ),
    "embedding": (
        Case(("float[3, 4]", IDS), "embedding(%a, %b)", ids=3),
        Case(("float[n, 4]", "int[]"), "embedding(%a, %b)", ids="n"),
    ),
    "embedding_gradient": (Case((F, IDS), "embedding_gradient(%a, %b, rows = 3)", ids=3),),
    "one_hot": (Case((IDS,), "one_hot(%a, classes = 4)", ids=4), Case((IDS,), "one_hot(%a, classes = <n>)", ids="n")),
    **_each(
        "add sub mul div minimum maximum",
        ((F, F), "OP(%a, %b)"),
        ((F, G), "OP(%a, %b)"),
        (("float[n, 1]", "float[4]"), "OP(%a, %b)"),
        (("float[]", F), "OP(%a, %b)"),
        ((F,), "OP(%a, %a)"),
        ((IDS, "int[n]"), "OP(%a, %b)"),
        ((F, "int[n, 4]"), "OP(%a, %b)"),
    ),
    **_each("neg abs", ((F,), "OP(%a)"), ((IDS,), "OP(%a)"), (("float[]",), "OP(%a)")),
    **_each("exp tanh sigmoid log_sigmoid relu gelu silu softplus erf", ((F,), "OP(%a)"), (("float[]",), "OP(%a)")),
    **_each("log sqrt rsqrt", ((F,), "OP(%a)"), positive=True),
    "logical_not": (Case((B,), "logical_not(%a)"),),
    **_each(
        "less less_equal",
        ((F, G), "OP(%a, %b)"),
        ((IDS, "int[]"), "OP(%a, %b)"),
        ((IDS, "float[]"), "OP(%a, %b)"),
    ),
    "equal": (
        Case((F, F), "equal(%a, %b)"),
        Case((B, B), "equal(%a, %b)"),
        Case((IDS, IDS), "equal(%a, %b)"),
    ),
    "cast": tuple(
        Case((source,), f'cast(%a, dtype = "{dtype}")') for source in (F, IDS, B) for dtype in ("float", "int", "bool")
    ),
    "clamp": (
        Case((F,), "clamp(%a, high = 1.1, low = -0.7)"),
        Case((F,), "clamp(%a, high = 2.0, low = 0.5)"),
        Case((F,), "clamp(%a, high = none, low = -0.7)"),
        Case((F,), "clamp(%a, high = -0.25, low = none)"),
        Case((IDS,), "clamp(%a, high = 2, low = -1)"),
    ),
    "where": (
        Case(("bool[n, 4]", F, "float[4]"), "where(%a, %b, %c)"),
        Case((B, IDS, "float[]"), "where(%a, %b, %c)"),
        Case((B, B, "bool[]"), "where(%a, %b, %c)"),
        Case((B, IDS, IDS), "where(%a, %b, %c)"),
    ),
    "matmul": (
        Case((F, "float[b, 4, m]"), "matmul(%a, %b)"),
        Case((F, "float[4, 3]"), "matmul(%a, %b)"),
        Case(("float[n, 4]", "float[b, 1, 4, 3]"), "matmul(%a, %b)"),
        Case((T, "float[b, m, 2]"), "matmul(%a, %b)"),
    ),
    **_each(
        "sum mean amax",
        ((F,), "OP(%a, axes = (-1,), keepdim = false)"),
        ((F,), "OP(%a, axes = (-3, -2), keepdim = true)"),
        ((F,), "OP(%a, axes = (0, 1, 2), keepdim = false)"),
        ((F,), "OP(%a, axes = (1,), keepdim = false)"),
        (("float[]",), "OP(%a, axes = (), keepdim = false)"),
    ),
    "softmax": (Case((F,), "softmax(%a, axis = -1)"), Case((F,), "softmax(%a, axis = 1)")),
    "layer_norm": (
        Case((F, "float[4]", "float[4]"), "layer_norm(%a, %b, %c, eps = 1e-05)"),
        Case(("float[4]", "float[4]", "float[4]"), "layer_norm(%a, %b, %c, eps = 0.1)"),
    ),
    "rms_norm": (
        Case((F, "float[4]"), "rms_norm(%a, %b, eps = 0.1)"),
        Case(("float[4]", "float[4]"), "rms_norm(%a, %b, eps = 1e-06)"),
    ),
    "unit": (Case((F,), "unit(%a)"), Case(("float[4]",), "unit(%a)"), Case((T,), "unit(%a)")),
    "causal": (Case((S,), "causal(%a)"), Case((S,), "causal(%a, fill = -2.0)"), Case(("float[n, n]",), "causal(%a)")),
    "window": (Case((S,), "window(%a, width = 1)"), Case((T,), "window(%a, fill = 0.5, width = 2)")),
    "padding": (
        Case((R, "bool[b, m]"), "padding(%a, %b)"),
        Case((T, "bool[b, m]"), "padding(%a, %b, fill = -2.0)"),
    ),
    "documents": (
        Case((S, IDS), "documents(%a, %b)"),
        Case(("float[b, n, n]", IDS), "documents(%a, %b, fill = 1.5)"),
    ),
    "prefix": (
        Case((S, "int[b]"), "prefix(%a, %b)"),
        Case(("float[b, n, n]", "int[b]"), "prefix(%a, %b, fill = 1.5)"),
    ),
    **_each(
        "forget decay",
        ((S, "float[b, 2, n]"), "OP(%a, %b)"),
        (("float[b, n, n]", "float[b, n]"), "OP(%a, %b)"),
        (("float[n, n]", "float[n]"), "OP(%a, %b)"),
    ),
    "near_far": (Case((S, S), "near_far(%a, %b, block = 1)"), Case((T, T), "near_far(%a, %b, block = 2)")),
    "polynomial": (
        Case((F,), "polynomial(%a, coefficients = (1.0, -0.5, 0.25, 0.1, 0.2))"),
        Case((F,), "polynomial(%a, coefficients = (0.0, 0.0, 1.0))"),
        Case((F,), "polynomial(%a, coefficients = (2.0,))"),
        Case((F,), "polynomial(%a, coefficients = (0.5, 0.0, -1.0, 2.0))"),
    ),
    "normalize_rows": (Case((F,), "normalize_rows(%a)"), Case(("float[4]",), "normalize_rows(%a)")),
    "assume_bound": (Case((S,), "assume_bound(%a, bound = 1000.0)"), Case((T,), "assume_bound(%a, bound = 0.4)")),
    "rotary": (
        Case((F,), "rotary(%a, base = 100.0)"),
        Case((F,), "rotary(%a, base = 10000.0, inverse = true)"),
        Case((F,), "rotary(%a, base = 0.5, inverse = false)"),
        Case(("float[3, n]",), "rotary(%a, base = 7.0)"),
        Case((F,), "rotary(%a, base = 100.0, stretch = (4.0,))"),
        Case(("float[n, 6]",), "rotary(%a, base = 9.0, inverse = true, stretch = (1.0, 2.5, 8.0))"),
    ),
    "shift": (
        Case((F,), "shift(%a, by = 1)"),
        Case(("float[3, 4]",), "shift(%a, by = 2)"),
        Case((F,), "shift(%a, by = -1)"),
        Case((F, IDS), "shift(%a, %b, by = 1)"),
        Case((S, IDS), "shift(%a, %b, by = -2)"),
    ),
    "depthwise": (
        Case((F, "float[1, 4]"), "depthwise(%a, %b)"),
        Case((F, "float[3, 4]"), "depthwise(%a, %b)"),
        Case(("float[3, 4]", "float[2, 4]"), "depthwise(%a, %b)"),
        Case((F, "float[2, 4]"), "depthwise(%a, %b, reverse = true)"),
        Case((F, "float[3, 4]", IDS), "depthwise(%a, %b, %c)"),
        Case((S, "float[3, n]", IDS), "depthwise(%a, %b, %c, reverse = true)"),
    ),
    "depthwise_weights": (
        Case((F, F), "depthwise_weights(%a, %b, width = 3)"),
        Case(("float[3, n]", "float[3, n]"), "depthwise_weights(%a, %b, width = 1)"),
        Case((S, S, IDS), "depthwise_weights(%a, %b, %c, width = 2)"),
    ),
    "alibi": (Case((S,), "alibi(%a)"), Case(("float[3, n, m]",), "alibi(%a)")),
    "dropout": (
        Case((F,), "dropout(%a, p = 0.0)"),
        Case((F,), "dropout(%a, p = 0.5)"),
        Case((F,), "dropout(%a, p = 0.9)"),
    ),
    "cross_entropy": (
        Case((F, IDS), "cross_entropy(%a, %b)", ids=4),
        Case(("float[4]", "int[]"), "cross_entropy(%a, %b)", ids=4),
        Case(("float[b, n]", "int[b]"), "cross_entropy(%a, %b)", ids="n"),
        Case((F, IDS), "cross_entropy(%a, %b, smoothing = 0.25)", ids=4),
        Case(("float[b, n]", "int[b]"), "cross_entropy(%a, %b, smoothing = 0.25)", ids="n"),
        Case((F, IDS), "cross_entropy(%a, %b, ignored = 3, smoothing = 0.5)", ids=4),
        Case((F, IDS), "cross_entropy(%a, %b, ignored = 5)", ids=4),
    ),
    "linear_cross_entropy": (
        Case((F, "float[4, 7]", IDS), "linear_cross_entropy(%a, %b, %c)", ids=7),
        Case((F, "float[4, 3]", IDS, "float[3]"), "linear_cross_entropy(%a, %b, %c, %d, smoothing = 0.25)", ids=3),
        Case((F, "float[4, 3]", IDS, "float[3]"), "linear_cross_entropy(%a, %b, %c, %d, ignored = 5)", ids=3),
    ),
    "mse": (Case((F, F), "mse(%a, %b)"), Case(("float[]", "float[]"), "mse(%a, %b)")),
    "attention": (
        _attention(""),
        _attention("causal = true; near = 1"),
        _attention('roles = ("padding",)', B),
        _attention('roles = ("documents",); causal = true; scale = -1.5', IDS),
        _attention('roles = ("near_q", "near_k"); near = 2', NQ, NK),
        _attention("window = 2; alibi = true"),
        _attention('roles = ("forget",); causal = true', "float[b, 2, n]"),
        _attention(
            'roles = ("near_q", "near_k", "forget", "documents"); near = 1; causal = true',
            *(NQ, NK, "float[b, 2, n]", IDS),
        ),
    ),
}  # fmt: skip
