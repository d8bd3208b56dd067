"""How a sparse matrix lies in memory, and how it gets there without ever being dense.

Tiles of 127 columns by ``row_block`` rows, each with its rows sorted by how many weights they have in it and cut into
slices of 64; a slice is a list of steps, and a step one weight of each of its rows. That is *sliced ELLPACK* with a
column of one byte, and hardly anything to fill up: 4 % at 9 % density. ``kernel.c`` says what that is good for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import Arranged, arrange, arrange_gaps

ROW_BLOCK = 2048
_MOST_CODES = 256


class PackedWeight(NamedTuple):
    """A sparse matrix as :func:`squall.kernels.sparse_linear` reads it; made by the ``pack`` functions.

    Args:
        columns: uint8, 64 a step: columns in their tile, those of slots 16 apart beside each other (a 4 x 16 matrix,
            transposed); 127 for what fills up a slice.
        codes: uint8, 64 a step, in that order too: places in ``values``; or None, and values are those of the slots.
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
        from .torch_path import triples, values_of

        rows, columns, slots = triples(self)
        dense = self.values.new_zeros(self.num_rows * self.num_columns)
        dense[rows * self.num_columns + columns] = values_of(self, slots)
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
        positions: int64 or int32, ascending: places in the matrix, counted row by row.
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
        positions: int64 or int32, ascending: places in the matrix, counted row by row.
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


def pack_gaps(
    gaps: Tensor,
    longest: int,
    codes: Tensor | None,
    values: Tensor,
    shape: tuple[int, int],
    row_block: int = ROW_BLOCK,
) -> PackedWeight:
    """Pack weights given by the gaps between them, as compressed files have them; by the compiled kernels alone.

    Args:
        gaps: uint8 or uint16: to the next weight, counted row by row, the first from -1 on; 0 goes on by ``longest`` to
            no weight.
        longest: See there.
        codes: Places in ``values``, uint8; None if each weight has its own.
        values: The codebook, of up to 256 values, or a value a weight; float32 or float64.
        shape: Outputs and inputs.
        row_block: As of :func:`pack_dense`.

    Raises:
        ValueError: Gaps lead to another number of weights, or out of the matrix; `longest` is below 1; or as
            :func:`pack_codes`.

    Example:
        >>> pack_gaps(torch.tensor([2, 0, 1], dtype=torch.uint8), 1, None, torch.tensor([0.5, 1.0]), (2, 2)).to_dense()
        tensor([[0.0000, 0.5000],
                [0.0000, 1.0000]])

    """
    num = len(values if codes is None else codes)
    _check(None, codes, values, shape, row_block)
    if gaps.ndim != 1 or gaps.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"gaps must be one row of uint8 or uint16, got {gaps.dtype} of shape {tuple(gaps.shape)}")
    if longest < 1:
        raise ValueError(f"longest must be at least 1, got {longest}")
    arranged = arrange_gaps(gaps.cpu().numpy(), longest, num, *shape, max(1, min(row_block, shape[0])))
    if isinstance(arranged, Arranged):
        return _lay_out(arranged, codes, values, shape)
    if arranged[0] != num:
        raise ValueError(f"gaps don't lead to {num:,} weights")
    raise ValueError(f"gaps run past the end, {math.prod(shape):,} weights")


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
    packed, arranged = _pack(positions, None, values, shape, row_block)
    slots = arranged.slots()
    positions = positions.detach().cpu()
    edges = torch.arange(shape[0] + 1, device=positions.device) * shape[1]
    row_starts = torch.searchsorted(positions, edges)
    columns = (positions - edges.repeat_interleave(row_starts.diff(append=row_starts[-1:]))).int()
    device = packed.values.device
    return packed, LivePositions(row_starts.to(device), columns.to(device), torch.from_numpy(slots).to(device))


def _check(
    positions: Tensor | None, codes: Tensor | None, values: Tensor, shape: tuple[int, int], row_block: int
) -> None:
    name = "values" if codes is None else "codebook"
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (outputs, inputs), got {tuple(shape)}")
    if not 1 <= row_block <= 32767:
        raise ValueError(f"row_block must be from 1 to 32767 rows, got {row_block}")
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {values.dtype}; convert it, e.g. by .float()")
    if positions is not None and (positions.ndim != 1 or positions.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"positions must be one row of int32 or int64, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    for given, of in ((values, name), (codes, "codes")):
        if given is not None and given.ndim != 1:
            raise ValueError(f"{of} must have one dimension, got shape {tuple(given.shape)}")
    per_weight = values if codes is None else codes
    if positions is not None and len(per_weight) != len(positions):
        raise ValueError(
            f"{name if codes is None else 'codes'} must be as many as positions, {len(positions)},"
            f" got {len(per_weight)}"
        )
    if codes is not None:
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, got {codes.dtype}")
        if len(values) > _MOST_CODES:
            raise ValueError(f"codebook must have at most {_MOST_CODES} values, got {len(values)}")
        largest = codes.cpu().numpy().max(initial=0)
        if len(codes) and largest >= len(values):
            raise ValueError(f"codes must be below the codebook's {len(values)} values, got {largest}")


def _pack(
    positions: Tensor, codes: Tensor | None, values: Tensor, shape: tuple[int, int], row_block: int
) -> tuple[PackedWeight, Arranged]:
    """Pack; returns where weights went as well."""
    _check(positions, codes, values, shape, row_block)
    num_rows, num_columns = shape
    row_block = max(1, min(row_block, num_rows))
    arranged = arrange(positions.detach().cpu().numpy(), num_rows, num_columns, row_block)
    if arranged is None:
        low, high = int(positions[0]), int(positions[-1])
        if bool((positions[1:] <= positions[:-1]).any()):
            raise ValueError("positions must ascend, each larger than the one before it; sort them with the values")
        raise ValueError(
            f"positions must be in a matrix of {num_rows} x {num_columns}, from 0 to {math.prod(shape) - 1},"
            f" got {low} to {high}"
        )
    return _lay_out(arranged, codes, values, shape), arranged


def _lay_out(arranged: Arranged, codes: Tensor | None, values: Tensor, shape: tuple[int, int]) -> PackedWeight:
    columns, filled = arranged.fill((values if codes is None else codes).detach().cpu().numpy())
    device = values.device
    slots = torch.from_numpy(filled).to(device)
    return PackedWeight(
        columns=torch.from_numpy(columns).to(device),
        codes=None if codes is None else slots,
        values=slots if codes is None else values.detach().clone().contiguous(),
        rows=torch.from_numpy(arranged.rows).to(device),
        starts=torch.from_numpy(arranged.starts).to(device),
        tiles=torch.from_numpy(arranged.tiles).to(device),
        num_rows=shape[0],
        num_columns=shape[1],
        row_block=arranged.row_block,
        num_live=len(arranged.columns),
    )
