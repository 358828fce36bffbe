"""Attention as a call: of PyTorch's own function, of the exact one in blocks, or of a kernel."""

from __future__ import annotations

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.codegen.attention_kernels import has_softmax_kernel
from fastgrad_compiler.codegen.place import Operands, Place
from fastgrad_compiler.codegen.writer import COMPARE, Expr, binary, call, index, literal, method
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.runtime.monomials import rank

Given = dict[str, Expr]  # the operands by role
_FLOATS = ("q", "k", "v", "near_q", "near_k")
_ARGUMENTS = {FORGET: "log_gate", "padding": "mask", "documents": "documents"}  # of the kernels, by role


def emit_attention(place: Place, node: Node, operands: Operands) -> Expr:
    """The expression of an `attention` or `poly_attention` node."""
    attention = Attention.of(node)
    given = attention.by_role(list(operands))
    if node.get("state") is not None:
        return _next(place, node, given)
    if (
        node.op == "poly_attention"
        and node.get("memory") is not None
        and (attention.is_own or not place.exact)
    ):
        return _of_memory(place, node, given)
    if node.op == "poly_attention" and (attention.is_own or not place.exact):
        return _polynomial(place, node, given)
    if has_softmax_kernel(attention, place.backends):
        return call(place.kernel(node), *_floats(given), **_masks(given))
    mask = attention.mask
    banded = attention.own_near or mask.window is not None or mask.documents or mask.forget
    if banded and not attention.alibi:
        return _exact(place, attention, given)
    return _softmax(place, node, given)


def _floats(given: Given) -> list[Expr]:
    return [given[role] for role in _FLOATS if role in given]


def _masks(given: Given) -> dict[str, Expr]:
    """What the masks read, by the names of the kernels' arguments."""
    return {name: given[role] for role, name in _ARGUMENTS.items() if role in given}


def _polynomial(place: Place, node: Node, given: Given) -> Expr:
    attention = Attention.of(node)
    place.remark(_what(attention, _size(place.type(node.inputs[0]).shape[-1])))
    verdict = attention.verdict
    below = {"exact_below": 0 if verdict is None else verdict.break_even or 0}
    on_gpu = None if verdict is None else verdict.break_even_gpu
    if on_gpu is not None and on_gpu != below["exact_below"]:
        below["exact_below_gpu"] = on_gpu
    kernel, masks = place.kernel(node), _masks(given)
    return call(kernel, *_floats(given), **masks, **below, guard=place.guard(node))


def _what(attention: Attention, d: int, step: bool = False) -> str:
    polynomial = attention.polynomial
    assert polynomial is not None
    degree, monomials = polynomial.degree, rank(d, polynomial.degree)
    if attention.is_own:
        below = attention.verdict.break_even if attention.verdict is not None and not step else None
        dense = f"; on all pairs below {below} tokens" if below else ""
        return f"the model's own polynomial, of degree {degree} and rank {monomials}{dense}"
    error, bound = polynomial.eps, attention.range.limit
    limit = "" if error is None else f"; relative error at most {error:.1e} where |s| <= {bound:g}"
    return f"a polynomial of degree {degree} instead of exp, rank {monomials}{limit}"


def _next(place: Place, node: Node, given: Given) -> Expr:
    """Attention of the next tokens to all before them."""
    attention = Attention.of(node)
    by_polynomial = node.op == "poly_attention" and (attention.is_own or not place.exact)
    if by_polynomial:
        place.remark(_what(attention, _size(place.type(node.inputs[0]).shape[-1]), step=True))
    return call(
        place.step_helper("attention_step"),
        *_floats(given),
        **_masks(given),
        state=place.state(node["state"]),
        rule=_rule(place, node, by_polynomial),
        whole=place.kernel(node) if by_polynomial else None,
        native=place.kernel_native(node) if by_polynomial and place.backends.cpp else None,
        guard=place.guard(node) if by_polynomial else None,
    )


def _of_memory(place: Place, node: Node, given: Given) -> Expr:
    """Attention of the next tokens to the keys of another sequence, which are the same in every call."""
    attention = Attention.of(node)
    place.remark(_what(attention, _size(place.type(node.inputs[0]).shape[-1]), step=True))
    return call(
        place.step_helper("memory_step"),
        *_floats(given),
        **_masks(given),
        state=place.state(node["memory"]),
        rule=_rule(place, node, True),
    )


def _rule(place: Place, node: Node, by_polynomial: bool) -> Expr:
    """How pairs weigh, as `runtime/step_tokens.py` has it."""
    attention, rule = Attention.of(node), place.step_helper("Rule")
    if by_polynomial:
        return call(f"{rule}.of", place.kernel_spec(node))
    return call(
        rule,
        literal(attention.scale),
        near=attention.near if attention.own_near else None,
        window=attention.mask.window,
        alibi=True if attention.alibi else None,
    )


def _exact(place: Place, attention: Attention, given: Given) -> Expr:
    return call(
        place.exact_kernel(),
        *_floats(given),
        **_masks(given),
        scale=literal(attention.scale),
        causal=True if attention.mask.causal else None,
        near=attention.near if attention.own_near else None,
        window=attention.mask.window,
    )


def _softmax(place: Place, node: Node, given: Given) -> Expr:
    attention = Attention.of(node)
    mask = _mask(place, attention, given)
    values, scale = [given[role] for role in ("q", "k", "v")], literal(attention.scale)
    if attention.mask.causal and attention.scale <= 0:
        place.remark(
            "PyTorch's fused kernel gives NaN on a CPU where a causal attention has no positive scale"
        )
        values[0], scale = binary("*", values[0], scale), literal(1.0)
    q, k, v = (place.type(name).shape for name in node.inputs[:3])
    extra = _size(v[-1]) - _size(q[-1])
    if extra:
        place.remark("columns of zeros change no logit, and PyTorch has fused kernels for equal widths only")
    for position in (0, 1) if extra > 0 else (2,) if extra < 0 else ():
        values[position] = call("F.pad", values[position], f"(0, {abs(extra)})")
    result = call(
        place.helper("softmax_attention"),
        *values,
        attn_mask=mask,
        is_causal=True if attention.mask.causal and mask is None else None,
        scale=scale,
        enable_gqa=True if q[-3] != k[-3] else None,
    )
    return index(place.bind(result, "attention"), f"..., :{_size(v[-1])}") if extra < 0 else result


def _mask(place: Place, attention: Attention, given: Given) -> Expr | None:
    """What attn_mask is: None where `is_causal` says it all. Queries and keys that it reads are kept in variables."""
    mask, alibi = attention.mask, attention.alibi
    if mask.window is None and not alibi and not mask.operands:
        return None
    visible = [call(place.helper(_MASKS[role]), given[role], 4) for role in mask.operands]
    if mask.window is not None or alibi or mask.causal:
        for role, name in (("q", "query"), ("k", "key")):
            if not given[role].is_name:
                given[role] = place.bind(given[role], name)
    q, k = given["q"], given["k"]
    if mask.window is not None:
        visible.insert(0, call(place.helper("window_mask"), q, k, mask.window))
    if mask.causal:
        visible.insert(0, call(place.helper("causal_mask"), q, k))
    bias = call(place.helper("alibi_bias"), q, k) if alibi else None
    if not visible:
        return bias
    seen = visible[0]
    if len(visible) > 1:
        seen = place.bind(Expr(" & ".join(map(str, visible)), COMPARE), "visible")
    return place.bind(method(bias, "masked_fill", f"~{seen}", "-math.inf"), "bias") if bias else seen


_MASKS = {"padding": "padding_mask", "documents": "document_mask"}


def _size(dim: Dim) -> int:
    if dim.constant is None:
        raise ValueError(f"the width {dim} of an attention is not known when it is compiled")
    return dim.constant
