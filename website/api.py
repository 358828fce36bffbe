"""The page of the Python API, from the docstrings: what `import fastgrad_dsl` and its public modules offer."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import fastgrad_dsl

INTRODUCTION = """# Python

What `import fastgrad_dsl as fg` offers, from the docstrings. A model that `fg.compile` or `fg.load` gives is a
`torch.nn.Module`; [pytorch](pytorch.md) says what PyTorch may do with it.
"""
MODULES = ("functional", "distributed", "training", "conversion")


def api_page() -> str:
    """The page in Markdown; the entries are filled in by Sphinx's autodoc."""
    names = [name for name in fastgrad_dsl.__all__ if not name.startswith("_") and name not in MODULES]
    parts = [INTRODUCTION, "## fastgrad_dsl\n", *(_entry(fastgrad_dsl, name) for name in names)]
    for module in (import_module(f"fastgrad_dsl.{name}") for name in MODULES):
        parts += [f"## {module.__name__}\n", f"{(module.__doc__ or '').strip()}\n"]
        parts += [_entry(module, name) for name in _public(module)]
    return "\n".join(parts)


def _public(module: ModuleType) -> list[str]:
    named = getattr(module, "__all__", None)
    if named is not None:
        return sorted(named)
    functions = inspect.getmembers(module, inspect.isfunction)
    return [
        name for name, each in functions if each.__module__ == module.__name__ and not name.startswith("_")
    ]


def _entry(module: ModuleType, name: str) -> str:
    thing = getattr(module, name)
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    members = "   :members:\n" if inspect.isclass(thing) else ""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        kind = "autoexception"
    return f"```{{eval-rst}}\n.. {kind}:: {module.__name__}.{name}\n{members}```\n"
