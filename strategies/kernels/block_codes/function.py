"""Numbers to blocks' headers and bits, and back, in one pass.

Plain functions on tensors, no custom ops: codecs call them, whom neither autograd nor a compiler meets. Where one
returns False nothing was done, and the codec's own Torch operations serve (:mod:`squall.consistency.codecs`); the codec
also checks shapes, and says what is wrong with them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.devices import triton_serves

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_encode = native.function("squall_encode_blocks", *[_POINTER] * 3, _LONG, *[_POINTER] * 2, _INT)
_decode = native.function("squall_decode_blocks", *[_POINTER] * 2, _LONG, _POINTER, _INT)


def encode_int8(numbers: Tensor, out: Tensor, residual: Tensor | None, codes: Tensor, values: Tensor) -> bool:
    """Write the code ``int8``, bit for bit as Torch operations would.

    Args:
        numbers: Shape (n,).
        out: Shape (4 bytes a block and n,), uint8.
        residual: Shape (n,), float32: added to the numbers; becomes, in place, what the code lost.
        codes: Shape (65536,), uint8, where the numbers are: for 32768 times a number as float16, by its bits.
        values: Shape (256,), float32, likewise: what the codes stand for.

    Returns:
        Whether it was done: the tensors are plain single-precision memory of the CPU, or on a CUDA device, and there is
        a kernel.

    """
    return _write(numbers, out, residual, (codes, values))


def decode_int8(data: Tensor, out: Tensor, values: Tensor) -> bool:
    """Read the code ``int8``. Arguments and result as of :func:`encode_int8`."""
    return _read(data, out, values)


def encode_signs(numbers: Tensor, out: Tensor, residual: Tensor | None) -> bool:
    """Write the code ``1bit``; its means are as Torch's, but for the order in which float64 are summed.

    Args:
        numbers: Shape (n,).
        out: Shape (8 bytes a block, and a bit a number), uint8.
        residual: As of :func:`encode_int8`.

    Returns:
        As :func:`encode_int8`.

    """
    return _write(numbers, out, residual, None)


def decode_signs(data: Tensor, out: Tensor) -> bool:
    """Read the code ``1bit``. Arguments and result as of :func:`encode_signs`."""
    return _read(data, out, None)


def _write(numbers: Tensor, out: Tensor, residual: Tensor | None, tables: tuple[Tensor, Tensor] | None) -> bool:
    if _is_for_triton(numbers, residual):
        from .triton_path import encode

        encode(numbers, out, residual, tables)
        return True
    if not native.serves_rows(numbers, residual):
        return False
    pointers = [native.pointer(tensor) for tensor in (numbers, residual, out, *(tables or (None, None)))]
    _encode(*pointers[:3], numbers.numel(), *pointers[3:], torch.get_num_threads())
    return True


def _read(data: Tensor, out: Tensor, values: Tensor | None) -> bool:
    if _is_for_triton(out):
        from .triton_path import decode

        decode(data, out, values)
        return True
    if not native.serves_rows(out):
        return False
    _decode(data.data_ptr(), out.data_ptr(), out.numel(), native.pointer(values), torch.get_num_threads())
    return True


def _is_for_triton(*rows: Tensor | None) -> bool:
    return all(row is None or row.is_contiguous() for row in rows) and triton_serves(*rows)
