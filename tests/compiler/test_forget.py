"""Forget gates: which spellings are an attention's, and what is told of those that are none's."""

from __future__ import annotations

import pytest

from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.attention.unserved import unserved_gates
from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source

SPEC = """
dim b
dim n <= 4096
model m(
    q: float[b, 4, n, 3],
    k: float[b, 2, n, 3],
    v: float[b, 2, n, 5],
    f: float[b, 4, n],
    fs: float[b, 2, n],
    mask: bool[b, n],
    ids: int[b, n],
) -> float[b, 4, n, 5] {
    weight tau: float[]
    K = repeat_heads(k, 2)
    V = repeat_heads(v, 2)
    s = q @ K.T
    u = 0.5 * unit(q) @ unit(K).T
    g = log_sigmoid(f)
    shared = squeeze(repeat_heads(unsqueeze(log_sigmoid(fs), -1), 2), -1)
    y = EXPRESSION
    return y
}
"""
P = "(1.0, 1.0, 0.5)"


def recognised(expression: str) -> Program:
    """The program after the recognition of attention."""
    source = Source("m.tfg", SPEC.replace("EXPRESSION", expression))
    return run(elaborate(source), until="attention")[-1].program


def attention_of(program: Program) -> Attention:
    (entry,) = attention_table(program)
    return entry.attention


ALLOWED = {
    "inside of causal": "softmax(causal(forget(s, g))) @ V",
    "outside of causal": "softmax(forget(causal(s), g)) @ V",
    "of scaled scores": "softmax(causal(forget(0.3 * s / 2.0, g))) @ V",
    "of scores with a gain": "softmax(causal(forget(s * exp(tau), g))) @ V",
    "of shifted scores": "softmax(causal(forget(s - max(s; axis = -1, keepdim = true), g))) @ V",
    "shifted": "softmax(forget(causal(s), g) - max(forget(causal(s), g); axis = -1, keepdim = true)) @ V",
    "of clamped scores": "softmax(causal(forget(clamp(u; -1.0, 1.0), g))) @ V",
    "of asserted scores": "softmax(causal(forget(assume_bound(s; 2.0), g))) @ V",
    "of near and far scores": "softmax(causal(forget(near_far(s, u; 4), g))) @ V",
    "in a window": "softmax(window(causal(forget(s, g)); 4)) @ V",
    "with padding and documents": "softmax(padding(documents(causal(forget(s, g)), ids), mask)) @ V",
    "over its sum": "exp(causal(forget(s, g))) / sum(exp(causal(forget(s, g))); axis = -1, keepdim = true) @ V",
    "divided late": "exp(causal(forget(s, g))) @ V / sum(exp(causal(forget(s, g))); axis = -1, keepdim = true)",
    "of weights of exp": "normalize_rows(decay(exp(causal(s)), g)) @ V",
    "of weights of a polynomial": f"normalize_rows(decay(causal(polynomial(s; {P})), g)) @ V",
    "of weights of a near field": f"normalize_rows(causal(decay(near_far(exp(s), polynomial(u; {P}); 4), g))) @ V",
    "a gate of a size": "softmax(causal(forget(s, -abs(f)))) @ V",
    "a gate of softplus": "softmax(causal(forget(s, -softplus(f)))) @ V",
    "a gate that is cut off": "softmax(causal(forget(s, min(f, 0.0)))) @ V",
    "a gate of 0": "softmax(causal(forget(s, 0.0 * g))) @ V",
    "a gate that forgets all": "softmax(causal(forget(s, log(sigmoid(f))))) @ V",
}


@pytest.mark.parametrize("spelling", ALLOWED)
def test_an_attention_has_the_gate(spelling: str) -> None:
    program = recognised(ALLOWED[spelling])
    attention = attention_of(program)
    assert attention.mask.forget
    assert attention.mask.causal
    assert not unserved_gates(program)
    assert not any(node.op in ("forget", "decay") for graph in program.graphs for node in graph.nodes)
    assert attention_of(parse_program(print_program(program))) == attention


def test_the_range_is_that_of_the_scores_inside() -> None:
    for expression in (
        "softmax(causal(forget(u, g))) @ V",
        "softmax(causal(forget(near_far(s, u; 4), g))) @ V",
        "softmax(causal(assume_bound(forget(u, g); 0.01))) @ V",
    ):
        known = attention_of(recognised(expression)).range
        assert (known.limit, known.asserted) == (0.5, False)
    assert (
        attention_of(recognised("softmax(causal(assume_bound(forget(s, g); 0.01))) @ V")).range.bound is None
    )


REFUSED = {
    "not causal": ("softmax(forget(s, g)) @ V", "not causal"),
    "weights that are not causal": (f"normalize_rows(decay(polynomial(s; {P}), g)) @ V", "not causal"),
    "a gate that may be above 0": ("softmax(causal(forget(s, f))) @ V", "nothing proves that f (m.tfg:8) is at most 0"),
    "a gate that may be a little above 0": (
        "softmax(causal(forget(s, g + 1e-9))) @ V", "nothing proves that `g + 1e-9`"
    ),
    "a gate that is asserted": (
        "softmax(causal(forget(s, assume_bound(f; 1.0) - 1.0))) @ V", "is asserted, not proved"
    ),
    "a factor outside": ("softmax(causal(0.5 * forget(s, g))) @ V", "a factor stands outside"),
    "a gain outside": ("softmax(causal(forget(s, g) / (1.0 + exp(tau)))) @ V", "a factor stands outside"),
    "a clamp outside": ("softmax(causal(clamp(forget(-abs(s), g); -1e9, 0.0))) @ V", "no attention"),
    "in one part of a near field": ("softmax(causal(near_far(s, forget(u, g); 4))) @ V", "put it outside"),
    "in both parts of a near field": (
        "softmax(causal(near_far(forget(s, g), forget(u, g); 4))) @ V", "put it outside"
    ),
    "twice": ("softmax(causal(forget(forget(s, g), g))) @ V", "another forget gate"),
    "of scores and of weights": ("normalize_rows(decay(causal(exp(forget(s, g))), g)) @ V", "another forget gate"),
    "in a polynomial": (f"normalize_rows(causal(polynomial(forget(s, g); {P}))) @ V", "write decay"),
    "added to weights": (f"normalize_rows(forget(causal(polynomial(s; {P})), g)) @ V", "forget is for scores"),
    "times scores": ("softmax(causal(decay(s, g))) @ V", "decay is for weights"),
    "transposed": ("softmax(causal(forget(s.T, g).T)) @ V", "transposed"),
    "alibi inside": ("softmax(causal(forget(alibi(s), g))) @ V", "slopes of alibi"),
    "alibi outside": ("softmax(causal(alibi(forget(s, g)))) @ V", "slopes of alibi"),
    "a polynomial in a window": (
        f"normalize_rows(decay(window(causal(polynomial(s; {P})); 4), g)) @ V", "a window or with slopes"
    ),
    "read twice": (
        "softmax(causal(forget(s, g))) @ V + sum(forget(s, g); axis = -1, keepdim = true)", "no attention"
    ),
    "scores read twice": (
        "softmax(causal(forget(s, g))) @ V + sum(s; axis = -1, keepdim = true)", "reads its scores or weights too"
    ),
    "no attention around it": ("tanh(forget(s, g)) @ V", "what reads it is no attention"),
    "after softmax": ("decay(softmax(causal(s)), g) @ V", "what reads it is no attention"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", REFUSED)
def test_the_gate_runs_as_it_is_written_and_this_is_told(spelling: str) -> None:
    expression, reason = REFUSED[spelling]
    program = recognised(expression)
    gates = expression.count("forget(") + expression.count("decay(")
    left = [node for graph in program.graphs for node in graph.nodes if node.op in ("forget", "decay")]
    assert len(left) == gates
    assert not any(
        "forget" in Attention.of(node).roles for node in program[program.main].nodes if node.op in ATTENTION
    )
    told = unserved_gates(program)
    assert {each.node for each in told} == set(left)
    assert any(reason in each.why for each in told), [each.why for each in told]


# ---------------------------------------------------------------- grouped heads


def heads_of(program: Program) -> tuple[int, int, tuple[str, ...]]:
    """Query heads, key heads, and the shape of the gates."""
    (entry,) = attention_table(program)
    gate = Attention.of(entry.node).by_role(list(entry.node.inputs))["forget"]
    shape = tuple(map(str, program[entry.graph][gate].tensor.shape))
    return entry.heads, entry.key_heads, shape


GROUPED = {
    "gates of the key heads": ("shared", (4, 2, ("b", "2", "n"))),
    "gates of the query heads": ("g", (4, 4, ("b", "4", "n"))),
    "repeated and then made gates": (
        "log_sigmoid(squeeze(repeat_heads(unsqueeze(fs, -1), 2), -1))", (4, 2, ("b", "2", "n"))
    ),
    "made gates between": (
        "squeeze(log_sigmoid(repeat_heads(unsqueeze(fs, -1), 2)), -1)", (4, 2, ("b", "2", "n"))
    ),
    "repeated otherwise": (
        "squeeze(repeat_heads(unsqueeze(g[:, 0:1], -1), 4), -1)", (4, 4, ("b", "4", "n"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", GROUPED)
def test_grouped_heads(spelling: str) -> None:
    gate, expected = GROUPED[spelling]
    program = recognised(f"softmax(causal(forget(s, {gate}))) @ V")
    assert heads_of(program) == expected
    assert not unserved_gates(program)


def test_query_heads_that_share_keys_by_broadcasting() -> None:
    """One key head for four gates: its keys and values are repeated, as the kernels have a gate for each key head."""
    one = "softmax(causal(forget(q @ k[:, 0:1].T, g))) @ v[:, 0:1]"
    assert heads_of(recognised(one)) == (4, 4, ("b", "4", "n"))


@pytest.mark.parametrize(
    ("types", "shape"),
    [
        (("float[b, n, 3]", "float[b, n]"), ("b", "1", "n")),
        (("float[n, 3]", "float[n]"), ("1", "1", "n")),
        (("float[b, 2, 4, n, 3]", "float[b, 2, 4, n]"), ("2*b", "4", "n")),
    ],
)
def test_other_numbers_of_dims(types: tuple[str, str], shape: tuple[str, ...]) -> None:
    rows, gates = types
    text = f"""
dim b
dim n <= 64
model m(q: {rows}, f: {gates}) -> {rows} {{
    return softmax(causal(forget(q @ q.T, log_sigmoid(f)))) @ q
}}
"""
    program = run(elaborate(Source("m.tfg", text)))[-1].program
    assert heads_of(program)[2] == shape


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("softmax(causal(forget(s, fs))) @ V", "FG203"),  # gates of other heads
        ("softmax(causal(forget(s, f[.., 0:1]))) @ V", "FG203"),
        ("softmax(causal(forget(s, q))) @ V", "FG205"),
        ("softmax(causal(forget(s, mask))) @ V", "FG209"),
        ("softmax(causal(forget(s[.., 0:1], g))) @ V", "FG203"),  # not square
        ("normalize_rows(decay(causal(s), ids)) @ V", "FG209"),
    ],
)
def test_gates_that_do_not_fit(expression: str, code: str) -> None:
    with pytest.raises(TfgError) as caught:
        recognised(expression)
    assert [each.code for each in caught.value.diagnostics] == [code]
