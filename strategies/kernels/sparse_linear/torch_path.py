"""A sparse matrix times vectors in Torch operations, for where the compiled kernels don't serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .packing import SLICE, TILE_COLUMNS

if TYPE_CHECKING:
    from .packed import PackedWeight

_CHUNK = 1 << 22  # products at a time


class _Rows(NamedTuple):
    """A packed matrix's positions as compressed rows: slots in the order of the positions."""

    row_starts: Tensor
    columns: Tensor
    slots: Tensor


# What a matrix costs to find is many times what it costs to use; it depends on no value.
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def triples(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Find the row, the column and the slot of each weight: three int64 tensors in the order of the slots."""
    columns = _by_slot(packed.columns)
    slots = (columns != TILE_COLUMNS).nonzero().squeeze(1)
    num_tiles = -(-packed.num_columns // TILE_COLUMNS)
    tile_of_slice = torch.arange(len(packed.tiles) - 1, device=slots.device).repeat_interleave(packed.tiles.diff())
    slice_of_step = torch.arange(len(packed.starts) - 1, device=slots.device).repeat_interleave(packed.starts.diff())
    slice_of = slice_of_step[slots // SLICE]
    tile_of = tile_of_slice[slice_of]
    block_of = tile_of // max(1, num_tiles)
    rows = packed.rows[slice_of * SLICE + slots % SLICE].long() + block_of * packed.row_block
    return rows, columns[slots].long() + (tile_of - block_of * num_tiles) * TILE_COLUMNS, slots


def _by_slot(stored: Tensor) -> Tensor:
    """Bring bytes of steps into the order of the slots."""
    return stored.view(-1, SLICE // 4, 4).transpose(1, 2).reshape(-1)


def values_of(packed: PackedWeight, slots: Tensor) -> Tensor:
    """Take the values of some slots."""
    return packed.values[slots if packed.codes is None else _by_slot(packed.codes)[slots].long()]


def _rows(packed: PackedWeight) -> _Rows:
    found: _Rows | None = _found.get(packed.columns)
    if found is None:
        rows, columns, slots = triples(packed)
        order = (rows * packed.num_columns + columns).argsort()
        edges = torch.arange(packed.num_rows + 1, device=rows.device)
        found = _Rows(torch.searchsorted(rows[order], edges), columns[order], slots[order])
        _found[packed.columns] = found
    return found


def csr(packed: PackedWeight) -> Tensor:
    """Build Torch's own sparse matrix of compressed rows."""
    rows = _rows(packed)
    return torch.sparse_csr_tensor(
        rows.row_starts, rows.columns, values_of(packed, rows.slots), packed.shape, check_invariants=False
    )


def torch_forward(x: Tensor, packed: PackedWeight, bias: Tensor | None, relu: bool) -> Tensor:
    """Compute ``x @ weight.T + bias``; ``x`` is ``(batch, inputs)``."""
    if not packed.num_live:
        y = x.new_zeros(len(x), packed.num_rows)
    else:
        y = (csr(packed) @ x.t().contiguous()).t().contiguous()
    if bias is not None:
        y += bias
    return y.relu_() if relu else y


def torch_input_grad(grad: Tensor, packed: PackedWeight) -> Tensor:
    """Compute ``grad @ weight``; ``grad`` is ``(batch, outputs)``."""
    if not packed.num_live:
        return grad.new_zeros(len(grad), packed.num_columns)
    return (csr(packed).t() @ grad.t().contiguous()).t().contiguous()


def torch_weight_grad(x: Tensor, grad: Tensor, row_starts: Tensor, columns: Tensor) -> Tensor:
    """Compute ``(grad.T @ x)`` at some places: one number each."""
    rows = torch.arange(len(row_starts) - 1, device=x.device).repeat_interleave(row_starts.diff())
    x, grad = x.t().contiguous(), grad.t().contiguous()
    result = x.new_empty(len(columns))
    step = max(1, _CHUNK // max(1, x.shape[1]))
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        result[part] = (x[columns[part].long()] * grad[rows[part]]).sum(1)
    return result
