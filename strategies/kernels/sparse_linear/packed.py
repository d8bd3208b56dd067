"""How a sparse matrix lies in memory, and how it gets there without ever being dense.

Tiles of 127 columns by ``row_block`` rows, each with its rows sorted by how many weights they have in it and cut into
slices of 64; a slice is a list of steps, and a step one weight of each of its rows. That is *sliced ELLPACK* with a
column of one byte, and hardly anything to fill up: 4 % at 9 % density. ``kernel.c`` says what that is good for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE_COLUMNS, SLICE, ROW_BLOCK = 127, 64, 2048  # the first two as in kernel.c
_FILL = TILE_COLUMNS  # the column of what fills up a slice
_MOST_CODES = 256


class PackedWeight(NamedTuple):
    """A sparse matrix as :func:`squall.kernels.sparse_linear` reads it; made by the ``pack`` functions.

    Args:
        columns: uint8, 64 a step: columns in their tile, their groups of four transposed as a 4 x 4 matrix; 127 for
            what fills up a slice.
        codes: uint8, 64 a step: places in ``values``; or None, and values are those of the steps.
        values: float32 or float64, 64 a step; or the codebook.
        rows: int16, 64 a slice: rows in their block, ``row_block`` for none.
        starts: int64: the first step of each slice, and how many there are.
        tiles: int64: the first slice of each tile (blocks of rows are the slow index), and how many there are.
        num_rows: Outputs.
        num_columns: Inputs.
        row_block: Rows that are sorted together, and that a thread works on.
        num_live: Weights that are not filled up.

    """

    columns: Tensor
    codes: Tensor | None
    values: Tensor
    rows: Tensor
    starts: Tensor
    tiles: Tensor
    num_rows: int
    num_columns: int
    row_block: int
    num_live: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.num_rows, self.num_columns

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, values and outputs."""
        return self.values.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in self if isinstance(part, Tensor))

    def to(self, *arguments: Any, **keywords: Any) -> PackedWeight:
        """Move to a device, or convert values, as :meth:`torch.Tensor.to`; other tensors keep their dtype.

        Example:
            >>> pack_dense(torch.eye(3)).to(torch.float64).dtype
            torch.float64

        """
        values = self.values.to(*arguments, **keywords)
        device = values.device
        return self._replace(
            columns=self.columns.to(device),
            codes=None if self.codes is None else self.codes.to(device),
            values=values,
            rows=self.rows.to(device),
            starts=self.starts.to(device),
            tiles=self.tiles.to(device),
        )

    def to_dense(self) -> Tensor:
        """Build the dense matrix, shape ``(num_rows, num_columns)``.

        Example:
            >>> pack_dense(torch.eye(2)).to_dense()
            tensor([[1., 0.],
                    [0., 1.]])

        """
        from .torch_path import triples

        rows, columns, slots = triples(self)
        values = self.values[slots] if self.codes is None else self.values[self.codes[slots].long()]
        dense = self.values.new_zeros(self.num_rows * self.num_columns)
        dense[rows * self.num_columns + columns] = values
        return dense.view(self.shape)


class LivePositions(NamedTuple):
    """Where a matrix's weights are, in ascending order, for gradients by them and for putting them in their slots.

    Args:
        row_starts: int64, one a row and one more: where each row's weights start.
        columns: int32: a column a weight.
        slots: int64: each weight's place in :attr:`PackedWeight.values`.

    """

    row_starts: Tensor
    columns: Tensor
    slots: Tensor


def pack_dense(weight: Tensor, row_block: int = ROW_BLOCK) -> PackedWeight:
    """Pack a dense matrix; what is zero is left out.

    Args:
        weight: Shape ``(outputs, inputs)``, float32 or float64.
        row_block: Rows that are sorted together; fewer fill up more, but let more threads work.

    Raises:
        ValueError: ``weight`` has another shape or dtype, or ``row_block`` isn't between 1 and 32767.

    Example:
        >>> pack_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).num_live
        1

    """
    if weight.ndim != 2:
        raise ValueError(f"weight must have two dimensions, (outputs, inputs), got shape {tuple(weight.shape)}")
    positions = weight.detach().flatten().nonzero().squeeze(1)
    return pack_values(positions, weight.detach().flatten()[positions], (weight.shape[0], weight.shape[1]), row_block)


def pack_values(positions: Tensor, values: Tensor, shape: tuple[int, int], row_block: int = ROW_BLOCK) -> PackedWeight:
    """Pack weights given by their positions.

    Args:
        positions: int64, ascending: places in the matrix, counted row by row.
        values: As many, float32 or float64.
        shape: Outputs and inputs.
        row_block: As of :func:`pack_dense`.

    Raises:
        ValueError: Positions don't ascend or are outside the matrix; or as :func:`pack_dense`.

    Example:
        >>> pack_values(torch.tensor([1, 2]), torch.tensor([0.5, 1.0]), (2, 2)).to_dense()
        tensor([[0.0000, 0.5000],
                [1.0000, 0.0000]])

    """
    return _pack(positions, None, values, shape, row_block)[0]


def pack_codes(
    positions: Tensor, codes: Tensor, codebook: Tensor, shape: tuple[int, int], row_block: int = ROW_BLOCK
) -> PackedWeight:
    """Pack weights given by their positions, and their values by their places in a codebook.

    Args:
        positions: int64, ascending: places in the matrix, counted row by row.
        codes: As many, uint8.
        codebook: Up to 256 values, float32 or float64. Up to 32 are looked up fastest.
        shape: Outputs and inputs.
        row_block: As of :func:`pack_dense`.

    Raises:
        ValueError: A code is outside the codebook; or as :func:`pack_values`.

    Example:
        >>> codes = torch.tensor([1, 0], dtype=torch.uint8)
        >>> pack_codes(torch.tensor([1, 2]), codes, torch.tensor([0.5, 1.0]), (2, 2)).to_dense()
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]])

    """
    return _pack(positions, codes, codebook, shape, row_block)[0]


def pack_live(
    positions: Tensor, values: Tensor, shape: tuple[int, int], row_block: int = ROW_BLOCK
) -> tuple[PackedWeight, LivePositions]:
    """Pack weights that will be trained; arguments as of :func:`pack_values`.

    Returns:
        The packed matrix, and where its weights are; both hold until the positions change.

    Example:
        >>> _, live = pack_live(torch.tensor([1, 2]), torch.tensor([0.5, 1.0]), (2, 2))
        >>> live.columns
        tensor([1, 0], dtype=torch.int32)

    """
    packed, slots = _pack(positions, None, values, shape, row_block)
    positions = positions.detach().cpu()
    edges = torch.arange(shape[0] + 1) * shape[1]
    row_starts = torch.searchsorted(positions, edges)
    columns = (positions - edges.repeat_interleave(row_starts.diff(append=row_starts[-1:]))).int()
    device = packed.values.device
    return packed, LivePositions(row_starts.to(device), columns.to(device), torch.from_numpy(slots).to(device))


def _check(positions: Tensor, codes: Tensor | None, values: Tensor, shape: tuple[int, int], row_block: int) -> None:
    name = "values" if codes is None else "codebook"
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (outputs, inputs), got {tuple(shape)}")
    if not 1 <= row_block <= 32767:
        raise ValueError(f"row_block must be from 1 to 32767 rows, got {row_block}")
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {values.dtype}; convert it, e.g. by .float()")
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions must be one row of int64, got {positions.dtype} of shape {tuple(positions.shape)}")
    for given, of in ((values, name), (codes, "codes")):
        if given is not None and given.ndim != 1:
            raise ValueError(f"{of} must have one dimension, got shape {tuple(given.shape)}")
    per_weight = values if codes is None else codes
    if len(per_weight) != len(positions):
        raise ValueError(
            f"{name if codes is None else 'codes'} must be as many as positions, {len(positions)},"
            f" got {len(per_weight)}"
        )
    if codes is not None:
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, got {codes.dtype}")
        if len(values) > _MOST_CODES:
            raise ValueError(f"codebook must have at most {_MOST_CODES} values, got {len(values)}")
        if len(codes) and int(codes.max()) >= len(values):
            raise ValueError(f"codes must be below the codebook's {len(values)} values, got {int(codes.max())}")
    if len(positions):
        low, high = int(positions[0]), int(positions[-1])
        if bool((positions[1:] <= positions[:-1]).any()):
            raise ValueError("positions must ascend, each larger than the one before it; sort them with the values")
        if low < 0 or high >= math.prod(shape):
            raise ValueError(
                f"positions must be in a matrix of {shape[0]} x {shape[1]}, from 0 to {math.prod(shape) - 1},"
                f" got {low} to {high}"
            )


def _pack(
    positions: Tensor, codes: Tensor | None, values: Tensor, shape: tuple[int, int], row_block: int
) -> tuple[PackedWeight, NDArray[np.int64]]:
    """Pack; returns each weight's slot as well."""
    _check(positions, codes, values, shape, row_block)
    num_rows, num_columns = shape
    row_block = max(1, min(row_block, num_rows))
    num_blocks, num_tiles = -(-num_rows // row_block), -(-num_columns // TILE_COLUMNS)
    places = positions.detach().cpu().numpy()
    row_of, column_of = np.divmod(places, max(1, num_columns))
    tile_of = column_of // TILE_COLUMNS
    column_of -= tile_of * TILE_COLUMNS
    run_of = row_of * num_tiles + tile_of  # a row's weights in one tile follow each other
    lengths = np.bincount(run_of, minlength=num_rows * num_tiles)
    step_of = np.arange(len(places)) - (np.cumsum(lengths) - lengths)[run_of]

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
    first_slot = starts[slice_of.ravel()].reshape(slice_of.shape) if len(starts) > 1 else slice_of
    first_slot = np.take_along_axis(first_slot, rank // SLICE, axis=1) * SLICE + rank % SLICE  # of (tile, row)
    first_slot = first_slot.reshape(num_blocks, num_tiles, height).transpose(0, 2, 1)[:, :row_block]
    first_slot = np.ascontiguousarray(first_slot).reshape(-1)  # of (row, tile), as runs are
    slots = first_slot[run_of] + step_of * SLICE

    num_slots = int(starts[-1]) * SLICE
    columns = np.full(num_slots, _FILL, np.uint8)
    columns[slots] = column_of
    columns = columns.reshape(-1, 4, 4, 4).transpose(0, 2, 1, 3).reshape(-1)

    def fill(given: Tensor) -> Tensor:
        host = given.detach().cpu().numpy()
        filled = np.zeros(num_slots, host.dtype)
        filled[slots] = host
        return torch.from_numpy(filled).to(values.device)

    device = values.device
    packed = PackedWeight(
        columns=torch.from_numpy(columns).to(device),
        codes=None if codes is None else fill(codes),
        values=fill(values) if codes is None else values.detach().clone().contiguous(),
        rows=torch.from_numpy(np.ascontiguousarray(rows).reshape(-1)).to(device),
        starts=torch.from_numpy(starts).to(device),
        tiles=torch.from_numpy(tiles).to(device),
        num_rows=num_rows,
        num_columns=num_columns,
        row_block=row_block,
        num_live=len(places),
    )
    return packed, slots
