"""What the rules of TORCH may ask of the block that they write into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from fastgrad_compiler.codegen.writer import Expr
from fastgrad_compiler.ir.graph import Attribute, Node, TensorType
from fastgrad_compiler.targets import Backends

Operands: TypeAlias = Sequence[Expr]


class Place(Protocol):
    """A block being written."""

    exact: bool  # every attention that a polynomial approximates is written exact
    safe_softmax: bool  # rows of scores may be masked as a whole

    def dim(self, value: Attribute) -> Expr:
        """A dim or an int, over the variables at hand."""

    def helper(self, name: str) -> str:
        """A function of runtime/functions.py, imported."""

    def type(self, name: str) -> TensorType:
        """The type of a node."""

    def like(self) -> Expr:
        """A float tensor at hand, whose dtype and device new tensors take."""

    def device(self) -> Expr:
        """The device of a tensor at hand."""

    @property
    def backends(self) -> Backends:
        """What serves attention kernels beside PyTorch."""

    def kernel(self, node: Node) -> str:
        """The function of the kernel that serves an attention, imported."""

    def state(self, label: Attribute) -> Expr:
        """The part of the state under a label, in a step form."""

    def step_helper(self, name: str) -> str:
        """A function or class of runtime/step.py or runtime/step_attention.py, imported."""

    def kernel_spec(self, node: Node) -> str:
        """The specification of that kernel, imported."""

    def kernel_native(self, node: Node) -> str:
        """The native operations of that kernel, imported."""

    def guard(self, node: Node) -> Expr | None:
        """The key of the guard that watches an attention, None where none does."""

    def exact_kernel(self) -> str:
        """The function of runtime/exact_attention.py, imported."""

    def bind(self, value: Expr, name: str) -> Expr:
        """A local variable that holds `value`."""

    def remark(self, text: str) -> None:
        """A comment before the statement."""


Rule: TypeAlias = Callable[[Place, Node, Operands], Expr]
