"""Flattening: paths, repeats, several results, backward graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad_compiler.ir.flatten import flatten, weights
from fastgrad_compiler.ir.graph import Graph
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program, print_graph
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.reference.interpret import run

DEEP = infer_shapes(
    parse_program("""
graph main {
    %x = input() : float[n, 4]
    %w = weight(init = ("zeros",), label = "w") : float[4, 4]
    %y = repeat(%x, %w, bodies = (("main.i", 2), ("main.i_2", 1)), carried = 1)
    %pair = call(%y, graph = "two", label = "split")
    %_item = item(%pair, index = 1)
    %_item_2 = item(%pair, index = 0)
    %z = add(%_item, %_item_2)
    return %z
}
graph main.i {
    %x = input() : float[n, 4]
    %w = input() : float[4, 4]
    %v = weight(init = ("ones",), label = "v") : float[4]
    %x_2 = matmul(%x, %w)
    %x_3 = call(%x_2, %v, graph = "layer", label = "layers")
    return %x_3
}
graph main.i_2 {
    %x = input() : float[n, 4]
    %w = input() : float[4, 4]
    %v = weight(init = ("ones",), label = "v") : float[4]
    %x_2 = matmul(%x, %w)
    %x_3 = mul(%x_2, %v)
    return %x_3
}
graph layer {
    %x = input() : float[n, 4]
    %v = input() : float[4]
    %b = weight(init = ("zeros",), label = "b") : float[4]
    %x_2 = mul(%x, %v)
    %x_3 = add(%x_2, %b)
    return %x_3
}
graph two {
    %x = input() : float[n, 4]
    %y = exp(%x)
    return %x, %y
}
""")
)


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(
            [d.evaluate({}) for d in node.tensor.shape], generator=generator, dtype=torch.float64
        )
        for path, node in weights(DEEP)
    }


def test_paths_of_weights() -> None:
    assert [path for path, _ in weights(DEEP)] == ["w", "v.0", "layers.0.b", "v.1", "layers.1.b", "v.2"]


def test_flat_graph() -> None:
    assert (
        print_graph(flatten(DEEP))
        == """\
graph main {
    %x = input() : float[n, 4]
    %w = weight(init = ("zeros",), label = "w") : float[4, 4]
    %v.0 = weight(init = ("ones",), label = "v.0") : float[4]
    %x_2.0 = matmul(%x, %w) : float[n, 4]
    %layers.0.b = weight(init = ("zeros",), label = "layers.0.b") : float[4]
    %layers.0.x_2 = mul(%x_2.0, %v.0) : float[n, 4]
    %layers.0.x_3 = add(%layers.0.x_2, %layers.0.b) : float[n, 4]
    %v.1 = weight(init = ("ones",), label = "v.1") : float[4]
    %x_2.1 = matmul(%layers.0.x_3, %w) : float[n, 4]
    %layers.1.b = weight(init = ("zeros",), label = "layers.1.b") : float[4]
    %layers.1.x_2 = mul(%x_2.1, %v.1) : float[n, 4]
    %layers.1.x_3 = add(%layers.1.x_2, %layers.1.b) : float[n, 4]
    %v.2 = weight(init = ("ones",), label = "v.2") : float[4]
    %x_2.2 = matmul(%layers.1.x_3, %w) : float[n, 4]
    %x_3.2 = mul(%x_2.2, %v.2) : float[n, 4]
    %split.y = exp(%x_3.2) : float[n, 4]
    %z = add(%split.y, %x_3.2) : float[n, 4]
    return %z
}"""
    )


def as_program(graph: Graph):  # type: ignore[no-untyped-def]  # a Program of one graph
    return DEEP.with_graphs([graph])


def test_flat_graph_computes_the_same() -> None:
    x, given = torch.randn(3, 4, dtype=torch.float64), random_weights()
    flat = as_program(flatten(DEEP))
    verify(flat, "flatten")
    torch.testing.assert_close(run(flat, [x], given), run(DEEP, [x], given), rtol=0, atol=0)


def test_flat_gradient_computes_the_same() -> None:
    program = derive_gradient(DEEP)
    assert program.gradient is not None
    inputs, given = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)], random_weights()
    flat = flatten(program, program.gradient)
    labels = [node["label"] for node in flat.nodes if node.op == "weight_gradient"]
    assert sorted(map(str, labels)) == sorted(given)
    found = run(program.with_graphs([flat]), inputs, given, graph=program.gradient)
    torch.testing.assert_close(found, run(program, inputs, given, graph=program.gradient))
