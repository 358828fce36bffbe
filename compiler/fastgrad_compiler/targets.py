"""The targets that code can be generated for."""

from __future__ import annotations

from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest

AVAILABLE = ("torch", "auto")
PLANNED = ("cpp", "triton")


def resolve_target(target: str) -> str:
    """The target that code is generated for; `auto` is torch. TfgError FG420 for one that is not available."""
    if target in AVAILABLE:
        return "torch"
    if target in PLANNED:
        reason = f"target {target} is not part of this version"
    else:
        near = nearest(target, AVAILABLE + PLANNED)
        reason = f"unknown target {target}" + (f": did you mean {near}?" if near else "")
    raise TfgError(
        [Diagnostic("FG420", reason, help=("available: torch, and auto, which chooses by device",))]
    )
