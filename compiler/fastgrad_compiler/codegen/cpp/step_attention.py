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
    value = Attention.of(node)
    spec = spec_of(value, *(given[role].width if role in given else 0 for role in ("q", "v", "near_q")))
    if spec.padding or spec.documents or spec.precision != "float32":
        raise Unserved
    heads, query_heads = given["k"].shape[0], given["q"].shape[0]
    label, ring = f"{node['state']}{{}}", 2 * (spec.near or 0)
    near, forgets = bool(spec.near), spec.forget
    kept = [
        body.kept(f"{label}.k", heads * ring * spec.d),
        body.kept(f"{label}.v", heads * ring * spec.dv),
        body.kept(f"{label}.near_k", heads * ring * spec.near_d) if spec.near_d else NULL,
        body.kept(f"{label}.log_gate", heads * ring, "double") if forgets and near else NULL,
        body.kept(f"{label}.summed.shared", 1, "std::int64_t") if near else NULL,
        body.kept(f"{label}.sums", heads * spec.rank * (spec.dv + 1), "double"),
    ]
    tokens = _texts(given, "q", "k", "v", "near_q", "near_k", FORGET)
    sizes = ["call.batch", str(heads), str(query_heads // heads), "call.past", "call.threads"]
    name = body.shared.attention(spec)
    return f"{name}::next({', '.join([*sizes, *tokens])}, {{{', '.join(kept)}}}, {target});"


def _softmax(body: Body, node: Node, given: dict[str, Value], target: str) -> str:
    value, label = Attention.of(node), f"{node['state']}{{}}"
    mask, near = value.mask, value.near if value.own_near else None
    if mask.padding and mask.forget:
        raise Unserved  # hidden tokens hand on their gates
    (heads, _, d), dv = given["k"].shape, given["v"].width
    near_d, slots = given["near_k"].width if near else 0, OF_CACHE if mask.window is None else mask.window - 1
    kept = [
        body.kept(f"{label}.k", heads * slots * d),
        body.kept(f"{label}.v", heads * slots * dv),
        body.kept(f"{label}.near_k", heads * slots * near_d) if near else NULL,
        body.kept(f"{label}.log_gate", heads * slots, "double") if mask.forget else NULL,
        body.kept(f"{label}.seen", slots, "bool") if mask.padding else NULL,
        body.kept(f"{label}.run", slots, "std::int64_t") if mask.documents else NULL,
    ]
    for name in ("document", "id"):
        kept.append(body.kept(f"{label}.{name}", 1, "std::int64_t") if mask.documents else NULL)
    body.shared.softmax = True
    groups, alibi = given["q"].shape[0] // heads, str(value.alibi).lower()
    sizes = [heads, groups, d, dv, repr(float(value.scale)), near or 0, near_d, alibi]
    tokens = _texts(given, "q", "k", "v", "near_q", "near_k", FORGET, "padding", "documents")
    structs = ", ".join(f"{{{', '.join(map(str, each))}}}" for each in (sizes, tokens, kept))
    return f"attend(call, {structs}, {'call.room' if slots == OF_CACHE else slots}, {target});"


def _texts(given: dict[str, Value], *roles: str) -> list[str]:
    return [given[role].text if role in given else NULL for role in roles]
