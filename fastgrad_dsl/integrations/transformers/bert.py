"""BERT and its relatives, whose attention does not use Transformers' `AttentionInterface` in releases of version 4.

Each keeps a table of classes by implementation; ours is added there, a subclass of the one for SDPA.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from fastgrad_dsl.integrations.transformers.attention import attention_forward

FAMILIES = ("bert", "camembert", "roberta", "xlm_roberta")


def tables() -> list[dict[str, Any]]:
    """The tables of classes that this release of Transformers has."""
    found = []
    for family in FAMILIES:
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        table = getattr(module, f"{family.upper()}_SELF_ATTENTION_CLASSES", None)
        if table is not None:
            found.append(table)
    return found


def register_classes(name: str) -> None:
    """Add a class of ours to each table."""
    for table in tables():
        table[name] = class_of(table["sdpa"])


def replace_classes(model: nn.Module) -> int:
    """Make the attention of a model that exists already one of ours, with the same weights; how many are."""
    ours = {each: class_of(table["sdpa"]) for table in tables() for each in (table["eager"], table["sdpa"])}
    count = 0
    for module in model.modules():
        if type(module) in ours:
            dropout = module.dropout
            assert isinstance(dropout, nn.Dropout)
            module.__class__ = ours[type(module)]
            module.dropout_prob = dropout.p  # type: ignore[assignment]
        count += type(module) in ours.values()
    return count


@cache
def class_of(sdpa: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose self-attention is ours; what it does not serve is its base's."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> Any:
        others = (head_mask, encoder_hidden_states, past_key_values)
        plain = self.position_embedding_type == "absolute" and not (self.is_decoder or output_attentions)
        if not plain or any(each is not None for each in others):
            given = (hidden_states, attention_mask, *others, output_attentions, cache_position)
            return sdpa.forward(self, *given)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        dropout = self.dropout_prob if self.training else 0.0
        out, weights = attention_forward(self, q, k, v, attention_mask, dropout, is_causal=False)
        return out.flatten(2), weights

    return type(f"Fastgrad{sdpa.__name__}", (sdpa,), {"forward": forward, "__module__": __name__})
