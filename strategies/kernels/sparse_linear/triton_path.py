"""Batch 1 on a CUDA device, in Triton: a program a slice, which adds its 64 sums to the outputs of its rows.

To be imported only where there is Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import PackedWeight
from .packing import SLICE, TILE_COLUMNS


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    x: Any,
    columns: Any,
    codes: Any,
    values: Any,
    rows: Any,
    starts: Any,
    tile_of: Any,
    y: Any,
    num_tiles: Any,
    row_block: Any,
    CODED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    lane = tl.arange(0, SIZE)
    tile = tl.load(tile_of + index)
    block = tile // num_tiles
    first = (tile - block * num_tiles) * WIDTH
    total = tl.zeros((SIZE,), tl.float32)
    byte = lane % 16 * 4 + lane // 16  # bytes of a step are a 4 x 16 matrix, transposed
    for step in range(tl.load(starts + index), tl.load(starts + index + 1)):
        column = tl.load(columns + step * SIZE + byte).to(tl.int32)
        slot = step * SIZE + lane
        if CODED:  # noqa: SIM108  (Triton compiles one of the branches)
            value = tl.load(values + tl.load(codes + step * SIZE + byte).to(tl.int32))
        else:
            value = tl.load(values + slot)
        total += value * tl.load(x + first + column, mask=column < WIDTH, other=0.0)
    row = tl.load(rows + index * SIZE + lane).to(tl.int32)
    tl.atomic_add(y + block * row_block + row, total, mask=row < row_block)


def triton_forward(x: Tensor, packed: PackedWeight, bias: Tensor | None, relu: bool) -> Tensor:
    """Compute ``x @ weight.T + bias`` of one sample, float32."""
    y = x.new_zeros(1, packed.num_rows) if bias is None else bias.clone().unsqueeze(0)
    num_slices = len(packed.starts) - 1
    if num_slices:
        tile_of = torch.arange(len(packed.tiles) - 1, device=x.device)
        tile_of = tile_of.repeat_interleave(packed.tiles.diff(), output_size=num_slices)
        _kernel[(num_slices,)](
            x.contiguous(),
            packed.columns,
            packed.values if packed.codes is None else packed.codes,
            packed.values,
            packed.rows,
            packed.starts,
            tile_of,
            y,
            -(-packed.num_columns // TILE_COLUMNS),
            packed.row_block,
            CODED=packed.codes is not None,
            SIZE=SLICE,
            WIDTH=TILE_COLUMNS,
        )
    return y.relu_() if relu else y
