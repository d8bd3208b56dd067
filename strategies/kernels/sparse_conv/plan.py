"""Where the weights of a sparse convolution find their inputs, for inputs of one size: what the compiled kernel needs.

A plan depends on which weights live and on the sizes, not on the values, so it is made once: for inference, and in
training between changes of the mask.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from squall.kernels import native

from .lanes import WIDTH, Lanes, choose_lanes
from .sizes import Sizes

_TILES = {"avx512": 14, "avx2": 6, "plain": 3}
"""Most registers of a tile: what the instruction set has, less what the weights need."""
_L1_BYTES = 48 << 10  # what it holds, and no more for the rest: what is read again soonest is what stays
_L2_BYTES = 256 << 10  # of sums: others need it, too
_MOST = 2**31 - 1  # numbers that an offset reaches
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_plan_kernel = native.function("squall_sparse_conv_plan", _POINTER, *[_LONG] * 7, _POINTER, _LONG, *[_POINTER] * 3)
_move_kernel = native.function("squall_sparse_conv_move", *[_POINTER] * 3, *[_LONG] * 3, ctypes.c_int)


@dataclass(frozen=True)
class Packing:
    """How a tensor of images lies in memory while it is worked on; see kernel.c.

    Args:
        lanes: What lies side by side.
        phases: Vertical and horizontal phase of each.
        first_y: First row of a phase; may lie above the image.
        rows: Rows of a phase of a strip.
        columns: Columns of a phase that are taken from the image.
        pitch: Pixels from a row to the next.
        guard: Numbers before the first pixel.
        channel_size: Numbers of a channel.
        tail: Numbers behind the last channel, which tiles may read.

    """

    lanes: Lanes
    phases: tuple[tuple[int, int], ...]
    first_y: int
    rows: int
    columns: int
    pitch: int
    guard: int
    channel_size: int
    tail: int

    @property
    def phase_size(self) -> int:
        """Numbers of a phase."""
        return self.rows * self.pitch * self.lanes.num

    @cached_property
    def phase_table(self) -> Tensor:
        """The phases, for the kernel."""
        return torch.tensor(self.phases, dtype=torch.int64, device="cpu").view(-1, 2)


@dataclass(frozen=True)
class Plan:
    """What the kernel is told.

    Args:
        sizes: Of the convolution.
        packing: Of its input.
        grad_packing: Of the output's gradient.
        block_size: Input channels of a block.
        num_blocks: Blocks of a group.
        tile: Registers of a tile beside each other, and rows of them.
        row_tiles: Tiles of a row of the output, or 0 if they run on from row to row.
        num_staged: Numbers of a block's output that are brought to where they belong when all of them are there; 0 if
            each tile's are at once.
        offsets: Where in a block's input each weight reads, in the kernel's order, int32; shape (live weights,).
        starts: Where the weights of each group, block and output begin.

    """

    sizes: Sizes
    packing: Packing
    grad_packing: Packing
    block_size: int
    num_blocks: int
    tile: tuple[int, int]
    row_tiles: int
    num_staged: int
    offsets: Tensor
    starts: Tensor

    def ordered(self, values: Tensor) -> Tensor:
        """Bring a number a weight, float32, from the order of their positions into the kernel's."""
        return self._move(values, back=False)

    def in_positions(self, ordered: Tensor) -> Tensor:
        """Bring such numbers back into the order of positions."""
        return self._move(ordered, back=True)

    def _move(self, numbers: Tensor, back: bool) -> Tensor:
        if len(numbers) != len(self.offsets):
            raise ValueError(f"values must be as many as positions, {len(self.offsets)}, got {len(numbers)}")
        numbers, groups = numbers.contiguous(), self.sizes.groups
        moved = torch.empty_like(numbers)
        _move_kernel(
            numbers.data_ptr(), moved.data_ptr(), self.starts.data_ptr(), self.sizes.weight[0] // groups, groups,
            self.num_blocks, back,
        )  # fmt: skip
        return moved


@torch.inference_mode(False)
def make_plan(positions: Tensor, sizes: Sizes) -> Plan:
    """Plan a convolution.

    Args:
        positions: Of the live weights in the flat weight, ascending, int64.
        sizes: Of the convolution.

    Returns:
        The plan, for the instruction set in use.

    """
    _, num_inputs, kernel_height, kernel_width = sizes.weight
    lanes = choose_lanes(sizes, len(positions))
    rows = _shifts(kernel_height, sizes.dilation[0], sizes.padding[0], sizes.stride[0])
    columns = _shifts(kernel_width, sizes.dilation[1], sizes.padding[1], sizes.stride[1])
    packing = _pack(sizes, lanes, rows, columns)
    density = len(positions) / max(1, math.prod(sizes.weight))
    tile, row_tiles, block_size = _tile(sizes, packing, rows, columns, density)
    num_blocks = -(-num_inputs // block_size)

    phases = {phase: index for index, phase in enumerate(packing.phases)}
    taps = torch.tensor(
        [
            phases[y[0], x[0]] * packing.phase_size + ((y[1] - packing.first_y) * packing.pitch + x[1]) * lanes.num
            for y in rows
            for x in columns
        ],
        dtype=torch.int64,
        device=positions.device,
    )
    offsets, starts = _offsets(positions, sizes, block_size, packing.channel_size, taps)
    return Plan(
        sizes, packing, _pack_output(sizes, packing), block_size, num_blocks, tile, row_tiles,
        _num_staged(sizes, packing, tile, row_tiles), offsets, starts,
    )  # fmt: skip


def _offsets(
    positions: Tensor, sizes: Sizes, block_size: int, channel_size: int, taps: Tensor
) -> tuple[Tensor, Tensor]:
    """Say where weights read, in the kernel's order, and where those of each output begin."""
    num_outputs, num_inputs, *kernel = sizes.weight
    outputs, num_blocks, positions = num_outputs // sizes.groups, -(-num_inputs // block_size), positions.contiguous()
    starts = positions.new_zeros(sizes.groups * num_blocks * outputs + 1)
    offsets = torch.empty_like(positions, dtype=torch.int32)
    reads = positions.new_empty(num_inputs * math.prod(kernel), dtype=torch.int32)
    _plan_kernel(
        positions.data_ptr(), len(positions), num_inputs, outputs, sizes.groups, num_blocks, block_size, channel_size,
        taps.data_ptr(), math.prod(kernel), starts.data_ptr(), offsets.data_ptr(), reads.data_ptr(),
    )  # fmt: skip
    return offsets, starts


def _num_staged(sizes: Sizes, packing: Packing, tile: tuple[int, int], row_tiles: int) -> int:
    lanes, (width, rows) = packing.lanes, tile
    if lanes.num == 1:
        return 0
    numbers = ((lanes.height - 1) * packing.pitch + sizes.out_width) * lanes.num
    tiles = -(-lanes.height // rows) * row_tiles or -(-numbers // (width * WIDTH))
    return sizes.weight[0] * tiles * width * rows * WIDTH


def _shifts(kernel: int, dilation: int, padding: int, stride: int) -> list[tuple[int, int]]:
    """Say for each place of a kernel which phase of the image it reads, and how far from the output's place."""
    places = [place * dilation - padding for place in range(kernel)]
    return [(place % stride, place // stride) for place in places]


def _pack(sizes: Sizes, lanes: Lanes, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Packing:
    top, bottom = min(shift for _, shift in rows), max(shift for _, shift in rows)
    left, right = min(shift for _, shift in columns), max(shift for _, shift in columns)
    held = min(-(-sizes.width // sizes.stride[1]), max(0, sizes.out_width + right))
    # What lies right of a row lies left of the next one.
    pitch = max(held + max(0, -left), sizes.out_width + max(0, right), sizes.out_width)
    guard = _up(max(0, -left) * lanes.num)
    phases = tuple(dict.fromkeys((y, x) for y, _ in rows for x, _ in columns))
    num_rows = lanes.height + bottom - top
    size = _up(guard + len(phases) * num_rows * pitch * lanes.num)
    tail = (max(_TILES.values()) + 1) * WIDTH + max(0, right) * lanes.num + guard
    return Packing(lanes, phases, top, num_rows, held, pitch, guard, size, tail)


def _pack_output(sizes: Sizes, packing: Packing) -> Packing:
    lanes = packing.lanes
    size = _up(lanes.height * packing.pitch * lanes.num)
    tail = (max(_TILES.values()) + 1) * WIDTH
    return Packing(lanes, ((0, 0),), 0, lanes.height, sizes.out_width, packing.pitch, 0, size, tail)


def _up(numbers: int) -> int:
    return -(-numbers // WIDTH) * WIDTH


def _tile(
    sizes: Sizes, packing: Packing, rows: list[tuple[int, int]], columns: list[tuple[int, int]], density: float
) -> tuple[tuple[int, int], int, int]:
    """Choose registers of a tile, tiles of a row and channels of a block, by what the inner loops cost."""
    lanes, pitch, num_inputs = packing.lanes.num, packing.pitch, sizes.weight[1]
    outputs, height = sizes.weight[0] // sizes.groups, packing.lanes.height
    reach = (max(shift for _, shift in columns) - min(shift for _, shift in columns)) * lanes
    span = (max(shift for _, shift in rows) - min(shift for _, shift in rows)) * pitch * lanes
    num_phases = len({phase for phase, _ in columns})
    numbers = ((height - 1) * pitch + sizes.out_width) * lanes
    weights = density * len(rows) * len(columns)

    most = _TILES.get(native.isa(), 1)
    shapes = [(width, 1) for width in range(1, most + 1)]
    if lanes > 1 and most > 1:
        shapes += [(most // 2, 2)]

    def choices() -> Iterator[tuple[float, tuple[int, int], int, int]]:
        for width, tile_rows in shapes:
            tile = width * tile_rows
            num_pieces = num_phases * len({(phase, shift + row) for phase, shift in rows for row in range(tile_rows)})
            footprint = 4 * num_pieces * (width * WIDTH + reach)
            if tile_rows == 1:  # pieces of a wide one overlap
                footprint = min(footprint, 4 * len(packing.phases) * (width * WIDTH + reach + span))
            block = min(num_inputs, max(1, min(_L1_BYTES // footprint, _MOST // packing.channel_size)))
            block = -(-num_inputs // -(-num_inputs // max(1, block)))  # as many blocks, of equal sizes
            row_tiles = -(-sizes.out_width * lanes // (width * WIDTH))
            far = 4 * outputs * tile * WIDTH > _L2_BYTES
            # The last number is the end of a loop that nobody foresees.
            per_block = block * weights * (tile + 3.0) + (2.4 if far else 2.0) * tile + 20
            per_tile = -(-num_inputs // block) * per_block
            if tile_rows == 1:
                yield -(-numbers // (width * WIDTH)) * per_tile, (width, 1), 0, block
            # Rows apart leave their gaps out, unless registers reach into the next row, whose pixels gradients would
            # count twice; the last tiles may be narrower and lower.
            if _up(sizes.out_width * lanes) > pitch * lanes and height > 1:
                continue
            num_beside = 0.3 * row_tiles + 0.7 * -(-sizes.out_width * lanes // WIDTH) / width
            num_below = 0.3 * -(-height // tile_rows) + 0.7 * height / tile_rows
            yield num_below * num_beside * per_tile, (width, tile_rows), row_tiles, block

    return min(choices())[1:]
