"""Attention in many spellings, and in spellings that only look like one: chains of what may stand around a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attack.grower import Grower, Typed, Unfit, constant_shape
from attack.operations import COEFFICIENTS, log_gate

Step = Callable[[Grower, Typed], str]


def _weight(g: Grower, *shape: int, initial: str = "normal(std = 1.0)") -> str:
    return g.declare("weight", shape or (1,), initial).text


# ---------------------------------------------------------------- rows of queries and keys


def _projected(g: Grower, x: Typed) -> str:
    return f"{x.text} @ {_weight(g, x.size(-1) or 1, g.rng.choice((1, 2, 2, 4)))}"


ROWS: dict[str, Step] = {
    "projection": _projected,
    "offset": lambda g, x: f"{x.text} + {_weight(g, x.size(-1) or 1)}",
    "unit": lambda g, x: f"unit({x.text})",
    "rms_norm": lambda g, x: f"rms_norm({x.text}, {_weight(g, x.size(-1) or 1)})",
    "rms_norm of ones": lambda g, x: f"0.7 * rms_norm({x.text}, ones(({x.size(-1)},)))",
    "layer_norm": lambda g, x: f"layer_norm({x.text}, ones(({x.size(-1)},)), zeros(({x.size(-1)},)))",
    "clamp": lambda g, x: f"clamp({x.text}; low = -0.8, high = {g.rng.choice((0.5, 1.0))})",
    "tanh": lambda g, x: f"tanh({x.text})",
    "softmax": lambda g, x: f"softmax({x.text})",
    "number": lambda g, x: f"{g.number(0.5, -1.0, 2.0)} * {x.text}",
    "negative": lambda g, x: f"-{x.text}",
    "rotary": lambda g, x: f"rotary({x.text}; base = 100.0)",
    "token before": lambda g, x: f"shift({x.text})",
    "convolution": lambda g, x: f"depthwise({x.text}, {_weight(g, g.rng.randint(1, 3), x.size(-1) or 1)})",
    "gain": lambda g, x: f"{x.text} * {gain(g)}",
    "divisor": lambda g, x: f"{x.text} / {gain(g)}",
    "cast": lambda g, x: f"float(int({g.positive()} * {x.text}))",
    "assumed": lambda g, x: f"assume_bound({x.text}; bound = {g.positive()})",
    "sine": lambda g, x: f"{x.text} + sinusoid({x.shape[-2]}, {x.size(-1)})",
}


def _tau(g: Grower) -> str:
    return _weight(g, 1, initial=g.rng.choice(("zeros()", "ones()", "normal(std = 1.0)")))


def _run_time(g: Grower, _: Typed) -> str:
    x = g.pick(where=lambda each: each.rank >= 1 and each.named)
    return f"{x.text}[{', '.join('0' * x.rank)}]"


GAINS: dict[str, Step] = {
    "number": lambda g, x: g.number(0.5, 1.5, -1.0, 0.0),
    "weight": lambda g, x: _tau(g),
    "sigmoid": lambda g, x: f"({g.positive()} * sigmoid({_tau(g)}))",
    "clamped": lambda g, x: f"clamp({_tau(g)}; low = {g.rng.choice((-1.0, 0.0, 0.25))}, high = 2.0)",
    "assumed": lambda g, x: f"({g.positive()} * assume_bound({_tau(g)}; bound = {g.positive()}))",
    "assumed below": lambda g, x: f"(1.5 + assume_bound({_tau(g)}; bound = 1.0))",
    "exp": lambda g, x: f"exp(tanh({_tau(g)}))",
    "rounded": lambda g, x: (
        f"(float(int(sigmoid({_tau(g)}) * {g.positive()} + {g.positive()})) - {g.number(0.8, 0.3, 1.5)})"
    ),
    "rounded only": lambda g, x: f"float(int(3.0 * sigmoid({_tau(g)})))",
    "run time": _run_time,
    "bounded run time": lambda g, x: f"tanh({_run_time(g, x)})",
    "positive": lambda g, x: f"(abs({_tau(g)}) + 0.2)",
    "buffer": lambda g, x: g.declare("buffer", (1,), "constant(0.7)").text,
    "rotated": lambda g, x: f"max({_tau(g)}, 0.5)",
}


OFTEN = {"gain": 4, "shift": 3, "near_far": 3, "assumed": 3, "cast": 2, "causal forget": 2}
"""Steps that are taken more often than others: those where a claim hangs on what stands around them."""


def _step(g: Grower, table: dict[str, Step], kind: str, x: Typed) -> str:
    name = g.rng.choices(tuple(table), [OFTEN.get(each, 1) for each in table])[0]
    text = table[name](g, x)
    g.used[f"{kind}: {name}"] += 1
    return text


def gain(g: Grower) -> str:
    """A factor of scores or rows: constant, learned, limited, asserted, or decided by a run."""
    return _step(g, GAINS, "gain", g.signature[0])


def rows(g: Grower, x: Typed, limited: bool) -> Typed:
    """Queries or keys from x, with steps at random; `limited` rows have a norm that is proved."""
    x = g.sometimes(_projected(g, x)) if g.rng.random() < 0.5 and x.size(-1) else x
    for _ in range(g.rng.choice((0, 0, 1, 2))):
        x = g.sometimes(_step(g, ROWS, "rows", x))
    if limited:
        x = g.sometimes(f"unit({x.text})")
    return x


# ---------------------------------------------------------------- scores


def _shift(g: Grower, s: Typed) -> str:
    return f"{s.text} - max({s.text}; axis = -1, keepdim = true)"


def _padding(g: Grower, s: Typed) -> str:
    mask = g.pick(
        "bool", lambda each: each.rank == 2 and s.rank >= 3 and each.shape == (s.shape[0], s.shape[-1])
    )
    return f"padding({s.text}, {mask.text})"


SCORES: dict[str, Step] = {
    "number": lambda g, s: f"{g.number(0.5, -1.3, 0.0, 2.0)} * {s.text}",
    "divided": lambda g, s: f"{s.text} / sqrt({g.positive()})",
    "gain": lambda g, s: f"{s.text} * {gain(g)}",
    "divisor": lambda g, s: f"{s.text} / {gain(g)}",
    "negative": lambda g, s: f"-{s.text}",
    "causal": lambda g, s: f"causal({s.text})",
    "causal again": lambda g, s: f"causal({s.text})",
    "window": lambda g, s: f"window({s.text}; width = {g.rng.randint(1, 4)})",
    "padding": _padding,
    "documents": lambda g, s: f"documents({s.text}, ids)",
    "prefix": lambda g, s: f"prefix({s.text}, max(ids; axis = -1))",
    "forget": lambda g, s: f"forget({s.text}, {log_gate(g, s)})",
    "causal forget": lambda g, s: f"causal(forget({s.text}, {log_gate(g, s)}))",
    "alibi": lambda g, s: f"alibi({s.text})",
    "clamp": lambda g, s: (
        f"clamp({s.text}; low = {g.rng.choice((-4.0, -1.0))}, high = {g.rng.choice((1.0, 3.0))})"
    ),
    "assumed": lambda g, s: f"assume_bound({s.text}; bound = {g.positive()})",
    "cast": lambda g, s: f"float(int({g.positive()} * {s.text}))",
    "float of float": lambda g, s: f"float({s.text} + 0.0)",
    "shift": _shift,
    "other shift": lambda g, s: f"{s.text} - max({s.text}; axis = {g.rng.choice((-2, -1))}, keepdim = true)",
    "mean shift": lambda g, s: f"{s.text} - mean({s.text}; axis = -1, keepdim = true)",
    "constant": lambda g, s: f"{s.text} + {g.number(0.5)}",
    "dropout": lambda g, s: f"dropout({s.text}; p = {g.rng.choice((0.0, 0.2))})",
    "twice turned": lambda g, s: f"{s.text}.T.T",
    "near_far": lambda g, s: near_far(g, s),
    "tanh": lambda g, s: f"2.0 * tanh({s.text})",
}


def chain(g: Grower, s: Typed, most: int = 4) -> Typed:
    """Scores after steps at random, each of which may also stand inside of a branch of `near_far`."""
    for _ in range(g.rng.randint(0, most)):
        try:
            s = g.sometimes(_step(g, SCORES, "scores", s))
        except Unfit:
            continue
    return s


def near_far(g: Grower, s: Typed) -> str:
    """s joined with scores of the same kind: the same with other steps, or those of other rows."""
    other = s
    if g.rng.random() < 0.6:
        matching = [each for each in g.pool if each.dtype == "float" and each.shape == s.shape]
        other = g.rng.choice(matching or [s])
    pair = [chain(g, each, 2) for each in (other, s)]
    if g.rng.random() < 0.3:  # a shift of one branch is none of the whole
        pair[0] = g.say(_shift(g, pair[0]), inline=True)
    g.rng.shuffle(pair)
    return f"near_far({pair[0].text}, {pair[1].text}; block = {g.rng.choice((1, 2, 4, 8))})"


def product(g: Grower, q: Typed, k: Typed) -> Typed:
    """q @ k.T in one of its spellings."""
    spelling = g.rng.choice(
        ("{0} @ {1}.T", "{0} @ {1}.T", "({1} @ {0}.T).T", "{0} @ transpose({1})",
         "transpose({1} @ {0}.T; first = -1, second = -2)")
    )  # fmt: skip
    return g.sometimes(spelling.format(q.text, k.text))


# ---------------------------------------------------------------- weights and values


WEIGHTED: dict[str, str] = {
    "softmax": "softmax({s}) @ {v}",
    "softmax of the axis": "softmax({s}; axis = -1) @ {v}",
    "softmax along queries": "softmax({s}; axis = -2) @ {v}",
    "turned": "softmax({s}.T; axis = -2).T @ {v}",
    "values turned": "({v}.T @ softmax({s}).T).T",
    "quotient": "(exp({s}) / sum(exp({s}); axis = -1, keepdim = true)) @ {v}",
    "divided after": "(exp({s}) @ {v}) / sum(exp({s}); axis = -1, keepdim = true)",
    "rows": "normalize_rows(exp({s})) @ {v}",
    "rows with a shift": "normalize_rows(exp({s} - max({s}; axis = -1, keepdim = true))) @ {v}",
    "polynomial": "normalize_rows(polynomial({s}; {p})) @ {v}",
    "masked polynomial": "normalize_rows(causal(polynomial({s}; {p}))) @ {v}",
    "polynomial quotient": "(polynomial({s}; {p}) / sum(polynomial({s}; {p}); axis = -1, keepdim = true)) @ {v}",
    "decayed": "normalize_rows(decay(causal(exp({s})), {g})) @ {v}",
    "decayed polynomial": "normalize_rows(decay(causal(polynomial({s}; {p})), {g})) @ {v}",
    "decayed near and polynomial": (
        "normalize_rows(causal(decay(near_far(exp({s}), polynomial({s}; {p}); 2), {g}))) @ {v}"
    ),
    "near and polynomial": "normalize_rows(near_far(exp({s}), polynomial({s}; {p}); 2)) @ {v}",
    "rounded weights": "float(int(3.0 * softmax({s}))) @ {v}",
    "cast weights": "float(int(softmax({s}))) @ {v}",
    "doubled": "(2.0 * softmax({s})) @ {v}",
    "read twice": "softmax({s}) @ {v} + 0.1 * sum(softmax({s}); axis = -1, keepdim = true)",
    "dropped": "dropout(softmax({s}); p = 0.1) @ {v}",
    "masked late": "causal(softmax({s})) @ {v}",
}
"""By name; {s} are scores, {v} values, {p} coefficients, {g} a log gate. Some only look like attention."""


def _weighted(g: Grower, s: Typed, v: Typed) -> Typed:
    likely = 0.5 if g.rng.random() < 0.5 else 0.0
    name = "softmax" if g.rng.random() < likely else g.rng.choice(tuple(WEIGHTED))
    gate = log_gate(g, s) if "{g}" in WEIGHTED[name] else ""
    text = WEIGHTED[name].format(s=s.text, v=v.text, p=g.rng.choice(COEFFICIENTS), g=gate)
    if name == "masked late":
        text = text.replace("causal(softmax", "normalize_rows(causal(softmax").replace(") @", ")) @")
    result = g.say(text)
    g.used[f"weights: {name}"] += 1
    return result


# ---------------------------------------------------------------- operands


def _plain(g: Grower) -> tuple[Typed, Typed, Typed]:
    x = g.pick(where=lambda each: each.rank == 3 and each.size(-1) is not None)
    other = x if g.rng.random() < 0.6 else g.pick(
        where=lambda each: each.rank == 3 and each.shape[0] == x.shape[0] and each.shape[-1] == x.shape[-1]
    )  # fmt: skip
    return x, other, other


def _heads(g: Grower) -> tuple[Typed, Typed, Typed]:
    x, other, _ = _plain(g)
    heads, width = g.rng.choice((1, 2, 3)), g.rng.choice((1, 2, 2, 4))
    groups = g.rng.choice([h for h in (1, 2, 3) if heads % h == 0])
    made = []
    for source, count in ((x, heads), (other, groups), (other, groups)):
        weight = _weight(g, source.size(-1) or 1, count * width)
        made.append(g.sometimes(f"split_heads({source.text} @ {weight}; heads = {count})"))
    if groups != heads or g.rng.random() < 0.1:
        made[1:] = [g.sometimes(f"repeat_heads({each.text}; times = {heads // groups})") for each in made[1:]]
    return made[0], made[1], made[2]


def _wide(g: Grower) -> tuple[Typed, Typed, Typed]:
    q = g.pick(where=lambda each: each.rank == 4 and each.size(-1) is not None)
    k = g.pick(where=lambda e: e.rank == 4 and e.shape[:2] == q.shape[:2] and e.shape[-1] == q.shape[-1])
    v = g.pick(where=lambda e: e.rank == 4 and e.shape[:3] == k.shape[:3])
    return q, k, v


def _flat(g: Grower) -> tuple[Typed, Typed, Typed]:
    x, other, _ = _plain(g)
    return g.sometimes(f"{x.text}[0]"), g.sometimes(f"{other.text}[0]"), g.sometimes(f"{other.text}[0]")


_OPERANDS = (_plain, _plain, _heads, _heads, _wide, _flat)


def _chained(g: Grower) -> Typed:
    """An attention to what another one gives, whose values have a proved range: its keys are of a known number."""
    x = g.pick(where=lambda each: each.rank >= 3 and constant_shape(each.shape[-2:]))
    values = g.rng.choice(("unit({})", "0.5 * unit({})", "tanh({})", "clamp({}; low = -0.5, high = 0.5)"))
    s = g.sometimes(f"assume_bound({x.text} @ {x.text}.T; bound = {g.positive()})")
    inner = g.say(f"softmax({s.text}) @ {g.sometimes(values.format(x.text)).text}")
    return g.say(f"softmax({g.rng.choice((0.02, 0.1, 0.5))} * ({inner.text} @ {inner.text}.T)) @ {x.text}")


def attention(g: Grower) -> Typed:
    """An attention, or what looks like one. Raises Unfit where it did not come about."""
    if g.rng.random() < 0.06:
        return _chained(g)
    q, k, v = g.rng.choice(_OPERANDS)(g)
    limited = g.rng.random() < 0.7
    same = g.rng.random() < 0.2
    queries = rows(g, q, limited)
    keys = queries if same and q.text == k.text else rows(g, k, limited)
    if queries.shape[-1] != keys.shape[-1]:
        width = keys.size(-1) or 1
        queries = replace(queries, text=f"unit({queries.text} @ {_weight(g, queries.size(-1) or 1, width)})")
    s = chain(g, product(g, queries, keys))
    if g.rng.random() < 0.2:  # the user's word of scores that nothing limits: what guards are for
        masks = g.rng.choice(("{}", "causal({})", "near_far({0}, {0}; block = 2)"))
        s = g.sometimes(masks.format(f"assume_bound({product(g, q, k).text}; bound = {g.positive()})"))
    result = _weighted(g, s, v)
    if result.rank == 4 and g.rng.random() < 0.6:
        result = g.say(f"merge_heads({result.text})")
    return result
