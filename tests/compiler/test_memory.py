"""The budget `memory`: what a step holds, the plans that hold less, the pass, its refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product
from math import inf

import pytest

from fastgrad_compiler.codegen.torch import emit_package
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning import activations
from fastgrad_compiler.planning.activations import ALWAYS, DECLINED, KEEPS, NOTHING_KEPT, VIEWS
from fastgrad_compiler.planning.memory import Search, in_bytes, recomputed
from fastgrad_compiler.planning.pieces import in_pieces, lengths, no_pieces
from fastgrad_compiler.runtime import linear_loss
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source
from tests.grids import wide

DEEP = """
use std
dim b
dim n <= 4096
block mlp(x: float[b, n, d]) -> float[b, n, d] {
    weight w: float[d, 4 * d] = normal(std = 0.1)
    weight v: float[4 * d, d] = normal(std = 0.1)
    return gelu(x @ w) @ v
}
block layer(x: float[b, n, d]) -> float[b, n, d] {
    x = x + std.mixer(std.rms_norm(x); heads = 2, near = 16)
    return x + mlp(x)
}
model m(x: float[b, n, 16]) -> float[b, n, 16] {
    repeat i in 4 { x = layer(x) as layers }
    return x
}
objective loss(y: float[b, n, 16], t: float[b, n, 16]) = mse(y, t)
"""

ATTEND = """block attend(x: float[b, n, d]) -> float[b, n, d] {
    s = assume_bound(causal(x @ x.T); bound = 2.0)
    return softmax(s) @ x
}
"""


def planned(
    text: str, memory: float | None = None, dims: dict[str, int] | None = None, target: str = "torch"
) -> Program:
    """The program after the last pass, under a budget of so many bytes."""
    budget = "" if memory is None else f"\nbudget {{\n    memory <= {memory!r}\n}}\n"
    return run(elaborate(Source("<text>", text + budget, ())), target=target, dims=dims, validate=False)[
        -1
    ].program


def test_chunks_of_a_loss_are_those_that_run() -> None:
    assert activations.LEAST_ENTRIES == linear_loss.LEAST_ENTRIES


def test_every_operation_has_a_rule() -> None:
    known = [*KEEPS, *NOTHING_KEPT, *VIEWS, *DECLINED]
    assert len(known) == len(set(known))
    assert set(known) == set(OPS)


def test_plan_is_the_first_that_fits() -> None:
    search = Search(planned(DEEP), {"b": 1, "n": 4096})
    options = search.options()
    assert len(options) > 5
    assert options[0].held.again == 0
    for before, option in pairwise(options):
        assert option.held.again >= before.held.again
        assert option.held.peak < before.held.peak
        program = planned(DEEP, memory=option.held.peak)
        held = search.held(recomputed(program))
        assert held.peak <= option.held.peak
        assert held.again == option.held.again
        assert program.memory is not None
        assert program.memory.piece is None


def test_the_bound_holds_of_every_plan() -> None:
    """All decisions on the calls of a small model, none of which beats the bound; the search is near the best."""
    text = DEEP.replace(
        "repeat i in 4 { x = layer(x) as layers }", "repeat i in 2 { x = layer(x) as layers }"
    )
    program = planned(text)
    search = Search(program, {"b": 1, "n": 512})
    sites = [
        (graph.name, node.name)
        for graph in program.graphs
        if graph.name in ("m", "m.i", "layer")
        for node in graph.nodes
        if node.op == "call" and search._pays(node)
    ]
    assert len(sites) == 4
    counts = [(0, 1, ALWAYS) if graph == "m.i" else (0, ALWAYS) for graph, _ in sites]
    decided = [
        {site: times for site, times in zip(sites, chosen, strict=True) if times}
        for chosen in product(*counts)
    ]
    every = [search.held(each) for each in decided]
    for held in every:
        assert held.again >= search.least_again(held.peak) * (1 - 1e-12)
    once = [search.held(each) for each in decided if len({graph == "m.i" for graph, _ in each}) < 2]
    for limit in sorted(
        {held.peak for held in once}
    ):  # the search makes nothing again within what is made again
        best = min(held.again for held in once if held.peak <= limit)
        found = min((o.held.again for o in search.options() if o.held.peak <= limit * 1.0001), default=inf)
        assert search.time(found) <= 1.03 * search.time(best)


def test_bound_of_what_cannot_be() -> None:
    search = Search(planned(DEEP), {"b": 1, "n": 4096})
    assert search.least_again(1.0) == inf
    assert search.least_again(1e12) == 0


def test_pieces_where_nothing_else_fits() -> None:
    program = planned(DEEP)
    sizes = {"b": 1, "n": 4096}
    least = Search(program, sizes).options()[-1].held.peak
    found = list(lengths(program, sizes))
    assert found == [2048, 1024, 512, 256, 128, 64, 32, 16]
    limit = in_pieces(program, sizes, 256).peak
    assert limit < least
    memory = planned(DEEP, memory=limit).memory
    assert memory is not None
    assert memory.piece == 256
    assert dict(memory.sizes) == sizes


def test_text_form() -> None:
    for limit in (1e7, 4e6):
        program = planned(DEEP, memory=limit)
        assert program.memory is not None
        text = print_program(program)
        assert "memory(b = 1, n = 4096)" in text
        assert parse_program(text) == program


def test_code() -> None:
    program = planned(DEEP, memory=1e7)
    decided = recomputed(program)
    assert decided
    code = emit_package(program, source="m.tfg")["model.py"]
    assert len(re.findall(r"\brecomputed\(", code)) >= 1
    times = next((times for (graph, _), times in decided.items() if graph == "m.i"), None)
    if times not in (None, ALWAYS):
        assert f"recomputed(self.layers[i], x, when=i < {times})" in code
    step = code[code.index("def step(") :]
    assert "recomputed" not in step.partition("def forward")[0]


@pytest.mark.parametrize("spec", wide(("plain", "once", "twice", "encoder"), few=["twice"]))
def test_every_limit_is_kept_or_refused(spec: str) -> None:
    """By the model, of programs of several forms; and the refusal names what the next larger budget is."""
    body = {
        "plain": "x = mlp(x)\n    x = layer(x)",
        "once": "repeat i in 1 { x = layer(x) as layers }",
        "twice": "x = mlp(x)\n    repeat i in 3 { x = layer(mlp(x) as first) as layers }",
        "encoder": "h = softmax(x @ x.T) @ x\n    repeat i in 2 { x = layer(x + h) as layers }",
    }[spec]
    text = DEEP.replace("repeat i in 4 { x = layer(x) as layers }", body)
    search = Search(planned(text), {"b": 1, "n": 256})
    largest = search.held({}).peak
    for share in (2.0, 1.0, 0.7, 0.5, 0.3, 0.1, 0.01, 1e-9):
        limit = share * largest
        try:
            program = planned(text, memory=limit, dims={"n": 256})
        except TfgError as error:
            (diagnostic,) = error.diagnostics
            assert diagnostic.code == "FG314"
            (larger,) = (float(h.rpartition(" ")[2]) for h in diagnostic.help if "a larger budget" in h)
            assert planned(text, memory=larger, dims={"n": 256}).memory is not None
            continue
        assert program.memory is not None
        held = search.held(recomputed(program)).peak
        if program.memory.piece is not None:
            held = in_pieces(program, dict(program.memory.sizes), program.memory.piece).peak
        assert held <= limit
        if share >= 1:
            assert not recomputed(program)


def test_no_pieces_is_said() -> None:
    text = DEEP.replace("repeat i in 4 { x = layer(x) as layers }", "x = softmax(x @ x.T) @ layer(x)")
    assert no_pieces(planned(text)) is not None
    with pytest.raises(TfgError) as caught:
        planned(text, memory=10.0)
    (diagnostic,) = caught.value.diagnostics
    assert any("cannot run in pieces" in line for line in diagnostic.help)


def test_guards_that_act_run_no_pieces() -> None:
    text = DEEP.replace(
        "std.mixer(std.rms_norm(x); heads = 2, near = 16)",
        "attend(std.rms_norm(x))",
    ).replace("block layer(", ATTEND + "block layer(")
    for policy in ("warn", "exact"):
        program = planned(text + f'\nbudget {{\n    at "*" degree = 2\n    on_violation = {policy}\n}}\n')
        found = no_pieces(program)
        assert found is None if policy == "warn" else "on_violation = exact" in str(found)
    assert no_pieces(replace(program, objective=None)) == "the file has no objective"


def test_sizes() -> None:
    open_ended = DEEP.replace("dim n <= 4096", "dim n")
    with pytest.raises(TfgError) as caught:
        planned(open_ended, memory=1e9)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FG313"
    assert planned(open_ended, memory=1e9, dims={"n": 64}).memory is not None
    for dims, said in (({"k": 2}, "no dim k"), ({"n": 8192}, "at most 4096"), ({"n": 0}, "at least 1")):
        with pytest.raises(TfgError, match=said):
            planned(DEEP, memory=1e9, dims=dims)
    one = planned(DEEP, memory=1e9, dims={"n": 1, "b": 3}).memory
    assert one is not None
    assert dict(one.sizes) == {"b": 3, "n": 1}


def test_in_bytes() -> None:
    assert [in_bytes(x) for x in (3.0, 2345.0, 1e6, 1.234e9)] == ["3 bytes", "2.35 kB", "1 MB", "1.23 GB"]


def test_limit_of_the_budget() -> None:
    for value in ("0", "-1", '"much"'):
        with pytest.raises(TfgError) as caught:
            elaborate(Source("<text>", DEEP + f"\nbudget {{\n    memory <= {value}\n}}\n", ()))
        assert caught.value.diagnostics[0].code == "FG233"
