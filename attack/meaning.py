"""What a program means: the oracle, which shares no code with recognition, emitters or kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastgrad_compiler.graph import Node, Program
from fastgrad_compiler.oracle import evaluate

Array = np.ndarray[Any, np.dtype[Any]]
Watch = Callable[[str, Node, Array], None]


def meaning(
    program: Program, inputs: Mapping[str, Array], weights: Mapping[str, Array], watch: Watch | None = None
) -> Sequence[Array]:
    """The results of the main graph in float64; `watch` gets (path, node, value)."""
    with np.errstate(all="ignore"):
        return evaluate(program, inputs, weights, watch=watch)
