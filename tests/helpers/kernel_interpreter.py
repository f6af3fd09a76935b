"""Triton's interpreter, made right for bfloat16, the same on every CPU, and faster. Only tests use it.

It holds bfloat16 as uint16: casts truncate, and dots and sums act on bit patterns. Here bfloat16 operands are widened
to float32, and results rounded to nearest even, as a GPU does, so that kernels stay free of special cases. Dots sum
their terms in order, not as the BLAS of a CPU does.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def _is_bf16(dtype: Any) -> bool:
    return bool(dtype.scalar == tl.bfloat16)


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle.dtype):
        return handle
    return TensorHandle((np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    """float32 -> bfloat16, nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return TensorHandle(np.where(is_nan, (bits >> 16) | 0x40, nearest).astype(np.uint16), tl.bfloat16)


def install() -> None:
    """Change the interpreter, for the life of this process."""
    _round_fma_once()
    _sum_dots_in_order()
    _teach_bfloat16()  # last: it calls the dot that is there
    _skip_what_changes_nothing()


def _round_fma_once() -> None:
    """The interpreter rounds the product of an fma before it adds; a GPU does not. In float64 the product is exact."""
    fma = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.float32:
            return fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        with np.errstate(over="ignore"):
            return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def _sum_dots_in_order() -> None:
    """The interpreter leaves a dot to numpy's BLAS, which on some CPUs sums a tile of another shape in another order.

    Tests compare the bits of recipes that are merged together with those of each alone. Their tiles differ in size, so
    that every dot has to sum in one order.
    """
    dot, floats = InterpreterBuilder.create_dot, {np.dtype(np.float16), np.dtype(np.float32)}

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *rest: Any) -> TensorHandle:
        if acc.data.dtype != np.float32 or not {a.data.dtype, b.data.dtype} <= floats:
            return dot(self, a, b, acc, *rest)
        total, left, right = np.zeros_like(acc.data), a.data.astype(np.float32), b.data.astype(np.float32)
        for k in range(left.shape[-1]):
            total += left[..., k : k + 1] * right[..., k : k + 1, :]
        return TensorHandle(total + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _skip_what_changes_nothing() -> None:
    """Leave out two things that take a third of the time of a kernel.

    Every sum or product of integers is computed a second time in int64 to find overflows, which are reported in debug
    mode only. And every call of a helper replaces triton's functions by those of the interpreter, which the launch of
    its kernel, or an earlier call, has done.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    launch, patch = GridExecutor.__call__, interpreter._patch_lang
    languages: dict[Any, set[int]] = {}  # {function: the modules that are patched for it}
    patched: set[int] = set()  # since the kernel was launched

    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    def patch_lang(function: Any) -> Any:
        if function not in languages:
            seen = {id(value) for value in function.__globals__.values()}
            languages[function] = seen & {id(tl), id(tl.core)}
        if languages[function] <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages[function])
        return patch(function)

    GridExecutor.__call__, interpreter._patch_lang = launched, patch_lang


def _teach_bfloat16() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: Any, src: TensorHandle, dtype: Any) -> TensorHandle:
        if _is_bf16(src.dtype) and _is_bf16(dtype):
            return src
        if _is_bf16(dtype):
            return _rounded(src if src.dtype.scalar == tl.float32 else cast(self, src, tl.float32))
        wide = _widened(src)
        return wide if wide.dtype.scalar == dtype.scalar else cast(self, wide, dtype)

    def create_fp_to_fp(self: Any, src: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
        if _is_bf16(src.dtype) or _is_bf16(dtype):
            return cast_impl(self, src, dtype)
        return convert(self, src, dtype, rounding)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), acc, *rest)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(lhs.dtype):
            return binary(self, lhs, rhs, op)
        value = op(_widened(lhs).data, _widened(rhs).data)
        return TensorHandle(value, tl.int1) if value.dtype == bool else _rounded(TensorHandle(value, tl.float32))

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _rounded(unary(self, _widened(arg), op)) if _is_bf16(arg.dtype) else unary(self, arg, op)

    for function in (cast_impl, create_fp_to_fp, create_dot, binary_op, unary_op):
        setattr(InterpreterBuilder, function.__name__, function)
