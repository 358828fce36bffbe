"""What rests on the user's word says so, through every operation; what does not say so holds where it is false."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Bound, Graph, Node, Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.pipeline import run as compiled
from fastgrad_compiler.reference.interpret import run
from fastgrad_grammar.source import Source

PROGRAMS = 250
UNARY = ("tanh", "neg", "abs", "exp", "relu", "sigmoid", "silu", "softplus", "unit", "softmax")
BINARY = ("add", "sub", "mul", "div", "minimum", "maximum")
SLACK = 1e-9


def written(random: np.random.Generator) -> str:
    """A graph of matrices [4, 4] and columns [4, 1], some of which the user vouches for."""
    lines = ["%x = input() : float[4, 4]", "%z = input() : float[4, 4]", "%c = input() : float[4, 1]"]
    lines += ["%two = constant(value = 2.0)", "%u = unit(%x)", "%half = constant(value = -0.5)"]
    known = ["x", "z", "u", "u"]
    others = ["c", "two", "half"]

    def put(text: str, column: bool = False) -> None:
        name = f"t{len(lines)}"
        lines.append(f"%{name} = {text}")
        (others if column else known).append(name)

    for _ in range(int(random.integers(4, 14))):
        left, right = str(random.choice(known)), str(random.choice([*known, *others]))
        column = str(random.choice(others))
        kind = int(random.integers(9))
        if kind <= 1:
            put(f"assume_bound(%{left}, bound = {random.choice([0.25, 1.5, 4.0])})")
        elif kind == 2 and column == "c":
            put(f"assume_bound(%{column}, bound = {random.choice([0.25, 2.0])})", column=True)
        elif kind <= 4:
            put(
                f"{random.choice(UNARY)}(%{left}".replace(
                    "softmax(%" + left, "softmax(%" + left + ", axis = -1"
                )
                + ")"
            )
        elif kind == 5:
            put(
                f"clamp(%{left}, low = {random.choice([-3.0, -0.5, 0.1])}, high = {random.choice([0.5, 1.0, 5.0])})"
            )
        elif kind == 6:
            put(f"matmul(%{left}, %{random.choice(known)!s})")
        elif kind == 7:
            put(f"amax(%{left}, axes = (-1,), keepdim = true)", column=True)
        else:
            pair = (left, right) if random.random() < 0.7 else (right, left)
            put(f"{random.choice(BINARY)}(%{pair[0]}, %{pair[1]})")
    return "graph main {\n" + "\n".join(lines) + f"\nreturn %{known[-1]}\n}}\n"


def values(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every node."""
    graph = program["main"]
    names = [node.name for node in graph.nodes if node.op != "input"]
    watched = Graph(graph.name, graph.nodes, tuple(names), graph.block)
    found = run(program.with_graphs([watched]), inputs, {}, dtype=torch.float64)
    assert isinstance(found, tuple)
    return inputs | dict(zip(names, found, strict=True))


def holds(bound: Bound, value: Tensor) -> bool:
    if not torch.isfinite(value).all():
        return True  # arithmetic of reals says nothing of what overflows
    slack = SLACK * (1 + value.abs().max().item())
    rows = value.norm(dim=-1).max().item() if value.ndim else value.abs().item()
    return bool(
        value.min() >= bound.low - slack
        and value.max() <= bound.high + slack
        and rows <= bound.norm + 4 * slack
    )


def true_of(program: Program, found: dict[str, Tensor]) -> bool:
    """Whether the user's word is kept."""
    return all(
        found[node.inputs[0]].abs().max().item() <= float(str(node["bound"]))
        for node in program["main"].nodes
        if node.op == "assume_bound"
    )


@pytest.mark.medium
def test_what_is_not_asserted_holds_where_every_word_is_false() -> None:
    counts = Counter[str]()
    for seed in range(PROGRAMS):
        random = np.random.default_rng(seed)
        text = written(random)
        program = prove_bounds(infer_shapes(parse_program(text)))
        for size in (0.05, 1.0, 30.0):
            inputs = {
                name: torch.from_numpy(size * random.standard_normal(shape))
                for name, shape in (("x", (4, 4)), ("z", (4, 4)), ("c", (4, 1)))
            }
            found = values(program, inputs)
            kept = true_of(program, found)
            counts["kept" if kept else "broken"] += 1
            for node in program["main"].nodes:
                bound = node.bound
                if bound is None or (bound.asserted and not kept):
                    continue
                counts["asserted" if bound.asserted else "proved"] += 1
                assert holds(bound, found[node.name]), f"seed {seed}, {node.name} in {bound}:\n{text}"
    assert min(counts.values()) >= PROGRAMS // 4, counts


TWO = """
%x = input() : float[4, 4]
%a = assume_bound(%x, bound = 2.0)
%b = assume_bound(%x, bound = 3.0)
%low = constant(value = -1.0)
%one = constant(value = 1.0)
%u = unit(%x)
%t = tanh(%x)
"""


@pytest.mark.parametrize(
    ("steps", "asserted"),
    [
        ("%y = minimum(%a, %b)", True),
        ("%y = minimum(%a, %t)", True),  # its lower end
        ("%m = minimum(%a, %t)\n%y = maximum(%m, %low)", False),
        ("%y = mul(%u, %a)", True),
        ("%y = mul(%a, %b)", True),
        ("%y = div(%u, %a)", False),  # of which nothing is known
        ("%s = sub(%a, %low)\n%p = add(%s, %b)\n%e = exp(%p)\n%y = div(%u, %e)", True),
        ("%y = tanh(%a)", True),
        ("%l = log(%a)\n%m = log(%b)\n%y = minimum(%l, %m)", True),  # either would do
        ("%l = log(%a)\n%y = minimum(%l, %l)", True),
        ("%y = unit(%a)", False),
        ("%y = clamp(%a, low = -1.0, high = 1.0)", False),
        ("%y = clamp(%a, low = -5.0, high = 5.0)", True),
        ("%y = assume_bound(%t, bound = 1.5)", False),
        ("%y = where(%c, %a, %t)", True),
        ("%y = where(%c, %u, %t)", False),
    ],
)
def test_assertion_passes_on_where_it_adds_something(steps: str, asserted: bool) -> None:
    body = f"{TWO}%c = less(%x, %one)\n{steps}\nreturn %y"
    bound = prove_bounds(infer_shapes(parse_program(f"graph main {{{body}\n}}\n")))["main"]["y"].bound
    assert (bound is not None and bound.asserted) is asserted
    if bound is not None and asserted:
        assert any("assume_bound" in line or "assumed in the file" in line for line in bound.proof)


CALLS = """
graph main {
    %x = input() : float[2, 8]
    %q = unit(%x)
    %a = assume_bound(%x, bound = 0.5)
    %y = call(%FIRST, graph = "same", label = "first") : float[2, 8]
    %z = call(%SECOND, graph = "same", label = "second") : float[2, 8]
    %r = repeat(%z, bodies = (("same", 3),), carried = 1) : float[2, 8]
    return %r
}
graph same {
    %v = input() : float[2, 8]
    %w = neg(%v)
    return %w
}
"""


@pytest.mark.parametrize(
    ("first", "second", "asserted"), [("q", "a", True), ("a", "q", True), ("q", "q", False)]
)
def test_what_one_call_asserts_is_asserted_of_the_block(first: str, second: str, asserted: bool) -> None:
    text = CALLS.replace("FIRST", first).replace("SECOND", second)
    program = prove_bounds(infer_shapes(parse_program(text)))
    inside, after = program["same"]["w"].bound, program["main"]["r"].bound
    assert inside is not None
    assert inside.asserted is asserted
    assert after is not None
    assert after.asserted is (second == "a")
    assert all(any("assum" in line for line in each.proof) is each.asserted for each in (inside, after))


# ---------------------------------------------------------------- attention


def attention(scores: str, budget: str = 'at "*" degree = 2') -> Program:
    """After the plan."""
    text = f"""
dim b
dim n
model m(x: float[b, n, 8]) -> float[b, n, 8] {{
    weight tau: float[] = ones()
    {scores}
}}
budget {{
    {budget}
}}
"""
    return compiled(elaborate(Source("m.tfg", text)), until="plan")[-1].program


def only(program: Program) -> Node:
    (entry,) = attention_table(program)
    return entry.node


UNIT = "unit(x) @ unit(x).T"
GAINS = {
    "a gain": (f"({UNIT}) * (0.5 * assume_bound(tau; bound = 2.0))", 1.0, True),
    "a divisor": (f"({UNIT}) / (assume_bound(tau; bound = 2.0) + 3.0)", 1.0, True),
    "two gains, one asserted": (f"(({UNIT}) * tanh(tau)) * assume_bound(tau; bound = 2.0)", 2.0, True),
    "a gain before the mask": (f"({UNIT}) * (assume_bound(tau; bound = 1.0) + 2.0)", 3.0, True),
    "a gain of the queries": ("(unit(x) * assume_bound(tau; bound = 2.0)) @ unit(x).T", 2.0, True),
    "a word that adds nothing": (f"({UNIT}) * assume_bound(2.0 * tanh(tau); bound = 3.0)", 2.0, False),
    "the product of norm and word": (f"assume_bound({UNIT}; bound = 1.0) * (2.0 * sigmoid(tau))", 2.0, False),
}


@pytest.mark.parametrize(("scores", "bound", "asserted"), GAINS.values(), ids=GAINS)
def test_range_that_rests_on_a_word_says_so(scores: str, bound: float, asserted: bool) -> None:
    node = only(attention(f"return softmax(causal({scores})) @ x"))
    assert node["bound"] == pytest.approx(bound)
    assert node["asserted"] is asserted
    proof = node["proof"]
    assert isinstance(proof, tuple)
    assert any("assumed in the file" in str(line) for line in proof) is asserted


@pytest.mark.parametrize(
    ("scores", "asserted"), [(scores, asserted) for scores, _, asserted in GAINS.values()]
)
def test_certified_trust_counts_no_word(scores: str, asserted: bool) -> None:
    """Neither a limit nor a pin makes a polynomial of it; what is proved anyway serves."""
    body = f"return softmax(causal({scores})) @ x"
    node = only(attention(body, "output <= 0.5\n    trust = certified"))
    assert node["asserted"] is False
    if asserted:
        assert (node["decision"], node["bound"]) == ("exact", None)
        assert "`trust = certified` does not count what assume_bound says (m.tfg:6)" in str(node["why"])
    else:
        assert node["decision"] == "polynomial"


def test_certified_trust_takes_the_proof_where_the_word_is_narrower() -> None:
    body = f"return softmax(assume_bound(2.0 * ({UNIT}); bound = 0.5)) @ x"
    assert (only(attention(body))["bound"], only(attention(body))["asserted"]) == (0.5, True)
    certified = only(attention(body, 'at "*" degree = 2\n    trust = certified'))
    assert (certified["bound"], certified["asserted"]) == (2.0, False)
