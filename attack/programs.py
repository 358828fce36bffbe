"""Random well-typed programs: blocks with several call sites, repeats, branches, attention in between, a budget."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attack.attentions import attention
from attack.grower import Grower, Typed, Unfit
from attack.operations import statement
from fastgrad_compiler.attention.table import attention_table, is_own
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import ON_VIOLATION
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.source import Source

LONGEST = 40  # of a run-time dim
MOST_RESULTS = 4


@dataclass(frozen=True)
class Grown:
    """A program: its text, what it uses, and what was refused on the way."""

    text: str
    used: Counter[str]
    refused: Counter[str]
    tried: int


def grow(seed: int) -> Grown:
    """The program of a seed."""
    rng = random.Random(seed)
    params = {f"p{i}": str(rng.choice((0.5, 1.5, -0.7))) for i in range(rng.randint(0, 2))}
    before = _header(rng, params)
    used, refused, tried = Counter[str](), Counter[str](), 0
    blocks: list[_Block] = []
    inputs = _inputs(rng)
    for index in range(rng.choice((0, 0, 1, 2))):
        grower = Grower(rng, before, inputs, f"part{index}", prefix="in_"[index:], params=params)
        blocks += _block(grower)
        used, refused, tried = used + grower.used, refused + grower.refused, tried + grower.tried
    texts = {block.name: block.text for block in blocks}
    g = Grower(rng, before, inputs, "attacked", texts, params=params)
    _fill(g, rng.randint(2, 12), blocks)
    text = _finished(g)
    return Grown(_with_budget(rng, text), used + g.used, refused + g.refused, tried + g.tried)


def _header(rng: random.Random, params: dict[str, str]) -> str:
    multiple = rng.choice((1, 1, 1, 2, 4))
    lines = ["use std", *(f"param {name} = {value}" for name, value in params.items()), "dim b"]
    limit = rng.choice((LONGEST, 4096))
    lines += [f"dim n <= {limit}" + (f" % {multiple}" if multiple > 1 else ""), f"dim m <= {limit}"]
    return "\n".join(lines) + "\n"


def _inputs(rng: random.Random) -> list[Typed]:
    b, n, m = map(Dim.of, "bnm")
    d, e, h = (Dim.of(rng.choice(choices)) for choices in ((1, 2, 4, 6), (1, 2, 4), (1, 2, 3)))
    floats = {
        "x": (b, n, d),
        "y": (b, m, d),
        "q": (b, h, n, e),
        "k": (b, h, m, e),
        "z": (b, n),
        "long": (b, n * 2, d),
        "single": (b, Dim.of(1), d),
        "image": (b, Dim.of(2), Dim.of(4), Dim.of(4)),
    }
    found = [Typed(name, "float", shape) for name, shape in floats.items()]
    found += [Typed("tokens", "int", (b, n)), Typed("ids", "int", (b, n))]
    return [*found, Typed("mask", "bool", (b, n)), Typed("keys", "bool", (b, m))]


# ---------------------------------------------------------------- bodies


def _fill(g: Grower, statements: int, blocks: list[_Block]) -> None:
    done = attempts = 0
    while done < statements and attempts < 4 * statements:
        attempts += 1
        kind = g.rng.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
        saved = list(g.lines), list(g.pool)
        try:
            kind(g, blocks)
            done += 1
        except Unfit:
            g.lines, g.pool = saved


def _call(g: Grower, blocks: list[_Block]) -> None:
    if not blocks:
        raise Unfit
    block = g.rng.choice(blocks)
    arguments = [
        g.pick(each.dtype, lambda other, each=each: other.shape == each.shape).text  # type: ignore[misc]
        for each in block.inputs
    ]
    values = g.rng.choice(("", f"; scale = {g.number(0.5, 2.0)}", "; flag = false"))
    label = f" as {g.fresh('label')}" if g.rng.random() < 0.5 else ""
    names = [g.fresh() for _ in range(block.results)]
    targets = names[0] if len(names) == 1 else f"({', '.join(names)})"
    line = f"{targets} = {block.name}({', '.join(arguments)}{values}){label}"
    for name in names:
        g.pool.append(g.typed([line], name))
    g.lines.append(line)
    g.used["block"] += 1


def _library(g: Grower, _: list[_Block]) -> None:
    x = g.pick(where=lambda each: each.rank == 3 and (each.size(-1) or 1) % 2 == 0)
    mask = [each.text for each in g.pool if each.dtype == "bool" and each.shape == x.shape[:2]]
    options = [f"heads = {g.rng.choice((1, 2))}", "qk_dim = 2"]
    more = ["gain = 1.0", "gain = 2.0, learned = true", "near = 4, gain = 1.0", "rope = 100.0", "window = 2",
            "causal = true", "bias = true"]  # fmt: skip
    options += g.rng.sample(more, g.rng.randint(0, 2))
    name, given = ("attention_padded", f", {mask[0]}") if mask and g.rng.random() < 0.3 else ("attention", "")
    if name == "attention" and g.rng.random() < 0.2:
        options.append("forget = true")
    kind = g.rng.choice((f"{name}({x.text}{given}; {', '.join(options)})", f"mlp({x.text}; hidden = 4)",
                         f"swiglu({x.text}; hidden = 4)", f"rms_norm({x.text})", f"layer_norm({x.text})",
                         f"short_conv({x.text}; width = 2)"))  # fmt: skip
    if kind.count("gain") > 1:
        raise Unfit
    g.say(f"std.{kind}")
    g.used["std"] += 1


def _repeat(g: Grower, blocks: list[_Block]) -> None:
    carried = g.pick(where=lambda each: each.named and each.rank > 0)
    with g.inside(
        f"repeat {g.fresh('i')} in {g.rng.randint(1, 3)} {{", f"{carried.text} = {carried.text} * 0.8"
    ):
        _fill(g, g.rng.randint(1, 3), blocks)
        g.lines.append(f"{carried.text} = {_like(g, carried)}")
    g.used["repeat"] += 1


def _like(g: Grower, carried: Typed) -> str:
    """An expression of the type of a value, of one that was made last."""
    last = g.pick()
    if last.shape == carried.shape:
        return f"0.5 * {carried.text} + tanh({last.text})"
    return f"{carried.text} * 0.9 + tanh(mean({last.text}))"


def _branch(g: Grower, _: list[_Block]) -> None:
    x, name = g.pick(), g.fresh()
    condition = g.rng.choice(("true", "1 < 2", "not false", *(f"{param} > 0.0" for param in g.params)))
    lines = [f"if {condition} {{", f"{name} = {x.text} * 1.5", "} else {", f"{name} = {x.text} * -0.5", "}"]
    g.raw(lines, name)
    g.used["if"] += 1


_KINDS: dict[Callable[[Grower, list[_Block]], object], float] = {
    lambda g, _: statement(g): 8.0,
    lambda g, _: attention(g): 3.0,
    _call: 2.0,
    _library: 0.8,
    _repeat: 0.8,
    _branch: 0.5,
}


@dataclass(frozen=True)
class _Block:
    """A block that was grown, and what it takes."""

    name: str
    text: str
    inputs: tuple[Typed, ...]
    results: int


def _block(g: Grower) -> list[_Block]:
    """The statements of a model as a block with two compile-time values; none where nothing came about."""
    _fill(g, g.rng.randint(1, 4), [])
    results = _leaves(g, g.rng.choice((1, 2)))
    if not results:
        return []
    result, *rest = results
    g.lines += ["if flag {", f"out = {result.text} * scale", "} else {", f"out = {result.text} + scale", "}"]
    inputs = tuple(each for each in g.signature if _reads(g.lines, each.text)) or (g.signature[0],)
    signature = ", ".join(f"{each.text}: {each.type}" for each in inputs)
    body = "\n".join(f"    {line}" for line in g.lines)
    values = "scale: float = 1.0, flag: bool = true"
    types, names = result.type, "out"
    if rest:
        types, names = f"({types}, {rest[0].type})", f"(out, {rest[0].text})"
    text = f"block {g.name}({signature}; {values}) -> {types} {{\n{body}\n    return {names}\n}}\n"
    return [_Block(g.name, text, inputs, len(results))]


def _reads(lines: list[str], name: str) -> bool:
    return any(re.search(rf"\b{name}\b", line) for line in lines)


def _leaves(g: Grower, most: int) -> list[Typed]:
    """Values that no statement reads, floats before others, the last ones first."""
    own = [each for each in g.pool if each not in g.signature and each.named]
    text = "\n".join(g.lines)
    unread = [each for each in own if len(re.findall(rf"\b{each.text}\b", text)) == 1] or own[-1:]
    floats = [each for each in unread if each.dtype == "float"]
    return floats[::-1][:most]


def _finished(g: Grower) -> str:
    results = _leaves(g, MOST_RESULTS) or [g.signature[0]]
    read = [each for each in g.signature if _reads(g.lines, each.text) or each in results]
    bound = {str(dim) for each in read for dim in each.shape}
    text = "\n".join(g.lines)
    binders = [
        each for n, each in (("n", "z"), ("m", "keys")) if n not in bound and re.search(rf"\b{n}\b", text)
    ]
    g.signature = [each for each in g.signature if each in read or each.text in binders] or g.signature[:1]
    return g.text(results)


# ---------------------------------------------------------------- budgets


def _with_budget(rng: random.Random, text: str) -> str:
    """The text with a budget that approximates what can be, where anything can."""
    entries = [f"output <= {rng.choice((0.5, 0.05))}", f"on_violation = {rng.choice(ON_VIOLATION)}"]
    if rng.random() < 0.2:
        entries.append(f"near = {rng.choice((2, 4))}")
    try:
        recognised = run(elaborate(Source("<attack>", text)), until="attention", validate=False)[-1].program
    except TfgError:
        return text
    table = [entry for entry in attention_table(recognised) if not is_own(entry.node)]
    for entry in table:
        pins = [f'at "{entry.path}" degree = {rng.randint(1, 6)}']
        if rng.random() < 0.3:
            pins.append(f'at "{entry.path}" family = {rng.choice(("taylor", "minimax"))}')
        if _compiles(f"{text}{_budget([*entries, *pins])}"):
            entries += pins
    budget = _budget(entries)
    return text + budget if table and _compiles(text + budget) else text


def _budget(entries: list[str]) -> str:
    return "budget {\n" + "".join(f"    {entry}\n" for entry in entries) + "}\n"


def _compiles(text: str) -> bool:
    try:
        run(elaborate(Source("<attack>", text)), until="plan", validate=False)
    except TfgError:
        return False
    return True
