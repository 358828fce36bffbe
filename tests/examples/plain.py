"""Plain PyTorch models, written without the compiler, that compiled examples must equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Weights = Mapping[str, Tensor]


def within(weights: Weights, scope: str) -> dict[str, Tensor]:
    """The weights below a path, by the rest of their paths."""
    return {path.removeprefix(f"{scope}."): w for path, w in weights.items() if path.startswith(f"{scope}.")}


def encoder_layer(weights: Weights, heads: int, *, norm_first: bool) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of one layer of bert.tfg or std.transformer_layer."""
    width, hidden = weights["mlp.w1"].shape
    layer = nn.TransformerEncoderLayer(
        width,
        heads,
        hidden,
        0.0,
        "gelu",
        batch_first=True,
        norm_first=norm_first,
        dtype=weights["mlp.w1"].dtype,
    )
    projections = [weights[f"attention.w{name}"].T for name in "qkv"]
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat(projections),
            "self_attn.in_proj_bias": torch.cat([weights[f"attention.b{name}"] for name in "qkv"]),
            "self_attn.out_proj.weight": weights["attention.wo"].T,
            "self_attn.out_proj.bias": weights["attention.bo"],
            "linear1.weight": weights["mlp.w1"].T,
            "linear1.bias": weights["mlp.b1"],
            "linear2.weight": weights["mlp.w2"].T,
            "linear2.bias": weights["mlp.b2"],
            "norm1.weight": weights["attention_norm.w"],
            "norm1.bias": weights["attention_norm.b"],
            "norm2.weight": weights["mlp_norm.w"],
            "norm2.bias": weights["mlp_norm.b"],
        }
    )
    return layer


def encoder(weights: Weights, depth: int, heads: int, *, norm_first: bool) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder with the weights below `layers`."""
    first = encoder_layer(within(weights, "layers.0"), heads, norm_first=norm_first)
    stack = nn.TransformerEncoder(first, depth, enable_nested_tensor=False)
    for index in range(depth):
        layer = encoder_layer(within(weights, f"layers.{index}"), heads, norm_first=norm_first)
        stack.layers[index].load_state_dict(layer.state_dict())
    return stack.eval()


def bert(weights: Weights, tokens: Tensor, mask: Tensor, depth: int, heads: int) -> Tensor:
    """The exact model of bert.tfg with free logits; logits at padding are of no meaning."""
    x = weights["table"][tokens] + weights["places"][: tokens.shape[1]]
    norm = weights["embedding_norm.w"], weights["embedding_norm.b"]
    x = functional.layer_norm(x, x.shape[-1:], *norm)
    x = encoder(weights, depth, heads, norm_first=False)(x, src_key_padding_mask=~mask)
    return x @ weights["table"].T


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions by complex numbers: (x_i, x_{i + d/2}) as one number each."""
    n, d = x.shape[-2:]
    first, second = x.chunk(2, -1)
    angle = torch.arange(n)[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    turned = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def gpt(weights: Weights, tokens: Tensor, *, depth: int, heads: int, near: int) -> Tensor:
    """The exact model of bounded.tfg: free logits in neighbouring blocks, unit queries and keys beyond."""
    x = weights["table"][tokens]
    for index in range(depth):
        layer = within(weights, f"layers.{index}")
        x = x + _gpt_attention(
            within(layer, "attention"), _rms_norm(x, layer["attention_norm.w"]), heads, near
        )
        h, mlp = _rms_norm(x, layer["mlp_norm.w"]), within(layer, "swiglu")
        x = x + (functional.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
    return _rms_norm(x, weights["rms_norm.w"]) @ weights["table"].T


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], w, 1e-6)


def _gpt_attention(weights: Weights, x: Tensor, heads: int, near: int) -> Tensor:
    b, n, _ = x.shape
    q, k, v = ((x @ weights[f"w{name}"]).view(b, n, heads, -1).transpose(1, 2) for name in "qkv")
    q, k = rotate(q, 10000.0), rotate(k, 10000.0)
    out = torch.zeros_like(v)
    for i in range(n):  # one query at a time, over the keys that it sees
        past = torch.arange(i + 1)
        local = (q[:, :, i : i + 1] * k[:, :, : i + 1]).sum(-1) / q.shape[-1] ** 0.5
        far = functional.cosine_similarity(q[:, :, i : i + 1], k[:, :, : i + 1], dim=-1)
        scores = torch.where(i // near - past // near <= 1, local, far)
        out[:, :, i] = (scores.softmax(-1)[..., None] * v[:, :, : i + 1]).sum(-2)
    return out.transpose(1, 2).flatten(2) @ weights["wo"]
