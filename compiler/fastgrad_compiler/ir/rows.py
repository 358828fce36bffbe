"""What a kernel that goes over rows does: the kinds of its values, and its operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import TensorType

Kind: TypeAlias = Literal["row", "each", "column", "number"]
Shape: TypeAlias = tuple[Dim, ...]

ELEMENTWISE = ("add", "sub", "mul", "div", "neg", "exp", "sigmoid", "silu", "sqrt", "rsqrt")
REDUCTIONS = ("sum", "mean")  # over the last axis, which stays as one
NORMS = ("rms_norm", "layer_norm")


def kind_of(type_: TensorType, shape: Shape) -> Kind | None:
    """What a tensor is beside rows [.., d] of a shape: one of them, [.., 1], [d] or []; None for anything else."""
    kinds: dict[Shape, Kind] = {
        (): "number",
        shape[-1:]: "column",
        (*shape[:-1], Dim.of(1)): "each",
        shape: "row",
    }
    return kinds.get(type_.shape) if type_.dtype == "float" else None


def row_shape(types: Iterable[TensorType]) -> Shape | None:
    """The shape of the rows among some tensors: the first with two axes or more and a width."""
    return next((each.shape for each in types if len(each.shape) > 1 and each.shape[-1] != Dim.of(1)), None)
