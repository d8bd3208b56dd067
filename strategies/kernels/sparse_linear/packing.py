"""How the weights of a sparse matrix get to their slots: by compiled loops, or in numpy.

A *run* is a row's weights in one tile; runs are counted row by row, so a run's weights follow each other.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from squall.kernels import native

TILE_COLUMNS, SLICE = 127, 64  # as in layout.h
_COUNTERS = 4  # as in gaps.c
_STEPS_MORE = 3  # as in fill.c
_FILL = TILE_COLUMNS  # the column of what fills up a slice

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_slices = native.function("squall_pack_slices", _POINTER, *[_LONG] * 3, *[_POINTER] * 4, returns=_LONG)
_count = {
    width: native.function(
        f"squall_pack_count_{8 * width}", _POINTER, *[_LONG] * 4, *[_POINTER] * 2, returns=_LONG
    )
    for width in (4, 8)
}  # fmt: skip
_count_gaps = {
    width: native.function(f"squall_pack_count_gaps_{8 * width}", _POINTER, *[_LONG] * 6, *[_POINTER] * 4)
    for width in (1, 2)
}
_fill = native.function(
    "squall_pack_fill", *[_POINTER] * 4, *[_LONG] * 3, *[_POINTER] * 2, _LONG, ctypes.c_int, *[_POINTER] * 3
)


class Arranged(NamedTuple):
    """Where weights go.

    Args:
        columns: uint8: each weight's column in its tile.
        lengths: uint8: weights of each run; shape (rows, tiles of a row).
        sorted_lengths: uint8: those of `rows`.
        rows: As of :class:`~squall.kernels.sparse_linear.PackedWeight`.
        starts: Likewise.
        tiles: Likewise.
        row_block: Likewise.

    """

    columns: NDArray[np.uint8]
    lengths: NDArray[np.uint8]
    sorted_lengths: NDArray[np.uint8]
    rows: NDArray[np.int16]
    starts: NDArray[np.int64]
    tiles: NDArray[np.int64]
    row_block: int

    def slots(self) -> NDArray[np.int64]:
        """Tell each weight's slot; those of a run are :data:`SLICE` apart."""
        lengths = self.lengths.reshape(-1).astype(np.int64)
        steps = np.arange(len(self.columns)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self._first_slots(), lengths) + steps * SLICE

    def _first_slots(self) -> NDArray[np.int64]:
        """Where each run that isn't empty begins."""
        first, (_, num_tiles) = np.zeros(self.lengths.shape, np.int64), self.lengths.shape
        tile = np.repeat(np.arange(len(self.tiles) - 1), np.diff(self.tiles))  # of each slice
        block, rows = tile // max(1, num_tiles), self.rows.reshape(-1, SLICE)
        there = rows < self.row_block
        slots = self.starts[:-1, None] * SLICE + np.arange(SLICE)
        row = rows + block[:, None] * self.row_block
        first[row[there], np.broadcast_to((tile - block * num_tiles)[:, None], rows.shape)[there]] = slots[there]
        return first.reshape(-1)

    def fill(self, values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Bring weights, or their codes, to their slots.

        Args:
            values: One a weight, of 1, 4 or 8 bytes; those of 1 are codes.

        Returns:
            The columns of all slots and the values, as they are stored; 0 where there is no weight.

        """
        num_slots = int(self.starts[-1]) * SLICE
        if native.serves():
            num_written, values = num_slots + _STEPS_MORE * SLICE, np.ascontiguousarray(values)
            columns, filled = np.empty(num_written, np.uint8), np.empty(num_written, values.dtype)
            per_row = self.lengths.sum(1, dtype=np.int64)
            next_of = np.cumsum(per_row) - per_row
            _fill(
                *(part.ctypes.data for part in (self.rows, self.sorted_lengths, self.starts, self.tiles)),
                *self.lengths.shape, self.row_block, self.columns.ctypes.data, values.ctypes.data, len(values),
                values.itemsize, next_of.ctypes.data, columns.ctypes.data, filled.ctypes.data,
            )  # fmt: skip
            return columns[:num_slots], filled[:num_slots]
        columns, filled = np.full(num_slots, _FILL, np.uint8), np.zeros(num_slots, values.dtype)
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
    columns, lengths = np.empty(len(places), np.uint8), np.zeros((num_rows, num_tiles), np.uint8)
    num_good = _count[places.itemsize](
        places.ctypes.data, len(places), num_rows, num_columns, num_tiles, lengths.ctypes.data, columns.ctypes.data
    )
    return None if num_good < len(places) else _slice(columns, lengths, row_block)


def arrange_gaps(
    gaps: NDArray[Any], longest: int, num: int, num_rows: int, num_columns: int, row_block: int
) -> Arranged | tuple[int, int]:
    """Find where weights go whose places are sums of gaps; by compiled loops alone.

    Args:
        gaps: uint8 or uint16: to the next weight, the first from -1 on; 0 goes on by ``longest`` to no weight.
        longest: See there.
        num: How many weights there should be.
        num_rows: Of the matrix.
        num_columns: Likewise.
        row_block: Rows that are sorted together.

    Returns:
        That; or, if there is another number of weights or a place outside of the matrix, the number and the last place.

    """
    num_tiles, gaps, ends = -(-num_columns // TILE_COLUMNS), np.ascontiguousarray(gaps), np.empty(2, np.int64)
    columns, lengths = np.empty(num, np.uint8), np.zeros((num_rows, num_tiles), np.uint8)
    counters = np.zeros(_COUNTERS * num_tiles, np.uint8)
    _count_gaps[gaps.itemsize](
        gaps.ctypes.data, len(gaps), longest, num, num_rows, num_columns, num_tiles, lengths.ctypes.data,
        counters.ctypes.data, columns.ctypes.data, ends.ctypes.data,
    )  # fmt: skip
    num_found, last = int(ends[0]), int(ends[1])
    if num_found != num or last >= num_rows * num_columns:
        return num_found, last
    return _slice(columns, lengths, row_block)


def _slice(columns: NDArray[np.uint8], lengths: NDArray[np.uint8], row_block: int) -> Arranged:
    """Sort the rows of each tile, and cut them into slices."""
    num_rows, num_tiles = lengths.shape
    num_all_tiles = -(-num_rows // row_block) * num_tiles
    most = num_all_tiles * -(-row_block // SLICE)
    rows, sorted_lengths = np.empty(most * SLICE, np.int16), np.empty(most * SLICE, np.uint8)
    starts, tiles = np.zeros(most + 1, np.int64), np.zeros(num_all_tiles + 1, np.int64)
    num_slices = _slices(
        lengths.ctypes.data, num_rows, num_tiles, row_block,
        *(part.ctypes.data for part in (rows, sorted_lengths, starts, tiles)),
    )  # fmt: skip
    num_lanes = num_slices * SLICE
    return Arranged(
        columns, lengths, sorted_lengths[:num_lanes], rows[:num_lanes].copy(), starts[: num_slices + 1].copy(), tiles,
        row_block,
    )  # fmt: skip


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
    starts = np.concatenate([[0], np.cumsum(depth[is_slice])]).astype(np.int64)
    tiles = np.concatenate([[0], np.cumsum(is_slice.sum(1))]).astype(np.int64)
    lanes = np.where(descending > 0, order, row_block).astype(np.int16)
    rows, of_rows = (lanes_of.reshape(*is_slice.shape, SLICE)[is_slice] for lanes_of in (lanes, descending))

    columns = (column_of - tile_of * TILE_COLUMNS).astype(np.uint8)
    of_runs = lengths.astype(np.uint8).reshape(num_rows, num_tiles)
    return Arranged(
        columns, of_runs, of_rows.astype(np.uint8).reshape(-1), np.ascontiguousarray(rows).reshape(-1), starts, tiles,
        row_block,
    )  # fmt: skip
