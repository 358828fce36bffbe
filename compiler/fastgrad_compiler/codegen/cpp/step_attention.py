"""What attention of a token to those before becomes in the kernel of a step: by a polynomial, or by softmax."""

from __future__ import annotations

from fastgrad_compiler.attention.kernel import spec_of
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.codegen.cpp.step_body import Body, Unserved, Value
from fastgrad_compiler.codegen.cpp.step_tensors import OF_CACHE
from fastgrad_compiler.ir.graph import STEP, Node
from fastgrad_compiler.ir.masks import FORGET

NULL = "nullptr"


def attention(body: Body, node: Node, place: int) -> None:
    """Causal, by a polynomial, within a window, or of all tokens, which a cache keeps."""
    value, shared = Attention.of(node), body.shared
    watched = (body.graph.name.removesuffix(STEP), node.name) in shared.guarded
    if node.get("state") is None or not value.mask.causal or watched:
        raise Unserved
    given = value.by_role([body.value(name) for name in node.inputs])
    write = _polynomial if value.is_own or (value.is_polynomial and not shared.exact) else _softmax
    body.line(write(body, node, given, body.target(node, place).text))


def _polynomial(body: Body, node: Node, given: dict[str, Value], target: str) -> str:
    value, label = Attention.of(node), f"{node['state']}{{}}"
    spec = spec_of(value, *(given[role].width if role in given else 0 for role in ("q", "v", "near_q")))
    if spec.precision != "float32":
        raise Unserved
    heads, query_heads, ring = given["k"].shape[0], given["q"].shape[0], 2 * (spec.near or 0)
    near_d = spec.near_d or 0
    space = body.shared.attention(spec)
    kept = _tokens_kept(body, value, label, ring, heads, (spec.d, spec.dv, near_d), space)
    token = _token(body, given, label, kept[-1], target)
    kept += [
        body.kept(f"{label}.summed.shared", 1, "std::int64_t") if spec.near else NULL,
        body.kept(f"{label}.sums", heads * spec.rank * (spec.dv + 1), "double"),
    ]
    sizes = ["call.batch", str(heads), str(query_heads // heads), "call.past", "call.threads"]
    arguments = ", ".join([*sizes, *token])
    return f"{space}::next({arguments}, {{{', '.join(kept)}}}, {target});"


def _softmax(body: Body, node: Node, given: dict[str, Value], target: str) -> str:
    value, label = Attention.of(node), f"{node['state']}{{}}"
    (heads, _, d), dv, window = given["k"].shape, given["v"].width, value.mask.window
    near_d, slots = given["near_k"].width if value.own_near else 0, OF_CACHE if window is None else window - 1
    kept = _tokens_kept(body, value, label, slots, heads, (d, dv, near_d), "step")
    body.shared.softmax = True
    groups, alibi = given["q"].shape[0] // heads, str(value.alibi).lower()
    near = value.near if value.own_near else 0
    sizes = map(str, (heads, groups, d, dv, repr(float(value.scale)), near, near_d, alibi))
    token = _token(body, given, label, kept[-1], target)
    structs = ", ".join(f"{{{', '.join(each)}}}" for each in (sizes, token, kept))
    return f"attend(call, {structs}, {'call.room' if slots == OF_CACHE else slots}, {target});"


def _tokens_kept(
    body: Body, value: Attention, label: str, slots: int, heads: int, widths: tuple[int, int, int], space: str
) -> list[str]:
    """What is kept of each token in its slot: k, v, near_k, log_gate, seen and run; and the last one's document."""
    mask = value.mask
    if mask.padding and mask.forget:
        raise Unserved  # hidden tokens hand on their gates
    rows = [
        body.kept(f"{label}.{name}", heads * slots * width, f"{space}::input") if width else NULL
        for name, width in zip(("k", "v", "near_k"), widths, strict=True)
    ]
    others = [
        body.kept(f"{label}.log_gate", heads * slots, "double") if mask.forget else NULL,
        body.kept(f"{label}.seen", slots, "bool") if mask.padding else NULL,
        body.kept(f"{label}.run", slots, "std::int64_t") if mask.documents else NULL,
        body.kept(f"{label}.document", 1, "std::int64_t") if mask.documents else NULL,
    ]
    return [*rows, *others]


def _token(body: Body, given: dict[str, Value], label: str, document: str, target: str) -> list[str]:
    """The new token's operands, and the number of its document after that of the last one."""
    roles = ("q", "k", "v", "near_q", "near_k", FORGET, "padding")
    found = [given[role].text if role in given else NULL for role in roles]
    if "documents" not in given:
        return [*found, NULL]
    last = f"{document}, {body.kept(f'{label}.id', 1, 'std::int64_t')}"
    body.line(f"const auto {target}_run = run_of(call.batch, {given['documents'].text}, {last});")
    return [*found, f"{target}_run.data()"]
