"""The largest numbers and their places, with error feedback in the same pass.

A plain function on tensors, no custom op: a codec calls it, whom neither autograd nor a compiler meets.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.native import memory

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_kernel = native.function("squall_top_k", *[_POINTER] * 3, *[_LONG] * 4, *[_POINTER] * 3, _INT)
_PIECE = 1 << 14  # as in kernel.c


def encode_top_k(numbers: Tensor, out: Tensor, residual: Tensor | None, k: int, stride: int, rank: int) -> bool:
    """Write the places, int32 and ascending, of the k numbers of largest magnitude, and then these numbers.

    NaN counts as infinite, and of equal magnitudes the first are taken.

    Args:
        numbers: Shape (n,).
        out: Shape (8 k,), uint8.
        residual: Shape (n,), float32: added to the numbers; becomes, in place, what isn't sent. Numbers that aren't
            finite are not kept.
        k: How many.
        stride: One number in so many is looked at for a threshold.
        rank: Which of these, the largest being 1, is the threshold; 0 for none. The result is exact whatever it is.

    Returns:
        Whether it was done: the tensors are plain single-precision memory of the CPU, and there is a kernel.

    """
    if not native.serves_rows(numbers, residual):
        return False
    num = numbers.numel()
    num_pieces = -(-num // _PIECE)
    scratch = memory.workspace(2 * num + 2 * num_pieces, "top_k")
    num_found = scratch.data_ptr()  # first, since they are of 8 bytes
    places = num_found + 8 * num_pieces
    _kernel(
        numbers.data_ptr(), native.pointer(residual), out.data_ptr(), num, k, stride, rank,
        places, places + 4 * num, num_found, torch.get_num_threads(),
    )  # fmt: skip
    return True
