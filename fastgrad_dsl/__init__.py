"""fastgrad: a small language for transformers, compiled to PyTorch modules with almost-linear attention.

    import fastgrad_dsl as fg
    compiled = fg.compile("gpt.tfg")
    model = compiled.module(seed=0)

Names are imported when they are first used, so that the command line starts without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrad_compiler.runtime.guard import BudgetViolation as BudgetViolation
    from fastgrad_compiler.runtime.in_turn import loss_in_pieces as loss_in_pieces
    from fastgrad_compiler.runtime.initialise import initialise as initialise
    from fastgrad_dsl import conversion as conversion
    from fastgrad_dsl import distributed as distributed
    from fastgrad_dsl import functional as functional
    from fastgrad_dsl.api.compiled import Compiled as Compiled
    from fastgrad_dsl.api.compiled import compile as compile
    from fastgrad_dsl.api.loader import load as load
    from fastgrad_dsl.generation.generate import generate as generate
    from fastgrad_dsl.generation.generate import read_prompt as read_prompt
    from fastgrad_dsl.generation.sampling import Sampling as Sampling
    from fastgrad_dsl.models.tokenizer import load_tokenizer as load_tokenizer
    from fastgrad_dsl.training.budget_log import JsonLinesHandler as JsonLinesHandler
    from fastgrad_dsl.training.budget_log import TensorBoardHandler as TensorBoardHandler
    from fastgrad_dsl.training.budget_log import log_budget as log_budget
    from fastgrad_grammar.diagnostics import Diagnostic as Diagnostic
    from fastgrad_grammar.diagnostics import TfgError as TfgError

__version__ = "0.1.0"  # what pyproject.toml, the command and reports say, too

_HOMES = {
    "BudgetViolation": "fastgrad_compiler.runtime.guard",
    "Compiled": "fastgrad_dsl.api.compiled",
    "Diagnostic": "fastgrad_grammar.diagnostics",
    "JsonLinesHandler": "fastgrad_dsl.training.budget_log",
    "TensorBoardHandler": "fastgrad_dsl.training.budget_log",
    "Sampling": "fastgrad_dsl.generation.sampling",
    "TfgError": "fastgrad_grammar.diagnostics",
    "compile": "fastgrad_dsl.api.compiled",
    "generate": "fastgrad_dsl.generation.generate",
    "initialise": "fastgrad_compiler.runtime.initialise",
    "load": "fastgrad_dsl.api.loader",
    "load_tokenizer": "fastgrad_dsl.models.tokenizer",
    "loss_in_pieces": "fastgrad_compiler.runtime.in_turn",
    "log_budget": "fastgrad_dsl.training.budget_log",
    "read_prompt": "fastgrad_dsl.generation.generate",
}
_MODULES = ("conversion", "distributed", "functional")
__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"fastgrad_dsl.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
