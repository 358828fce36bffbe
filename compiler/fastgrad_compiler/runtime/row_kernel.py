"""Groups of operations on rows: a C++ kernel where it can be had, PyTorch's operations everywhere else.

The library of a group and a variant (see `native`) registers

    fastgrad::NAME_VARIANT_forward(inputs.., out, threads)
    fastgrad::NAME_VARIANT_backward(inputs.., gradient of out, gradients of the inputs.., threads)

All are contiguous and of the variant's dtype, but the gradients of weights and numbers, which are float32 for bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .native import Library, enabled
from .private_files import warn_once

Plain = Callable[..., Tensor]


class _Operations(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


def row_kernel(name: str, spec: ModuleSpec | None, kinds: str, width: int) -> Callable[[Plain], RowKernel]:
    """Serve a function of rows of a width d by the kernel NAME.cpp, which lies beside the module of `spec`.

    kinds: a letter for each argument: r for rows [.., d], e for a number of each [.., 1], c for [d], n for a number.
    """
    return lambda plain: RowKernel(name, spec, kinds, width, plain)


class RowKernel:
    """The group; `plain` computes it by PyTorch's operations."""

    def __init__(self, name: str, spec: ModuleSpec | None, kinds: str, width: int, plain: Plain) -> None:
        self.name, self.kinds, self.width, self.plain = name, kinds, width, plain
        self._library = Library(name, spec, _Operations, _warn)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result, rows as those of the inputs."""
        if torch.compiler.is_compiling() or self._serving(inputs) is None:
            return self.plain(*inputs)
        result: Tensor = _Rows.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return result

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The result by the kernel, which is there."""
        operations = self._library.of(inputs[0].dtype)
        assert operations is not None
        out = torch.empty_like(self._rows(inputs), memory_format=torch.contiguous_format)
        operations.forward(*(x.contiguous() for x in inputs), out, torch.get_num_threads())
        return out

    def backward(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> list[Tensor]:
        """The gradients of the inputs."""
        operations = self._library.of(inputs[0].dtype)
        assert operations is not None
        work = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradients = [
            torch.empty(x.shape, dtype=work if kind in "cn" else x.dtype)
            for x, kind in zip(inputs, self.kinds, strict=True)
        ]
        given = [x.contiguous() for x in (*inputs, gradient)]
        operations.backward(*given, *gradients, torch.get_num_threads())
        return [g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]

    def _rows(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[self.kinds.index("r")]

    def _serving(self, inputs: tuple[Tensor, ...]) -> _Operations | None:
        dtype = inputs[0].dtype
        derived = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        if derived or not enabled() or torch.is_autocast_enabled("cpu"):
            return None
        batched = torch._C._functorch.is_legacy_batchedtensor  # by torch.autograd.grad with is_grads_batched
        shape = tuple(self._rows(inputs).shape)
        wanted = {"r": (*shape[:-1], self.width), "e": (*shape[:-1], 1), "c": (self.width,), "n": ()}
        for x, kind in zip(inputs, self.kinds, strict=True):
            plain = type(x) in _TENSORS and x.device.type == "cpu" and not batched(x)
            if not plain or x.dtype != dtype or tuple(x.shape) != wanted[kind] or x.numel() == 0:
                return None
        return self._library.of(dtype)

    def __deepcopy__(self, memo: object) -> RowKernel:
        return self


_TENSORS = (Tensor, torch.nn.Parameter)


class _Rows(torch.autograd.Function):
    """(kernel, *inputs): the group; a second derivative is that of the plain operations."""

    @staticmethod
    def forward(kernel: RowKernel, *inputs: Tensor) -> Tensor:
        return kernel.forward(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kernel = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel: RowKernel = ctx.kernel
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient):
            with torch.enable_grad():
                asked = [x for x, wanted in zip(inputs, needed, strict=True) if wanted]
                found = iter(torch.autograd.grad(kernel.plain(*inputs), asked, gradient, create_graph=True))
            return (None, *(next(found) if wanted else None for wanted in needed))
        gradients = kernel.backward(inputs, gradient)
        return (None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)))


def _warn(reason: str) -> None:
    warn_once(
        "native_warning", f"rows are computed without native kernels, and slower: {reason}", RuntimeWarning
    )
