"""Translation validation: it finds every fault that is put into recognition, and nothing where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from fastgrad_compiler import pipeline
from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.calls import runs
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.pipeline import Pass, run
from fastgrad_compiler.reference.oracle_attention import Array
from fastgrad_compiler.validation import cases
from fastgrad_compiler.validation.shrink import ENTRIES, fits
from fastgrad_compiler.validation.validate import Checked, Difference, compare, validate
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from tests.calibration.random_specs import random_spec

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.tfg"))

SPEC = """
use std
dim b
dim n <= 4096
dim m
model m(x: float[b, n, 8], y: float[b, m, 8], mask: bool[b, n], ids: int[b, n], length: int[b])
    -> float[b, {tokens}, {width}] {{
    weight wq: float[8, 8]
    weight wk: float[8, 8]
    weight tau: float[]
    q = x @ wq
    k = x @ wk
    v = x
    s = q @ k.T
    u = unit(q) @ unit(k).T
    qs = split_heads(q; 4)
    ks = split_heads(k; 4)
    vs = split_heads(v; 4)
    ss = qs @ ks.T
    gates = log_sigmoid((x @ wq)[.., 0:4].T)
    gate = log_sigmoid((x @ wq)[.., 0])
    z = {expression}
    {end}
}}
"""


def spec(expression: str, tokens: str = "n", width: int = 8, end: str = "return z") -> Program:
    return elaborate(
        Source("<text>", SPEC.format(expression=expression, tokens=tokens, width=width, end=end))
    )


def proved(program: Program) -> Program:
    """As recognition is given it."""
    return prove_bounds(infer_shapes(program))


# ---------------------------------------------------------------- no false alarm

HEADS = "merge_heads(softmax({}) @ vs)"
FORMS = {
    "plain": "softmax(s) @ v",
    "scaled": "softmax((0.25 * q) @ (k / 2.0).T * -3.0) @ v",
    "shifted": "softmax(causal(s - max(s; axis = -1, keepdim = true))) @ v",
    "exp over its sum": "(exp(s) / sum(exp(s); axis = -1, keepdim = true)) @ v",
    "divided late": "(exp(causal(s)) @ v) / sum(exp(causal(s)); axis = -1, keepdim = true)",
    "a hidden row is 0 / 0": "(exp(padding(s, mask)) / sum(exp(padding(s, mask)); axis = -1, keepdim = true)) @ v",
    "a shift of a hidden row": "softmax(padding(s, mask) - max(padding(s, mask); axis = -1, keepdim = true)) @ v",
    "clamp of unit rows": "softmax(causal(clamp(u; -1.0, 1.0))) @ v",
    "gain": "softmax(causal(s * exp(tau))) @ v",
    "divisor": "softmax(s / (1.0 + sigmoid(tau))) @ v",
    "transposed": "(v.T @ softmax(s).T).T",
    "over queries": "softmax(k @ q.T, axis = -2).T @ v",
    "cross": "softmax(q @ y.T) @ y",
    "window": "softmax(window(causal(s); 16)) @ v",
    "two windows": "softmax(window(window(s; 70); 20)) @ v",
    "near": "softmax(causal(near_far(s, u; 8))) @ v",
    "near, documents": "softmax(causal(documents(near_far(s, u; 4), ids))) @ v",
    "padding": HEADS.format("padding(ss * 0.5, mask)"),
    "padding, window": HEADS.format("window(padding(ss, mask); 9)"),
    "alibi": HEADS.format("causal(alibi(ss))"),
    "documents": HEADS.format("documents(ss, ids)"),
    "prefix": HEADS.format("prefix(ss, length)"),
    "prefix in a window with padding": "softmax(window(prefix(padding(s, mask), length); 3)) @ v",
    "prefix of near and far with documents": "softmax(prefix(documents(near_far(s, u; 2), ids), length)) @ v",
    "prefix of a causal attention": "softmax(causal(prefix(s, length))) @ v",
    "prefix, own": "normalize_rows(prefix(polynomial(s; (1.0, 1.0, 0.5)), length)) @ v",
    "grouped": "merge_heads(softmax(qs @ repeat_heads(split_heads(k[.., 0:4]; 2); 2).T) @ repeat_heads(split_heads("
    "v[.., 0:4]; 2); 2))",
    "forget": HEADS.format("causal(forget(ss, gates))"),
    "forget outside, with window and documents": HEADS.format(
        "forget(window(documents(causal(ss), ids); 9), gates)"
    ),
    "forget, with padding, over its sum": "(exp(padding(causal(forget(s, gate)), mask)) @ v)"
    " / sum(exp(padding(causal(forget(s, gate)), mask)); axis = -1, keepdim = true)",
    "forget, near": "softmax(causal(forget(near_far(s, u; 8), gate))) @ v",
    "forget, prefix": "softmax(causal(prefix(forget(u, gate), length))) @ v",
    "forget, grouped": "merge_heads(softmax(causal(forget(qs @ repeat_heads(ks[:, 0:2], 2).T, squeeze(log_sigmoid("
    "repeat_heads(unsqueeze((x @ wq).T[:, 0:2], -1), 2)), -1)))) @ repeat_heads(vs[:, 0:2], 2))",
    "forget, grouped keys": "merge_heads(softmax(causal(forget(qs @ repeat_heads(ks[:, 0:2], 2).T, gates)))"
    " @ repeat_heads(vs[:, 0:2], 2))",
    "forget, one key head": "merge_heads(softmax(causal(forget(qs @ ks[:, 0:1].T, gates))) @ vs[:, 0:1])",
    "exponentials of 0": "normalize_rows(exp(sigmoid(q) @ (-4e5 * sigmoid(k)).T)) @ v",
    "decay": "normalize_rows(decay(causal(exp(s)), gate)) @ v",
    "decay, own": "normalize_rows(decay(causal(polynomial(s; (1.0, 1.0, 0.5))), gate)) @ v",
    "decay, own, near": "normalize_rows(causal(decay(near_far(exp(s), polynomial(u; (1.0, 1.0, 0.5)); 4), gate))) @ v",
    "own": "normalize_rows(causal(polynomial(s; (1.0, 1.0, 0.5)))) @ v",
    "own, even": "normalize_rows(padding(polynomial(s; (0.0, 0.0, 1.0)), mask)) @ v",
    "own, near": "normalize_rows(causal(near_far(exp(s), polynomial(u; (1.0, 1.0, 0.5)); 4))) @ v",
    "assertion": "softmax(causal(assume_bound(s; 1.0))) @ v",
    "wide band": "softmax(window(near_far(s, u; 1000); 3000)) @ v",
    "steep": "softmax(1000.0 * s) @ v",
    "infinite values": "softmax(40.0 * s) @ log(abs(v))",
}
WIDTHS = {"grouped": 8}


def differences(before: Program, after: Program, seed: int = 0) -> list[Difference]:
    found = compare(before, after, recognise_attention, seed)
    return [each for each in found if isinstance(each, Difference)]


def is_recognised(program: Program) -> bool:
    ops = {node.op for graph in program.graphs for node in graph.nodes}
    return bool(ops & {"attention", "poly_attention"})


@pytest.mark.parametrize("seeds", [(0,), pytest.param(range(1, 6), marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_right_is_not_alarming(form: str, seeds: Sequence[int]) -> None:
    """In any spelling, on many inputs: NaN of a hidden row, overflow, bounds that inputs must keep, steep logits."""
    before = proved(spec(FORMS[form]))
    after = recognise_attention(before)
    assert is_recognised(after)
    for seed in seeds:
        assert differences(before, after, seed) == []


@pytest.mark.parametrize(
    "end",
    ["return float(int(100.0 * z))", "return where(z > 0.1, z, -z)", "return softmax(1000.0 * z, axis = -2)"],
)
def test_a_jump_behind_attention_does_not_amplify_rounding(end: str) -> None:
    before = proved(spec(FORMS["scaled"], end=end))
    after = recognise_attention(before)
    assert is_recognised(after)
    for seed in range(6):
        assert differences(before, after, seed) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_attention_of_an_example_is_compared(path: Path) -> None:
    """Each graph that recognition changed, on six runs, and on one that is longer than a near field or window."""
    stages = run(elaborate(read_source(path)), until="attention", validate=False)
    before, after = stages[-2].program, stages[-1].program
    checked = [each for each in compare(before, after, recognise_attention) if isinstance(each, Checked)]
    changed = [graph.name for graph in before.graphs if after[graph.name] != graph]
    assert sorted(each.graph for each in checked) == sorted(changed)
    for each in checked:
        banded = any(n.op == "near_far" or n.op == "window" for n in before[each.graph].nodes)
        assert (each.claims, each.runs) == (1, 6 + banded)
    for seed in (1, 2):
        assert differences(before, after, seed) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int) -> None:
    """All exact passes, the plan with its near fields among them."""
    stages = run(
        elaborate(Source("<text>", random_spec(seed, "calibrated").text)), until="attention", validate=False
    )
    for first, second in pairwise(stages):
        assert differences(first.program, second.program, seed) == []


def test_a_deep_model_is_no_more_work() -> None:
    """A graph is compared once, however often it runs."""
    gpt = read_source(next(path for path in EXAMPLES if path.stem == "bounded"))
    counts = []
    for depth in (1, 96):
        stages = run(elaborate(gpt, params={"depth": depth}), until="attention", validate=False)
        found = compare(stages[-2].program, stages[-1].program)
        counts.append([(each.graph, each.runs) for each in found if isinstance(each, Checked)])
    assert counts[0] == counts[1]


# ---------------------------------------------------------------- faults


def edited(program: Program, edit: Callable[[Node], Node]) -> Program:
    return program.with_graphs(replace(g, nodes=tuple(map(edit, g.nodes))) for g in program.graphs)


def with_values(**values: Attribute) -> Callable[[Program], Program]:
    """Recognition, and then these attributes of every attention."""

    def faulty(program: Program) -> Program:
        return edited(
            recognise_attention(program),
            lambda node: (
                node.with_attributes(**values) if node.op in ("attention", "poly_attention") else node
            ),
        )

    return faulty


def scaled(factor: float) -> Callable[[Program], Program]:
    def edit(node: Node) -> Node:
        return (
            node.with_attributes(scale=factor * float(str(node["scale"]))) if node.op == "attention" else node
        )

    return lambda program: edited(recognise_attention(program), edit)


def without(op: str) -> Callable[[Program], Program]:
    """Recognition that walks through an operation as if it were not there."""

    def skip(graph: Graph) -> Graph:
        inner = {node.name: node.inputs[0] for node in graph.nodes if node.op == op}

        def real(name: str) -> str:
            return real(inner[name]) if name in inner else name

        nodes = (replace(node, inputs=tuple(map(real, node.inputs))) for node in graph.nodes)
        return replace(graph, nodes=tuple(nodes), outputs=tuple(map(real, graph.outputs)))

    return lambda program: recognise_attention(program.with_graphs(map(skip, program.graphs)))


def reordered(*places: int) -> Callable[[Program], Program]:
    """Recognition that takes the operands of an attention in another order, or fewer."""

    def edit(node: Node) -> Node:
        if node.op not in ("attention", "poly_attention"):
            return node
        roles = node["roles"]
        kept = tuple(roles[place - 3] for place in places if place > 2) if isinstance(roles, tuple) else ()
        given = replace(node, inputs=tuple(node.inputs[place] for place in places))
        return given.with_attributes(roles=kept)

    return lambda program: edited(recognise_attention(program), edit)


SHIFT = "{0} - max({0}; axis = -1, keepdim = true)"
FAULTS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "causal dropped": ("softmax(causal(s)) @ v", with_values(causal=False)),
    "causal added": ("softmax(s) @ v", with_values(causal=True)),
    "window ignored": ("softmax(window(s; 16)) @ v", with_values(window=None)),
    "window off by one": ("softmax(window(causal(s); 16)) @ v", with_values(window=17)),
    "wide window ignored": ("softmax(window(s; 3000)) @ v", with_values(window=None)),
    "sign of the scale": ("softmax(causal(s)) @ v", scaled(-1.0)),
    "scale a little off": ("softmax(causal(s)) @ v", scaled(1 + 1e-6)),
    "alibi dropped": (FORMS["alibi"], with_values(alibi=False)),
    "alibi added": (HEADS.format("ss"), with_values(alibi=True)),
    "padding dropped": (FORMS["padding"], reordered(0, 1, 2)),
    "documents dropped": (FORMS["documents"], reordered(0, 1, 2)),
    "forget gate dropped": (FORMS["forget"], reordered(0, 1, 2)),
    "decay dropped": (FORMS["decay, own"], reordered(0, 1, 2)),
    "a factor of a forget gate": ("softmax(causal(forget(s, gate) * 0.5)) @ v", without("mul")),
    "a forget gate in a polynomial": (
        "normalize_rows(decay(causal(polynomial(s; (1.0, 1.0, 0.5))), gate)) @ v", without("decay")
    ),
    "q and k exchanged": ("softmax(s) @ v", reordered(1, 0, 2)),
    "v in place of k": ("softmax(s) @ v", reordered(0, 2, 2)),
    "near field dropped": ("softmax(near_far(s, u; 8)) @ v", lambda p: with_values(near=None)(reordered(0, 1, 2)(p))),
    "near field of the far logits": ("softmax(near_far(s, u; 8)) @ v", reordered(0, 1, 2)),
    "near field of another block": ("softmax(near_far(s, u; 8)) @ v", with_values(near=9)),
    "wide near field of another block": ("softmax(near_far(s, u; 3000)) @ v", with_values(near=2999)),
    "another polynomial": (FORMS["own"], with_values(coefficients=(1.0, 1.0, 0.5000001))),
    "a shift near": (f"softmax(near_far({SHIFT.format('s')}, u; 8)) @ v", without("sub")),
    "a shift far": (f"softmax(near_far(s, {SHIFT.format('u')}; 8)) @ v", without("sub")),
    "a cast of scores": ("softmax(float(int(2.5 * s))) @ v", without("cast")),
    "a cast of weights": ("float(int(softmax(s) + 0.25)) @ v", without("cast")),
    "a clamp": ("softmax(clamp(s; -1.0, 1.0)) @ v", without("clamp")),
    "a clamp of unit rows": ("softmax(clamp(u; -0.9, 1.0)) @ v", without("clamp")),
    "the sign of a gain": ("softmax(causal(s * exp(tau))) @ v", without("exp")),
}  # fmt: skip


def faulty_pipeline(monkeypatch: pytest.MonkeyPatch, step: Callable[[Program], Program]) -> None:
    passes = [Pass("attention", step) if p.name == "attention" else p for p in pipeline.PASSES]
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_recognition_is_found_and_can_be_reproduced(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expression, step = FAULTS[fault]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    faulty_pipeline(monkeypatch, step)
    with pytest.raises(
        CompilerBug, match=r"^after attention: m\.\S+ .* is not what it was, on inputs "
    ) as caught:
        run(spec(expression), until="attention")
    (file,) = tmp_path.iterdir()
    assert f"{file} reproduces it" in str(caught.value)
    namespace: dict[str, str] = {"__name__": "reproducer"}
    exec(file.read_text(), namespace)
    from fastgrad_compiler.pipeline import reproduce

    assert reproduce(namespace["BEFORE"], namespace["AFTER"], "attention") == 1


def test_a_reproducer_is_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It shows what the faulty pass made, and that the pass as it is makes nothing of the kind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    faulty_pipeline(monkeypatch, with_values(causal=False))
    with pytest.raises(CompilerBug) as caught:
        run(spec("softmax(causal(s)) @ v"), until="attention")
    (file,) = tmp_path.iterdir()
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    was, now = done.stdout.splitlines()
    told, _, _ = str(caught.value).removeprefix("after attention: ").partition(f". {tmp_path}")
    told = re.sub(r":\d+\)", ":1)", told)  # the text of a program knows lines
    assert was == f"attention as it was: {told}"
    assert now == "attention as it is now: no difference"


def test_where_no_file_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    faulty_pipeline(monkeypatch, with_values(causal=False))
    with pytest.raises(CompilerBug, match="No file that reproduces it could be written"):
        run(spec("softmax(causal(s)) @ v"), until="attention")


def test_validation_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty_pipeline(monkeypatch, with_values(causal=False))
    run(spec("softmax(causal(s)) @ v"), until="attention", validate=False)


@pytest.mark.parametrize("name", ["shapes", "bounds", "attention", "plan", "backward"])
def test_any_exact_pass_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A product that becomes a sum, wherever it happens."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    step = next(p for p in pipeline.PASSES if p.name == name)

    def faulty(program: Program, **given: object) -> Program:
        return edited(step.run(program, **given), lambda n: replace(n, op="add") if n.op == "mul" else n)

    passes = (Pass(name, faulty) if p.name == name else p for p in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    with pytest.raises(CompilerBug, match=rf"^after {name}: m\.\S+ .* is not what it was"):
        run(spec("softmax(causal(s)) @ (v * v)"))


@pytest.mark.parametrize("edit", ["weight", "return", "callee", "times", "input"])
def test_faults_of_structure(edit: str) -> None:
    """Another weight, another result, another graph that is called, another number of iterations."""
    text = """
dim n
block layer(x: float[n, 4]) -> float[n, 4] {
    weight w: float[4, 4]
    weight u: float[4, 4]
    return tanh(x @ w + x @ u)
}
block other(x: float[n, 4]) -> float[n, 4] {
    weight w: float[4, 4]
    weight u: float[4, 4]
    return exp(x @ w - x @ u)
}
model m(x: float[n, 4], y: float[n, 4]) -> (float[n, 4], float[n, 4]) {
    repeat i in 2 { x = layer(x) as layers }
    z = other(y) as last
    return (x, z)
}
"""
    before = infer_shapes(elaborate(Source("<text>", text)))
    main = before["m"]

    def changed(node: Node) -> Node:
        if edit == "weight" and node.op == "weight":
            return node.with_attributes(label={"w": "u", "u": "w"}[str(node["label"])])
        if edit == "callee" and node.op == "call" and node["graph"] == "other":
            return node.with_attributes(graph="layer")
        if edit == "times" and node.op == "repeat":
            ((body, times),) = runs(node)
            return node.with_attributes(bodies=((body, times + 1),))
        if edit == "input" and node.op == "repeat":
            return replace(node, inputs=("y",))
        return node

    after = edited(before, changed)
    if edit == "return":
        others = [graph for graph in after.graphs if graph.name != "m"]
        after = after.with_graphs([replace(main, outputs=main.outputs[::-1]), *others])
    assert len(differences(before, after)) == (2 if edit == "weight" else 1)  # of both blocks
    assert list(compare(before, before)) == []


def test_a_result_that_is_lost() -> None:
    before = proved(spec("softmax(s) @ v"))
    main = before["m"]
    after = before.with_graphs([replace(main, outputs=main.outputs * 2)])
    with pytest.raises(CompilerBug, match="a graph changed its signature"):
        validate(before, after, "attention")


# ---------------------------------------------------------------- graphs that are too large to run


def test_a_length_in_the_text_is_made_smaller() -> None:
    """4,096 patches of 8 heads have 134 million scores: the same attention is run on fewer."""
    text = """
model m(q: float[8, 4096, 8], k: float[8, 4096, 8], v: float[8, 4096, 8]) -> float[8, 4096, 8] {
    return softmax(window(near_far(q @ k.T, unit(q) @ unit(k).T; 30); 100)) @ v
}
"""
    before = proved(elaborate(Source("<text>", text)))
    whole, short, long = fits(before, recognise_attention(before), "m", "m")
    assert (whole.cases, short.shrunk, long.shrunk, len(long.cases)) == ((), True, True, 1)
    lengths = [fit.before["m"]["q"].tensor.shape[1].constant for fit in (short, long)]
    assert lengths == [9, 107]
    assert ENTRIES >= 24 * 303 * 303
    (checked,) = compare(before, recognise_attention(before), recognise_attention)
    assert checked == Checked("m", 1, 7)
    faulty = with_values(window=99)
    (difference,) = compare(before, faulty(before), faulty)
    assert isinstance(difference, Difference)


def test_a_pass_that_read_the_length_is_not_blamed() -> None:
    """A window that hides nothing at the length of the text, and something at the smaller one, may be dropped."""
    text = """
model m(q: float[24, 4096, 8], k: float[24, 4096, 8], v: float[24, 4096, 8]) -> float[24, 4096, 8] {
    return softmax(window(q @ k.T; 4096)) @ v
}
"""

    def clever(program: Program) -> Program:
        length = program["m"]["q"].tensor.shape[1].constant
        window = next(n["width"] for n in program["m"].nodes if n.op == "window")
        needless = isinstance(window, int) and length is not None and window >= length
        return with_values(window=None)(program) if needless else recognise_attention(program)

    before = proved(elaborate(Source("<text>", text)))
    careless = with_values(window=None)
    assert any(isinstance(each, Difference) for each in compare(before, careless(before), careless))
    assert not any(isinstance(each, Difference) for each in compare(before, clever(before), clever))


BIG = """
dim n
block layer(x: float[n, d]) -> float[n, d] {
    weight w: float[d, 4 * d]
    weight u: float[4 * d, d]
    return x + gelu(x @ w) @ u
}
model m(tokens: int[n]) -> float[n, 4096] {
    weight table: float[128000, 4096]
    weight wq: float[4096, 4096]
    weight wk: float[4096, 4096]
    x = embedding(table, tokens)
    repeat i in 80 { x = layer(x) as layers }
    k = x @ wk
    e = exp(0.01 * ((x @ wq) @ k.T))
    return (e @ x) / sum(exp(0.01 * ((x @ wq) @ k.T)); axis = -1, keepdim = true)
}
"""


def test_a_large_model_around_an_attention_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, layers and large products are drawn; the same product, spelled twice, is drawn once."""
    sizes: list[int] = []
    real = cases.draw

    def measured(node: Node, case: cases.Case) -> Array:
        value = real(node, case)
        sizes.append(value.size)
        return value

    monkeypatch.setattr(cases, "draw", measured)
    before = proved(elaborate(Source("<text>", BIG)))
    after = recognise_attention(before)
    assert is_recognised(after)
    (checked,) = compare(before, after, recognise_attention)
    assert checked == Checked("m", 1, 6)
    assert 0 < max(sizes) <= 11 * 4096
    (difference,) = compare(before, scaled(1.001)(before), scaled(1.001))
    assert isinstance(difference, Difference)


@pytest.mark.parametrize(
    "expression", ["softmax(s[.., 0:300] @ ones((300, n))) @ v", "softmax(s[.., 5:]) @ v[:, 5:]"]
)
def test_a_slice_that_small_dims_do_not_have(expression: str) -> None:
    before = proved(spec(expression, end="return z + softmax(z @ x.T) @ x"))
    (checked,) = compare(before, recognise_attention(before), recognise_attention)
    assert isinstance(checked, Checked)
    assert checked.runs >= 1
    (difference,) = compare(before, scaled(1.001)(before), scaled(1.001))
    assert isinstance(difference, Difference)


def test_patches_in_one_graph_with_attention() -> None:
    """The length is made smaller behind the patches, which are drawn."""
    text = """
dim b
model m(images: float[b, 3, 256, 256]) -> float[b, 4096, 192] {
    weight w: float[48, 192]
    weight places: float[4096, 192]
    x = patches(images, 4) @ w + places
    h = split_heads(x; 24)
    return x + merge_heads(softmax(h @ transpose(h)) @ h)
}
"""
    before = proved(elaborate(Source("<text>", text)))
    (checked,) = compare(before, recognise_attention(before), recognise_attention)
    assert checked == Checked("m", 1, 6)


def test_attributes_are_those_of_the_vocabulary() -> None:
    """The remarks of an attention are attributes that it has."""
    from fastgrad_compiler.ir.ops import OPS, STEP_ATTRIBUTES
    from fastgrad_compiler.validation.structure import REMARKS

    attention = OPS["attention"]
    assert {*attention.attributes, *attention.optional} - REMARKS - STEP_ATTRIBUTES == {
        "roles", "causal", "scale", "near", "window", "alibi",
    }  # fmt: skip
    assert {*attention.attributes, *attention.optional} >= REMARKS
