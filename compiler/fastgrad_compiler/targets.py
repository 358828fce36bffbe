"""The targets that code can be generated for."""

from __future__ import annotations

from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest

NATIVE = {"torch": False, "cpp": True, "auto": True}
"""The targets, and whether C++ serves attention on a CPU; what else runs is PyTorch's, on every device."""
PLANNED = ("triton",)


def check_target(target: str) -> None:
    """Raise TfgError FG420 for a target that is not available."""
    if target in NATIVE:
        return
    if target in PLANNED:
        reason = f"target {target} is not part of this version"
    else:
        near = nearest(target, (*NATIVE, *PLANNED))
        reason = f"unknown target {target}" + (f": did you mean {near}?" if near else "")
    help_ = ("available: torch, cpp (C++ on a CPU), and auto, which chooses by device",)
    raise TfgError([Diagnostic("FG420", reason, help=help_)])
