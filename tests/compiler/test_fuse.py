"""The pass `fuse`: which operations become a group, and that program and gradients stay what they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.cpp.rows import EXPRESSIONS
from fastgrad_compiler.ir.graph import FUSED, Program
from fastgrad_compiler.ir.rows import ELEMENTWISE
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.passes.backward import derive_gradient
from fastgrad_compiler.passes.fuse import fuse_rows
from fastgrad_compiler.reference.interpret import run, run_gradient
from tests.compiler.gradients import program_of

X = "float[b, n, 8]"
HEAD = f"%x = input() : {X}\n    %y = input() : {X}\n    %w = input() : float[8]\n    %e = input() : float[b, n, 1]"


def text(*lines: str, result: str = "z") -> str:
    body = "\n    ".join([HEAD, *lines, f"return %{result}"])
    return f"program p\nmain main\n\ngraph main {{\n    {body}\n}}\n"


def groups(program: Program) -> list[list[str]]:
    """The operations of each group."""
    bodies = [g for g in program.graphs if FUSED in g.name and not g.name.endswith(".backward")]
    return [[n.op for n in g.nodes if n.op not in ("input", "constant")] for g in bodies]


CASES: dict[str, tuple[tuple[str, ...], list[list[str]]]] = {
    "a gate": (("%s = silu(%x)", "%z = mul(%s, %y)"), [["silu", "mul"]]),
    "a norm": (("%z = rms_norm(%x, %w, eps = 1e-06)",), [["rms_norm"]]),
    "a residual sum and a norm": (
        ("%s = add(%x, %y)", "%z = rms_norm(%s, %w, eps = 1e-05)"), [["add", "rms_norm"]],
    ),
    "one weight in two places": (("%z = layer_norm(%x, %w, %w, eps = 1e-05)",), []),  # its gradient is a sum of two
    "one operation": (("%z = exp(%x)",), []),
    "numbers of each row": (("%s = mul(%x, %e)", "%z = div(%s, %e)"), [["mul", "div"]]),
    "a mean of a row": (
        ("%s = mean(%x, axes = (-1,), keepdim = true)", "%z = sub(%x, %s)"), [["mean", "sub"]],
    ),
    "a mean of a batch": (("%s = mean(%x, axes = (-3,), keepdim = true)", "%z = sub(%x, %s)"), []),
    "a constant": (("%c = constant(value = 0.5)", "%s = mul(%x, %c)", "%z = exp(%s)"), [["mul", "exp"]]),
    "around a product": (
        ("%s = silu(%x)", "%t = mul(%s, %w)", "%p = permute(%y, axes = (0, 2, 1))", "%q = matmul(%t, %p)",
         "%m = matmul(%q, %y)", "%u = mul(%t, %m)", "%z = exp(%u)"),
        [["silu", "mul"], ["mul", "exp"]],  # not one, which would run before and after the product
    ),
    "before and after a product": (
        ("%s = silu(%x)", "%t = mul(%s, %w)", "%p = permute(%y, axes = (0, 2, 1))", "%q = matmul(%t, %p)",
         "%m = matmul(%q, %y)", "%u = mul(%x, %m)", "%z = exp(%u)"),
        [["silu", "mul"], ["mul", "exp"]],
    ),
    "what no kernel does": (("%s = erf(%x)", "%z = mul(%s, %y)"), []),
}  # fmt: skip


def drawn(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 5, 8), (2, 5, 8), (8,), (2, 5, 1))
    return [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in shapes]


def stays(program: Program) -> Program:
    """The program with its groups, after a comparison of results and gradients."""
    fused = fuse_rows(program)
    verify(fused, "fuse")
    assert print_program(parse_program(print_program(fused))) == print_program(fused)
    inputs = drawn()
    expected, found = run(program, inputs, {}), run(fused, inputs, {})
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    one, _ = run_gradient(derive_gradient(program), inputs, {}, [cotangent])
    other, _ = run_gradient(derive_gradient(fused), inputs, {}, [cotangent])
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-10, atol=1e-10)
    return fused


@pytest.mark.parametrize(("lines", "expected"), CASES.values(), ids=CASES.keys())
def test_groups(lines: tuple[str, ...], expected: list[list[str]]) -> None:
    assert groups(stays(program_of(text(*lines)))) == expected


@settings(max_examples=40)
@given(st.data())
def test_random_programs_stay_what_they_are(data: st.DataObject) -> None:
    values, lines = ["x", "y", "w", "e"], list[str]()
    rows = ["x", "y"]
    for i in range(data.draw(st.integers(2, 9))):
        op = data.draw(
            st.sampled_from(("add", "sub", "mul", "sigmoid", "silu", "neg", "mean", "rms_norm", "permuted"))
        )
        one, other = data.draw(st.sampled_from(rows)), data.draw(st.sampled_from(values))
        if op == "permuted":
            lines += [
                f"%p{i} = permute(%{one}, axes = (1, 0, 2))",
                f"%v{i} = permute(%p{i}, axes = (1, 0, 2))",
            ]
        elif op == "mean":
            lines.append(f"%v{i} = mean(%{one}, axes = (-1,), keepdim = true)")
        elif op == "rms_norm":
            lines.append(f"%v{i} = rms_norm(%{one}, %w, eps = 1e-06)")
        else:
            given = f"%{one}, %{other}" if op in ("add", "sub", "mul") else f"%{one}"
            lines.append(f"%v{i} = {op}({given})")
        values.append(f"v{i}")
        if op != "mean":
            rows.append(f"v{i}")
    stays(program_of(text(*lines, f"%z = mul(%{rows[-1]}, %{values[-1]})")))


@pytest.mark.medium
def test_stages_show_the_groups_of_targets_with_kernels() -> None:
    for target, there in (("cpp", True), ("auto", True), ("torch", False), ("triton", False)):
        compiled = fg.compile("examples/gpt.tfg", params={"depth": 1}, target=target)
        names = [graph.name for graph in compiled.program.graphs if FUSED in graph.name]
        assert ("std.swiglu@fused" in names) == there
        assert ("std.swiglu@fused.backward" in names) == there
        assert any(name.startswith("rows_") for name in compiled.files) == there
        assert ("@row_kernel" in compiled.modules["model.py"]) == there


def test_step_forms_have_no_groups() -> None:
    program = fg.compile("examples/gpt.tfg", params={"depth": 1}, target="cpp").program
    steps = [graph for graph in program.graphs if graph.name.endswith("@step")]
    assert steps
    assert not any(node.is_fused for graph in steps for node in graph.nodes)


def test_a_kernel_has_code_for_each_operation_of_a_group() -> None:
    assert set(ELEMENTWISE) < set(EXPRESSIONS)
