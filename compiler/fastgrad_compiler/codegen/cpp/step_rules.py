"""What the operations of a step become in its kernel: a call of a function of step_kernel.h, or nothing but a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fastgrad_compiler.codegen.cpp.step_attention import attention
from fastgrad_compiler.codegen.cpp.step_body import Body, Rule, Unserved, Value, times
from fastgrad_compiler.ir.graph import Node, integer, number, sequence
from fastgrad_grammar.quote import cpp_comment


def _weight(body: Body, node: Node, place: int) -> None:
    value = body.declared(node, "")
    if node.tensor.dtype != "float" or value.batch:
        raise Unserved
    read = body.weight(str(node["label"]), value.count)
    name = body.variable(node, place)
    body.line(f"const input* const {name} = {read};  // {cpp_comment(str(node['label']))}")
    body.values[node.name] = replace(value, text=name, stored=True)


def _constant(body: Body, node: Node, place: int) -> None:
    value = node["value"]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Unserved
    body.values[node.name] = Value(repr(float(value)), False, (), is_number=True)


def _view(body: Body, node: Node, place: int) -> None:
    body.view(node, body.operand(node.inputs[0]))


def _heads(body: Body, node: Node, place: int) -> None:
    """The axis of tokens, of one, and that of heads are exchanged."""
    of, shape = body.operand(node.inputs[0]), body.declared(node, "").shape
    tokens = of.shape[-2] if node.op == "split_heads" else shape[-2]
    if tokens != 1:
        raise Unserved
    body.view(node, of)


def _permute(body: Body, node: Node, place: int) -> None:
    of = body.operand(node.inputs[0])
    shape = (0, *of.shape) if of.batch else of.shape
    axes = [integer(axis) % len(shape) for axis in sequence(node["axes"])]
    moved = [axis for axis in axes if shape[axis] != 1]
    if moved == sorted(moved):
        body.view(node, of)
    elif axes == [1, 0] and not of.batch:
        made = body.declared(node, of.text)
        body.values[node.name] = replace(made, transposed=True, stored=of.stored)
    else:
        raise Unserved


def _dropout(body: Body, node: Node, place: int) -> None:
    body.shared.drops = True
    _view(body, node, place)


def _item(body: Body, node: Node, place: int) -> None:
    body.values[node.name] = body.several[node.inputs[0]][integer(node["index"])]


def _embedding(body: Body, node: Node, place: int) -> None:
    table, ids = (body.operand(name) for name in node.inputs)
    body.is_row(node.inputs[1], table.shape[0])
    target = body.target(node, place)
    numbers = times("call.batch", ids.count)
    body.line(f"embed({numbers}, {target.width}, {table.text}, {ids.text}, {target.text});")


def _matmul(body: Body, node: Node, place: int) -> None:
    """A product with a weight, and others that read the same rows beside it."""
    x, place_of = body.value(node.inputs[0]), {each.name: i for i, each in enumerate(body.graph.nodes)}
    products: dict[str, list[str]] = {}
    for user in body.graph.users[node.inputs[0]]:
        if user.op != "matmul" or user.inputs[0] != node.inputs[0] or user.name not in body.graph.alive:
            continue
        weight = body.values.get(user.inputs[1])
        if weight is None and user is not node and body.graph[user.inputs[1]].op == "weight":
            body.write(body.graph[user.inputs[1]], place_of[user.inputs[1]])
            weight = body.values[user.inputs[1]]
        if weight is None or user.name in body.values:
            continue
        if weight.batch or weight.is_number or len(weight.shape) != 2:
            raise Unserved
        target = body.target(user, place_of[user.name])
        transposed = str(weight.transposed).lower()
        product = f"{{{weight.text}, {target.width}, {transposed}, {target.text}}}"
        products.setdefault(weight.element, []).append(product)
    for element, those in products.items():
        body.line(f"multiply<{element}>(call, {x.rows}, {x.width}, {x.text}, {{{', '.join(those)}}});")


def _norm(body: Body, node: Node, place: int) -> None:
    x, *weights = body.value(node.inputs[0]), *map(body.operand, node.inputs[1:])
    eps = [f"real({number(node['eps'])!r})"] if node.op != "unit" else []
    target = body.target(node, place)
    given = [x.rows, str(x.width), *(each.text for each in (x, *weights)), *eps, target.text]
    body.line(f"{node.op}({', '.join(given)});")


def _reduce(body: Body, node: Node, place: int) -> None:
    x = body.value(node.inputs[0])
    rank = len(x.shape) + x.batch
    if [integer(axis) % rank for axis in sequence(node["axes"])] != [rank - 1] or not x.shape:
        raise Unserved
    target, divisor = body.target(node, place), x.width if node.op == "mean" else 1
    body.line(f"reduce({x.rows}, {x.width}, {x.text}, {divisor}, {target.text});")


def _fill(body: Body, node: Node, place: int) -> None:
    target = body.target(node, place)
    value = number(node["value"])
    if target.batch or not math.isfinite(value):
        raise Unserved
    body.line(f"std::fill_n({target.text}, {target.count}, real({value!r}));")


def _pad(body: Body, node: Node, place: int) -> None:
    """Zeros around a value that is no token's."""
    x, target = body.value(node.inputs[0]), body.target(node, place)
    if target.batch or node.tensor.dtype != "float":
        raise Unserved
    axis = integer(node["axis"]) % len(x.shape)
    inner = math.prod(x.shape[axis + 1 :])
    body.line(f"std::fill_n({target.text}, {target.count}, real(0));")
    for outer in range(math.prod(x.shape[:axis])):
        at = (outer * target.shape[axis] + integer(node["before"])) * inner
        size = x.shape[axis] * inner
        body.line(f"std::copy_n({x.text} + {outer * size}, {size}, {target.text} + {at});")


def _slice(body: Body, node: Node, place: int) -> None:
    """The row of a table of positions that is this token's."""
    x, start = body.operand(node.inputs[0]), node["start"]
    if (
        not node.get("past")
        or x.batch
        or integer(node["axis"]) % len(x.shape) != 0
        or not isinstance(start, int)
    ):
        raise Unserved
    if body.graph.name != body.shared.main.name:
        raise Unserved
    body.shared.limit(x.shape[0] - start)
    row = math.prod(x.shape[1:])
    place_of = f"({x.text} + (call.past + {start}) * {row})"
    body.values[node.name] = replace(x, text=place_of, shape=body.declared(node, "").shape)


def _rotary(body: Body, node: Node, place: int) -> None:
    x = body.value(node.inputs[0])
    if not node.get("past"):
        raise Unserved
    given = node.get("stretch")
    stretch = () if given is None else tuple(map(number, sequence(given)))
    turns = body.shared.angles(x.width, number(node["base"]), stretch)
    target, sign = body.target(node, place), -1 if node.get("inverse") else 1
    body.line(f"rotary({x.rows}, {x.width}, call.turns[{turns}], {sign}, {x.text}, {target.text});")


def _recent(body: Body, node: Node, place: int) -> None:
    """Of the last tokens, those of the same document where there are documents."""
    x, *others = body.value(node.inputs[0]), *map(body.operand, node.inputs[1:])
    weights, ids = (others[:1], others[1:]) if node.op == "depthwise" else ([], others)
    before = integer(node["by"]) if node.op == "shift" else weights[0].shape[0] - 1
    if node.get("state") is None or not x.batch or x.shape[-2] != 1 or before == 0:
        raise Unserved
    target, label = body.target(node, place), f"{node['state']}{{}}"
    recent, seen = body.kept(f"{label}.recent", before * x.count, "input"), "nullptr"
    if ids:
        documents = body.kept(f"{label}.documents", before, "std::int64_t")
        body.line(
            f"const auto {target.text}_seen = seen_of(call.batch, {before}, {ids[0].text}, {documents});"
        )
        seen = f"{target.text}_seen.data()"
    rows, each = x.rows, str(x.count // x.width)
    given = [
        rows,
        str(x.width),
        str(before),
        x.text,
        *(w.text for w in weights),
        recent,
        seen,
        each,
        target.text,
    ]
    body.line(f"{node.op}({', '.join(given)});")


RULES: Mapping[str, Rule] = {
    "weight": _weight,
    "literal": _weight,
    "constant": _constant,
    "call": Body.run,
    "repeat": Body.repeat,
    "item": _item,
    "assume_bound": _view,
    "reshape": _view,
    "split_heads": _heads,
    "merge_heads": _heads,
    "permute": _permute,
    "dropout": _dropout,
    "embedding": _embedding,
    "matmul": _matmul,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "unit": _norm,
    "sum": _reduce,
    "mean": _reduce,
    "fill": _fill,
    "pad": _pad,
    "slice": _slice,
    "rotary": _rotary,
    "shift": _recent,
    "depthwise": _recent,
    "attention": attention,
    "poly_attention": attention,
}
"""What a kernel may compute beside ELEMENTWISE."""
