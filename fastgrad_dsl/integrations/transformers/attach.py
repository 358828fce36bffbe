"""The name "fastgrad" in Transformers' registries, and settings for the attentions of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastgrad_dsl.integrations.transformers.attention import (
    Attached,
    attached,
    attention_forward,
    find_attached,
    set_default,
)
from fastgrad_dsl.integrations.transformers.bert import register_classes, replace_classes
from fastgrad_dsl.integrations.transformers.settings import Settings
from fastgrad_dsl.integrations.transformers.sight import describe

NAME = "fastgrad"


def register(settings: Settings | None = None) -> None:
    """Make `attn_implementation="fastgrad"` known to Transformers; again, with other settings, as often as wanted.

    settings: of all attentions that have none of their own.

    Raises:
        ModuleNotFoundError: Transformers is not installed, or has no `AttentionInterface` (older than 4.56).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe)
    register_classes(NAME)
    set_default(settings or Settings())


def attach(model: Any, settings: Settings | Mapping[str, Settings] | None = None) -> None:
    """Serve a model of Transformers that is already made, as `set_attn_implementation("fastgrad")` does.

    It serves BERT and its relatives too, which that method does not in releases of version 4. settings: of all its
    attentions, or by their path in the model; None: the default ones.

    Raises:
        ValueError: a path that no module of the model has.
    """
    register_if_needed()
    if not replace_classes(model):
        model.set_attn_implementation(NAME)
    if settings is None:
        return
    modules = dict(model.named_modules())
    if isinstance(settings, Mapping):
        for path, own in settings.items():
            if path not in modules:
                raise ValueError(f"the model has no module {path!r}")
            _set(modules[path], path, own)
        return
    for path, module in modules.items():
        _set(module, path, settings)


def _set(module: nn.Module, path: str, settings: Settings) -> None:
    found = attached(module)
    found.settings, found.path = settings, path
    found.guards.clear()


def register_if_needed() -> None:
    """Register with the default settings unless it was done."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        register()


def status(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was done in each attention of a model that was called: by path, numbers of calls that polynomials might
    serve, of heads in them by what served them, of calls that are not served by the reason, and what guards say.
    """
    found = {path: find_attached(module) for path, module in model.named_modules()}
    return {path: _row(each) for path, each in found.items() if each is not None and _was_called(each)}


def _was_called(found: Attached) -> bool:
    return bool(found.counts.calls or found.counts.refused)


def _row(found: Attached) -> dict[str, Any]:
    counts = found.counts
    return {
        "calls": counts.calls,
        "polynomial": counts.polynomial,
        "exact": counts.exact,
        "refused": dict(counts.refused),
        "guards": [guard.status() for guard in found.guards.values()],
    }
