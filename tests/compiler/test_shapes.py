"""Shape rules: one per operation, symbolic dims, broadcasting, what is refused and how it is explained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, Program, TensorType, Type
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.shapes import SHAPE, ShapeError, infer, infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_grammar.source import Source

B, N, M = (Dim.of(name) for name in "bnm")


def t(*shape: int | str | Dim, dtype: str = "float") -> TensorType:
    return TensorType(dtype, tuple(Dim.of(dim) for dim in shape))


def ints(*shape: int | str | Dim) -> TensorType:
    return t(*shape, dtype="int")


def bools(*shape: int | str | Dim) -> TensorType:
    return t(*shape, dtype="bool")


ATTENTION: dict[str, Attribute] = {"roles": (), "causal": True, "scale": 1.0, "near": None}

CASES: list[tuple[str, tuple[Type, ...], dict[str, Attribute], Type]] = [
    ("constant", (), {"value": 2}, ints()),
    ("constant", (), {"value": 2.0}, t()),
    ("constant", (), {"value": True}, bools()),
    ("fill", (), {"shape": (N, 4), "value": 0.0}, t("n", 4)),
    ("literal", (), {"label": "c", "values": (((0.5, 1.0),), ((2.0, -1.0),))}, t(2, 1, 2)),
    ("item", ((t("n"), ints(3)),), {"index": 1}, ints(3)),
    ("reshape", (t("b", "n", 6),), {"shape": (B * N, 2, 3)}, t(B * N, 2, 3)),
    ("permute", (t("b", "n", 6),), {"axes": (0, 2, 1)}, t("b", 6, "n")),
    ("split_heads", (t("b", "n", 64),), {"heads": 8}, t("b", 8, "n", 8)),
    ("merge_heads", (t("b", 8, "n", 8),), {}, t("b", "n", 64)),
    ("repeat_heads", (t("b", 2, "n", 8),), {"times": 4}, t("b", 8, "n", 8)),
    ("concat", (t("b", "n"), t("b", "m")), {"axis": -1}, t("b", N + M)),
    ("stack", (t("b"), t("b")), {"axis": -1}, t("b", 2)),
    ("stack", (t("b"), t("b"), t("b")), {"axis": 0}, t(3, "b")),
    ("slice", (t("n", 8),), {"axis": -1, "start": 2, "stop": 5}, t("n", 3)),
    ("slice", (t("n", 8),), {"axis": -2, "start": 1, "stop": N}, t(N - 1, 8)),
    ("select", (t("n", 8),), {"axis": -1, "index": 7}, t("n")),
    ("pad", (t("n", 8),), {"axis": -1, "before": 1, "after": 2}, t("n", 11)),
    ("patches", (t("b", 3, 32, 16),), {"size": 8}, t("b", 8, 192)),
    ("broadcast_to", (t(1, 4),), {"shape": (N, 4)}, t("n", 4)),
    ("sum_to", (t("b", "n", 4),), {"shape": (1, 4)}, t(1, 4)),
    ("embedding", (t(100, 8), ints("b", "n")), {}, t("b", "n", 8)),
    ("embedding_gradient", (t("b", "n", 8), ints("b", "n")), {"rows": 100}, t(100, 8)),
    ("arange", (), {"stop": N}, ints("n")),
    ("one_hot", (ints("b"),), {"classes": 5}, t("b", 5)),
    ("add", (t("b", 1, 4), ints("n", 4)), {}, t("b", "n", 4)),
    ("mul", (ints(3), ints(3)), {}, ints(3)),
    ("div", (ints(3), ints(3)), {}, t(3)),
    ("maximum", (t("n"), t()), {}, t("n")),
    ("neg", (ints("n"),), {}, ints("n")),
    ("exp", (t("n"),), {}, t("n")),
    ("logical_not", (bools("n"),), {}, bools("n")),
    ("less", (t("n", 1), t("m")), {}, bools("n", "m")),
    ("equal", (bools("n"), bools("n")), {}, bools("n")),
    ("cast", (bools("n"),), {"dtype": "float"}, t("n")),
    ("where", (bools("n", 1), t(), t(4)), {}, t("n", 4)),
    ("matmul", (t("b", 8, "n", 4), t(8, 4, "m")), {}, t("b", 8, "n", "m")),
    ("sum", (t("b", "n", 4),), {"axes": (-1, 0), "keepdim": False}, t("n")),
    ("mean", (t("b", "n", 4),), {"axes": (-2,), "keepdim": True}, t("b", 1, 4)),
    ("amax", (ints("b", 4),), {"axes": (-1,), "keepdim": False}, ints("b")),
    ("softmax", (t("b", 4),), {"axis": -1}, t("b", 4)),
    ("layer_norm", (t("b", 4), t(4), t(4)), {"eps": 1e-5}, t("b", 4)),
    ("rms_norm", (t("b", 4), t(4)), {"eps": 1e-5}, t("b", 4)),
    ("causal", (t("b", "n", "n"),), {}, t("b", "n", "n")),
    ("window", (t("b", "n", "m"),), {"width": 3}, t("b", "n", "m")),
    ("padding", (t("b", 8, "n", "m"), bools("b", "m")), {}, t("b", 8, "n", "m")),
    ("documents", (t("b", 8, "n", "n"), ints("b", "n")), {}, t("b", 8, "n", "n")),
    ("prefix", (t("b", 8, "n", "n"), ints("b")), {}, t("b", 8, "n", "n")),
    ("near_far", (t("b", "n", "m"), t("b", "n", "m")), {"block": 4}, t("b", "n", "m")),
    ("alibi", (t("b", 8, "n", "m"),), {}, t("b", 8, "n", "m")),
    ("rotary", (t("b", "n", 8),), {"base": 10.0}, t("b", "n", 8)),
    ("shift", (t("b", 8, "n", 4), ints("b", "n")), {"by": -1}, t("b", 8, "n", 4)),
    ("depthwise", (t("n", "m"), t(3, "m")), {}, t("n", "m")),
    ("depthwise_weights", (t("b", "n", 4), t("b", "n", 4)), {"width": 3}, t(3, 4)),
    ("sinusoid", (), {"length": N, "width": 8}, t("n", 8)),
    ("cross_entropy", (t("b", "n", 10), ints("b", "n")), {}, t()),
    ("linear_cross_entropy", (t("b", "n", 10), t(10, 7), ints("b", "n"), t(7)), {}, t()),
    ("mse", (t("b", 4), t("b", 4)), {}, t()),
    ("attention", (t("b", 8, "n", 4), t("b", 2, "m", 4), t("b", 2, "m", 6)), ATTENTION, t("b", 8, "n", 6)),
    (
        "poly_attention",
        (t("b", 8, "n", 4), t("b", 8, "n", 4), t("b", 8, "n", 6), t("b", 8, "n", 9), t("b", 8, "n", 9)),
        {**ATTENTION, "roles": ("near_q", "near_k")},
        t("b", 8, "n", 6),
    ),
    (
        "poly_attention_backward",
        (t("b", 8, "n", 4), t("b", 8, "m", 4), t("b", 8, "m", 6), bools("b", "m"), t("b", 8, "n", 6)),
        {**ATTENTION, "roles": ("padding",)},
        (t("b", 8, "n", 4), t("b", 8, "m", 4), t("b", 8, "m", 6)),
    ),
    ("repeat_backward", (t("n"), ints("n"), t(4), t("n")), {"carried": 2, "bodies": ()}, (t("n"), t(4))),
    ("weight_gradient", (t(4, 4),), {"label": "w"}, t(4, 4)),
]


def test_every_operation_has_a_rule() -> None:
    assert set(SHAPE) == set(OPS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "result"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_rule(op: str, inputs: tuple[Type, ...], attributes: dict[str, Attribute], result: Type) -> None:
    assert infer(op, inputs, attributes) == result


REFUSED: list[tuple[str, tuple[Type, ...], dict[str, Attribute], str]] = [
    ("add", (t("n"), t("m")), {}, "FG203"),
    ("add", (bools("n"), t("n")), {}, "FG209"),
    ("matmul", (t("n", 4), t(5, 4)), {}, "FG204"),
    ("matmul", (t("b", "n", 4), t("m", 4, 4)), {}, "FG204"),
    ("matmul", (t("n", 4), t(4)), {}, "FG205"),
    ("reshape", (t("n", 6),), {"shape": (N, 5)}, "FG207"),
    ("reshape", (t("n", 6),), {"shape": (M, 6)}, "FG207"),
    ("permute", (t("n", 6),), {"axes": (0, 0)}, "FG206"),
    ("split_heads", (t("n", 64),), {"heads": 7}, "FG208"),
    ("split_heads", (t("n", "m"),), {"heads": 2}, "FG208"),
    ("concat", (t("b", 4), t("n", 4)), {"axis": -1}, "FG203"),
    ("concat", (t("b", 4), ints("b", 4)), {"axis": -1}, "FG209"),
    ("slice", (t(8),), {"axis": -1, "start": 4, "stop": 9}, "FG206"),
    ("slice", (t(8),), {"axis": -1, "start": 4, "stop": 4}, "FG206"),
    ("select", (t(8),), {"axis": -1, "index": 8}, "FG206"),
    ("patches", (t("b", 3, 30, 32),), {"size": 8}, "FG208"),
    ("embedding", (ints("n"), t(100, 8)), {}, "FG209"),
    ("mean", (ints("n"),), {"axes": (-1,), "keepdim": False}, "FG209"),
    ("sum", (t("n"),), {"axes": (-1, 0), "keepdim": False}, "FG206"),
    ("softmax", (t("n"),), {"axis": 1}, "FG206"),
    ("rms_norm", (t("n", 4), t(1)), {"eps": 0.0}, "FG203"),
    ("causal", (t("n", "m"),), {}, "FG203"),
    ("padding", (t("b", 8, "n", "m"), bools("b", "n")), {}, "FG203"),
    ("near_far", (t("n", "n"), t("n", "m")), {"block": 4}, "FG203"),
    ("alibi", (t("b", "m", "n", "n"),), {}, "FG212"),
    ("rotary", (t("n", 7),), {"base": 10.0}, "FG208"),
    ("shift", (t("n"),), {"by": 1}, "FG205"),
    ("shift", (ints("b", "n", 4),), {"by": 1}, "FG209"),
    ("shift", (t("n", 4), ints("b", "n")), {"by": 1}, "FG205"),
    ("shift", (t("b", "n", 4), ints("b", "m")), {"by": 1}, "FG203"),
    ("shift", (t("b", "n", 4), ints("m", "n")), {"by": 1}, "FG203"),
    ("shift", (t("b", "n", 4), bools("b", "n")), {"by": 1}, "FG209"),
    ("depthwise", (t("n", 4), t(3, 5)), {}, "FG203"),
    ("depthwise", (t("n", 4), t(4)), {}, "FG205"),
    ("depthwise", (t("n", 4), t("m", 4)), {}, "FG212"),
    ("depthwise", (t("b", "n", 4), t(3, 4), t("b", "n")), {}, "FG209"),
    ("depthwise_weights", (t("b", "n", 4), t("b", "m", 4)), {"width": 3}, "FG203"),
    ("cross_entropy", (t("b", "n", 10), ints("b", "m")), {}, "FG203"),
    ("linear_cross_entropy", (t("b", "n", 10), t(10, 7), ints("b", "m")), {}, "FG203"),
    ("linear_cross_entropy", (t("b", "n", 10), t(7, 10), ints("b", "n")), {}, "FG203"),
    ("linear_cross_entropy", (t("b", "n", 10), t(10, 7), ints("b", "n"), t(10)), {}, "FG203"),
    ("linear_cross_entropy", (t("b", "n", 10), t(10, 7), t("b", "n")), {}, "FG209"),
    ("attention", (t("b", 8, "n", 4), t("b", 3, "m", 4), t("b", 3, "m", 6)), ATTENTION, "FG208"),
    ("attention", (t("b", 8, "n", 4), t("b", 8, "m", 4), t("b", 8, "n", 6)), ATTENTION, "FG203"),
    ("attention", (t("n", 4), t("m", 4), t("m", 6)), ATTENTION, "FG205"),
    ("attention", (t("b", 8, "n", 4), t(8, "m", 4), t(8, "m", 6)), ATTENTION, "FG205"),
    ("attention", (t("b", 8, "n", 4), t(1, 8, "m", 4), t(1, 8, "m", 6)), ATTENTION, "FG203"),
]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "code"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_misfit_is_refused(
    op: str, inputs: tuple[Type, ...], attributes: dict[str, Attribute], code: str
) -> None:
    with pytest.raises(ShapeError) as error:
        infer(op, inputs, attributes)
    assert error.value.code == code


def test_blame_names_both_sides_and_their_axes() -> None:
    with pytest.raises(ShapeError) as error:
        infer("matmul", (t("b", "n", 256), t(128, 512)), {})
    assert error.value.message == "matrix product of [b, n, 256] and [128, 512]: inner dimensions differ"
    assert [(b.input, b.axis, b.text) for b in error.value.blame] == [
        (0, -1, "256 here"),
        (1, -2, "128 here"),
    ]


def test_declared_multiples_let_run_time_dims_divide() -> None:
    found = infer("patches", (t("b", 1, "n", 8),), {"size": 8}, {"n": 8})
    assert isinstance(found, TensorType)
    assert str(found) == "float[b, n/8, 64]"
    with pytest.raises(ShapeError):
        infer("patches", (t("b", 1, "n", 8),), {"size": 8}, {"n": 4})


TEXT = """\
dim n % 2

model m(x: float[n, 8]) -> float[n, 8] {
    weight w: float[8, 8] = xavier()
    repeat i in 3 {
        (a, c) = halves(x)
        x = concat(a, c, axis = 1) @ w
    }
    return x
}

block halves(x: float[n, d]) -> (float[n, d / 2], float[n, d / 2]) {
    return (x[.., 0:d / 2], x[.., d / 2:])
}
"""


def _untyped(program: Program) -> Program:
    """The program without the types that rules can find again."""

    def strip(node: Node) -> Node:
        return node if node.op in ("input", "weight", "buffer") else replace(node, type=None)

    return program.with_graphs(replace(g, nodes=tuple(map(strip, g.nodes))) for g in program.graphs)


def test_infer_shapes_finds_every_type_again() -> None:
    program = elaborate(Source("m.tfg", TEXT))
    assert any(node.type is None for graph in _untyped(program).graphs for node in graph.nodes)
    assert infer_shapes(_untyped(program)) == program


def test_infer_shapes_names_the_node_that_does_not_fit() -> None:
    text = "program m\nmain m\n\ngraph m {\n    %x = input() : float[4, 4]\n    %y = input() : float[3, 4]\n"
    program = parse_program(text + "    %z = matmul(%x, %y)\n    return %z\n}\n")
    with pytest.raises(ShapeError, match=r"^m\.z: matrix product of \[4, 4\] and \[3, 4\]"):
        infer_shapes(program)
