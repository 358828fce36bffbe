"""The native side of an attention kernel: which calls it serves, and its operations called on tensors.

The library of a kernel and a variant (see `native`) registers

    fastgrad::NAME_VARIANT_forward(q, k, v, near_q, near_k, log_decay, mask, documents, out, denominator, maximum,
                                   threads)
    fastgrad::NAME_VARIANT_backward(gradient, q, k, v, near_q, near_k, log_decay, mask, documents, out, denominator,
                                    maximum, dq, dk, dv, dnear_q, dnear_k, dlog_decay, threads)

Their inputs have the variant's dtype and a dense last dimension; they write `out`, `denominator` and `maximum`, and the
gradients, which are allocated here. Denominators, maxima and gradients are float32 in the variant bfloat16. Of gates
they get the sums of `decay.log_decay`, and give the gradient of these, or of a window the gradient of the gate after
each token: all are float64 and contiguous in all variants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_op import NAMESPACE, compute_dtype
from .content_name import read_beside
from .decay import gate_gradient, log_decay, sum_of_later
from .documents import document_runs
from .kernel_spec import KernelSpec
from .native import NativeError, enabled, load
from .private_files import warn_once

Operation = Callable[..., None]


class NativeWarning(RuntimeWarning):
    """Native kernels were wanted and cannot be had; results are the same, and slower."""


class NativeAttention:
    """The native operations of one kernel, built and loaded when the first call asks for them.

    name: of the kernel. spec: of its module, beside which NAME.cpp lies: in a folder, an archive or memory. kernel:
    what it computes.
    """

    def __init__(self, name: str, spec: ModuleSpec | None, kernel: KernelSpec) -> None:
        self.name, self.kernel = name, kernel
        self._spec = spec
        self._operations: dict[torch.dtype, tuple[Operation, Operation] | None] = {}
        self._lock = threading.Lock()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near_q: Tensor | None,
        near_k: Tensor | None,
        log_gate: Tensor | None,
        mask: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """out, denominator and maximum; None where the call is not for native kernels or they cannot be had."""
        operations = self._serve(q, k, v)
        if operations is None:
            return None
        dtype, rows = _input_dtype(q, k, v), q.shape[:-1]
        precision = compute_dtype(q, k, v)
        out = v.new_empty((*rows, v.shape[-1]), dtype=dtype)
        denominator = q.new_empty(rows, dtype=precision)
        maximum = q.new_empty(rows if self.kernel.saves_maximum else (0,), dtype=precision)
        inputs = _inputs(dtype, q, k, v, near_q, near_k, log_gate, mask, documents)
        operations[0](*inputs, out, denominator, maximum, torch.get_num_threads())
        return out.to(v.dtype), denominator, maximum

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near_q: Tensor | None,
        near_k: Tensor | None,
        log_gate: Tensor | None,
        mask: Tensor | None,
        documents: Tensor | None,
        out: Tensor,
        denominator: Tensor,
        maximum: Tensor,
    ) -> tuple[Tensor, ...] | None:
        """The gradients of the floating inputs, those that do not exist without elements; None as `forward`."""
        operations = self._serve(q, k, v)
        if operations is None:
            return None
        dtype, precision = _input_dtype(q, k, v), compute_dtype(q, k, v)
        floats = (q, k, v, near_q, near_k, log_gate)
        precisions = (*[precision] * 5, torch.float64)
        gradients = [
            None if x is None else x.new_empty(x.shape, dtype=of)
            for x, of in zip(floats, precisions, strict=True)
        ]
        inputs = _inputs(dtype, q, k, v, near_q, near_k, log_gate, mask, documents)
        saved = (_dense(out.to(dtype)), denominator.contiguous(), maximum.contiguous())
        operations[1](_dense(gradient.to(dtype)), *inputs, *saved, *gradients, torch.get_num_threads())
        *_, of_sums = gradients
        if log_gate is not None and of_sums is not None:
            if self.kernel.window:
                later = pad(of_sums, (1, -1))
            else:
                later = sum_of_later(of_sums, None if documents is None else document_runs(documents))
            gradients[-1] = gate_gradient(later, log_gate, mask, documents)
        return tuple(
            q.new_empty((0,)) if x is None or dx is None else dx.to(x.dtype)
            for x, dx in zip(floats, gradients, strict=True)
        )

    def _serve(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Operation, Operation] | None:
        """The two operations that serve these inputs, None where PyTorch's must."""
        if q.device.type != "cpu" or not enabled() or 0 in (q.numel(), k.numel(), v.numel()):
            return None
        dtype = _input_dtype(q, k, v)
        if dtype not in self._operations:
            with self._lock:
                if dtype not in self._operations:
                    self._operations[dtype] = self._load(str(dtype).removeprefix("torch."))
        return self._operations[dtype]

    def _load(self, variant: str) -> tuple[Operation, Operation] | None:
        registered = getattr(torch.ops, NAMESPACE)
        forward, backward = (f"{self.name}_{variant}_{which}" for which in ("forward", "backward"))
        if not hasattr(registered, forward):
            try:
                load(self.name, self._text(), variant)
            except NativeError as error:
                _warn(str(error))
                return None
        return getattr(registered, forward).default, getattr(registered, backward).default

    def _text(self) -> str:
        """NAME.cpp, from where the module came."""
        try:
            return read_beside(self._spec, f"{self.name}.cpp").decode()
        except OSError as error:
            message = f"{error.filename or error} is missing: compile the model again"
            raise NativeError(message) from error


def _input_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """bfloat16 where all inputs are; else the precision of the arithmetic."""
    if q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return torch.bfloat16
    return compute_dtype(q, k, v)


def _inputs(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    log_gate: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
) -> list[Tensor | None]:
    floats = [None if x is None else _dense(x.to(dtype)) for x in (q, k, v, near_q, near_k)]
    ids = None if documents is None else documents.to(torch.int64).contiguous()
    sums = None if log_gate is None else log_decay(log_gate, mask, documents).contiguous()
    return [*floats, sums, None if mask is None else mask.contiguous(), ids]


def _dense(tensor: Tensor) -> Tensor:
    """With neighbours in the last dimension next to each other; a last dimension of size 1 may keep any stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _warn(reason: str) -> None:
    message = f"attention runs without native kernels, and slower: {reason}"
    warn_once("native_warning", message, NativeWarning)
