"""Recognition of attention: what is the same function becomes one node, whatever its spelling; what is not
stays as it is.
"""

from __future__ import annotations

import pytest
import torch

from fastgrad_compiler.analysis.bounds.prove import prove_bounds
from fastgrad_compiler.attention.recognise import recognise_attention
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.ir.shapes import infer_shapes
from fastgrad_compiler.ir.text import parse_program
from fastgrad_compiler.ir.verify import verify
from fastgrad_compiler.reference.interpret import run

SIZES = {"b": 2, "h": 4, "g": 2, "n": 6, "m": 5, "d": 8, "c": 3}

HEADS = """
%q = input() : float[b, 4, n, 8]
%k = input() : float[b, 4, n, 8]
%v = input() : float[b, 4, n, 3]
"""
PLAIN = """
%q = input() : float[b, n, 8]
%k = input() : float[b, n, 8]
%v = input() : float[b, n, 3]
"""
TRANSPOSED = "%kt = permute(%k, axes = (0, 1, 3, 2))\n"
SCORES = TRANSPOSED + "%s = matmul(%q, %kt)\n"
END = "%p = softmax(%s, axis = -1)\n%y = matmul(%p, %v)\nreturn %y"


def program(body: str) -> Program:
    """A typed program of one graph, with bounds."""
    return prove_bounds(infer_shapes(parse_program(f"graph main {{\n{body}\n}}\n")))


def attentions(of: Program) -> list[Node]:
    return [node for graph in of.graphs for node in graph.nodes if node.op == "attention"]


def inputs_of(of: Program) -> dict[str, torch.Tensor]:
    """Random inputs; every sequence keeps its first key, documents are two runs of tokens."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for node in of[of.main].inputs:
        shape = [dim.evaluate(SIZES) for dim in node.tensor.shape]
        if node.tensor.dtype == "bool":
            values[node.name] = torch.arange(shape[-1]).expand(shape) < torch.tensor([[3], [4]])
        elif node.tensor.dtype == "int":
            values[node.name] = (torch.arange(shape[-1]) >= 2).long().expand(shape)
        else:
            values[node.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values


def results(of: Program) -> torch.Tensor:
    weights = {"tau": torch.tensor([0.3, -0.5, 1.0, 2.0], dtype=torch.float64).reshape(4, 1, 1)}
    found = run(of, inputs_of(of), weights, dtype=torch.float64)
    assert isinstance(found, torch.Tensor)
    return found


SPELLINGS = {
    "scale on the scores": HEADS
    + SCORES
    + "%c = constant(value = 0.3)\n%u = mul(%s, %c)\n"
    + END.replace("%s,", "%u,"),
    "scale on q": HEADS
    + "%c = constant(value = 0.3)\n%r = mul(%c, %q)\n"
    + TRANSPOSED
    + "%s = matmul(%r, %kt)\n"
    + END,
    "scale on k, before its transposition": HEADS
    + "%c = constant(value = 0.3)\n%r = mul(%k, %c)\n%kt = permute(%r, axes = (0, 1, 3, 2))\n%s = matmul(%q, %kt)\n"
    + END,
    "scale on k, behind its transposition": HEADS
    + TRANSPOSED
    + "%c = constant(value = 0.3)\n%r = mul(%kt, %c)\n%s = matmul(%q, %r)\n"
    + END,
    "division by a computed root": HEADS
    + SCORES
    + "%c = constant(value = 8.0)\n%r = sqrt(%c)\n%u = div(%s, %r)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
    "scale behind the masks": HEADS
    + SCORES
    + "%c = constant(value = 0.3)\n%w = causal(%s)\n%u = mul(%w, %c)\n"
    + END.replace("%s,", "%u,"),
    "both negated": HEADS
    + TRANSPOSED
    + "%r = neg(%q)\n%s = matmul(%r, %kt)\n%u = neg(%s)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
    "padding, then causal": HEADS
    + "%mask = input() : bool[b, n]\n"
    + SCORES
    + "%u = padding(%s, %mask)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
    "causal, then padding": HEADS
    + "%mask = input() : bool[b, n]\n"
    + SCORES
    + "%u = causal(%s)\n%w = padding(%u, %mask)\n"
    + END.replace("%s,", "%w,"),
    "window and documents": HEADS
    + "%ids = input() : int[b, n]\n"
    + SCORES
    + "%u = window(%s, width = 3)\n%w = documents(%u, %ids)\n"
    + END.replace("%s,", "%w,"),
    "alibi": HEADS + SCORES + "%u = alibi(%s)\n%w = causal(%u)\n" + END.replace("%s,", "%w,"),
    "two windows": HEADS
    + SCORES
    + "%u = window(%s, width = 2)\n%w = window(%u, width = 4)\n"
    + END.replace("%s,", "%w,"),
    "two windows, the wide one first": HEADS
    + SCORES
    + "%u = window(%s, width = 4)\n%w = window(%u, width = 2)\n"
    + END.replace("%s,", "%w,"),
    "assume_bound outside of the mask": HEADS
    + SCORES
    + "%u = causal(%s)\n%w = assume_bound(%u, bound = 60.0)\n"
    + END.replace("%s,", "%w,"),
    "transposed scores": HEADS
    + "%qt = permute(%q, axes = (0, 1, 3, 2))\n%r = matmul(%k, %qt)\n%s = permute(%r, axes = (0, 1, 3, 2))\n"
    + END,
    "softmax over queries of k q^T": HEADS
    + "%qt = permute(%q, axes = (0, 1, 3, 2))\n%r = matmul(%k, %qt)\n%p = softmax(%r, axis = -2)\n"
    + "%t = permute(%p, axes = (0, 1, 3, 2))\n%y = matmul(%t, %v)\nreturn %y",
    "v^T times transposed weights": HEADS
    + SCORES
    + "%w = causal(%s)\n%p = softmax(%w, axis = -1)\n%t = permute(%p, axes = (0, 1, 3, 2))\n"
    + "%vt = permute(%v, axes = (0, 1, 3, 2))\n%y = matmul(%vt, %t)\nreturn %y",
    "heads moved and keys transposed at once": """
%q = input() : float[b, 4, n, 8]
%x = input() : float[b, n, 4, 8]
%v = input() : float[b, 4, n, 3]
%kt = permute(%x, axes = (0, 2, 3, 1))
%s = matmul(%q, %kt)
"""
    + END,
    "grouped": """
%q = input() : float[b, 4, n, 8]
%k0 = input() : float[b, 2, n, 8]
%v0 = input() : float[b, 2, n, 3]
%k = repeat_heads(%k0, times = 2)
%v = repeat_heads(%v0, times = 2)
"""
    + SCORES
    + END,
    "grouped, normalised behind the repetition": """
%q = input() : float[b, 4, n, 8]
%k0 = input() : float[b, 2, n, 8]
%v0 = input() : float[b, 2, n, 3]
%k1 = repeat_heads(%k0, times = 2)
%k = unit(%k1)
%v = repeat_heads(%v0, times = 2)
"""
    + SCORES
    + END,
    "multi-query by broadcasting": """
%q = input() : float[b, 4, n, 8]
%k = input() : float[b, 1, n, 8]
%v = input() : float[b, 1, n, 3]
"""
    + SCORES
    + END,
    "cross-attention": """
%q = input() : float[b, 4, n, 8]
%k = input() : float[b, 4, m, 8]
%v = input() : float[b, 4, m, 3]
%mask = input() : bool[b, m]
"""
    + SCORES
    + "%w = padding(%s, %mask)\n"
    + END.replace("%s,", "%w,"),
    "without heads": PLAIN
    + "%mask = input() : bool[b, n]\n%kt = permute(%k, axes = (0, 2, 1))\n%s = matmul(%q, %kt)\n"
    + "%w = padding(%s, %mask)\n"
    + END.replace("%s,", "%w,"),
    "a single sequence": """
%q = input() : float[n, 8]
%k = input() : float[n, 8]
%v = input() : float[n, 3]
%kt = permute(%k, axes = (1, 0))
%s = matmul(%q, %kt)
%w = causal(%s)
"""
    + END.replace("%s,", "%w,"),
    "exp over its sum": HEADS
    + SCORES
    + "%w = causal(%s)\n%e = exp(%w)\n%t = sum(%e, axes = (-1,), keepdim = true)\n%p = div(%e, %t)\n"
    + "%y = matmul(%p, %v)\nreturn %y",
    "exp twice": HEADS
    + SCORES
    + "%e = exp(%s)\n%f = exp(%s)\n%t = sum(%f, axes = (-1,), keepdim = true)\n%p = div(%e, %t)\n"
    + "%y = matmul(%p, %v)\nreturn %y",
    "exp less the largest": HEADS
    + SCORES
    + "%w = causal(%s)\n%a = amax(%w, axes = (-1,), keepdim = true)\n%z = sub(%w, %a)\n%e = exp(%z)\n"
    + "%t = sum(%e, axes = (-1,), keepdim = true)\n%p = div(%e, %t)\n%y = matmul(%p, %v)\nreturn %y",
    "division behind the values": HEADS
    + SCORES
    + "%e = exp(%s)\n%t = sum(%e, axes = (-1,), keepdim = true)\n%o = matmul(%e, %v)\n%y = div(%o, %t)\nreturn %y",
    "learned gain for each head": HEADS
    + '%tau = weight(init = ("zeros",), label = "tau") : float[4, 1, 1]\n%a = sigmoid(%tau)\n'
    + SCORES
    + "%u = mul(%s, %a)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
    "a clamp without effect": HEADS.replace("%q =", "%q0 =").replace("%k =", "%k0 =")
    + "%q = unit(%q0)\n%k = unit(%k0)\n"
    + SCORES
    + "%u = clamp(%s, low = -1.0, high = 1.5)\n"
    + END.replace("%s,", "%u,"),
    "dropout of probability 0": HEADS
    + SCORES
    + "%p = softmax(%s, axis = 3)\n%o = dropout(%p, p = 0.0)\n%y = matmul(%o, %v)\nreturn %y",
    "near and far": HEADS
    + SCORES
    + "%c = constant(value = 0.3)\n%local = mul(%s, %c)\n%qu = unit(%q)\n%ku = unit(%k)\n"
    + "%kut = permute(%ku, axes = (0, 1, 3, 2))\n%f = matmul(%qu, %kut)\n%two = constant(value = 2.0)\n"
    + "%far = mul(%two, %f)\n%u = near_far(%local, %far, block = 2)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
    "near and far the same": HEADS
    + SCORES
    + "%u = near_far(%s, %s, block = 2)\n%w = causal(%u)\n"
    + END.replace("%s,", "%w,"),
}

UNIT_SCORES = (
    HEADS.replace("%q =", "%q0 =").replace("%k =", "%k0 =") + "%q = unit(%q0)\n%k = unit(%k0)\n" + SCORES
)

SHIFT = "%m = amax(%s, axes = (-1,), keepdim = true)\n%z = sub(%s, %m)\n"
NEAR_MISSES = {
    "a shift of near scores alone": HEADS
    + SCORES
    + SHIFT
    + "%qu = unit(%q)\n%far = matmul(%qu, %kt)\n%u = near_far(%z, %far, block = 2)\n"
    + END.replace("%s,", "%u,"),
    "a shift of far scores alone": HEADS
    + SCORES
    + SHIFT
    + "%qu = unit(%q)\n%near = matmul(%qu, %kt)\n%u = near_far(%near, %z, block = 2)\n"
    + END.replace("%s,", "%u,"),
    "shifts of both by the largest of each": HEADS
    + SCORES
    + SHIFT
    + "%qu = unit(%q)\n%f = matmul(%qu, %kt)\n%a = amax(%f, axes = (-1,), keepdim = true)\n%far = sub(%f, %a)\n"
    + "%u = near_far(%z, %far, block = 2)\n"
    + END.replace("%s,", "%u,"),
    "less the largest of what another dropout left": HEADS
    + SCORES
    + "%a = dropout(%s, p = 0.5)\n%o = dropout(%s, p = 0.5)\n%m = amax(%o, axes = (-1,), keepdim = true)\n"
    + "%u = sub(%a, %m)\n"
    + END.replace("%s,", "%u,"),
    "scores as whole numbers": HEADS
    + SCORES
    + '%c = constant(value = 2.5)\n%r = mul(%s, %c)\n%i = cast(%r, dtype = "int")\n%u = cast(%i, dtype = "float")\n'
    + END.replace("%s,", "%u,"),
    "weights as whole numbers": HEADS
    + SCORES
    + '%p = softmax(%s, axis = -1)\n%i = cast(%p, dtype = "int")\n%f = cast(%i, dtype = "float")\n'
    + "%y = matmul(%f, %v)\nreturn %y",
    "weights as truth values": HEADS
    + SCORES
    + '%p = softmax(%s, axis = -1)\n%i = cast(%p, dtype = "bool")\n%f = cast(%i, dtype = "float")\n'
    + "%y = matmul(%f, %v)\nreturn %y",
    "a mask under a gain that is positive by assertion": HEADS
    + '%tau = weight(init = ("zeros",), label = "tau") : float[4, 1, 1]\n%a = assume_bound(%tau, bound = 1.0)\n'
    + "%c = constant(value = 2.0)\n%less = neg(%c)\n%g = sub(%a, %less)\n"
    + SCORES
    + "%u = causal(%s)\n%w = mul(%u, %g)\n"
    + END.replace("%s,", "%w,"),
    "a finite fill, which counts in a row that sees no key": UNIT_SCORES
    + "%u = window(%s, width = 1, fill = -10000.0)\n"
    + END.replace("%s,", "%u,"),
    "a fill of bounded scores that does not hide": UNIT_SCORES
    + "%u = causal(%s, fill = -2.0)\n"
    + END.replace("%s,", "%u,"),
    "weights read elsewhere": HEADS
    + SCORES
    + "%p = softmax(%s, axis = -1)\n%o = matmul(%p, %v)\n%a = amax(%p, axes = (-1,), keepdim = true)\n"
    + "%y = mul(%o, %a)\nreturn %y",
    "scores read elsewhere": HEADS
    + SCORES
    + "%p = softmax(%s, axis = -1)\n%o = matmul(%p, %v)\n%a = amax(%s, axes = (-1,), keepdim = true)\n"
    + "%y = mul(%o, %a)\nreturn %y",
    "attention over channels, as wide as the run says": PLAIN
    + "%qt = permute(%q, axes = (0, 2, 1))\n%s = matmul(%qt, %k)\n%vt = permute(%k, axes = (0, 2, 1))\n"
    + "%p = softmax(%s, axis = -1)\n%y = matmul(%p, %vt)\nreturn %y",
    "dropout on the weights": HEADS
    + SCORES
    + "%p = softmax(%s, axis = -1)\n%o = dropout(%p, p = 0.1)\n%y = matmul(%o, %v)\nreturn %y",
    "weights returned as well": HEADS + SCORES + END + ", %p",
    "scores returned as well": HEADS + SCORES + END + ", %s",
    "softmax over the queries": HEADS + SCORES + END.replace("axis = -1", "axis = -2"),
    "softmax over the heads": HEADS + SCORES + END.replace("axis = -1", "axis = 1"),
    "weights scaled behind the softmax": HEADS
    + SCORES
    + "%p = softmax(%s, axis = -1)\n%c = constant(value = 0.5)\n%o = mul(%p, %c)\n%y = matmul(%o, %v)\nreturn %y",
    "softcap": HEADS + SCORES + "%u = tanh(%s)\n" + END.replace("%s,", "%u,"),
    "additive bias": HEADS
    + "%bias = input() : float[n, n]\n"
    + SCORES
    + "%u = add(%s, %bias)\n"
    + END.replace("%s,", "%u,"),
    "sum of two products": HEADS
    + SCORES
    + "%qu = unit(%q)\n%s2 = matmul(%qu, %kt)\n%u = add(%s, %s2)\n"
    + END.replace("%s,", "%u,"),
    "a factor for each key": HEADS
    + "%gain = input() : float[n]\n"
    + SCORES
    + "%u = mul(%s, %gain)\n"
    + END.replace("%s,", "%u,"),
    "a mask negated": HEADS + SCORES + "%u = causal(%s)\n%w = neg(%u)\n" + END.replace("%s,", "%w,"),
    "a mask under a gain of unknown sign": HEADS
    + '%tau = weight(init = ("zeros",), label = "tau") : float[4, 1, 1]\n'
    + SCORES
    + "%u = causal(%s)\n%w = mul(%u, %tau)\n"
    + END.replace("%s,", "%w,"),
    "the transposed mask": HEADS
    + "%qt = permute(%q, axes = (0, 1, 3, 2))\n%r = matmul(%k, %qt)\n%u = causal(%r)\n"
    + "%w = permute(%u, axes = (0, 1, 3, 2))\n"
    + END.replace("%s,", "%w,"),
    "a clamp that bites": HEADS
    + SCORES
    + "%u = clamp(%s, low = -1.0, high = 1.0)\n"
    + END.replace("%s,", "%u,"),
    "a clamp over the mask": HEADS.replace("%q =", "%q0 =").replace("%k =", "%k0 =")
    + "%q = unit(%q0)\n%k = unit(%k0)\n"
    + SCORES
    + "%u = causal(%s)\n%w = clamp(%u, low = -1.0, high = 1.0)\n"
    + END.replace("%s,", "%w,"),
    "a fill that does not hide": HEADS
    + SCORES
    + "%u = causal(%s, fill = -2.0)\n"
    + END.replace("%s,", "%u,"),
    "exp of other scores in the sum": HEADS
    + SCORES
    + "%qu = unit(%q)\n%s2 = matmul(%qu, %kt)\n%e = exp(%s)\n%f = exp(%s2)\n"
    + "%t = sum(%f, axes = (-1,), keepdim = true)\n%p = div(%e, %t)\n%y = matmul(%p, %v)\nreturn %y",
    "alibi scaled": HEADS
    + SCORES
    + "%u = alibi(%s)\n%c = constant(value = 0.5)\n%w = mul(%u, %c)\n"
    + END.replace("%s,", "%w,"),
    "keys repeated otherwise than values": """
%q = input() : float[b, 4, n, 8]
%k = input() : float[b, 1, n, 8]
%v = input() : float[b, 4, n, 3]
"""
    + SCORES
    + END,
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spelling_is_recognised_and_means_the_same(spelling: str) -> None:
    before = program(spelling)
    after = recognise_attention(before)
    verify(after, "attention")
    assert len(attentions(after)) == 1
    left = {node.op for graph in after.graphs for node in graph.nodes}
    assert not left & {
        "softmax",
        "matmul",
        "causal",
        "padding",
        "window",
        "documents",
        "alibi",
        "exp",
        "near_far",
    }
    torch.testing.assert_close(results(after), results(before), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spelling", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_miss_stays_as_it_is(spelling: str) -> None:
    before = program(spelling)
    assert recognise_attention(before) == before


@pytest.mark.parametrize(("steps", "factor"), [('%w = cast(%c, dtype = "int")', 2.0), ("%w = neg(%c)", -2.5)])
def test_a_constant_is_what_is_computed(steps: str, factor: float) -> None:
    """int(2.5) is 2, and no factor of a scale."""
    body = (
        HEADS
        + SCORES
        + f"%c = constant(value = 2.5)\n{steps}\n%u = mul(%s, %w)\n"
        + END.replace("%s,", "%u,")
    )
    before = program(body)
    after, scaled = (
        recognise_attention(before),
        program(body.replace("%w)", "%c)").replace("2.5", str(factor))),
    )
    torch.testing.assert_close(results(after), results(scaled), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(results(before), results(scaled), rtol=1e-12, atol=1e-13)


def test_the_same_near_and_far_may_be_shifted_together() -> None:
    body = HEADS + SCORES + SHIFT + "%u = near_far(%z, %z, block = 2)\n" + END.replace("%s,", "%u,")
    before = program(body)
    after = recognise_attention(before)
    assert len(attentions(after)) == 1
    torch.testing.assert_close(results(after), results(before), rtol=1e-12, atol=1e-13)


def test_spelling_twice_what_many_read_is_compared_once() -> None:
    """Of 60 doublings each, there are 2^60 ways through."""
    twice = "\n".join(f"%{x}{i + 1} = add(%{x}{i}, %{x}{i})" for x in "eo" for i in range(60))
    body = f"{HEADS}{SCORES}%e0 = exp(%s)\n%o0 = exp(%s)\n{twice}\n"
    for name, doubled in (("w", "e60"), ("x", "o60")):
        body += f"%{name} = polynomial(%{doubled}, coefficients = (1.0, 1.0, 0.5))\n"
    body += "%t = sum(%x, axes = (-1,), keepdim = true)\n%p = div(%w, %t)\n%y = matmul(%p, %v)\nreturn %y"
    before = program(body)
    assert recognise_attention(before) == before


def only(spelling: str) -> Node:
    (node,) = attentions(recognise_attention(program(SPELLINGS.get(spelling, spelling))))
    return node


@pytest.mark.parametrize(
    ("spelling", "scale"),
    [
        ("scale on the scores", 0.3),
        ("scale on q", 0.3),
        ("scale on k, before its transposition", 0.3),
        ("scale on k, behind its transposition", 0.3),
        ("division by a computed root", 8.0**-0.5),
        ("scale behind the masks", 0.3),
        ("both negated", 1.0),
        ("near and far", 2.0),
        ("causal, then padding", 1.0),
    ],
)
def test_constant_factors_are_one_scale(spelling: str, scale: float) -> None:
    assert only(spelling)["scale"] == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    ("spelling", "attribute", "expected"),
    [
        ("padding, then causal", "causal", True),
        ("padding, then causal", "roles", ("padding",)),
        ("window and documents", "window", 3),
        ("window and documents", "roles", ("documents",)),
        ("two windows", "window", 2),
        ("alibi", "alibi", True),
        ("near and far", "near", 2),
        ("near and far", "roles", ("near_q", "near_k")),
        ("near and far the same", "near", 2),
        ("near and far the same", "roles", ()),
        ("near and far", "bound", 2.0),
        ("a clamp without effect", "bound", 1.0),
        ("assume_bound outside of the mask", "bound", 60.0),
        ("assume_bound outside of the mask", "asserted", True),
        ("scale on q", "bound", None),
    ],
)
def test_node_says_what_was_recognised(spelling: str, attribute: str, expected: object) -> None:
    assert only(spelling)[attribute] == expected


def test_grouped_heads_are_taken_before_their_repetition() -> None:
    for spelling in ("grouped", "grouped, normalised behind the repetition"):
        after = recognise_attention(program(SPELLINGS[spelling]))
        (node,) = attentions(after)
        assert [after["main"][name].tensor.shape[1].constant for name in node.inputs] == [4, 2, 2]


def test_only_the_far_part_must_be_bounded() -> None:
    """The local logits of `near and far` are free; swapped, the far ones are."""
    far_is_free = SPELLINGS["near and far"].replace("near_far(%local, %far", "near_far(%far, %local")
    assert only("near and far")["bound"] == 2.0
    assert only(far_is_free)["bound"] is None


def test_proof_is_that_of_the_far_logits() -> None:
    proof = only("near and far")["proof"]
    assert isinstance(proof, tuple)
    assert [str(line).split(":")[0] for line in proof] == [
        "rows of qu have norm at most 1",
        "rows of ku have norm at most 1",
        "|f| is at most 1",
        "|far| is at most 2",
    ]


def test_attention_without_a_bound_names_what_is_not_limited() -> None:
    one_free = HEADS + "%u = unit(%q)\n" + TRANSPOSED + "%s = matmul(%u, %kt)\n" + END
    assert only("scale on q")["proof"] == ("nothing limits the rows of q", "nothing limits the rows of k")
    assert only(one_free)["proof"] == ("nothing limits the rows of k",)


def test_outer_factor_counts_in_the_bound() -> None:
    """A bound asserted below a gain is worth the gain times it; the least bound on the way is taken."""
    gained = (
        HEADS + SCORES + "%a = assume_bound(%s, bound = 3.0)\n%c = constant(value = -2.0)\n%u = mul(%a, %c)\n"
    )
    assert only(gained + END.replace("%s,", "%u,"))["bound"] == 6.0
    limited = gained + "%w = assume_bound(%u, bound = 4.0)\n"
    assert only(limited + END.replace("%s,", "%w,"))["bound"] == 4.0


def test_name_and_place_are_those_of_the_result() -> None:
    after = recognise_attention(program(SPELLINGS["without heads"]))
    (node,) = attentions(after)
    assert node.name == "y"
    assert [str(after["main"][name].tensor) for name in node.inputs[:3]] == [
        "float[b, 1, n, 8]",
        "float[b, 1, n, 8]",
        "float[b, 1, n, 3]",
    ]


def test_two_attentions_of_a_graph() -> None:
    body = HEADS + SCORES + "%p = softmax(%s, axis = -1)\n%a = matmul(%p, %v)\n"
    body += "%s2 = matmul(%k, %kt)\n%t = causal(%s2)\n%p2 = softmax(%t, axis = -1)\n%y = matmul(%p2, %a)\nreturn %y"
    before = program(body)
    after = recognise_attention(before)
    verify(after, "attention")
    assert [node.name for node in attentions(after)] == ["a", "y"]
    torch.testing.assert_close(results(after), results(before), rtol=1e-12, atol=1e-13)


def test_weights_stay_though_nothing_reads_them() -> None:
    """A weight is a key of the state_dict: recognition may not change what a checkpoint holds."""
    body = HEADS + '%unused = weight(init = ("zeros",), label = "unused") : float[3]\n' + SCORES + END
    assert "unused" in recognise_attention(program(body))["main"].by_name
