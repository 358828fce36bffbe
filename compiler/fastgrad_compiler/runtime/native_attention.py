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

Where attention is causal and by a polynomial, it has five more. Two are for tokens that go on from a `State`:

    fastgrad::NAME_VARIANT_step(q, k, v, near_q, near_k, log_gate, mask, runs, ring_k, ring_v, ring_near_k, ring_gates,
                                ring_seen, ring_run, document, summed, sums, out, past,
                                threads)
    fastgrad::NAME_VARIANT_absorb(k, v, factor, there, sums, threads)

The first gives the attention of some tokens one by one, and brings up to date what is kept: the tensors of
`step_attention.Kept`. All its tokens have one dtype; in the variant float64 that may be float32. The second adds keys
to sums. Three are for a piece of a sequence: what its queries read from such sums, and the gradients of both:

    fastgrad::NAME_VARIANT_read(q, sums, found, threads)
    fastgrad::NAME_VARIANT_read_backward(gradient, q, sums, dq, dsums, threads)
    fastgrad::NAME_VARIANT_absorb_backward(dsums, k, v, factor, there, dk, dv, dfactor, threads)

They add to the gradients that they are given, and overwrite `dfactor`. `found` and `gradient` are
contiguous and, as the gradients of tokens, in the precision of the arithmetic; sums, their gradients and factors are
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from .attention_op import Inputs, compute_dtype
from .decay import gate_gradient, log_decay, sum_of_later
from .documents import document_runs
from .kernel_spec import KernelSpec
from .native import Library, enabled
from .private_files import warn_once
from .softmax_pairs import is_mapped

Operation = Callable[..., None]


class Operations(NamedTuple):
    """Those of a library; from `step` on None where the attention is not of a step form."""

    forward: Operation
    backward: Operation
    step: Operation | None
    absorb: Operation | None
    read: Operation | None
    read_backward: Operation | None
    absorb_backward: Operation | None


class NativeWarning(RuntimeWarning):
    """Native kernels were wanted and cannot be had; results are the same, and slower."""


class NativeAttention:
    """The native operations of one kernel, built and loaded when the first call asks for them.

    name: of the kernel. spec: of its module, beside which NAME.cpp lies: in a folder, an archive or memory. kernel:
    what it computes.
    """

    def __init__(self, name: str, spec: ModuleSpec | None, kernel: KernelSpec) -> None:
        self.name, self.kernel = name, kernel
        self._library = Library(name, spec, Operations, _warn)

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
        operations.forward(*inputs, out, denominator, maximum, torch.get_num_threads())
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
        operations.backward(_dense(gradient.to(dtype)), *inputs, *saved, *gradients, torch.get_num_threads())
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

    @staticmethod
    def is_plain() -> bool:
        """Whether operations that have no rules for graphs, maps and derivatives may serve what runs now."""
        derived = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return enabled() and not (derived or torch.compiler.is_compiling() or is_mapped())

    def stepper(self, tokens: Sequence[Tensor | None]) -> Operation | None:
        """What serves the next tokens, of which these are the floating tensors, new ones and kept ones; or None.

        They carry no gradients, and `is_plain` holds.
        """
        floats = [x for x in tokens if x is not None]
        dtype = floats[0].dtype
        if any([x.dtype != dtype or not x.is_cpu for x in floats]):
            return None
        if self.kernel.precision == "float64":
            if dtype not in (torch.float32, torch.float64):
                return None
            dtype = torch.float64
        operations = self._library.of(dtype)
        return None if operations is None else operations.step

    def step(
        self,
        operation: Operation,
        inputs: Inputs,
        ring: Sequence[Tensor | None],
        document: Tensor | None,
        summed: Tensor | None,
        sums: Tensor,
        past: int,
    ) -> Tensor:
        """[b, H, c, dv]: the attention of new tokens, whose documents are numbered as those of the ring.

        operation: of `stepper`. ring: k, v, near_k, gates, seen and run. They and what follows are written.
        """
        q, k, v, near_q, near_k, log_gate, mask, runs = inputs
        batch, heads, count, _ = q.shape
        out = v.new_empty((batch, count, heads, v.shape[-1])).transpose(1, 2)
        floats = [None if x is None else _dense(x) for x in (q, k, v, near_q, near_k)]
        gates = None if log_gate is None else log_gate.double().contiguous()
        masks = (None if x is None else x.contiguous() for x in (mask, runs))
        operation(*floats, gates, *masks, *ring, document, summed, sums, out, past, torch.get_num_threads())
        return out

    def absorb(
        self,
        sums: Tensor,
        k: Tensor,
        v: Tensor,
        there: Tensor | None,
        factor: Tensor | None,
        work: torch.dtype,
    ) -> bool:
        """`step_sums.absorb` in the precision `work`; False where it cannot be had, and nothing is done."""
        if not (self.is_plain() and k.is_cpu) or 0 in (k.numel(), v.numel()):
            return False
        half = k.dtype == v.dtype == torch.bfloat16 and work == torch.float32
        dtype = torch.bfloat16 if half else work
        operations = self._library.of(dtype)
        if operations is None or operations.absorb is None:
            return False
        shown = None if there is None else there.expand(k.shape[0], -1).contiguous()
        given = None if factor is None else factor.double().contiguous()
        rows = (_dense(x.to(dtype)) for x in (k, v))
        operations.absorb(*rows, given, shown, sums, torch.get_num_threads())
        return True

    def of_piece(self, *tokens: Tensor) -> Operations | None:
        """The operations for pieces of sequences that serve such tokens, which may carry gradients, or None."""
        plain = enabled() and not (
            torch.compiler.is_compiling() or is_mapped() or forward_ad._current_level >= 0
        )
        if not plain or any(x.device.type != "cpu" or x.numel() == 0 for x in tokens):
            return None
        dtypes = {x.dtype for x in tokens}
        if self.kernel.precision == "float64":
            dtypes = {torch.float64}
        operations = self._library.of(dtypes.pop()) if len(dtypes) == 1 else None
        return None if operations is None or operations.read is None else operations

    def _serve(self, q: Tensor, k: Tensor, v: Tensor) -> Operations | None:
        """The operations that serve these inputs, None where PyTorch's must."""
        if q.device.type != "cpu" or not enabled() or 0 in (q.numel(), k.numel(), v.numel()):
            return None
        return self._library.of(_input_dtype(q, k, v))


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
