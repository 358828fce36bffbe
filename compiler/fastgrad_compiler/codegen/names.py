"""Python names for what a program names: classes for blocks, variables for nodes, attributes for labels."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from functools import cache

# What the generated module itself uses; a variable of the user's of that name gets an underscore behind it.
HELPERS = frozenset(
    {
        "BufferDict",
        "BufferList",
        "alibi_bias",
        "apply_alibi",
        "apply_causal",
        "apply_documents",
        "apply_near_far",
        "apply_padding",
        "apply_polynomial",
        "apply_window",
        "causal_mask",
        "check_dim",
        "check_shape",
        "document_mask",
        "masked_softmax",
        "normalize_rows",
        "padding_mask",
        "rotary",
        "sinusoid",
        "softmax_attention",
        "window_mask",
    }
)
MODULE_NAMES = frozenset({"F", "Guard", "Tensor", "budget_status", "math", "name_guards", "nn", "torch"})
LOCAL_NAMES = HELPERS | MODULE_NAMES | {"MODEL", "exact_attention", "initialise", "like", "range", "self"}
CLASS_NAMES = HELPERS | MODULE_NAMES | {"ClassVar", "False", "None", "True"}
_NUMBERED = re.compile(r"(.+?)_\d+")


def class_name(block: str, taken: Collection[str]) -> str:
    """`std.rms_norm` is RmsNorm, `gpt` is Gpt; the second class of a block has a 2 behind its name."""
    parts = block.rpartition(".")[2].split("_")
    stem = "".join(part[:1].upper() + part[1:] for part in parts if part) or "Block"
    number, name = 1, stem
    while name in taken or name in CLASS_NAMES:
        number += 1
        name = f"{stem}{number}"
    return name


def variable(name: str) -> str:
    """A valid Python identifier close to `name` that hides nothing the module needs."""
    text = re.sub(r"\W", "_", name.lstrip("_"), flags=re.ASCII) or "value"
    if text[0].isdigit():
        text = f"_{text}"
    reserved = keyword.iskeyword(text) or text in LOCAL_NAMES or text.startswith("polynomial_attention")
    return f"{text}_" if reserved else text


@cache
def _module_attributes() -> frozenset[str]:
    from torch import nn

    return frozenset(dir(nn.Module())) | {"INIT", "budget_status"}


def member_access(label: str, kind: str, owner: str = "self") -> str:
    """`self.label`; where Python or nn.Module knows another thing by that name, its entry among the members."""
    if keyword.iskeyword(label) or label in _module_attributes():
        return f'{owner}._{kind}s["{label}"]'
    return f"{owner}.{label}"


def base(name: str, others: Collection[str]) -> str:
    """The user's name of a node: `x` for `x_2`, where `x` is a node too (a name bound again is numbered)."""
    found = _NUMBERED.fullmatch(name)
    return found.group(1) if found and found.group(1) in others else name


def unique(stem: str, taken: Collection[str]) -> str:
    """`stem`, or the first of `stem_2`, `stem_3` ... that is not taken."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name
