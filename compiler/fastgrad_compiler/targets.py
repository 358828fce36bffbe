"""The targets that code can be generated for."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest


@dataclass(frozen=True, slots=True)
class Backends:
    """What serves attention kernels beside PyTorch's operations, which serve whatever these do not, on every device.

    cpp: C++, on a CPU. triton: Triton, on a GPU.
    """

    cpp: bool = False
    triton: bool = False


PYTORCH = Backends()
BACKENDS = {
    "torch": PYTORCH,
    "cpp": Backends(cpp=True),
    "triton": Backends(triton=True),
    "auto": Backends(cpp=True, triton=True),
}
"""The targets, and what serves attention for each."""


def check_target(target: str) -> None:
    """Raise TfgError FG420 for a target that is not available."""
    if target in BACKENDS:
        return
    near = nearest(target, tuple(BACKENDS))
    reason = f"unknown target {target}" + (f": did you mean {near}?" if near else "")
    help_ = (
        "available: torch, cpp (C++ on a CPU), triton (Triton on a GPU), and auto, which chooses by device",
    )
    raise TfgError([Diagnostic("FG420", reason, help=help_)])
