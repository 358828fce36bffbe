"""Attention in every form that a node can have, as programs of one node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """An attention: `types` of q, k, v and what `roles` names."""

    name: str
    q: str = "float[b, 4, n, 3]"
    k: str = "float[b, 4, n, 3]"
    v: str = "float[b, 4, n, 2]"
    roles: tuple[tuple[str, str], ...] = ()
    causal: bool = False
    near: int | None = None
    window: int | None = None
    alibi: bool = False
    more: str = ""

    @property
    def text(self) -> str:
        """A program that returns the attention of its inputs."""
        inputs = (("q", self.q), ("k", self.k), ("v", self.v), *self.roles)
        declared = "\n    ".join(f"%{name} = input() : {type_}" for name, type_ in inputs)
        names = ", ".join(f"%{name}" for name, _ in inputs)
        roles = "".join(f'"{name}", ' for name, _ in self.roles)
        flags = f"alibi = {str(self.alibi).lower()}, causal = {str(self.causal).lower()}"
        sizes = f"near = {self.near or 'none'}, window = {self.window or 'none'}"
        call = (
            f"attention({names}, {flags}, {sizes}, roles = ({roles}), scale = 0.7, "
            f"bound = none, asserted = false, proof = (){self.more})"
        )
        body = f"{declared}\n    %y = {call}\n    return %y"
        return f"program p\nmain main\n\ngraph main {{\n    {body}\n}}\n"


NEAR = (("near_q", "float[b, 4, n, 5]"), ("near_k", "float[b, 4, n, 5]"))
GROUPED_NEAR = (("near_q", "float[b, 4, n, 5]"), ("near_k", "float[b, 2, n, 5]"))
PADDING = (("padding", "bool[b, n]"),)
K2, V2 = "float[b, 2, n, 3]", "float[b, 2, n, 2]"
FORGET2 = ("forget", "float[b, 2, n]")
VARIANTS = (
    Variant("plain"),
    Variant("causal", causal=True),
    Variant("grouped", k=K2, v=V2, causal=True),
    Variant("one key head", k="float[b, 1, n, 3]", v="float[b, 1, n, 2]"),
    Variant("cross", k="float[b, 4, m, 3]", v="float[b, 4, m, 2]"),
    Variant("padding", roles=PADDING),
    Variant("padding causal", roles=PADDING, causal=True),
    Variant("window", window=2),
    Variant("window causal", window=2, causal=True),
    Variant("documents", roles=(("documents", "int[b, n]"),), causal=True),
    Variant("alibi", alibi=True, causal=True),
    Variant("near", roles=NEAR, near=2),
    Variant("near causal", roles=NEAR, near=1, causal=True),
    Variant("near grouped padding", k=K2, v=V2, roles=(*GROUPED_NEAR, *PADDING), near=1, causal=True),
    Variant("near, same logits", near=1, causal=True),
    Variant("forget", roles=(("forget", "float[b, 4, n]"),), causal=True),
    Variant("forget window", roles=(("forget", "float[b, 4, n]"),), window=3, causal=True),
    Variant(
        "forget near grouped padding",
        k=K2,
        v=V2,
        roles=(*GROUPED_NEAR, FORGET2, *PADDING),
        near=1,
        causal=True,
    ),
    Variant("forget documents", k=K2, v=V2, roles=(FORGET2, ("documents", "int[b, n]")), causal=True),
)
