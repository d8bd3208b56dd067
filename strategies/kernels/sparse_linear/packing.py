"""How the weights of a sparse matrix get to their slots: by compiled loops, or in numpy.

A *run* is a row's weights in one tile; runs are counted row by row, so a run's weights follow each other.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from squall.kernels import native

TILE_COLUMNS, SLICE = 127, 64  # as in kernel.c
_FILL = TILE_COLUMNS  # the column of what fills up a slice

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_slices = native.function("squall_pack_slices", _POINTER, *[_LONG] * 3, *[_POINTER] * 4, returns=_LONG)
_count = {
    width: native.function(
        f"squall_pack_count_{8 * width}", _POINTER, *[_LONG] * 4, *[_POINTER] * 2, returns=_LONG
    )
    for width in (4, 8)
}  # fmt: skip
_fill = {
    width: native.function(f"squall_pack_fill_{width}", _POINTER, _POINTER, _LONG, *[_POINTER] * 4)
    for width in (1, 4, 8)
}


class Arranged(NamedTuple):
    """Where weights go.

    Args:
        columns: uint8: each weight's column in its tile.
        lengths: uint8: weights of each run.
        first_slots: int64: where each run that isn't empty begins; its next weights are :data:`SLICE` slots apart.
        rows: As of :class:`~squall.kernels.sparse_linear.PackedWeight`.
        starts: Likewise.
        tiles: Likewise.

    """

    columns: NDArray[np.uint8]
    lengths: NDArray[np.uint8]
    first_slots: NDArray[np.int64]
    rows: NDArray[np.int16]
    starts: NDArray[np.int64]
    tiles: NDArray[np.int64]

    def slots(self) -> NDArray[np.int64]:
        """Tell each weight's slot."""
        lengths = self.lengths.astype(np.int64)
        steps = np.arange(len(self.columns)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.first_slots, lengths) + steps * SLICE

    def fill(self, values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Bring weights, or their codes, to their slots.

        Args:
            values: One a weight, of 1, 4 or 8 bytes; those of 1 are codes.

        Returns:
            The columns of all slots and the values, as they are stored; 0 where there is no weight.

        """
        num_slots = int(self.starts[-1]) * SLICE
        columns, filled = np.full(num_slots, _FILL, np.uint8), np.zeros(num_slots, values.dtype)
        if native.serves():
            values = np.ascontiguousarray(values)
            _fill[values.itemsize](
                self.lengths.ctypes.data, self.first_slots.ctypes.data, len(self.lengths), self.columns.ctypes.data,
                values.ctypes.data, columns.ctypes.data, filled.ctypes.data,
            )  # fmt: skip
            return columns, filled
        slots = self.slots()
        columns[slots], filled[slots] = self.columns, values
        return _as_bytes(columns), _as_bytes(filled) if filled.itemsize == 1 else filled


def _as_bytes(slots: NDArray[Any]) -> NDArray[Any]:
    """Bring what is one byte a slot into the order in which that is stored."""
    stored: NDArray[Any] = slots.reshape(-1, 4, SLICE // 4).transpose(0, 2, 1).reshape(-1)
    return stored


def arrange(places: NDArray[Any], num_rows: int, num_columns: int, row_block: int) -> Arranged | None:
    """Find where weights go.

    Args:
        places: int32 or int64: theirs in the matrix, counted row by row.
        num_rows: Of the matrix.
        num_columns: Likewise.
        row_block: Rows that are sorted together.

    Returns:
        That; None if places don't ascend within the matrix.

    """
    if not native.serves():
        return _arrange(places, num_rows, num_columns, row_block)
    num_tiles, places = -(-num_columns // TILE_COLUMNS), np.ascontiguousarray(places)
    columns, lengths = np.empty(len(places), np.uint8), np.zeros(num_rows * num_tiles, np.uint8)
    num_good = _count[places.itemsize](
        places.ctypes.data, len(places), num_rows, num_columns, num_tiles, lengths.ctypes.data, columns.ctypes.data
    )
    if num_good < len(places):
        return None
    num_all_tiles = -(-num_rows // row_block) * num_tiles
    most = num_all_tiles * -(-row_block // SLICE)
    first_slots, rows = np.zeros(len(lengths), np.int64), np.empty(most * SLICE, np.int16)
    starts, tiles = np.zeros(most + 1, np.int64), np.zeros(num_all_tiles + 1, np.int64)
    num_slices = _slices(
        lengths.ctypes.data, num_rows, num_tiles, row_block, first_slots.ctypes.data, rows.ctypes.data,
        starts.ctypes.data, tiles.ctypes.data,
    )  # fmt: skip
    return Arranged(
        columns, lengths, first_slots, rows[: num_slices * SLICE].copy(), starts[: num_slices + 1].copy(), tiles
    )


def _arrange(places: NDArray[Any], num_rows: int, num_columns: int, row_block: int) -> Arranged | None:
    if len(places) and (
        places[0] < 0 or places[-1] >= num_rows * num_columns or bool((places[1:] <= places[:-1]).any())
    ):
        return None
    num_blocks, num_tiles = -(-num_rows // row_block), -(-num_columns // TILE_COLUMNS)
    row_of, column_of = np.divmod(places.astype(np.int64), max(1, num_columns))
    tile_of = column_of // TILE_COLUMNS
    lengths = np.bincount(row_of * num_tiles + tile_of, minlength=num_rows * num_tiles)

    # Sort the rows of each tile; short last blocks get rows of no length, which are in no slice.
    height = -(-row_block // SLICE) * SLICE
    padded = np.zeros((num_blocks, height, num_tiles), np.int64)
    for block in range(num_blocks):
        part = lengths.reshape(num_rows, num_tiles)[block * row_block : (block + 1) * row_block]
        padded[block, : len(part)] = part
    padded = padded.transpose(0, 2, 1).reshape(num_blocks * num_tiles, height)
    order = np.argsort(-padded, axis=1, kind="stable")
    descending = np.take_along_axis(padded, order, axis=1)
    depth = descending[:, ::SLICE]  # a slice is as long as its first row
    is_slice = depth > 0
    slice_of = np.cumsum(is_slice).reshape(is_slice.shape) - 1
    starts = np.concatenate([[0], np.cumsum(depth[is_slice])]).astype(np.int64)
    tiles = np.concatenate([[0], np.cumsum(is_slice.sum(1))]).astype(np.int64)
    lanes = np.where(descending > 0, order, row_block).astype(np.int16)
    rows = lanes.reshape(*is_slice.shape, SLICE)[is_slice]

    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(height), order.shape), axis=1)
    first_slots = starts[slice_of.ravel()].reshape(slice_of.shape) if len(starts) > 1 else slice_of
    first_slots = np.take_along_axis(first_slots, rank // SLICE, axis=1) * SLICE + rank % SLICE  # of (tile, row)
    first_slots = first_slots.reshape(num_blocks, num_tiles, height).transpose(0, 2, 1)[:, :row_block]
    first_slots = first_slots.reshape(num_blocks * row_block, num_tiles)[:num_rows].reshape(-1)  # in the runs' order
    columns = (column_of - tile_of * TILE_COLUMNS).astype(np.uint8)
    return Arranged(
        columns, lengths.astype(np.uint8), first_slots, np.ascontiguousarray(rows).reshape(-1), starts, tiles
    )
