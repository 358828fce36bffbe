"""The GPU side of an attention kernel: which calls its Triton kernels serve, and how they are launched.

Kernels are in NAME_triton.py beside the module of the operation. No launch waits for the device, and what a
call allocates depends on shapes alone, so that CUDA graphs can record it once the first call has compiled the kernels
and made their tables. With TRITON_INTERPRET=1 Triton's interpreter serves tensors on a CPU, unless
other kernels are for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .decay import gate_gradient, log_decay, sum_of_later
from .kernel_spec import KernelSpec, folded_coefficients
from .triton_kernels import DTYPES, cannot_build, enabled, import_kernels, refusal, warn
from .triton_schedule import DEVICES, SCAN, Shape, choose_chunk, choose_schedule
from .triton_tables import feature_tables
from .triton_tuned import configuration

PREFIX, SUFFIX, TOTAL = 0, 1, 2  # of scan_kernel
DELTA_ROWS = 32


Forward = tuple[Tensor, Tensor, Tensor]
Backward = tuple[Tensor, ...]
Result = TypeVar("Result")


class TritonAttention:
    """The Triton kernels of one attention, imported when the first call asks for them.

    name: of the kernel. module: its own, beside which NAME_triton.py lies. by_device: something else serves the
    other devices, so that a tensor there is no reason for a warning.
    """

    def __init__(
        self, name: str, module: ModuleSpec | None, spec: KernelSpec, by_device: bool = False
    ) -> None:
        self.name, self.spec, self.by_device = name, spec, by_device
        self._module = module
        self._kernels: ModuleType | None = None
        self._failed = False
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
    ) -> Forward | None:
        """out, denominator and maximum; None where the call is not for Triton kernels or they cannot be had."""
        return self._attempt(lambda call: call.forward(), q, k, v, near_q, near_k, log_gate, mask)

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
    ) -> Backward | None:
        """The gradients of the floating inputs, those that do not exist without elements; None as `forward`."""
        return self._attempt(
            lambda call: call.backward(gradient, out, denominator, maximum),
            *(q, k, v, near_q, near_k, log_gate, mask),
        )

    def _attempt(
        self,
        work: Callable[[Launches], Result],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near_q: Tensor | None,
        near_k: Tensor | None,
        log_gate: Tensor | None,
        mask: Tensor | None,
    ) -> Result | None:
        if self._failed or not enabled() or 0 in (q.numel(), k.numel(), v.numel()):
            return None
        if self.by_device and q.device.type != "cuda":
            return None
        if (reason := refusal(q, k, v)) is not None:
            warn(reason)
            return None
        try:
            with torch.cuda.device_of(q):
                return work(Launches(self.kernels(), self.spec, q, k, v, near_q, near_k, log_gate, mask))
        except Exception as error:
            if not cannot_build(error):
                raise
            self._failed = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            warn(f"the kernels of {self.name} cannot be built for this device: {lines[0]}")
            return None

    def kernels(self) -> ModuleType:
        """The module NAME_triton; OSError where it cannot be had."""
        with self._lock:
            if self._kernels is None:
                self._kernels = import_kernels(f"{self.name}_triton", self._module)
        return self._kernels


class Launches:
    """The launches that one call takes: its inputs as kernels want them, its type of arithmetic, its schedule."""

    interprets_bfloat16 = False  # Triton's interpreter takes the bits of bfloat16 for integers

    def __init__(
        self,
        kernels: ModuleType,
        spec: KernelSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near_q: Tensor | None,
        near_k: Tensor | None,
        log_gate: Tensor | None,
        mask: Tensor | None,
        target: str = "",
    ) -> None:
        self.kernels, self.spec, self.given = kernels, spec, (q, k, v, near_q, near_k, log_gate)
        self.dtype = q.dtype if q.dtype == k.dtype == v.dtype else torch.float32
        if self.dtype == torch.bfloat16 and q.device.type == "cpu" and not self.interprets_bfloat16:
            self.dtype = torch.float32
        self.device = q.device
        self.q, self.k, self.v = (_aligned(x.to(self.dtype)) for x in (q, k, v))
        self.near = [None if x is None else _aligned(x.to(self.dtype)) for x in (near_q, near_k)]
        self.sums = None if log_gate is None else _two_numbers(log_decay(log_gate, mask, None))
        self.shown = mask
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.batch, self.heads, self.queries = q.shape[:3]
        self.shared, self.keys = k.shape[1:3]
        self.groups = self.heads // self.shared
        self.index, self.origin, self.weight = feature_tables(spec.d, folded_coefficients(spec), self.device)
        self.architecture = target or architecture(self.device)
        self.operand, self.precision = arithmetic(self.dtype, self.architecture)
        self.fused, self.chunk = self._schedule()

    def _schedule(self) -> tuple[bool, int]:
        """Whether one program walks a sequence, and the tokens of a chunk."""
        device, spec = DEVICES[self.architecture], self.spec
        shape = Shape(
            heads=self.batch * self.heads,
            key_heads=self.batch * self.shared,
            n=self.queries,
            m=self.keys,
            d=spec.d,
            dv=spec.dv,
            degree=spec.degree,
            rank=self.index.shape[1],
            dtype=DTYPES[self.dtype],
            causal=spec.causal,
            near=spec.near or 0,
            near_d=spec.near_d or 0,
            forget=spec.forget,
        )
        there = "fused_forward_kernel" in self.kernels.CONFIGS[self.architecture][DTYPES[self.dtype]]
        return there and choose_schedule(device, shape) == "fused", choose_chunk(device, shape)

    @property
    def chunks(self) -> int:
        """Chunks of the sequence."""
        return _ceil(max(self.queries, self.keys), self.chunk)

    def forward(self) -> Forward:
        """out [B, H, n, dv], denominator [B, H, n], and maximum [B, H, n] with a near field, else empty."""
        rows = (self.batch, self.heads, self.queries)
        out = self._empty((*rows, self.spec.dv), self.dtype)
        denominator = self._empty(rows)
        maximum = self._empty(rows if self.spec.near else (0,))
        if self.fused:
            self._launch(
                "fused_forward_kernel",
                self._rows,
                *(self.q, self.k, self.v, self.sums, self.mask, self.index, self.origin, self.weight),
                *(out, denominator),
                *self._strides(self.q, self.k, self.v),
                *(self.queries, self.heads, self.groups),
            )
            return out.to(self.given[2].dtype), denominator, maximum
        before, after = self._key_states()
        self._launch(
            "forward_kernel",
            self._query_tiles,
            *(self.q, self.k, self.v, *self.near, self.sums, self.mask, self.index, self.origin),
            *(before, after),
            *(out, denominator, maximum),
            *self._strides(self.q, self.k, self.v, *self.near),
            *self._sizes(),
            MIXED=self._mixed,
        )
        return out.to(self.given[2].dtype), denominator, maximum

    def backward(self, gradient: Tensor, out: Tensor, denominator: Tensor, maximum: Tensor) -> Backward:
        """The gradients of the six floating inputs, in their types."""
        gradient, out = _aligned(gradient.to(self.dtype)), _aligned(out).contiguous()
        denominator, maximum = denominator.contiguous(), maximum.contiguous()
        *floats, log_gate = self.given
        dq, dk, dv, dnear_q, dnear_k = (
            self.q.new_empty((0,)) if x is None else self._empty(x.shape, self.dtype) for x in floats
        )
        dsums = [None if log_gate is None else self._empty(x.shape[:3]) for x in (self.q, self.k)]
        delta, inverse = self._empty(denominator.shape), self._empty(denominator.shape)
        sizes = (*gradient.stride()[:3], out.stride(2), self.queries, self.heads)
        grid = (self.batch * self.heads * _ceil(self.queries, DELTA_ROWS),)
        self.kernels.delta_kernel[grid](gradient, out, denominator, delta, inverse, *sizes, ROWS=DELTA_ROWS)
        if self.fused:
            self._fused_backward(gradient, inverse, delta, dq, dk, dv, dsums)
        else:
            self._backward(gradient, (inverse, maximum, delta), dq, dk, dv, dnear_q, dnear_k, dsums)
        gradients = (dq, dk, dv, dnear_q, dnear_k)
        found = (g if x is None else g.to(x.dtype) for x, g in zip(floats, gradients, strict=True))
        if log_gate is None:
            return (*found, self.q.new_empty((0,)))
        of_queries, of_keys = (x.double() for x in dsums if x is not None)
        total = of_queries.unflatten(1, (self.shared, self.groups)).sum(2) + of_keys
        return (*found, gate_gradient(sum_of_later(total, None), log_gate, self.shown, None))

    def _fused_backward(
        self,
        gradient: Tensor,
        inverse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dsums: list[Tensor | None],
    ) -> None:
        tensors = (gradient, self.q, self.k, self.v, self.sums, self.mask, self.index, self.origin)
        inputs = (*tensors, self.weight, inverse, delta)
        sizes = (*self._strides(gradient, self.q, self.k, self.v), self.queries, self.heads, self.groups)
        self._launch("fused_query_gradient_kernel", self._rows, *inputs, dq, dsums[0], *sizes)
        self._launch("fused_key_gradient_kernel", self._rows, *inputs, dk, dv, dsums[1], *sizes)

    def _backward(
        self,
        gradient: Tensor,
        saved: tuple[Tensor, Tensor, Tensor],
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dnear_q: Tensor,
        dnear_k: Tensor,
        dsums: list[Tensor | None],
    ) -> None:
        strides = self._strides(gradient, self.q, self.k, self.v, *self.near)
        tensors = (gradient, self.q, self.k, self.v, *self.near, self.sums)
        inputs = (*tensors, self.mask, self.index, self.origin)
        before, after = self._key_states()
        self._launch(
            "query_gradient_kernel",
            self._query_tiles,
            *(*inputs, before, after, *saved, dq, dnear_q, dsums[0]),
            *(*strides, *self._sizes()),
            MIXED=self._mixed,
        )
        del before, after
        live = self._empty((self.batch * self.shared * self.chunks,)) if self.spec.causal else None
        before, after = self._query_states(gradient, saved, live)
        self._launch(
            "key_gradient_kernel",
            self._key_tiles,
            *(*inputs, before, after, *saved, live, dk, dv, dnear_k, dsums[1]),
            *(*strides, *self._sizes()),
            MIXED=self._mixed,
        )

    # ---------------------------------------------------------------- states

    def _key_states(self) -> tuple[Tensor, Tensor]:
        """W Z of the keys before each chunk, or of all, and of those after it if a query sees far ones there."""
        spec, near = self.spec, self.spec.near or 0
        inputs = (self.k, self.v, self.sums, self.mask, None, None, None)

        def make(shift: int, mode: int) -> Tensor:
            return self._states(inputs, self.keys, shift, mode, upstream=False)

        before = make(-near, TOTAL if spec.total else PREFIX)
        return before, make(near, SUFFIX) if spec.two_sided else before

    def _query_states(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor], live: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """W Y of the queries before each chunk, and of those after it, or of all; causal: `live` is written too."""
        spec, near = self.spec, self.spec.near or 0
        inverse, maximum, delta = saved
        inputs = (self.q, gradient, self.sums, None, inverse, delta, maximum)

        def make(shift: int, mode: int) -> Tensor:
            return self._states(inputs, self.queries, shift, mode, upstream=True, live=live)

        after = make(near, TOTAL if spec.total else SUFFIX)
        return make(-near, PREFIX) if spec.two_sided else after, after

    def _states(
        self,
        inputs: tuple[Tensor | None, ...],
        tokens: int,
        shift: int,
        mode: int,
        upstream: bool,
        live: Tensor | None = None,
    ) -> Tensor:
        kernels, rows = self.kernels, self.batch * self.shared
        x, y = inputs[:2]
        assert x is not None
        assert y is not None
        state = self._empty((rows * self.chunks * kernels.STATE_SIZE.value,))
        self._launch(
            "state_kernel",
            lambda config: rows * self.chunks * (kernels.RANK.value // config["FEATURES"]),
            *(*inputs, self.index, self.origin, state, live),
            *self._strides(x, y),
            *(tokens, self.chunk, self.chunks, shift, self.shared, self.groups if upstream else 1),
            UPSTREAM=upstream,
        )
        grid = (rows * _ceil(kernels.STATE_SIZE.value, SCAN),)
        sizes = (tokens, self.chunk, self.chunks, shift)
        kernels.scan_kernel[grid](state, self.weight, self.sums, *sizes, MODE=mode, SIZE=SCAN)
        return state

    # ---------------------------------------------------------------- a launch

    def _launch(
        self, name: str, programs: Callable[[dict[str, int]], int], *arguments: object, **constants: object
    ) -> None:
        rows, keys, features, warps, stages = self.configuration(name)
        config = {"ROWS": rows, "KEYS": keys, "FEATURES": features}
        if name == "state_kernel":
            config = {"TOKENS": keys, "FEATURES": features}
        elif name.startswith("fused"):
            config = {"ROWS": rows}
        getattr(self.kernels, name)[(programs(config),)](
            *arguments,
            **constants,
            **config,
            OPERAND=self.operand,
            PRECISION=self.precision,
            num_warps=warps,
            num_stages=stages,
        )

    def configuration(self, kernel: str) -> tuple[int, ...]:
        """ROWS, KEYS, FEATURES, warps and stages: what `fastgrad tune` found, else the row of the table."""
        return configuration(self.kernels, self.device, DTYPES[self.dtype], kernel) or self.row(kernel)

    def row(self, kernel: str) -> tuple[int, ...]:
        """The row of the kernels' own table."""
        table: dict[str, tuple[int, ...]] = self.kernels.CONFIGS[self.architecture][DTYPES[self.dtype]]
        return table[kernel]

    def _rows(self, config: dict[str, int]) -> int:
        return self.batch * self.shared

    def _query_tiles(self, config: dict[str, int]) -> int:
        return self.batch * self.heads * self._tiles(self.queries, config["ROWS"])

    def _key_tiles(self, config: dict[str, int]) -> int:
        return self.batch * self.shared * self._tiles(self.keys, config["ROWS"])

    def _tiles(self, tokens: int, rows: int) -> int:
        return _ceil(tokens, rows) if self.spec.total else self.chunks * _ceil(self.chunk, rows)

    def _sizes(self) -> tuple[int, ...]:
        return self.queries, self.keys, self.chunk, self.chunks, self.heads, self.groups

    @property
    def _mixed(self) -> bool:
        return self.chunk > (self.spec.near or 0)

    def _strides(self, *tensors: Tensor | None) -> list[int]:
        return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def arithmetic(dtype: torch.dtype, architecture: str) -> tuple[Any, str]:
    """The type of operands, and the precision of products of float32 numbers.

    Features and states of float16 inputs are float32, of which products take the leading bits; float16 might overflow.
    """
    import triton.language as tl

    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    if architecture.startswith("gfx"):
        return tl.float32, "ieee"
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return tl.float32, "tf32x3" if exact else "tf32"


def architecture(device: torch.device) -> str:
    """The row of CONFIGS that is for a device."""
    if device.type != "cuda":  # the interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def _two_numbers(sums: Tensor) -> Tensor:
    """Sums float64 [b, h, n] as float32 [b, h, 2, n], twice n numbers that add up to them: to 48 bits."""
    rounded = sums.float()
    return torch.stack((rounded, (sums - rounded).float()), -2)


def _aligned(x: Tensor) -> Tensor:
    """With a width that is a multiple of 8, a dense last dimension, and rows that start at multiples of 16 bytes."""
    if x.shape[-1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))
    whole = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _ceil(size: int, part: int) -> int:
    return -(-size // part)
