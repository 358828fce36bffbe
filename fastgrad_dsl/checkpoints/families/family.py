"""What there is to know of a family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgrad_dsl.checkpoints.fields import Config, Field
from fastgrad_dsl.checkpoints.mapping import Rule


@dataclass(frozen=True)
class Family:
    """A family: `name` is its model_type.

    fields          what it reads of config.json
    architectures   the classes of Transformers that are read, as config.json names them
    spec            the text of the spec, in any layout
    rules           the place of each tensor in it
    layers          how many layers there are, for `{i}` in the rules
    prefix          what may stand before the names of the backbone, `{p}` in the rules
    kept            patterns of tensors that no computation reads; `{p}` as in the rules
    check           raises TfgError FG602 for fields that do not fit each other
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    fields: tuple[Field, ...]
    spec: Callable[[Config], str]
    rules: Callable[[Config], tuple[Rule, ...]]
    layers: Callable[[Config], int]
    prefix: str = ""
    kept: Callable[[Config], tuple[str, ...]] = lambda config: ()
    check: Callable[[Config], None] = lambda config: None


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What the language calls Transformers' activations."""


def params(**values: object) -> str:
    """Lines of params; what is none is left out."""
    lines = (f"param {name} = {value!r}" for name, value in values.items() if value is not None)
    return "\n".join(lines) + "\n"


LANGUAGE_LOSS = """
objective loss(logits: float[b, n, vocab], targets: int[b, n]) = cross_entropy(logits, targets)
"""
