"""The table TORCH: an operation as a PyTorch expression.

Model code follows the dtype of its weights: constants are Python numbers, and what is made anew is made like a tensor
at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastgrad_compiler.codegen.attention_call import emit_attention
from fastgrad_compiler.codegen.place import Operands, Place, Rule
from fastgrad_compiler.codegen.writer import (
    Expr,
    attribute,
    binary,
    call,
    index,
    literal,
    method,
    negative,
    tuple_text,
)
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, integer, sequence
from fastgrad_compiler.ir.masks import GATED, MASKS

_NO_TARGET = "-(2**63)"  # in place of -100, the targets that PyTorch leaves out in silence by default


def _function(function: str) -> Rule:
    def rule(place: Place, node: Node, operands: Operands) -> Expr:
        first = _tensor(place, node.inputs[0], operands[0])
        return call(function, first, *operands[1:])

    return rule


def _tensor(place: Place, name: str, operand: Expr) -> Expr:
    """The operand, as a tensor where it is a number."""
    if not operand.number:
        return operand
    if place.type(name).dtype == "float":
        return method(place.like(), "new_tensor", operand)
    return call("torch.tensor", operand, device=place.device())


def _arithmetic(operator: str) -> Rule:
    def rule(place: Place, node: Node, operands: Operands) -> Expr:
        left, right = operands
        if node.tensor.dtype == "float":
            left, right = _floats(place, node.inputs, operands)
        return binary(operator, left, right)

    return rule


def _floats(place: Place, names: Sequence[str], operands: Operands) -> list[Expr]:
    """Int tensors as floats where no float tensor is beside them: PyTorch would take its default dtype."""
    kinds = [place.type(name).dtype for name in names]
    tensors = [not operand.number for operand in operands]
    if any(kind == "float" and is_tensor for kind, is_tensor in zip(kinds, tensors, strict=True)):
        return list(operands)
    return [_as_float(place, o) if is_tensor else o for o, is_tensor in zip(operands, tensors, strict=True)]


def _as_float(place: Place, operand: Expr) -> Expr:
    return method(operand, "to", attribute(place.like(), "dtype"))


def _extreme(function: str) -> Rule:
    """Of two tensors, a number too: the gradient of a tie is shared, where `clamp` would give all of it to one."""

    def rule(place: Place, node: Node, operands: Operands) -> Expr:
        left, right = operands
        if node.tensor.dtype == "float":
            left, right = _floats(place, node.inputs, operands)
        if left.number and right.number:
            left = _tensor(place, node.inputs[0], left)
        left, right = _filled(left, right), _filled(right, left)
        return call(function, left, right)

    return rule


def _filled(operand: Expr, other: Expr) -> Expr:
    """A number as a tensor like the other operand."""
    return method(other, "new_full", "()", operand) if operand.number else operand


def _compare(operator: str, turned: str) -> Rule:
    """`turned` is what the comparison reads like from the other side."""

    def rule(place: Place, node: Node, operands: Operands) -> Expr:
        left, right = operands
        if left.number and not right.number:
            return binary(turned, right, left)
        return binary(operator, _tensor(place, node.inputs[0], left), right)

    return rule


def _where(place: Place, node: Node, operands: Operands) -> Expr:
    condition, then, otherwise = operands
    if node.tensor.dtype == "float":
        then, otherwise = _floats(place, node.inputs[1:], operands[1:])
    if then.number and otherwise.number:
        then = _tensor(place, node.inputs[1], then)
    return call("torch.where", _tensor(place, node.inputs[0], condition), then, otherwise)


def _cast(place: Place, node: Node, operands: Operands) -> Expr:
    operand = _tensor(place, node.inputs[0], operands[0])
    match node["dtype"]:
        case "float":
            return _as_float(place, operand)
        case "int":
            floats = place.type(node.inputs[0]).dtype == "float"
            return call(place.helper("truncate"), operand) if floats else method(operand, "long")
        case _:
            return method(operand, "bool")


def _clamp(place: Place, node: Node, operands: Operands) -> Expr:
    low, high = (literal(_number(node[key])) for key in ("low", "high"))
    limits = {key: text for key, text in (("min", low), ("max", high)) if not text.text.endswith("math.inf")}
    operand = _tensor(place, node.inputs[0], operands[0])
    return method(operand, "clamp", **limits) if limits else operand


def _number(value: Attribute) -> float | int | bool | str | None:
    assert not isinstance(value, tuple | Dim)
    return value


# ---------------------------------------------------------------- shape


def _dims(place: Place, value: Attribute) -> list[Expr]:
    assert isinstance(value, tuple)
    return [place.dim(dim) for dim in value]


def _reshape(place: Place, node: Node, operands: Operands) -> Expr:
    return method(operands[0], "reshape", *(_dims(place, node["shape"]) or [Expr("()")]))


def _permute(place: Place, node: Node, operands: Operands) -> Expr:
    axes = node["axes"]
    assert isinstance(axes, tuple)
    rank = len(axes)
    places = [int(str(axis)) % rank for axis in axes]
    moved = [axis for axis in range(rank) if places[axis] != axis]
    if moved == [rank - 2, rank - 1]:
        return attribute(operands[0], "mT")
    if len(moved) == 2:
        return method(operands[0], "transpose", *moved)
    return method(operands[0], "permute", *places) if moved else operands[0]


def _split_heads(place: Place, node: Node, operands: Operands) -> Expr:
    return method(method(operands[0], "unflatten", -1, tuple_text((node["heads"], -1))), "transpose", -3, -2)


def _merge_heads(place: Place, node: Node, operands: Operands) -> Expr:
    return method(method(operands[0], "transpose", -3, -2), "flatten", -2)


def _repeat_heads(place: Place, node: Node, operands: Operands) -> Expr:
    return method(operands[0], "repeat_interleave", place.dim(node["times"]), -3)


def _concat(place: Place, node: Node, operands: Operands) -> Expr:
    return call("torch.cat", tuple_text(operands), node["axis"])


def _stack(place: Place, node: Node, operands: Operands) -> Expr:
    tensors = [_tensor(place, name, o) for name, o in zip(node.inputs, operands, strict=True)]
    return call("torch.stack", tuple_text(tensors), node["axis"])


def _places(place: Place, node: Node, one: str) -> str:
    """`..., 0:4` for the last axis; what stands at `axis`, and full slices for the axes on its shorter side."""
    rank = len(place.type(node.inputs[0]).shape)
    axis = int(str(node["axis"])) % rank
    if axis < rank - axis:
        return ", ".join([":"] * axis + [one])
    return ", ".join(["...", one] + [":"] * (rank - 1 - axis))


def _slice(place: Place, node: Node, operands: Operands) -> Expr:
    if node.get("past"):
        first, count = node["start"], _as_dim(node["stop"]) - _as_dim(node["start"])
        rows = place.step_helper("rows_of")
        return call(rows, operands[0], node["axis"], place.dim(first), place.dim(count), "state")
    start, stop = place.dim(node["start"]), place.dim(node["stop"])
    size = place.type(node.inputs[0]).shape[int(str(node["axis"]))]
    first, end = _as_dim(node["start"]), _as_dim(node["stop"])
    if _may_be_negative(first) or _may_be_negative(end - first):
        return call(place.helper("entries"), operands[0], node["axis"], start, stop)
    if (
        end.constant is None and end != size
    ):  # a slice would be cut short silently where the run-time dim is too large
        return method(
            operands[0],
            "narrow",
            node["axis"],
            start,
            binary("-", stop, start) if str(start) != "0" else stop,
        )
    complex_bound = not (start.is_name and stop.is_name)
    one = f"{start} : {stop}" if complex_bound else f"{'' if start.text == '0' else start}:{stop}"
    return index(operands[0], _places(place, node, one))


def _as_dim(value: Attribute) -> Dim:
    assert isinstance(value, int | Dim)
    return Dim.of(value)


def _may_be_negative(dim: Dim) -> bool:
    """Where a run could give a place before the first, which PyTorch would count from the end."""
    return dim.least is None or dim.least < 0


def _select(place: Place, node: Node, operands: Operands) -> Expr:
    if _may_be_negative(_as_dim(node["index"])):
        return call(place.helper("entry"), operands[0], node["axis"], place.dim(node["index"]))
    return index(operands[0], _places(place, node, str(place.dim(node["index"]))))


def _pad(place: Place, node: Node, operands: Operands) -> Expr:
    rank = len(place.type(node.inputs[0]).shape)
    behind = rank - 1 - int(str(node["axis"])) % rank
    widths = [literal(0)] * (2 * behind) + [place.dim(node["before"]), place.dim(node["after"])]
    return call("F.pad", operands[0], tuple_text(widths))


def _patches(place: Place, node: Node, operands: Operands) -> Expr:
    return attribute(call("F.unfold", operands[0], node["size"], stride=node["size"]), "mT")


def _broadcast_to(place: Place, node: Node, operands: Operands) -> Expr:
    return method(_tensor(place, node.inputs[0], operands[0]), "expand", *_dims(place, node["shape"]))


# ---------------------------------------------------------------- lookup, reduce, normalise


def _fill(place: Place, node: Node, operands: Operands) -> Expr:
    return method(
        place.like(), "new_full", tuple_text(_dims(place, node["shape"])), literal(_number(node["value"]))
    )


def _arange(place: Place, node: Node, operands: Operands) -> Expr:
    if node.get("past"):
        return call(place.step_helper("place_of"), place.dim(node["stop"]), "state", place.device())
    return call("torch.arange", place.dim(node["stop"]), device=place.device())


def _one_hot(place: Place, node: Node, operands: Operands) -> Expr:
    return _as_float(place, call("F.one_hot", operands[0], place.dim(node["classes"])))


def _reduce(name: str) -> Rule:
    def rule(place: Place, node: Node, operands: Operands) -> Expr:
        axes = node["axes"]
        assert isinstance(axes, tuple)
        if not axes:
            return operands[0]
        dims = axes[0] if len(axes) == 1 else tuple_text(axes)
        return method(operands[0], name, dims, keepdim=True if node["keepdim"] else None)

    return rule


def _softmax(place: Place, node: Node, operands: Operands) -> Expr:
    if place.safe_softmax:
        return call(place.helper("masked_softmax"), operands[0], node["axis"])
    return call("F.softmax", operands[0], node["axis"])


def _width(place: Place, node: Node) -> str:
    return tuple_text([place.dim(place.type(node.inputs[0]).shape[-1])])


def _layer_norm(place: Place, node: Node, operands: Operands) -> Expr:
    return call(place.helper("centred_layer_norm"), *operands, literal(_number(node["eps"])))


def _rms_norm(place: Place, node: Node, operands: Operands) -> Expr:
    return call("F.rms_norm", operands[0], _width(place, node), operands[1], literal(_number(node["eps"])))


# ---------------------------------------------------------------- masks, positions, losses


def _mask(place: Place, node: Node, operands: Operands) -> Expr:
    fill = node.get("fill")
    given = None if fill is None or fill == float("-inf") else literal(_number(fill))
    size = MASKS[node.op].size
    sizes = [] if size is None else [node[size]]
    return call(place.helper(f"apply_{node.op}"), *operands, *sizes, fill=given)


def _gated(place: Place, node: Node, operands: Operands) -> Expr:
    return call(place.helper(f"apply_{node.op}"), *operands)


def _near_far(place: Place, node: Node, operands: Operands) -> Expr:
    return call(place.helper("apply_near_far"), *operands, node["block"])


def _polynomial(place: Place, node: Node, operands: Operands) -> Expr:
    coefficients = node["coefficients"]
    assert isinstance(coefficients, tuple)
    numbers = tuple_text([literal(_number(c)) for c in coefficients])
    return call(place.helper("apply_polynomial"), operands[0], numbers)


def _normalize_rows(place: Place, node: Node, operands: Operands) -> Expr:
    return call(place.helper("normalize_rows"), operands[0])


def _alibi(place: Place, node: Node, operands: Operands) -> Expr:
    return call(place.helper("apply_alibi"), operands[0])


def _rotary(place: Place, node: Node, operands: Operands) -> Expr:
    inverse = True if node.get("inverse") else None
    stretch = node.get("stretch")
    numbers = None if stretch is None else tuple_text([literal(_number(each)) for each in sequence(stretch)])
    given = operands[0], literal(_number(node["base"]))
    if node.get("past"):
        return call(place.step_helper("rotary_step"), *given, stretch=numbers, inverse=inverse, state="state")
    return call(place.helper("rotary"), *given, stretch=numbers, inverse=inverse)


def _shift(place: Place, node: Node, operands: Operands) -> Expr:
    if node.get("state") is not None:
        return call(
            place.step_helper("shift_step"), *operands, by=node["by"], state=place.state(node["state"])
        )
    return call(place.helper("shift"), *operands, by=node["by"])


def _depthwise(place: Place, node: Node, operands: Operands) -> Expr:
    if node.get("state") is not None:
        return call(place.step_helper("depthwise_step"), *operands, state=place.state(node["state"]))
    return call(place.helper("depthwise"), *operands, reverse=True if node.get("reverse") else None)


def _sinusoid(place: Place, node: Node, operands: Operands) -> Expr:
    sizes = place.dim(node["length"]), place.dim(node["width"])
    past = "state.past" if node.get("past") else None  # the place of the first token, in a step form
    return call(place.helper("sinusoid"), *sizes, place.like(), past=past)


def _dropout(place: Place, node: Node, operands: Operands) -> Expr:
    return call("F.dropout", operands[0], node["p"], "self.training")


def _cross_entropy(place: Place, node: Node, operands: Operands) -> Expr:
    logits, targets = operands
    if len(place.type(node.inputs[0]).shape) > 2:
        logits, targets = method(logits, "flatten", 0, -2), method(targets, "flatten")
    smoothing, ignored = _loss_options(node)
    left_out = _NO_TARGET if ignored is None else ignored
    return call("F.cross_entropy", logits, targets, ignore_index=left_out, label_smoothing=smoothing)


def _loss_options(node: Node) -> tuple[Expr | None, Expr | None]:
    """`smoothing` and `ignored` of a loss, where they are set."""
    smoothing, ignored = node.get("smoothing"), node.get("ignored")
    share = None if smoothing is None else literal(_number(smoothing))
    return share, None if ignored is None else literal(integer(ignored))


def _linear_cross_entropy(place: Place, node: Node, operands: Operands) -> Expr:
    smoothing, ignored = _loss_options(node)
    return call(place.helper("linear_cross_entropy"), *operands, smoothing=smoothing, ignored=ignored)


TORCH: dict[str, Rule] = {
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
    "fill": _fill,
    "embedding": lambda place, node, operands: call("F.embedding", operands[1], operands[0]),
    "arange": _arange,
    "one_hot": _one_hot,
    "add": _arithmetic("+"),
    "sub": _arithmetic("-"),
    "mul": _arithmetic("*"),
    "div": _arithmetic("/"),
    "matmul": lambda place, node, operands: binary("@", *operands),
    "neg": lambda place, node, operands: negative(operands[0]),
    "minimum": _extreme("torch.minimum"),
    "maximum": _extreme("torch.maximum"),
    **{
        name: _function(f"torch.{name}")
        for name in ("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "abs", "erf")
    },
    **{name: _function(f"F.{name}") for name in ("relu", "gelu", "silu")},
    "log_sigmoid": _function("F.logsigmoid"),
    # above the threshold PyTorch gives x itself: its default of 20 would be seen in float64
    "softplus": lambda place, node, operands: call(
        "F.softplus", _tensor(place, node.inputs[0], operands[0]), threshold=literal(40.0)
    ),
    "logical_not": _function("torch.logical_not"),
    "less": _compare("<", ">"),
    "less_equal": _compare("<=", ">="),
    "equal": _compare("==", "=="),
    "cast": _cast,
    "clamp": _clamp,
    "where": _where,
    "sum": _reduce("sum"),
    "mean": _reduce("mean"),
    "amax": _reduce("amax"),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": lambda place, node, operands: call("F.normalize", operands[0], dim=-1, eps=literal(1e-6)),
    **dict.fromkeys(MASKS, _mask),
    **dict.fromkeys(GATED, _gated),
    "near_far": _near_far,
    "polynomial": _polynomial,
    "normalize_rows": _normalize_rows,
    "assume_bound": lambda place, node, operands: operands[0],
    "rotary": _rotary,
    "shift": _shift,
    "depthwise": _depthwise,
    "sinusoid": _sinusoid,
    "alibi": _alibi,
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "mse": _function("F.mse_loss"),
    "attention": emit_attention,
    "poly_attention": emit_attention,
}

# Written by statements, or as part of the expressions that read them.
STRUCTURE = frozenset({"input", "weight", "buffer", "literal", "constant", "call", "repeat", "item"})
# Only in gradient graphs, which are not emitted: PyTorch differentiates the module.
DECLINED = frozenset(
    {
        "sum_to",
        "embedding_gradient",
        "depthwise_weights",
        "repeat_backward",
        "weight_gradient",
        "poly_attention_backward",
    }
)
