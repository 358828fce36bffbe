"""Elaboration: syntax tree to Program. Names, params, dims; blocks instantiated once per signature."""

from __future__ import annotations

from fastgrad_compiler.frontend.programs import elaborate, models

__all__ = ["elaborate", "models"]
