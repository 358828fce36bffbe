"""How sentence-transformers makes one vector of a text: modules.json and the config of its pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgrad_dsl.checkpoints.read import CONFIG, MODULES
from fastgrad_dsl.documents.form import shown
from fastgrad_grammar.diagnostics import TfgError

_PACKAGE = "sentence_transformers.models."
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclass(frozen=True)
class Pooling:
    """`mode` is mean, or cls for the first token; `unit`: the vector is divided by its norm."""

    mode: str
    unit: bool

    @property
    def statements(self) -> str:
        """What makes the vector of `x` and `mask`."""
        pooled = "std.mean_pool(x, mask)" if self.mode == "mean" else "x[:, 0]"
        return f"return unit({pooled})" if self.unit else f"return {pooled}"


def pooling_of(others: Mapping[str, Any]) -> Pooling | None:
    """The pooling that modules.json names, none without such a file. Raises TfgError FG602 for other modules."""
    modules = others.get(MODULES)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise _refused(MODULES, "it is not a list of modules")
    kinds = [str(each.get("type")).removeprefix(_PACKAGE) for each in modules]
    paths = [each.get("path") for each in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _refused(
            MODULES, f"its modules are {shown(kinds)}, expected Transformer, Pooling and perhaps Normalize"
        )
    if paths[0] != "":
        raise _refused(MODULES, f"the model is in {shown(paths[0])}, expected in the folder itself")
    name = f"{paths[1]}/{CONFIG}"
    config = others.get(name)
    if not isinstance(config, dict):
        raise _refused(MODULES, f"pooling is in {shown(paths[1])}, expected a folder like 1_Pooling")
    return Pooling(_mode(name, config), len(kinds) == 3)


def _mode(name: str, config: Mapping[str, object]) -> str:
    named = config.get("pooling_mode")
    set_ = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    for mode, key in _MODES.items():
        if named == mode or (named is None and set_ == [key]):
            return mode
    found = shown(named if named is not None else set_)
    raise _refused(name, f"the pooling mode is {found}, expected one of {', '.join(_MODES.values())}")


def _refused(file: str, said: str) -> TfgError:
    return TfgError.of("FG602", f"{file}: {said}")
