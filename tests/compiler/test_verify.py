"""Each invariant of a program, broken once."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.ir.verify import CompilerBug, verify

GOOD = """\
main main
objective loss
dim n <= 64
graph main {
    %x = input() : float[n, 4]
    %ids = input() : int[n]
    %w = weight(init = ("zeros",), label = "w") : float[4, 4]
    %h = matmul(%x, %w) : float[n, 4]
    %s = softmax(%h, axis = -1) : float[n, 4]
    %y = call(%s, graph = "layer", label = "first") : float[n, 4]
    %z = repeat(%y, %w, bodies = (("body", 2),), carried = 1) : float[n, 4]
    return %z
}
graph layer {
    %x = input() : float[n, 4]
    %v = weight(init = ("zeros",), label = "v") : float[4]
    %y = mul(%x, %v) : float[n, 4]
    return %y
}
graph body {
    %x = input() : float[n, 4]
    %w = input() : float[4, 4]
    %y = call(%x, graph = "layer", label = "layers") : float[n, 4]
    return %y
}
graph loss {
    %y = input() : float[n, 4]
    %t = input() : float[n, 4]
    %l = mse(%y, %t) : float[]
    return %l
}
"""

BROKEN = {
    "two graphs of one name": ("graph body {", "graph layer {", "two graphs have one name"),
    "no main": ("main main", "main other", "main graph other is not there"),
    "no objective": ("objective loss", "objective lost", "objective graph lost is not there"),
    "no gradient": ("objective loss", "gradient g", "gradient graph g is not there"),
    "gradient of other inputs": ("objective loss", "gradient layer", "do not start with those of main"),
    "a dim twice": ("dim n <= 64", "dim n\ndim n", "a dim is declared twice"),
    "two nodes of one name": ("%s = softmax(%h", "%h = softmax(%h", "main.h: two nodes have one name"),
    "use before definition": ("matmul(%x, %w)", "matmul(%s, %w)", "main.h: it reads s, which comes later"),
    "unknown input": ("matmul(%x, %w)", "matmul(%x, %q)", "main.h: it reads q, which is not there"),
    "input behind others": (
        "    %ids = input() : int[n]\n",
        '    %u = weight(init = ("zeros",), label = "u") : float[4]\n    %ids = input() : int[n]\n',
        "main.ids: an input comes after other nodes",
    ),
    "unknown output": ("return %z", "return %zz", "main: its output zz is not there"),
    "unknown operation": ("softmax(%h, axis = -1)", "softmix(%h)", "main.s: there is no operation softmix"),
    "arity": ("matmul(%x, %w)", "matmul(%x)", "main.h: matmul has 1 inputs"),
    "missing attribute": ("softmax(%h, axis = -1)", "softmax(%h)", "main.s: softmax lacks attribute axis"),
    "unknown attribute": ("axis = -1", "axis = -1, base = 2", "main.s: softmax has no attribute base"),
    "call of nothing": ('"layer", label = "first"', '"lier", label = "first"', "main.y: it runs graph lier"),
    "call of other types": ("call(%s, graph", "call(%w, graph", "main.y: call of layer: x is float[n, 4]"),
    "call with too many inputs": ("call(%s, graph", "call(%s, %w, graph", "takes 1"),
    "label taken": ('label = "first"', 'label = "w"', "main.y: label w is taken"),
    "labels of two repeats": (
        "    return %z\n",
        '    %zz = repeat(%z, %w, bodies = (("body", 1),), carried = 1) : float[n, 4]\n    return %zz\n',
        "main.zz: label layers is taken by another repeat",
    ),
    "no runs": ('bodies = (("body", 2),)', "bodies = ()", "main.z: its bodies are ()"),
    "malformed run": ('"body", 2', '"body", 0', "main.z: its run is ('body', 0), not (graph, times)"),
    "carried": ("carried = 1", "carried = 2", "main.z: it carries 2 values, body body gives 1"),
    "repeat's inputs": ("repeat(%y, %w,", "repeat(%y,", "main.z: it passes 1 inputs, body body takes 2"),
    "recursion": ('graph = "layer", label = "layers"', 'graph = "main", label = "layers"', "it runs itself"),
    "missing type": ("-1) : float[n, 4]", "-1)", "main.s: it has no type"),
    "wrong type": ("-1) : float[n, 4]", "-1) : int[n]", "main.s: its type is int[n], but float[n, 4]"),
    "types that do not fit": ("matmul(%x, %w)", "matmul(%w, %x)", "types do not fit: main.h"),
}  # fmt: skip


def test_a_good_program_passes() -> None:
    verify(parse_program(GOOD), "shapes")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_is_found(name: str) -> None:
    old, new, message = BROKEN[name]
    assert GOOD.count(old) == 1
    with pytest.raises(CompilerBug, match=re.escape(message)) as caught:
        verify(parse_program(GOOD.replace(old, new)), "plan")
    assert str(caught.value).startswith("after plan: ")


def test_types_may_be_missing_before_shapes_only() -> None:
    untyped = parse_program(GOOD.replace("axis = -1) : float[n, 4]", "axis = -1)"))
    verify(untyped, "elaborate")
    verify(infer_shapes(untyped), "shapes")


def test_attributes_in_disorder() -> None:
    program = parse_program(GOOD)
    main = program["main"]
    nodes = [replace(n, attributes=n.attributes[::-1]) if n.op == "weight" else n for n in main.nodes]
    broken = program.with_graphs([replace(main, nodes=tuple(nodes)), *program.graphs[1:]])
    with pytest.raises(CompilerBug, match="are not sorted"):
        verify(broken, "plan")
