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
    (of_gap, width): native.function(
        f"squall_positions_{8 * of_gap}_{8 * width}", _POINTER, *[_LONG] * 3, *[_POINTER] * 2
    )
    for of_gap in (1, 2)
    for width in (4, 8)
}  # fmt: skip
_turn = {
    (width, size): native.function(f"squall_turn_{8 * width}_{size}", _POINTER, *[_LONG] * 3, *[_POINTER] * 4)
    for width in (4, 8)
    for size in (1, 2, 4, 8)
}

Symbols = npt.NDArray[np.uint16]
Gaps = npt.NDArray[Any]
"""uint8 or uint16."""


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


def positions(gaps: Gaps, longest: int, num_positions: int, num_elements: int) -> tuple[npt.NDArray[Any], int, int]:
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
    _positions[gaps.itemsize, wide.itemsize](
        gaps.ctypes.data, len(gaps), longest, num_positions, found.ctypes.data, ends.ctypes.data
    )
    return found, int(ends[0]), int(ends[1])


def turn(
    places: npt.NDArray[Any], values: npt.NDArray[Any], num_rows: int, num_columns: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Bring a matrix's weights from the order of its columns into that of its rows.

    Args:
        places: Ascending: theirs in the matrix, counted column by column; int32 or int64. All are in it.
        values: As many, of 1, 2, 4 or 8 bytes.
        num_rows: Of the matrix.
        num_columns: Likewise.

    Returns:
        The places, counted row by row and ascending, and the values in their order.

    """
    turned, ordered, next_of = np.empty_like(places), np.empty_like(values), np.empty(num_rows + 1, np.int64)
    _turn[places.itemsize, values.itemsize](
        places.ctypes.data, len(places), num_rows, num_columns, np.ascontiguousarray(values).ctypes.data,
        turned.ctypes.data, ordered.ctypes.data, next_of.ctypes.data,
    )  # fmt: skip
    return turned, ordered
