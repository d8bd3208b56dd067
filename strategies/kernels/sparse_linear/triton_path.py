"""Batch 1 on a CUDA device, in Triton: a program a slice, which adds its 64 sums to the outputs of its rows."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .packed import SLICE, TILE_COLUMNS

if TYPE_CHECKING:
    from .packed import PackedWeight


def serves(x: Tensor) -> bool:
    """Tell whether Triton can work on ``x``, ``(batch, inputs)``."""
    return x.is_cuda and len(x) == 1 and x.dtype == torch.float32 and importlib.util.find_spec("triton") is not None


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
        x, columns, codes, values, rows, starts, tile_of, y, num_tiles, num_columns, row_block,
        CODED: tl.constexpr, SLICE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        index = tl.program_id(0)
        lane = tl.arange(0, SLICE)
        tile = tl.load(tile_of + index)
        block = tile // num_tiles
        first = (tile - block * num_tiles) * WIDTH
        total = tl.zeros((SLICE,), tl.float32)
        # Groups of four of a step's columns are a 4 x 4 matrix, transposed.
        place = (lane // 4 % 4 * 4 + lane // 16) * 4 + lane % 4
        for step in range(tl.load(starts + index), tl.load(starts + index + 1)):
            column = tl.load(columns + step * SLICE + place).to(tl.int32)
            live = column < WIDTH
            slot = step * SLICE + lane
            if CODED:
                value = tl.load(values + tl.load(codes + slot).to(tl.int32))
            else:
                value = tl.load(values + slot)
            total += value * tl.load(x + first + column, mask=live, other=0.0)
        row = tl.load(rows + index * SLICE + lane).to(tl.int32)
        tl.atomic_add(y + block * row_block + row, total, mask=row < row_block)

    return kernel


def triton_forward(x: Tensor, packed: PackedWeight, bias: Tensor | None, relu: bool) -> Tensor:
    """Compute ``x @ weight.T + bias`` of one sample."""
    y = x.new_zeros(1, packed.num_rows) if bias is None else bias.clone().unsqueeze(0)
    num_slices = len(packed.starts) - 1
    if num_slices:
        tile_of = torch.arange(len(packed.tiles) - 1, device=x.device)
        tile_of = tile_of.repeat_interleave(packed.tiles.diff(), output_size=num_slices)
        codes = packed.values if packed.codes is None else packed.codes
        _kernel()[(num_slices,)](
            x.contiguous(), packed.columns, codes, packed.values, packed.rows, packed.starts, tile_of, y,
            -(-packed.num_columns // TILE_COLUMNS), packed.num_columns, packed.row_block,
            CODED=packed.codes is not None, SLICE=SLICE, WIDTH=TILE_COLUMNS,
        )  # fmt: skip
    return y.relu_() if relu else y
