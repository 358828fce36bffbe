"""What a program means: the oracle, which shares no code with recognition, emitters or kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastgrad_compiler import interpret
from fastgrad_compiler.graph import Node, Program

Array = np.ndarray[Any, np.dtype[Any]]
Watch = Callable[[str, Node, Array], None]


def meaning(
    program: Program, inputs: Mapping[str, Array], weights: Mapping[str, Array], watch: Watch | None = None
) -> Sequence[Array]:
    """The results of the main graph in float64; `watch` gets (path, node, value)."""
    given = {name: torch.as_tensor(value) for name, value in inputs.items()}
    held = {name: torch.as_tensor(value) for name, value in weights.items()}
    with torch.no_grad():
        found = interpret.run(program, given, held, dtype=torch.float64)
    results = found if isinstance(found, tuple) else (found,)
    return [each.numpy() for each in results]
