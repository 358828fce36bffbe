"""Attention as a call: of PyTorch's own function, of the exact one in blocks, or of a kernel.

Those take q [.., H, n, d], k [.., Hk, m, d] and v [.., Hk, m, dv] with the same leading dims; attention in a program
may have no heads, or keys that are broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_compiler.approximation.features import rank
from fastgrad_compiler.attention.table import is_own
from fastgrad_compiler.codegen.attention_kernels import has_window_kernel
from fastgrad_compiler.codegen.place import Operands, Place
from fastgrad_compiler.codegen.writer import COMPARE, Expr, binary, call, index, literal, method
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Node

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class _Tensor:
    value: Expr
    shape: Shape


def emit_attention(place: Place, node: Node, operands: Operands) -> Expr:
    """The expression of an `attention` or `poly_attention` node."""
    roles = node["roles"]
    assert isinstance(roles, tuple)
    tensors = [_Tensor(o, place.type(name).shape) for o, name in zip(operands, node.inputs, strict=True)]
    others = {str(role): tensor for role, tensor in zip(roles, tensors[3:], strict=True)}
    headless = len(tensors[0].shape) == 2 or (
        len(tensors[0].shape) == 3 and ("padding" in others or "documents" in others)
    )
    lead = tensors[0].shape[:-2] if headless else tensors[0].shape[:-3]
    q, k, v, *near = (
        _lifted(place, tensor, lead, headless)
        for tensor in (*tensors[:3], *(others[role] for role in ("near_q", "near_k") if role in others))
    )
    banded = near or node.get("window") is not None or "documents" in others
    if node.op == "poly_attention" and (is_own(node) or not place.exact):
        result = _polynomial(place, node, [q, k, v, *near], _masks(place, others, lead))
    elif has_window_kernel(node, place.backends):
        result = call(place.kernel(node), *(x.value for x in (q, k, v)), **_masks(place, others, lead))
    elif banded and not node.get("alibi"):
        result = _exact(place, node, [q, k, v, *near], _masks(place, others, lead))
    else:
        result = _softmax(place, node, [q, k, v], others)
    return method(place.bind(result, "attention"), "squeeze", len(lead)) if headless else result


def _lifted(place: Place, tensor: _Tensor, lead: Shape, headless: bool) -> _Tensor:
    """With a dim of heads, and the leading dims `lead`."""
    value, shape = tensor.value, tensor.shape
    if headless or len(shape) == 2:
        value = method(value, "unsqueeze", len(shape) - 2)
        shape = (*shape[:-2], Dim.of(1), *shape[-2:])
    if shape[:-3] != lead:
        shape = (*lead, *shape[-3:])
        value = method(value, "expand", *(place.dim(dim) for dim in shape))
    return _Tensor(value, shape)


def _masks(place: Place, others: dict[str, _Tensor], lead: Shape) -> dict[str, Expr]:
    """The mask of padding, bool [.., m], and the ids of documents, [.., n], by the names of the kernels' arguments."""
    roles = (("mask", "padding"), ("documents", "documents"))
    return {name: _spread(place, others[role], lead) for name, role in roles if role in others}


def _spread(place: Place, tensor: _Tensor, lead: Shape) -> Expr:
    """Of shape [b, m], with all leading dims instead of b."""
    if len(lead) == 1:
        return tensor.value
    whole = (*lead, tensor.shape[-1])
    spread = index(tensor.value, ", ".join([":"] + ["None"] * (len(lead) - 1)))
    return method(spread, "expand", *(place.dim(dim) for dim in whole))


def _polynomial(place: Place, node: Node, tensors: list[_Tensor], masks: dict[str, Expr]) -> Expr:
    coefficients = node["coefficients"]
    assert isinstance(coefficients, tuple)
    degree = len(coefficients) - 1
    monomials = rank(_size(tensors[0].shape[-1]), degree)
    place.remark(_what(node, degree, monomials))
    values = [tensor.value for tensor in tensors]
    below = {"exact_below": node.get("break_even") or 0}
    on_gpu = node.get("break_even_gpu")
    if on_gpu is not None and on_gpu != below["exact_below"]:
        below["exact_below_gpu"] = on_gpu
    return call(place.kernel(node), *values, **masks, **below, guard=place.guard(node))


def _what(node: Node, degree: int, monomials: int) -> str:
    if is_own(node):
        return f"the model's own polynomial, of degree {degree} and rank {monomials}"
    error = node.get("eps")
    bound = node["bound"]
    largest = max(map(float, map(str, bound))) if isinstance(bound, tuple) else bound
    limit = "" if error is None else f"; relative error at most {error:.1e} where |s| <= {largest:g}"
    return f"a polynomial of degree {degree} instead of exp, rank {monomials}{limit}"


def _exact(place: Place, node: Node, tensors: list[_Tensor], masks: dict[str, Expr]) -> Expr:
    return call(
        place.exact_kernel(),
        *(tensor.value for tensor in tensors),
        **masks,
        scale=_scale(node),
        causal=True if node["causal"] else None,
        near=node["near"] if len(tensors) > 3 else None,
        window=node.get("window"),
    )


def _softmax(place: Place, node: Node, tensors: list[_Tensor], others: dict[str, _Tensor]) -> Expr:
    mask = _mask(place, node, tensors, others)
    q, k, v = tensors
    values = [tensor.value for tensor in tensors]
    scale = _scale(node)
    if node["causal"] and float(str(node["scale"])) <= 0:
        place.remark(
            "PyTorch's fused kernel gives NaN on a CPU where a causal attention has no positive scale"
        )
        values[0], scale = binary("*", values[0], scale), literal(1.0)
    extra = _size(v.shape[-1]) - _size(q.shape[-1])
    if extra:
        place.remark("columns of zeros change no logit, and PyTorch has fused kernels for equal widths only")
    for position in (0, 1) if extra > 0 else (2,) if extra < 0 else ():
        values[position] = call("F.pad", values[position], f"(0, {abs(extra)})")
    result = call(
        place.helper("softmax_attention"),
        *values,
        attn_mask=mask,
        is_causal=True if node["causal"] and mask is None else None,
        scale=scale,
        enable_gqa=True if q.shape[-3] != k.shape[-3] else None,
    )
    return index(place.bind(result, "attention"), f"..., :{_size(v.shape[-1])}") if extra < 0 else result


def _mask(place: Place, node: Node, tensors: list[_Tensor], others: dict[str, _Tensor]) -> Expr | None:
    """What attn_mask is: None where `is_causal` says it all. Queries and keys that it reads are kept in variables."""
    window, alibi = node.get("window"), node.get("alibi")
    masks = [role for role in ("padding", "documents") if role in others]
    if window is None and not alibi and not masks:
        return None
    rank = len(tensors[0].shape)
    visible = [call(place.helper(_MASKS[role]), others[role].value, rank) for role in masks]
    if window is not None or alibi or node["causal"]:
        for position, name in enumerate(("query", "key")):
            if not tensors[position].value.is_name:
                tensors[position] = _Tensor(
                    place.bind(tensors[position].value, name), tensors[position].shape
                )
    q, k = (tensor.value for tensor in tensors[:2])
    if window is not None:
        visible.insert(0, call(place.helper("window_mask"), q, k, window))
    if node["causal"]:
        visible.insert(0, call(place.helper("causal_mask"), q, k))
    bias = call(place.helper("alibi_bias"), q, k) if alibi else None
    if not visible:
        return bias
    mask = visible[0]
    if len(visible) > 1:
        mask = place.bind(Expr(" & ".join(map(str, visible)), COMPARE), "visible")
    return place.bind(method(bias, "masked_fill", f"~{mask}", "-math.inf"), "bias") if bias else mask


_MASKS = {"padding": "padding_mask", "documents": "document_mask"}


def _scale(node: Node) -> Expr:
    scale = node["scale"]
    assert isinstance(scale, int | float)
    return literal(float(scale))


def _size(dim: Dim) -> int:
    if dim.constant is None:
        raise ValueError(f"the width {dim} of an attention is not known when it is compiled")
    return dim.constant
