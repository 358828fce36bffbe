"""Shape rules of single operations: shape changes, lookups, arithmetic, reductions, normalisation."""

from __future__ import annotations

from collections.abc import Callable

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, TensorType, Type
from fastgrad_compiler.ir.shape_errors import (
    Blame,
    Shape,
    ShapeError,
    Site,
    axis_of,
    broadcast,
    fail,
    product,
    show,
    want_dtype,
    want_equal,
    want_rank,
)

Rule = Callable[[Site], Type]

VERBS = {
    "add": "sum",
    "sub": "difference",
    "mul": "product",
    "div": "quotient",
    "minimum": "minimum",
    "maximum": "maximum",
    "less": "comparison",
    "less_equal": "comparison",
    "equal": "comparison",
}


def shape_attribute(site: Site) -> Shape:
    """The attribute `shape`, ints or dims."""
    value = site.attributes["shape"]
    if not isinstance(value, tuple):
        fail("FG217", f"attribute shape of {site.op} is {value!r}, not a tuple")
    return tuple(dim_attribute(site, dim) for dim in value)


def dim_attribute(site: Site, value: Attribute) -> Dim:
    """An attribute that is an int or a dim."""
    if isinstance(value, bool) or not isinstance(value, int | Dim):
        fail("FG217", f"{value!r} in {site.op} is not a dimension")
    return Dim.of(value)


def divide(site: Site, axis: int, by: Attribute, what: str) -> Dim:
    """A dim of operand 0 divided by an int; FG208 where that is not whole for every value of the run-time dims."""
    shape = site.tensor(0).shape
    divisor = dim_attribute(site, by)
    found = shape[axis].divide(divisor, site.multiples) if divisor != Dim.of(0) else None
    if found is None:
        names = sorted(shape[axis].names)
        help_ = f"declare dim {names[0]} % {divisor}" if names and shape[axis] == Dim.of(names[0]) else None
        fail("FG208", f"{shape[axis]} is not a multiple of {divisor}: {what}",
             Blame(0, axis, f"{shape[axis]} here"), help_=help_)  # fmt: skip
    return found


# ---------------------------------------------------------------- shape


def _reshape(site: Site) -> Type:
    source, shape = site.tensor(0), shape_attribute(site)
    if product(source.shape) != product(shape):
        fail(
            "FG207",
            f"reshape of {show(source.shape)} to {show(shape)}: "
            f"{product(source.shape)} elements become {product(shape)}",
            Blame(0, None, f"{source} here"),
        )
    return TensorType(source.dtype, shape)


def _permute(site: Site) -> Type:
    source, axes = site.tensor(0), site.attributes["axes"]
    rank = len(source.shape)
    if not isinstance(axes, tuple) or len(axes) != rank:
        fail("FG205", f"permute of {source} needs all its {rank} axes once", Blame(0, None, f"{source} here"))
    places = [axis_of(site, axis, rank) for axis in axes]
    if len(set(places)) != rank:
        fail("FG206", f"permute of {source} names an axis twice", Blame(0, None, f"{source} here"))
    return TensorType(source.dtype, tuple(source.shape[place] for place in places))


def _split_heads(site: Site) -> Type:
    source = want_rank(site, 0, 2)
    heads = site.attributes["heads"]
    width = divide(site, -1, heads, f"it does not split into {heads} heads")
    *lead, length, _ = source.shape
    return TensorType(source.dtype, (*lead, dim_attribute(site, heads), length, width))


def _merge_heads(site: Site) -> Type:
    source = want_rank(site, 0, 3)
    *lead, heads, length, width = source.shape
    return TensorType(source.dtype, (*lead, length, heads * width))


def _repeat_heads(site: Site) -> Type:
    source = want_rank(site, 0, 3)
    *lead, heads, length, width = source.shape
    return TensorType(
        source.dtype, (*lead, heads * dim_attribute(site, site.attributes["times"]), length, width)
    )


def _same_dtype(site: Site) -> str:
    dtypes = [site.tensor(index).dtype for index in range(len(site.inputs))]
    other = next((index for index, dtype in enumerate(dtypes) if dtype != dtypes[0]), None)
    if other is not None:
        fail("FG209", f"{site.op} of tensors of {dtypes[0]} and {dtypes[other]}",
             Blame(0, None, f"{site.inputs[0]} here"), Blame(other, None, f"{site.inputs[other]} here"))  # fmt: skip
    return dtypes[0]


def _concat(site: Site) -> Type:
    dtype, first = _same_dtype(site), want_rank(site, 0, 1)
    rank = len(first.shape)
    axis = axis_of(site, site.attributes["axis"], rank)
    total = first.shape[axis]
    for index in range(1, len(site.inputs)):
        other = want_rank(site, index, rank, rank)
        for place in range(-rank, 0):
            if place != axis:
                text = f"concat of {show(first.shape)} and {show(other.shape)} along axis {axis}: axis {place} differs"
                want_equal(site, (0, place), (index, place), text)
        total = total + other.shape[axis]
    shape = list(first.shape)
    shape[axis] = total
    return TensorType(dtype, tuple(shape))


def _stack(site: Site) -> Type:
    dtype, first = _same_dtype(site), site.tensor(0)
    rank = len(first.shape)
    for index in range(1, len(site.inputs)):
        other = want_rank(site, index, rank, rank)
        for place in range(-rank, 0):
            text = f"stack of {show(first.shape)} and {show(other.shape)}: axis {place} differs"
            want_equal(site, (0, place), (index, place), text)
    axis = site.integer("axis")
    if not -rank - 1 <= axis <= rank:
        fail("FG206", f"stack along axis {axis}: the result has axes {-rank - 1} to {rank}",
             Blame(0, None, f"{first} here"))  # fmt: skip
    place = axis if axis >= 0 else axis + rank + 1
    return TensorType(dtype, (*first.shape[:place], Dim.of(len(site.inputs)), *first.shape[place:]))


def _slice(site: Site) -> Type:
    source = want_rank(site, 0, 1)
    axis = axis_of(site, site.attributes["axis"], len(source.shape))
    start, stop = (dim_attribute(site, site.attributes[name]) for name in ("start", "stop"))
    size, whole = stop - start, source.shape[axis]
    low, count, rest = start.constant, size.constant, (whole - stop).constant
    if (low is not None and low < 0) or (count is not None and count <= 0) or (rest is not None and rest < 0):
        fail("FG206", f"slice {start}:{stop} of axis {axis}, which has {whole} entries",
             Blame(0, axis, f"{whole} here"))  # fmt: skip
    shape = list(source.shape)
    shape[axis] = size
    return TensorType(source.dtype, tuple(shape))


def _select(site: Site) -> Type:
    source = want_rank(site, 0, 1)
    axis = axis_of(site, site.attributes["axis"], len(source.shape))
    index = dim_attribute(site, site.attributes["index"])
    low, rest = index.constant, (source.shape[axis] - index).constant
    if (low is not None and low < 0) or (rest is not None and rest <= 0):
        fail("FG206", f"index {index} of axis {axis}, which has {source.shape[axis]} entries",
             Blame(0, axis, f"{source.shape[axis]} here"))  # fmt: skip
    shape = list(source.shape)
    del shape[axis]
    return TensorType(source.dtype, tuple(shape))


def _pad(site: Site) -> Type:
    source = want_rank(site, 0, 1)
    axis = axis_of(site, site.attributes["axis"], len(source.shape))
    shape = list(source.shape)
    for name in ("before", "after"):
        shape[axis] = shape[axis] + dim_attribute(site, site.attributes[name])
    return TensorType(source.dtype, tuple(shape))


def _patches(site: Site) -> Type:
    image, size = want_rank(site, 0, 4, 4), site.integer("size")
    batch, channels, *_ = image.shape
    rows, columns = (
        divide(site, axis, size, f"the image does not split into patches of {size}") for axis in (2, 3)
    )
    return TensorType(image.dtype, (batch, rows * columns, channels * size * size))


def _broadcast_to(site: Site) -> Type:
    source, shape = site.tensor(0), shape_attribute(site)
    _fits(site, source.shape, shape)
    return TensorType(source.dtype, shape)


def _sum_to(site: Site) -> Type:
    source, shape = want_dtype(site, 0, "float", "int"), shape_attribute(site)
    _fits(site, shape, source.shape)
    return TensorType(source.dtype, shape)


def _fits(site: Site, small: Shape, large: Shape) -> None:
    rank = len(small)
    if rank > len(large) or any(
        small[axis] != large[axis] and small[axis].constant != 1 for axis in range(-rank, 0)
    ):
        fail("FG203", f"{site.op}: {show(small)} does not broadcast to {show(large)}",
             Blame(0, None, f"{site.inputs[0]} here"))  # fmt: skip


# ---------------------------------------------------------------- lookup


def _embedding(site: Site) -> Type:
    if site.tensor(0).dtype == "int" and site.tensor(1).dtype == "float":
        fail("FG209", f"embedding takes the table first: {site.inputs[0]} and {site.inputs[1]} are the wrong way round",
             Blame(0, None, f"{site.inputs[0]} here"), help_="write embedding(table, ids)")  # fmt: skip
    table, ids = want_dtype(site, 0, "float"), want_dtype(site, 1, "int", help_="convert it with int(x)")
    want_rank(site, 0, 2, 2)
    return TensorType("float", (*ids.shape, table.shape[-1]))


def _embedding_gradient(site: Site) -> Type:
    cotangent, ids = want_dtype(site, 0, "float"), want_dtype(site, 1, "int")
    want_rank(site, 0, len(ids.shape) + 1, len(ids.shape) + 1)
    for axis in range(len(ids.shape)):
        text = f"embedding_gradient of {show(cotangent.shape)} at ids {show(ids.shape)}: axis {axis} differs"
        want_equal(site, (0, axis), (1, axis), text)
    return TensorType("float", (dim_attribute(site, site.attributes["rows"]), cotangent.shape[-1]))


def _arange(site: Site) -> Type:
    return TensorType("int", (dim_attribute(site, site.attributes["stop"]),))


def _one_hot(site: Site) -> Type:
    ids = want_dtype(site, 0, "int")
    return TensorType("float", (*ids.shape, dim_attribute(site, site.attributes["classes"])))


# ---------------------------------------------------------------- arithmetic


def _numeric(site: Site, indices: tuple[int, ...]) -> str:
    dtypes = [
        want_dtype(
            site, index, "float", "int", help_="convert it with float(x), or choose with where(c, a, b)"
        ).dtype
        for index in indices
    ]
    return "float" if "float" in dtypes else "int"


def _arithmetic(site: Site) -> Type:
    dtype = _numeric(site, (0, 1))
    return TensorType("float" if site.op == "div" else dtype, broadcast(site, (0, 1), VERBS[site.op]))


def _compare(site: Site) -> Type:
    if site.op != "equal" or {site.tensor(0).dtype, site.tensor(1).dtype} != {"bool"}:
        _numeric(site, (0, 1))
    return TensorType("bool", broadcast(site, (0, 1), VERBS[site.op]))


def _float_unary(site: Site) -> TensorType:
    return want_dtype(site, 0, "float")


def _numeric_unary(site: Site) -> TensorType:
    return want_dtype(site, 0, "float", "int")


def _clamp(site: Site) -> Type:
    found = _numeric_unary(site)
    for name in ("low", "high"):
        limit = site.attributes[name]
        if found.dtype == "int" and isinstance(limit, float):
            fail("FG217", f"clamp of {found}: its limit {limit} is a float", Blame(0, None, f"{found} here"))
    return found


def _unit(site: Site) -> Type:
    want_rank(site, 0, 1)
    return want_dtype(site, 0, "float")


def _bool_unary(site: Site) -> Type:
    return want_dtype(site, 0, "bool", help_="compare it, for instance x > 0")


def _cast(site: Site) -> Type:
    return TensorType(str(site.attributes["dtype"]), site.tensor(0).shape)


def _where(site: Site) -> Type:
    want_dtype(site, 0, "bool", help_="compare it, for instance x > 0")
    both_bool = {site.tensor(1).dtype, site.tensor(2).dtype} == {"bool"}
    return TensorType("bool" if both_bool else _numeric(site, (1, 2)), broadcast(site, (0, 1, 2), "where"))


def _matmul(site: Site) -> Type:
    for index in (0, 1):
        want_dtype(site, index, "float")
    for index in (0, 1):
        if len(site.tensor(index).shape) < 2:
            fail("FG205", f"matrix product of {site.tensor(0)} and {site.tensor(1)}: both need two dimensions",
                 Blame(index, None, f"{site.tensor(index)} here"),
                 help_="for a sum over the last axis write sum(x * w, axis = -1)")  # fmt: skip
    left, right = site.tensor(0).shape, site.tensor(1).shape
    if left[-1] != right[-2]:
        fail(
            "FG204",
            f"matrix product of {show(left)} and {show(right)}: inner dimensions differ",
            Blame(0, -1, f"{left[-1]} here"),
            Blame(1, -2, f"{right[-2]} here"),
        )
    lead = Site("matmul", (TensorType("float", left[:-2]), TensorType("float", right[:-2])), {})
    try:
        batch = broadcast(lead, (0, 1), "batch")
    except ShapeError as error:
        sides = [Blame(b.input, None if b.axis is None else b.axis - 2, b.text) for b in error.blame]
        fail("FG204", f"matrix product of {show(left)} and {show(right)}: leading dimensions differ", *sides)
    return TensorType("float", (*batch, left[-2], right[-1]))


# ---------------------------------------------------------------- reduce, normalise


def _reduce(site: Site) -> Type:
    source = want_dtype(site, 0, *(("float",) if site.op == "mean" else ("float", "int")))
    axes, rank = site.attributes["axes"], len(source.shape)
    if not isinstance(axes, tuple):
        fail("FG217", f"attribute axes of {site.op} is {axes!r}, not a tuple")
    places = [axis_of(site, axis, rank) for axis in axes]
    if len(set(places)) != len(places):
        fail("FG206", f"{site.op} names an axis twice", Blame(0, None, f"{source} here"))
    one = (Dim.of(1),) if site.attributes["keepdim"] else ()
    shape: Shape = ()
    for place in range(-rank, 0):
        shape += one if place in places else (source.shape[place],)
    return TensorType(source.dtype, shape)


def _softmax(site: Site) -> Type:
    source = want_dtype(site, 0, "float")
    axis_of(site, site.attributes["axis"], len(source.shape))
    return source


def _normalise(site: Site) -> Type:
    source = want_dtype(site, 0, "float")
    want_rank(site, 0, 1)
    for index, name in enumerate(("w", "b")[: len(site.inputs) - 1], 1):
        want_dtype(site, index, "float")
        want_rank(site, index, 1, 1)
        own = show(site.tensor(index).shape)
        text = f"{site.op} of {show(source.shape)} with {name} of {own}: the last dimensions differ"
        want_equal(site, (0, -1), (index, -1), text)
    return source


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": _repeat_heads,
    "concat": _concat,
    "stack": _stack,
    "slice": _slice,
    "select": _select,
    "pad": _pad,
    "patches": _patches,
    "broadcast_to": _broadcast_to,
    "sum_to": _sum_to,
    "embedding": _embedding,
    "embedding_gradient": _embedding_gradient,
    "arange": _arange,
    "one_hot": _one_hot,
    **dict.fromkeys(("add", "sub", "mul", "div", "minimum", "maximum"), _arithmetic),
    **dict.fromkeys(("less", "less_equal", "equal"), _compare),
    **dict.fromkeys(("neg", "abs"), _numeric_unary),
    "clamp": _clamp,
    **dict.fromkeys(("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "gelu", "silu"), _float_unary),
    **dict.fromkeys(
        ("log_sigmoid", "softplus", "erf", "assume_bound", "dropout", "polynomial"), _float_unary
    ),
    "logical_not": _bool_unary,
    "cast": _cast,
    "where": _where,
    "matmul": _matmul,
    **dict.fromkeys(("sum", "mean", "amax"), _reduce),
    "softmax": _softmax,
    "unit": _unit,
    "layer_norm": _normalise,
    "rms_norm": _normalise,
}
