"""How each operation of the language is written: one rule for each operation, from the values that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attack.grower import Grower, Typed, Unfit, constant_shape, tuple_of

Rule = Callable[[Grower], str]  # an expression; raises Unfit where the pool has no operand
IDS = 5  # ids of tokens are below it


def ranked(g: Grower, least: int, dtype: str = "float") -> Typed:
    """A value of at least so many dims."""
    return g.pick(dtype, lambda each: each.rank >= least)


def numeric(g: Grower) -> Typed:
    """A float or int value."""
    return g.pick(g.rng.choices(("float", "int"), (3, 1))[0])


def ids(g: Grower) -> str:
    """Ids below IDS, of any shape."""
    tokens = g.pick("int")
    safe = tokens.text in ("tokens", "ids")
    return (
        tokens.text if safe and g.rng.random() < 0.6 else f"clamp({tokens.text}; low = 0, high = {IDS - 1})"
    )


def keyword(g: Grower, text: str, share: float = 0.6) -> str:
    """An argument that may be left out."""
    return text if g.rng.random() < share else ""


def _of(write: Callable[[Grower, Typed], str], fits: Callable[[Typed], bool] = lambda each: True) -> Rule:
    """An operation that is written of one float that fits."""
    return lambda g: write(g, g.pick(where=fits))


def _least(rank: int) -> Callable[[Typed], bool]:
    return lambda each: each.rank >= rank


# ---------------------------------------------------------------- shape


def _reshape(g: Grower) -> str:
    x = ranked(g, 1)
    dims = list(x.shape)
    choice, last = g.rng.randrange(5), x.size(-1)
    if choice == 0 and x.rank >= 2:
        dims[-2:] = [dims[-2] * dims[-1]]
    elif choice == 1:
        dims.insert(g.rng.randint(0, x.rank), type(dims[0]).of(1))
    elif choice == 2 and last is not None and last % 2 == 0:
        dims[-1:] = [type(dims[0]).of(2), type(dims[0]).of(last // 2)]
    elif choice == 3 and x.rank >= 2:
        return f"reshape({x.text}, {', '.join(map(str, dims[:-2]))}{', ' if dims[:-2] else ''}-1)"
    elif x.rank >= 3:
        dims[:2] = [dims[0] * dims[1]]
    return f"reshape({x.text}, {tuple_of(dims)})"


def _permute(g: Grower, x: Typed) -> str:
    axes = g.rng.sample(range(x.rank), x.rank)
    if g.rng.random() < 0.3:
        axes = [axis - x.rank for axis in axes]
    return f"permute({x.text}, {tuple_of(axes)})"


def _broadcast_to(g: Grower, x: Typed) -> str:
    dims = [g.rng.choice((2, 3)) if dim.constant == 1 else dim for dim in x.shape]
    dims = [*g.rng.sample([1, 2, 3], g.rng.randint(0, 1)), *dims]
    return f"broadcast_to({x.text}, {tuple_of(dims or [2])})"


def _patches(g: Grower, x: Typed) -> str:
    sizes = [size for size in (1, 2, 4) if not any((x.size(axis) or 1) % size for axis in (2, 3))]
    return f"patches({x.text}; size = {g.rng.choice(sizes)})"


def _concat(g: Grower, x: Typed) -> str:
    axis = g.axis(x) % x.rank
    rest = [place for place in range(x.rank) if place != axis]
    others = [
        each
        for each in g.pool
        if each.dtype == "float"
        and each.rank == x.rank
        and all(each.shape[place] == x.shape[place] for place in rest)
    ]
    chosen = [x, *(g.rng.choice(others) for _ in range(g.rng.randint(0, 2)))]
    return f"concat({', '.join(each.text for each in chosen)}; axis = {g.rng.choice((axis, axis - x.rank))})"


def _stack(g: Grower, x: Typed) -> str:
    others = [each for each in g.pool if each.dtype == "float" and each.shape == x.shape]
    chosen = [x, *(g.rng.choice(others) for _ in range(g.rng.randint(0, 2)))]
    return f"stack({', '.join(each.text for each in chosen)}; axis = {g.rng.randint(-x.rank - 1, x.rank)})"


def _filled(name: str) -> Rule:
    def rule(g: Grower, x: Typed) -> str:
        dims = g.rng.choice([x.shape, x.shape[-1:], (2, x.shape[-1])])
        return f"{name}({tuple_of(dims)}{f'; value = {g.number(0.5, -2.0)}' if name == 'full' else ''})"

    return _of(rule, _least(1))


def _index(g: Grower) -> str:
    x = g.pick(g.rng.choice(("float", "float", "float", "int", "bool")), lambda each: each.rank >= 1)
    return f"{x.text}[{g.rng.choice(_INDICES)(g, x)}]"


_INDICES: tuple[Callable[[Grower, Typed], str], ...] = (
    lambda g, x: "..," + f" {g.rng.choice((0, -1))}",
    lambda g, x: ", ".join([":"] * g.rng.randrange(x.rank)) or "0",
    lambda g, x: ".., 0:1",
    lambda g, x: f".., {g.rng.randint(0, 1)}:{g.rng.randint(1, 2)}",
    lambda g, x: ", ".join([":"] * g.rng.randrange(x.rank) + ["0"]),
    lambda g, x: ", ".join([":"] * g.rng.randrange(x.rank) + ["-1:"]),
    lambda g, x: ", ".join(["0"] * g.rng.randint(1, x.rank)),
    lambda g, x: f"..{', :' if x.rank > 1 else ''}",
    lambda g, x: ".., -1:" if g.rng.random() < 0.5 else ".., :1",
)

# ---------------------------------------------------------------- lookup and positions


def _embedding(g: Grower) -> str:
    table = g.declare("weight", (g.rng.choice((IDS, 7)), g.rng.choice((1, 3, 4, 6))), "normal(std = 1.0)")
    return f"embedding({table.text}, {ids(g)})"


def _positions(name: str) -> Rule:
    return lambda g: f"{name}({g.rng.choice([dim for each in g.pool for dim in each.shape] or [2])})"


def _of_documents(g: Grower) -> tuple[Typed, str]:
    """A value with tokens, and `, ids` where documents of it are told apart."""
    if g.rng.random() < 0.5:
        return ranked(g, 2), ""
    which = g.pick("int", lambda each: each.rank == 2)
    x = g.pick(where=lambda each: each.rank >= 3 and (each.shape[0], each.shape[-2]) == which.shape)
    return x, f", {which.text}"


def _shift(g: Grower) -> str:
    x, documents = _of_documents(g)
    return f"shift({x.text}{documents}{keyword(g, f'; by = {g.rng.randint(1, 3)}')})"


def _depthwise(g: Grower) -> str:
    x, documents = _of_documents(g)
    if x.size(-1) is None:
        w = g.pick(where=lambda each: each.rank == 2 and each.shape[-1] == x.shape[-1])
    else:
        w = g.declare("weight", (g.rng.randint(1, 4), x.shape[-1]), "normal(std = 0.7)")
    return f"depthwise({x.text}, {w.text}{documents})"


# ---------------------------------------------------------------- arithmetic


def _unary(name: str) -> Rule:
    return lambda g: f"{name}({g.pick().text})"


def _guarded(name: str, guard: str) -> Rule:
    """A function with a small domain, half of the time inside it for certain."""
    return lambda g: f"{name}({guard.format(g.pick().text) if g.rng.random() < 0.7 else g.pick().text})"


def _binary(operator: str) -> Rule:
    def rule(g: Grower) -> str:
        x = numeric(g)
        if g.rng.random() < 0.3:
            number = g.number(0.5, 1.0, -1.0, 2.0, 0.0)
            pair = (x.text, number) if g.rng.random() < 0.6 else (number, x.text)
        else:
            other = g.partner(x, g.rng.choice(("float", "float", x.dtype)))
            pair = (x.text, other.text)
        return f"{pair[0]} {operator} {pair[1]}"

    return rule


def _division(g: Grower) -> str:
    x = numeric(g)
    other = g.partner(x, g.rng.choice(("float", "int")))
    below = f"(abs({other.text}) + {g.positive()})" if g.rng.random() < 0.8 else other.text
    return f"{x.text} / {g.rng.choice((below, g.positive()))}"


def _matmul(g: Grower, x: Typed) -> str:
    if g.rng.random() < 0.5 and x.size(-1) is not None:
        other = g.declare("weight", (x.shape[-1], g.rng.choice((1, 2, 4, 6))), "normal(std = 0.7)").text
        return f"{x.text} @ {other}"
    other = g.pick(where=lambda each: each.rank >= 2 and x.shape[-1] in each.shape[-2:]).text
    return f"{x.text} @ {g.rng.choice((other, f'{other}.T'))}"


def _compared(operator: str) -> Rule:
    def rule(g: Grower) -> str:
        x = numeric(g)
        right = g.number(0.0, 0.5) if g.rng.random() < 0.5 else g.partner(x).text
        return f"{x.text} {operator} {right}"

    return rule


def _equal(operator: str) -> Rule:
    """Of ints and bools, and of floats where both are the same or rounded: others are never equal."""

    def rule(g: Grower) -> str:
        x = g.pick(g.rng.choice(("int", "int", "bool")))
        right = str(g.rng.randint(0, 3)) if x.dtype == "int" and g.rng.random() < 0.5 else ""
        return f"{x.text} {operator} {right or g.partner(x, x.dtype).text}"

    return rule


def _clamp(g: Grower) -> str:
    x = numeric(g)
    low = g.rng.choice((-3.0, -2.0, -1.0, -0.5, 0.0, 0.5))
    if x.dtype == "int" and g.rng.random() < 0.7:
        return f"clamp({x.text}; low = {int(low)}, high = {int(low) + g.rng.randint(0, 4)})"
    return f"clamp({x.text}; low = {low}, high = {low + g.rng.choice((0.0, 0.5, 1.5, 4.0))})"


def _extreme(name: str) -> Rule:
    def rule(g: Grower) -> str:
        if g.rng.random() < 0.5:
            return _reduction(name)(g)
        x = numeric(g)
        other = g.number(0.0, 1.0) if g.rng.random() < 0.4 else g.partner(x).text
        return f"{name}({x.text}, {other})"

    return rule


def _where(g: Grower) -> str:
    condition = g.pick("bool")
    if g.rng.random() < 0.4:
        x = g.pick()
        return f"where({x.text} > {g.number(0.0)}, {x.text}, {g.partner(x).text})"
    x = g.partner(condition, g.rng.choice(("float", "float", "float", "int", "bool")))
    if x.dtype == "bool":
        other = g.partner(x, "bool").text
    else:
        other = g.number(0.0, 1.0) if g.rng.random() < 0.4 else g.partner(x).text
    return f"where({condition.text}, {x.text}, {other})"


def _cast(dtype: str) -> Rule:
    def rule(g: Grower) -> str:
        x = g.pick(g.rng.choice(("bool", "int" if dtype == "float" else "float", "float")))
        if dtype == "int" and x.dtype == "float":
            return f"int({g.positive()} * {x.text})" if g.rng.random() < 0.6 else f"int({x.text})"
        return f"{dtype}({x.text})"

    return rule


# ---------------------------------------------------------------- reductions and norms


def _reduction(name: str) -> Rule:
    def rule(g: Grower) -> str:
        dtype = "float" if name == "mean" else g.rng.choice(("float", "float", "int"))
        x = g.pick(dtype, lambda each: each.rank > 0)
        axes = g.rng.sample(range(x.rank), g.rng.randint(1, x.rank))
        axis = g.rng.choice(
            (f"axis = {axes[0]}", f"axis = {axes[0] - x.rank}", f"axis = {tuple_of(axes)}", "")
        )
        keep = keyword(g, f"keepdim = {g.rng.choice(('true', 'false'))}")
        given = ", ".join(part for part in (axis, keep) if part)
        return f"{name}({x.text}{f'; {given}' if given else ''})"

    return rule


def _norm(name: str, count: int) -> Rule:
    def rule(g: Grower, x: Typed) -> str:
        weights = [g.declare("weight", x.shape[-1:], g.rng.choice(("ones()", "normal(std = 0.5)"))).text
                   for _ in range(count)]  # fmt: skip
        eps = keyword(g, f"; eps = {g.rng.choice(('1e-6', '1e-3', '0.5'))}")
        return f"{name}({', '.join([x.text, *weights])}{eps})"

    return _of(rule, lambda each: each.rank >= 1 and each.size(-1) is not None)


# ---------------------------------------------------------------- masks, weights, losses


_READERS = (
    *("softmax({})",) * 4,
    "tanh(2.0 * {})", "exp(2.0 * tanh({}))", "sigmoid({} + 1.0)", "exp(-abs({}))", "clamp({}; low = -1.0, high = 0.5)",
    "max({}, -0.5)", "1.0 / (1.0 + abs({}))",
)  # fmt: skip
"""What reads scores with hidden pairs and is finite: -inf stays in no sum."""


def _scores(g: Grower, fits: Callable[[Typed], bool]) -> Typed:
    """Scores that fit: of the pool, or of the tokens of a value with themselves."""
    try:
        return g.pick(where=fits)
    except Unfit:
        x = g.pick(where=lambda e: e.rank >= 2 and fits(replace(e, shape=(*e.shape[:-1], e.shape[-2]))))
        return g.sometimes(f"{x.text} @ {x.text}.T")


def _masked(name: str, mask: str = "") -> Rule:
    """Scores with hidden pairs, in what leaves no -inf."""

    def rule(g: Grower) -> str:
        if mask:
            which = g.pick("bool" if name == "padding" else "int", lambda each: each.rank == 2)
            x = _scores(g, lambda e: e.rank >= 3 and (e.shape[0], e.shape[-1]) == which.shape
                        and (name == "padding" or e.shape[-2] == e.shape[-1]))  # fmt: skip
            operand = f"max({which.text}; axis = -1)" if mask == "length" else which.text
            return g.rng.choice(_READERS).format(f"{name}({x.text}, {operand})")
        x = _scores(g, lambda e: e.rank >= 2 and (name == "window" or e.shape[-2] == e.shape[-1]))
        width = f"; width = {g.rng.randint(1, 4)}" if name == "window" else ""
        return g.rng.choice(_READERS).format(f"{name}({x.text}{width})")

    return rule


_GATES = ("log_sigmoid({})", "-abs({})", "min({}, 0.0)", "clamp({}; low = -2.0, high = 0.0)", "log(sigmoid({}))",
          "0.1 * tanh({})", "-1000.0 * abs({})", "-abs(assume_bound({}; bound = 4.0))")  # fmt: skip


def log_gate(g: Grower, s: Typed) -> str:
    """A log gate for each query of scores or weights; not each is proved to be at most 0."""
    if s.rank < 2 or s.shape[-1] != s.shape[-2]:
        raise Unfit
    made = [each.text for each in g.pool if each.dtype == "float" and each.shape == s.shape[:-1]]
    return g.rng.choice(_GATES).format(g.rng.choice([*made, f"tanh(mean({s.text}; axis = -1))"]))


def _gated(name: str) -> Rule:
    def rule(g: Grower) -> str:
        x = g.pick(where=lambda each: each.rank >= 2 and each.shape[-1] == each.shape[-2])
        return f"{name}({x.text}, {log_gate(g, x)})"

    return rule


def _near_far(g: Grower, x: Typed) -> str:
    other = g.pick(where=lambda each: each.shape == x.shape)
    return f"near_far({x.text}, {other.text}; block = {g.rng.randint(1, 4)})"


COEFFICIENTS = ("(1.0, 1.0, 0.5)", "(0.0, 0.0, 1.0)", "(1.0, 0.0, 0.5)", "(2.0, -1.0, 1.0)",
                "(1.0, 0.5, 0.5, 0.1, 0.05)")  # fmt: skip


def _even(each: Typed) -> bool:
    return each.rank >= 2 and (each.size(-1) or 1) % 2 == 0


def _keywords(g: Grower, *texts: str) -> str:
    """Arguments that may each be left out, after the tensors."""
    given = [text for text in texts if g.rng.random() < 0.6]
    return f"; {', '.join(given)}" if given else ""


def _stretched(name: str, *options: str) -> Rule:
    """A rotary whose stretch a function of the language gives."""

    def rule(g: Grower) -> str:
        x, base = g.pick(where=_even), g.rng.choice((10.0, 1000.0))
        factor, context = g.rng.choice((0.5, 2.0, 8.0)), g.rng.choice((4, 64, 8192))
        more = _keywords(g, *options).replace("; ", ", ")
        stretch = f"{name}({x.size(-1)}, {base}, {factor}, {context}{more})"
        return f"rotary({x.text}; base = {base}, stretch = {stretch})"

    return rule


def _fit(g: Grower) -> str:
    family = g.rng.choice(("balanced", "minimax", "taylor", '"minimax"'))
    degree, bound = g.rng.choice((2, 2, 4)), g.positive()
    return g.rng.choice(
        (f"fit({family}, {degree}, {bound})", f"fit({family}, degree = {degree}, bound = {bound})")
    )


def _cross_entropy(g: Grower) -> str:
    targets = g.pick("int")
    x = g.pick(where=lambda each: each.shape[:-1] == targets.shape and each.size(-1) is not None)
    logits = x.text
    if (x.size(-1) or 0) < IDS or g.rng.random() < 0.3:
        logits = f"{x.text} @ {g.declare('weight', (x.size(-1), IDS), 'normal(std = 1.0)').text}"
    options = g.rng.choice(("", "", "; smoothing = 0.2", "; ignored = -1", "; ignored = -1, smoothing = 0.1"))
    return f"cross_entropy({logits}, clamp({targets.text}; low = 0, high = {IDS - 1}){options})"


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "permute": _of(_permute, _least(2)),
    "transpose": _of(
        lambda g, x: f"transpose({x.text}{keyword(g, f'; first = {g.axis(x)}, second = {g.axis(x)}')})",
        _least(2),
    ),
    "unsqueeze": _of(
        lambda g, x: f"unsqueeze({x.text}; axis = {g.rng.randint(-x.rank - 1, x.rank)})",
        lambda each: each.rank < 4,
    ),
    "squeeze": _of(
        lambda g, x: (
            f"squeeze({x.text}; axis = {g.rng.choice([a for a in range(x.rank) if x.size(a) == 1])})"
        ),
        lambda each: any(dim.constant == 1 for dim in each.shape),
    ),
    "broadcast_to": _of(_broadcast_to, lambda each: each.rank < 4),
    "pad": _of(
        lambda g, x: (
            f"pad({x.text}; axis = {g.axis(x)}, before = {g.rng.randint(0, 2)}, after = {g.rng.randint(0, 2)})"
        ),
        _least(1),
    ),
    "split_heads": _of(
        lambda g, x: (
            f"split_heads({x.text}; heads = {g.rng.choice([h for h in range(1, 7) if (x.size(-1) or 1) % h == 0])})"
        ),
        lambda each: 2 <= each.rank <= 3 and (each.size(-1) or 0) > 0,
    ),
    "merge_heads": _of(lambda g, x: f"merge_heads({x.text})", _least(3)),
    "repeat_heads": _of(lambda g, x: f"repeat_heads({x.text}; times = {g.rng.randint(1, 3)})", _least(3)),
    "patches": _of(_patches, lambda each: each.rank == 4 and constant_shape(each.shape[2:])),
    "concat": _of(_concat, _least(1)),
    "stack": _of(_stack, lambda each: each.rank < 4),
    **{name: _filled(name) for name in ("zeros", "ones", "full")},
    "embedding": _embedding,
    "one_hot": lambda g: f"one_hot({ids(g)}; classes = {g.rng.choice((IDS, 6))})",
    **{name: _positions(name) for name in ("positions", "arange")},
    **{name: _cast(name) for name in ("float", "int")},
    **{
        name: _unary(name)
        for name in ("tanh", "sigmoid", "log_sigmoid", "relu", "gelu", "silu", "softplus", "erf")
    },
    "abs": lambda g: f"abs({numeric(g).text})",
    "exp": _guarded("exp", "tanh({})"),
    **{name: _guarded(name, "abs({}) + 0.1") for name in ("log", "sqrt", "rsqrt")},
    **{name: _extreme(name) for name in ("min", "max")},
    "clamp": _clamp,
    "where": _where,
    **{name: _reduction(name) for name in ("sum", "mean")},
    "softmax": _of(lambda g, x: f"softmax({x.text}{keyword(g, f'; axis = {g.axis(x)}')})", _least(1)),
    "layer_norm": _norm("layer_norm", 2),
    "rms_norm": _norm("rms_norm", 1),
    "unit": lambda g: f"unit({ranked(g, 1).text})",
    "causal": _masked("causal"),
    "window": _masked("window"),
    "padding": _masked("padding", "mask"),
    "documents": _masked("documents", "ids"),
    "prefix": _masked("prefix", "length"),
    **{name: _gated(name) for name in ("forget", "decay")},
    "assume_bound": lambda g: f"assume_bound({g.pick().text}; bound = {g.positive()})",
    "near_far": _of(_near_far, _least(2)),
    "fit": lambda g: f"polynomial({g.pick().text}; {_fit(g)})",
    "polynomial": lambda g: f"polynomial({g.pick().text}; {g.rng.choice(COEFFICIENTS)})",
    "normalize_rows": _of(
        lambda g, x: (
            f"normalize_rows({g.rng.choice(('{}', 'exp({})', 'abs({})', 'sigmoid({})')).format(x.text)})"
        ),
        _least(1),
    ),
    "rope_llama3": _stretched("rope_llama3", "low = 0.5", "high = 3.0"),
    "rope_yarn": _stretched("rope_yarn", "fast = 16.0", "slow = 0.25", "whole = false"),
    "rotary": lambda g: (
        f"rotary({g.pick(where=_even).text}"
        + _keywords(g, f"base = {g.rng.choice((10.0, 1000.0, 10000.0))}", f"stretch = ({g.positive()},)")
        + ")"
    ),
    "shift": _shift,
    "depthwise": _depthwise,
    "sinusoid": _of(lambda g, x: f"sinusoid({x.shape[-2]}, {x.size(-1) or 4})", _least(2)),
    "alibi": _of(
        lambda g, x: f"alibi({x.text}{keyword(g, f'; heads = {x.size(-3)}')})",
        lambda each: each.rank >= 3 and each.size(-3) is not None,
    ),
    "dropout": lambda g: f"dropout({g.pick().text}; p = {g.rng.choice((0.0, 0.1, 0.5))})",
    "cross_entropy": _cross_entropy,
    "mse": _of(lambda g, x: f"mse({x.text}, {g.pick(where=lambda each: each.shape == x.shape).text})"),
    # what is written with signs
    **{operator: _binary(operator) for operator in ("+", "-", "*")},
    "/": _division,
    "@": _of(_matmul, _least(2)),
    **{operator: _compared(operator) for operator in ("<", "<=", ">", ">=")},
    **{operator: _equal(operator) for operator in ("==", "!=")},
    "negation": lambda g: f"-{numeric(g).text}",
    "not": lambda g: f"not {g.pick('bool').text}",
    ".T": _of(lambda g, x: f"{x.text}.T", _least(2)),
    "[..]": _index,
    "if else": lambda g: f"{g.pick().text} if {g.rng.choice(('true', 'false'))} else {g.pick().text} * 2.0",
}
"""By the name of an operation, or the sign of one that is written with signs."""


def statement(g: Grower, names: tuple[str, ...] = tuple(RULES)) -> Typed:
    """One more value, by an operation that was used rarely. Raises Unfit where it did not come about."""
    chosen = min(g.rng.sample(names, min(3, len(names))), key=lambda name: g.used[name])
    found = g.say(RULES[chosen](g))
    g.used[chosen] += 1
    return found
