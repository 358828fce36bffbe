"""Every step of the recognition of attention, attacked: random spellings, right ones and wrong ones, mean after it
what plain numpy says they mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.reference.interpret import run

Array = NDArray[Any]

B, H, N, D = 2, 2, 6, 6  # as many heads as sequences, and mostly as many queries as keys and columns
M = 4  # keys of another sequence
WIDTHS = (1, 2, 4)
BLOCKS = (1, 2)
COEFFICIENTS = (1.0, 1.0, 0.5)
RECOGNISED = {  # operations that some attention has that is recognised
    "mul", "div", "neg", "causal", "window", "padding", "documents", "sub", "amax", "cast", "clamp", "alibi",
    "assume_bound", "dropout", "permute", "near_far", "softmax", "exp", "sum", "polynomial", "normalize_rows",
    "forget", "decay",
}  # fmt: skip


@dataclass
class Text:
    """A program as it is written, and the value of each of its nodes; `lead` are the dims before the tokens."""

    random: np.random.Generator
    lead: tuple[int, ...] = (B, H)
    keys: int = N
    lines: list[str] = field(default_factory=list)
    values: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)

    def put(self, expression: str, value: Array) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"%{name} = {expression}")
        self.values[name] = value
        return name

    def given(self, type_: str, value: Array) -> str:
        name = self.put(f"input() : {type_}", value)
        self.inputs[name] = value
        return name

    def number(self, value: float) -> str:
        return self.put(f"constant(value = {value!r})", np.asarray(value))

    def op(self, op: str, *operands: str, value: Array, more: str = "") -> str:
        return self.put(f"{op}({', '.join(f'%{name}' for name in operands)}{more})", value)

    def binary(self, op: str, left: str, right: str) -> str:
        x, y = self.values[left], self.values[right]
        functions: dict[str, Callable[[Array, Array], Array]] = {
            "mul": np.multiply,
            "div": np.divide,
            "sub": np.subtract,
            "matmul": np.matmul,
        }
        value = functions[op](x, y)
        return self.op(op, left, right, value=value)

    def normal(self, *shape: int) -> str:
        return self.given(f"float[{', '.join(map(str, shape))}]", self.random.standard_normal(shape))

    def swap(self, name: str) -> str:
        rank = len(self.lead)
        axes = (*range(rank), rank + 1, rank)
        return self.op("permute", name, value=self.values[name].swapaxes(-1, -2), more=f", axes = {axes}")

    def reduce(self, op: str, name: str, axis: int) -> str:
        value = getattr(self.values[name], {"sum": "sum", "amax": "max"}[op])(axis, keepdims=True)
        return self.op(op, name, value=value, more=f", axes = ({axis},), keepdim = true")

    def pick(self, *options: str) -> str:
        return str(self.random.choice(options))

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)


# ---------------------------------------------------------------- what operations mean, in numpy


def hide(scores: Array, visible: Array) -> Array:
    return np.where(visible, scores, -np.inf)


def distance(scores: Array) -> Array:
    n, m = scores.shape[-2:]
    return np.arange(n)[:, None] - np.arange(m)[None, :].astype(np.float64)


def near(scores: Array, block: int) -> Array:
    n, m = (np.arange(size) // block for size in scores.shape[-2:])
    return np.abs(n[:, None] - m[None, :]) <= 1


def of_batch(seen: Array, scores: Array) -> Array:
    """Of each sequence [b, ...], the same for its heads."""
    return seen.reshape(seen.shape[0], *(1,) * (scores.ndim - 3), *seen.shape[1:])


def same_document(ids: Array) -> Array:
    runs = np.concatenate([np.zeros((B, 1)), np.cumsum(ids[:, 1:] != ids[:, :-1], axis=1)], axis=1)
    return runs[:, :, None] == runs[:, None, :]


def softmax(scores: Array, axis: int) -> Array:
    top = scores.max(axis, keepdims=True)
    weights = np.exp(scores - np.where(top == -np.inf, 0.0, top))
    total = weights.sum(axis, keepdims=True)
    return weights / np.where(total == 0, 1.0, total)


def polynomial(scores: Array) -> Array:
    shown = np.where(scores == -np.inf, 0.0, scores)
    return np.where(scores == -np.inf, 0.0, sum(c * shown**j for j, c in enumerate(COEFFICIENTS)))


def normalize_rows(weights: Array) -> Array:
    shown = np.where(weights == -np.inf, 0.0, weights)
    total = shown.sum(-1, keepdims=True)
    return shown / np.where(total == 0, 1.0, total)


# ---------------------------------------------------------------- steps on scores


def scaled(text: Text, s: str) -> str:
    factor = text.number(float(text.random.choice([2.0, 0.5, -0.7, 0.0, 1.0, 1e-3])))
    if text.chance(0.5):
        return text.binary("mul", *((s, factor) if text.chance(0.5) else (factor, s)))
    return text.binary("div", s, text.number(float(text.random.choice([2.0, -4.0]))))


def negated(text: Text, s: str) -> str:
    return text.op("neg", s, value=-text.values[s])


def gained(text: Text, s: str) -> str:
    """By a factor for each head, query or key, of any sign or positive."""
    *lead, n, m = text.values[s].shape
    shapes = {
        "query": (*lead, n, 1),
        "key": (*lead, 1, m),
        "column": (m,),
        "all": (1,),
        "head": (*lead[-1:], 1, 1),
    }
    shape = shapes[text.pick("head", "query", "query", "key", "column", "all")]
    gain = text.normal(*shape)
    if text.chance(0.2):
        type_ = f"int[{', '.join(map(str, shape))}]"
        gain = text.given(type_, text.random.integers(1, 4, shape) * text.random.choice([-1, 1]))
    elif text.chance(0.6):
        gain = text.op("tanh", gain, value=np.tanh(text.values[gain]))
        gain = text.binary("sub", gain, text.number(float(text.random.choice([-1.5, -1.5, -0.5, 1.5]))))
    pair = (s, gain) if text.chance(0.8) else (gain, s)
    return text.binary(text.pick("mul", "div"), *pair)


def masked(text: Text, s: str) -> str:
    scores = text.values[s]
    n, m = scores.shape[-2:]
    kind = text.pick(
        *("causal",) * (n == m), "window", *("padding", "documents")[: len(text.lead) and 1 + (n == m)]
    )
    if kind == "causal":
        return text.op("causal", s, value=hide(scores, distance(scores) >= 0))
    if kind == "window":
        width = int(text.random.choice(WIDTHS))
        seen = np.abs(distance(scores)) < width
        return text.op("window", s, value=hide(scores, seen), more=f", width = {width}")
    if kind == "padding":
        mask = text.random.random((B, m)) < 0.7
        name = text.given(f"bool[{B}, {m}]", mask)
        return text.op("padding", s, name, value=hide(scores, of_batch(mask[:, None], scores)))
    ids = np.sort(text.random.integers(0, 3, (B, n)), axis=1)
    name = text.given(f"int[{B}, {n}]", ids)
    return text.op("documents", s, name, value=hide(scores, of_batch(same_document(ids), scores)))


def other_axis(text: Text) -> int:
    """Mostly that of the keys."""
    return int(text.random.choice([-1, -1, -1, -1, -2, -2 - bool(text.lead)]))


def shifted(text: Text, s: str) -> str:
    """Less the largest of a row, of a column, of a head, or of other scores."""
    of, axis = s, other_axis(text)
    if text.chance(0.15):
        of = text.op("tanh", s, value=np.tanh(text.values[s]))
    top = text.reduce("amax", of, axis)
    return text.binary("sub", *((s, top) if text.chance(0.9) else (top, s)))


def cast(text: Text, s: str) -> str:
    if text.chance(0.4) or not np.isfinite(text.values[s]).all():
        return text.op("cast", s, value=text.values[s], more=', dtype = "float"')
    dtype = text.pick("int", "bool")
    through = text.values[s].astype(np.int64 if dtype == "int" else np.bool_)
    whole = text.op("cast", s, value=through, more=f', dtype = "{dtype}"')
    return text.op("cast", whole, value=through.astype(np.float64), more=', dtype = "float"')


def clamped(text: Text, s: str) -> str:
    low, high = sorted(text.random.choice([-40.0, -1.0, 0.0, 1.0, 40.0], 2, replace=False).tolist())
    if text.chance(0.4):
        low, high = -1.0, 1.0  # of no effect on products of unit rows
    return text.op("clamp", s, value=np.clip(text.values[s], low, high), more=f", low = {low}, high = {high}")


def sloped(text: Text, s: str) -> str:
    if not text.lead:
        return s
    scores, heads = text.values[s], text.lead[-1]
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    return text.op("alibi", s, value=scores - slopes[:, None, None] * np.abs(distance(scores)))


def gates(text: Text, s: str) -> str:
    """Log gates for scores [.., n, n]: at most 0, which is proved of some."""
    gate = text.normal(*text.values[s].shape[:-1])
    kind = text.pick("log_sigmoid", "log_sigmoid", "log_sigmoid", "neg abs", "any")
    if kind == "log_sigmoid":
        return text.op("log_sigmoid", gate, value=-np.logaddexp(0.0, -text.values[gate]))
    if kind == "neg abs":
        size = text.op("abs", gate, value=np.abs(text.values[gate]))
        return text.op("neg", size, value=-text.values[size])
    return gate


def of_gates(log_gate: Array) -> Array:
    """The sum of those after the key up to the query."""
    n = log_gate.shape[-1]
    total = log_gate.cumsum(-1)
    return np.where(np.arange(n)[:, None] > np.arange(n), total[..., None] - total[..., None, :], 0.0)


def forgotten(text: Text, s: str) -> str:
    """With a gate, mostly of causal scores."""
    if text.values[s].shape[-2] != text.values[s].shape[-1]:
        return s
    if text.chance(0.7):
        s = text.op("causal", s, value=hide(text.values[s], distance(text.values[s]) >= 0))
    gate = gates(text, s)
    return text.op("forget", s, gate, value=text.values[s] + of_gates(text.values[gate]))


def decayed(text: Text, w: str) -> str:
    """Weights with a gate."""
    weights = text.values[w]
    if weights.shape[-2] != weights.shape[-1]:
        return w
    gate = gates(text, w)
    factor = np.exp(of_gates(text.values[gate]))
    return text.op("decay", w, gate, value=np.where(weights == -np.inf, weights, weights * factor))


def assumed(text: Text, s: str) -> str:
    return text.op("assume_bound", s, value=text.values[s], more=", bound = 1e6")


def undropped(text: Text, s: str) -> str:
    return text.op("dropout", s, value=text.values[s], more=", p = 0.0")


def turned(text: Text, s: str) -> str:
    """Steps on the transposed scores."""
    return text.swap(stepped(text, text.swap(s), 1))


def exchanged(text: Text, s: str) -> str:
    """Heads for sequences."""
    if len(text.lead) < 2:
        return s
    return text.op("permute", s, value=text.values[s].swapaxes(0, 1), more=", axes = (1, 0, 2, 3)")


def split(text: Text, s: str) -> str:
    """Near and far, each with steps of its own; the same scores, or others, nearby."""
    block = int(text.random.choice(BLOCKS))
    local, far = s if text.chance(0.5) else product(text, *text.values[s].shape[-2:]), s
    if text.chance(0.6):
        local = stepped(text, local, 1)
    if text.chance(0.4):
        far = stepped(text, far, 1)
    value = np.where(near(text.values[far], block), text.values[local], text.values[far])
    return text.op("near_far", local, far, value=value, more=f", block = {block}")


Step = Callable[[Text, str], str]
STEPS: dict[Step, float] = {
    scaled: 3, negated: 1, gained: 2, masked: 4, shifted: 4, cast: 1.5, clamped: 1.5, sloped: 1.5, assumed: 0.5,
    forgotten: 2, undropped: 0.5, turned: 1.5, exchanged: 0.4, split: 2,
}  # fmt: skip


def stepped(text: Text, s: str, most: int) -> str:
    chances = np.array(list(STEPS.values()))
    for _ in range(int(text.random.integers(0, most + 1))):
        step = list(STEPS)[int(text.random.choice(len(STEPS), p=chances / chances.sum()))]
        s = step(text, s)
    return s


def product(text: Text, n: int, m: int) -> str:
    """q k^T, each of unit rows or not, scaled or not."""
    operands = []
    for tokens in (n, m):
        name = text.normal(*text.lead, tokens, D)
        if text.chance(0.5):
            rows = text.values[name]
            name = text.op("unit", name, value=rows / np.linalg.norm(rows, axis=-1, keepdims=True))
        if text.chance(0.2):
            name = scaled(text, name)
        operands.append(name)
    return text.binary("matmul", operands[0], text.swap(operands[1]))


# ---------------------------------------------------------------- weights of scores, and what they weigh


def of_scores(text: Text, s: str, op: str) -> str:
    if op == "exp":
        return text.op("exp", s, value=np.exp(text.values[s]))
    coefficients = f", coefficients = {COEFFICIENTS}"
    return text.op("polynomial", s, value=polynomial(text.values[s]), more=coefficients)


def attended(text: Text, s: str, v: str) -> str:
    """Weights of scores in one of their spellings, times the values."""
    spelling = text.pick("softmax", "softmax", "ratio", "late", "rows", "rows near")
    axis = other_axis(text)
    if spelling == "softmax":
        p = text.op("softmax", s, value=softmax(text.values[s], axis), more=f", axis = {axis}")
        return weighed(text, p, v)
    if spelling in ("ratio", "late"):
        w = of_scores(text, s, text.pick("exp", "polynomial"))
        total = text.reduce("sum", w, axis)
        if spelling == "late" and axis == -1:
            return text.binary("div", text.binary("matmul", w, v), total)
        return weighed(text, text.binary("div", w, total), v)
    if spelling == "rows":
        w = of_scores(text, s, text.pick("exp", "polynomial"))
    else:
        local = stepped(text, s, 1) if text.chance(0.5) else product(text, N, text.keys)
        close, far = (
            of_scores(text, local, text.pick("exp", "exp", "exp", "polynomial")),
            of_scores(text, s, text.pick("polynomial", "polynomial", "exp")),
        )
        value = np.where(near(text.values[s], 2), text.values[close], text.values[far])
        w = text.op("near_far", close, far, value=value, more=", block = 2")
    if text.chance(0.5):
        w = masked(text, w)
    if text.chance(0.3):
        w = decayed(text, w)
    return weighed(text, text.op("normalize_rows", w, value=normalize_rows(text.values[w])), v)


def weighed(text: Text, p: str, v: str) -> str:
    if text.chance(0.15):
        p = cast(text, p)
    if text.keys == N and text.chance(0.2):
        p = text.swap(p)
    if text.chance(0.2):
        return text.binary("matmul", text.swap(v), text.swap(p))
    return text.binary("matmul", p, v)


def written(seed: int) -> tuple[Text, str]:
    """A program, and the node that it returns."""
    random = np.random.default_rng(seed)
    lead = ((B, H), (B, H), (B,), ())[int(random.integers(4))]
    text = Text(random, lead, M if random.random() < 0.2 else N)
    v = text.normal(*lead, text.keys, D)
    return text, attended(text, stepped(text, product(text, N, text.keys), 4), v)


def source(text: Text, result: str) -> str:
    """Inputs first, as a graph has them."""
    given = [line for line in text.lines if "= input()" in line]
    others = [line for line in text.lines if "= input()" not in line]
    body = "\n".join([*given, *others, f"return %{result}"])
    return f"graph main {{\n{body}\n}}\n"


def ran(program: Program, text: Text) -> Array:
    inputs = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in text.inputs.items()}
    found = run(program, inputs, {}, dtype=torch.float64)
    assert isinstance(found, torch.Tensor)
    return found.numpy()


def ranges(program: Program, text: Text) -> list[tuple[float, float]]:
    """(the largest |scale q.k|, R and a rounding) of each attention whose range is known."""
    graph = program["main"]
    known = [node for node in graph.nodes if node.op == "attention" and node["bound"] is not None]
    found = []
    for node in known:
        q, k = (ran(program.with_graphs([replace(graph, outputs=(name,))]), text) for name in node.inputs[:2])
        largest = np.abs(float(str(node["scale"])) * (q @ k.swapaxes(-1, -2))).max()
        found.append((float(largest), float(str(node["bound"])) * (1 + 1e-12)))
    return found


@pytest.mark.medium
@pytest.mark.parametrize("programs", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_recognition_keeps_the_meaning_of_random_spellings(programs: int) -> None:
    """Where the text gives a number, what is recognised gives the same one; 0 / 0 and inf - inf promise nothing."""
    kinds, spelled = Counter[str](), set[str]()
    for seed in range(programs):
        with np.errstate(all="ignore"):
            text, result = written(seed)
        wanted = text.values[result]
        before = prove_bounds(infer_shapes(parse_program(source(text, result))))
        after = recognise_attention(before)
        verify(after, "attention")
        ops = {node.op for node in after["main"].nodes}
        kinds[next((op for op in ("poly_attention", "attention") if op in ops), "as written")] += 1
        if not ops & {"attention", "poly_attention"}:
            continue
        spelled |= {line.split(" = ")[1].partition("(")[0] for line in text.lines}
        defined = np.isfinite(wanted)
        kinds["defined"] += bool(defined.all())
        found = ran(after, text)
        claimed = ranges(after, text)
        kinds["range"] += bool(claimed)
        assert all(largest <= bound for largest, bound in claimed), f"seed {seed}:\n{source(text, result)}"
        np.testing.assert_allclose(
            found[defined],
            wanted[defined],
            rtol=1e-9,
            atol=1e-10,
            err_msg=f"seed {seed}:\n{source(text, result)}",
        )
    assert spelled >= RECOGNISED
    assert kinds["attention"] >= programs // 20
    assert kinds["poly_attention"] >= programs // 50
    assert kinds["as written"] >= programs // 4
    assert kinds["defined"] >= programs // 20
    assert kinds["range"] >= programs // 50
