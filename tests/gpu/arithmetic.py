"""Arithmetic of Triton's interpreter as the compiled kernels do it.

Triton 3.7 interprets bfloat16 as the integers that hold its bits, and takes every product of float32 matrices as
exact. Here an operation on bfloat16 is done in float32 and rounded to nearest even, and products of float32 have the
input precision that the kernel asks for, split as the compiler's pass for it does (its output can be read in the GPU
dialect):

* `tf32`: the tensor cores drop the last 13 bits of both factors; the compiler rounds nothing beforehand.
* `tf32x3`: high part rounded to nearest (ties away from zero), low part the rest; low*high + high*low + high*high,
  where a sum of small products that is not a number counts as zero.
* `bf16x3`, `bf16x6`: two or three parts of bfloat16, and the three or six largest products of them.

A sum, a maximum or a scan of bfloat16 is rounded once, at its end; a maximum over something that is not a number is
not a number, so that a lane which was never loaded does not hide in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime import interpreter

Floats = NDArray[np.float32]
Bits = NDArray[np.uint16]

_TF32_MASK = np.uint32(0xFFFFE000)  # sign, exponent and the first 10 bits of the fraction
_TF32_HALF = np.uint32(0x1000)  # half of the last bit that is kept


def bfloat16_bits(values: Floats) -> Bits:
    """The nearest bfloat16, ties to even, as bits."""
    contiguous = torch.from_numpy(np.array(values, np.float32, order="C"))
    bits: Bits = contiguous.bfloat16().view(torch.uint16).numpy()
    return bits


def from_bfloat16_bits(bits: Bits) -> Floats:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bfloat16(values: Floats) -> Floats:
    """The nearest bfloat16, ties to even."""
    return from_bfloat16_bits(bfloat16_bits(values))


def tf32_truncated(values: Floats) -> Floats:
    """What a tensor core takes of a float32 factor."""
    return (np.array(values, np.float32, order="C").view(np.uint32) & _TF32_MASK).view(np.float32)


def tf32_rounded(values: Floats) -> Floats:
    """The nearest number of 11 bits, ties away from zero, as the instruction cvt.rna.tf32.f32 has it."""
    bits = np.array(values, np.float32, order="C").view(np.uint32)
    rounded = ((bits + _TF32_HALF) & _TF32_MASK).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def _parts(values: Floats, count: int) -> list[Floats]:
    """`count` numbers of bfloat16 whose sum is `values`, nearly: each the nearest to what those before it leave."""
    parts = []
    for _ in range(count):
        parts.append(bfloat16(values))
        values = values - parts[-1]
    return parts


def _large_and_small(large: Floats, small: Floats) -> Floats:
    return large + np.where(np.isnan(small), np.float32(0), small)


def tf32(a: Floats, b: Floats) -> Floats:
    return tf32_truncated(a) @ tf32_truncated(b)


def tf32x3(a: Floats, b: Floats) -> Floats:
    a_high, b_high = tf32_rounded(a), tf32_rounded(b)
    small = tf32(a - a_high, b_high) + tf32(a_high, b - b_high)
    return _large_and_small(a_high @ b_high, small)


def bf16x3(a: Floats, b: Floats) -> Floats:
    (a0, a1), (b0, b1) = _parts(a, 2), _parts(b, 2)
    return _large_and_small(a0 @ b0, a1 @ b0 + a0 @ b1)


def bf16x6(a: Floats, b: Floats) -> Floats:
    (a0, a1, a2), (b0, b1, b2) = _parts(a, 3), _parts(b, 3)
    return _large_and_small(a0 @ b0, a1 @ b1 + a2 @ b0 + a0 @ b2 + a1 @ b0 + a0 @ b1)


PRODUCTS: dict[Any, Callable[[Floats, Floats], Floats]] = {
    ir.INPUT_PRECISION.TF32: tf32,
    ir.INPUT_PRECISION.TF32x3: tf32x3,
    ir.INPUT_PRECISION.BF16x3: bf16x3,
    ir.INPUT_PRECISION.BF16x6: bf16x6,
}
"""Product of matrices of float32 by input precision; without an entry it is exact but for the rounding of sums."""


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """The same numbers in float32, if they are bfloat16."""
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(from_bfloat16_bits(handle.data), tl.float32)


def _narrow(handle: Any) -> Any:
    return interpreter.TensorHandle(bfloat16_bits(handle.data), tl.bfloat16)


def _in_float32(operation: Any) -> Any:
    """An operation whose result has the type of its arguments, done in float32 if that is bfloat16."""

    def widened(self: Any, *arguments: Any) -> Any:
        if not any(map(_is_bfloat16, arguments)):
            return operation(self, *arguments)
        return _narrow(operation(self, *map(_widen, arguments)))

    return widened


def _binary(operation: Any) -> Any:
    """As `_in_float32`; the result of a comparison has the type of truth values, not its operands'."""

    def widened(self: Any, left: Any, right: Any, function: Any) -> Any:
        result = operation(self, _widen(left), _widen(right), function)
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.int1)
        return _narrow(result) if _is_bfloat16(left) else result

    return widened


def _cast(operation: Any) -> Any:
    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return operation(self, _widen(source), target)
        if _is_bfloat16(source):
            return source
        return _narrow(interpreter.TensorHandle(source.data.astype(np.float32), tl.float32))

    return cast


def _cast_rounding(operation: Any) -> Any:
    """A cast with a rounding mode. The interpreter's own rounds ties upwards where it should round them to even."""

    def cast(self: Any, source: Any, target: Any, mode: Any) -> Any:
        nearest = mode is None or mode == ir.ROUNDING_MODE.RTNE
        if nearest and target.scalar in (tl.bfloat16, tl.float16):
            return self.cast_impl(source, target)
        return operation(self, source, target, mode)

    return cast


def _dot(operation: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, sum_: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar == tl.float32 and precision in PRODUCTS:
            return interpreter.TensorHandle(
                PRODUCTS[precision](a.data, b.data) + sum_.data, sum_.dtype.scalar
            )
        return operation(self, _widen(a), _widen(b), sum_, precision, imprecise)

    return dot


def _over_axis(operation: Any) -> Any:
    """A reduction or scan over tensors, those of bfloat16 done in float32."""

    def widened(self: Any, tensors: Any) -> Any:
        wide = tuple(
            self.to_tensor(from_bfloat16_bits(t.handle.data), tl.float32) if _is_bfloat16(t.handle) else t
            for t in tensors
        )
        results = operation(self, wide)
        results = results if isinstance(results, list | tuple) else (results,)
        return [
            _narrowed_tensor(self, result) if _is_bfloat16(tensor.handle) else result
            for tensor, result in zip(tensors, results, strict=True)
        ]

    return widened


def _narrowed_tensor(self: Any, tensor: Any) -> Any:
    bits = bfloat16_bits(tensor.handle.data)
    return self.to_tensor(bits if tensor.type.is_block() else bits.item(), tl.bfloat16)


def _reduce(operation: Any) -> Any:
    extremes = {tl.standard._elementwise_max: np.max, tl.standard._elementwise_min: np.min}

    def reduce(self: Any, tensors: Any) -> Any:
        if self.combine_fn in extremes:
            return self.min_max(tensors[0], val_reduce_op=extremes[self.combine_fn])
        return operation(self, tensors)

    return _over_axis(reduce)


def _constant(self: Any, value: float) -> Any:
    return _narrow(interpreter.TensorHandle(np.array([value], np.float32), tl.float32))


def install() -> None:
    """Replace the arithmetic of the interpreter in this process, for good. Once only."""
    builder = interpreter.InterpreterBuilder
    for name in ("unary_op", "create_fma", "create_erf", "create_rsqrt", "create_clampf"):
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.binary_op = _binary(builder.binary_op)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast_rounding(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    builder.get_bf16 = _constant
    interpreter.ReduceOps.apply_impl = _reduce(interpreter.ReduceOps.apply_impl)
    interpreter.ScanOps.apply_impl = _over_axis(interpreter.ScanOps.apply_impl)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        allowed_dot_input_precisions=("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    )
    # As on NVIDIA: a product over fewer than 16 elements (32 of eight bits) does not compile there.
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda left, right: (
        1,
        1,
        32 if left.scalar.primitive_bitwidth == 8 else 16,
    )
