"""What compressed files are decoded with where the compiled kernels serve; whoever calls has another way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from squall.kernels import native

_SHARE_BITS, _BUCKET_BITS = 24, 12  # as in kernel.c
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_decode = native.function("squall_ans_decode", _POINTER, _LONG, _INT)
_positions = {
    width: native.function(f"squall_positions_{8 * width}", _POINTER, _LONG, _LONG, _LONG, *[_POINTER] * 2)
    for width in (4, 8)
}

Symbols = npt.NDArray[np.uint16]


class Code(NamedTuple):
    """Symbols as the library ``constriction`` codes them on a stack, by shares that are rounded its fast way.

    Args:
        words: uint32.
        shares: The model: a share a symbol, not rounded. Sums of them must be exact.
        num_symbols: How many to decode.

    """

    words: npt.NDArray[np.uint32]
    shares: npt.NDArray[np.float64]
    num_symbols: int


def decode(codes: Sequence[Code]) -> list[tuple[Symbols, bool]]:
    """Decode codes, several side by side.

    Args:
        codes: From 2 to 2^16 symbols each in the model.

    Returns:
        The symbols of each code, and whether it ends where they do.

    """
    order = sorted(range(len(codes)), key=lambda index: -codes[index].num_symbols)
    kept = [_prepare(codes[index]) for index in order]
    told = np.array(
        [[*(part.ctypes.data for part in parts), len(parts[0]) - 1, len(parts[3]), 0] for parts in kept], np.int64
    ).reshape(len(kept), 7)
    _decode(told.ctypes.data, len(kept), torch.get_num_threads())
    found = {index: (kept[place][3], bool(told[place, -1])) for place, index in enumerate(order)}
    return [found[index] for index in range(len(codes))]


def _prepare(code: Code) -> tuple[npt.NDArray[Any], ...]:
    """The words, where shares start, the symbols that buckets start in, and room for the result."""
    ends = np.cumsum(code.shares)
    num_kinds, whole = len(ends), 1 << _SHARE_BITS
    starts = np.empty(num_kinds + 1, np.uint32)
    starts[0], starts[num_kinds] = 0, whole
    # Each symbol has 1 for certain; what is left is dealt out by the shares.
    starts[1:-1] = (ends[:-1] * ((whole - num_kinds) / ends[-1])).astype(np.uint32) + np.arange(1, num_kinds)
    first = np.searchsorted(starts, np.arange(0, whole + 1, 1 << _BUCKET_BITS), side="right") - 1
    first = np.minimum(first, num_kinds - 1).astype(np.uint16)
    words = np.concatenate((np.zeros(1, np.uint32), code.words))
    return words, starts, first, np.empty(code.num_symbols, np.uint16)


def positions(gaps: Symbols, longest: int, num_positions: int, num_elements: int) -> tuple[npt.NDArray[Any], int, int]:
    """Sum gaps up.

    Args:
        gaps: To the next position, the first from -1 on; 0 goes on by ``longest`` without stopping.
        longest: See there.
        num_positions: How many there should be.
        num_elements: All positions should be below this: where that fits, they are int32.

    Returns:
        The positions; how many were found; and where the last gap has led to. They are right if the numbers are.

    """
    wide = np.dtype(np.int32 if num_elements < 1 << 31 else np.int64)
    found, ends = np.empty(num_positions, wide), np.empty(2, np.int64)
    _positions[wide.itemsize](gaps.ctypes.data, len(gaps), longest, num_positions, found.ctypes.data, ends.ctypes.data)
    return found, int(ends[0]), int(ends[1])
