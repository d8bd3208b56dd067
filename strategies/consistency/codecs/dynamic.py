"""``int8``: the dynamic 8-bit data type, scaled by blocks.

Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (2015), section 2: a sign, a run of zeros that is a
decimal exponent, an indicator bit, and the rest of the bits a linear fraction. Seven decades are covered, the largest
numbers with 64 steps and the smallest with one. The 256 values are those of bitsandbytes' ``create_dynamic_map``.

Speed comes from tables: a number is rounded to float16, and its 16 bits are the index of its code. A search among
midpoints (``torch.bucketize``) is many times slower. On a CPU a compiled kernel does all of a block at once
(:mod:`squall.kernels.block_codes`), with the same tables and to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from squall.kernels.block_codes import decode_int8, encode_int8

from .blocks import BlockCodec
from .codec import load, store

NUM_DECADES = 7
UNIT = 1 << 15
"""What 1 becomes in float16: with it the smallest value of the type, 5.5e-7, is a normal number, not a rough one."""


@lru_cache(maxsize=1)
def dynamic_values() -> Tensor:
    """The values that the codes 0 to 255 stand for, ascending, float64.

    The decade up to 10^-k has 2^(6 - k) equal intervals and the midpoint of each, with both signs; 0 and 1 are added.
    There is no -1, but a block's scale has the sign of its largest number, so that this one is always 1.
    """
    values = [0.0, 1.0]
    for exponent in range(NUM_DECADES):
        num_intervals = 2 ** (NUM_DECADES - 1 - exponent)
        for interval in range(num_intervals):
            middle = 0.1 + 0.9 * (interval + 0.5) / num_intervals
            values += [middle * 10.0**-exponent, -middle * 10.0**-exponent]
    return torch.tensor(sorted(values), dtype=torch.float64)


@lru_cache(maxsize=16)
def float_values(device: torch.device) -> Tensor:
    """What :func:`dynamic_values` are in single precision."""
    return dynamic_values().to(device, torch.float32)


@lru_cache(maxsize=16)
def _codes_on(device: torch.device) -> Tensor:
    """The nearest code of every float16, by its bits; NaN has any, for its block's scale tells."""
    values = dynamic_values()
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    return torch.bucketize(halves.double() / UNIT, (values[1:] + values[:-1]) / 2).to(device, torch.uint8)


def _scales(blocks: Tensor) -> Tensor:
    """The number of largest magnitude in each block, with its sign; NaN for a block that isn't finite."""
    highest, lowest = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    scales = torch.where(highest >= -lowest, highest, lowest)
    return scales.add_(scales - scales)  # infinity less itself is NaN


@dataclass(frozen=True)
class DynamicCodec(BlockCodec):
    """8 bits a number, and a float32 scale for each block.

    A number is coded as the nearest of the 256 values times the scale, give or take its rounding to float16, which
    moves a midpoint by 1/2048 of itself at most. So the error is below 0.73 % of the block's largest magnitude, and
    that number itself is exact. A block with a NaN or an infinity has a scale of NaN, and decodes to NaN altogether.
    """

    name = "int8"
    header_bytes = 4
    num_bits = 8

    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        if not encode_int8(values, out, residual, _codes_on(values.device), float_values(values.device)):
            super()._encode(values, out, residual)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        if not decode_int8(data, out, float_values(out.device)):
            super()._decode(data, out)

    def _encode_blocks(self, blocks: Tensor, header: Tensor, bits: Tensor) -> None:
        scales = _scales(blocks)
        store(scales, header)
        # Not times the reciprocal, which overflows for a block of denormal numbers. Whatever code a block of zeros gets
        # from 0 / 0, times its scale it is 0.
        scaled = torch.div(blocks, scales).mul_(UNIT)
        index = scaled.half().view(torch.uint16).to(torch.int32).view(-1)
        torch.index_select(_codes_on(blocks.device), 0, index, out=bits)

    def _decode_blocks(self, header: Tensor, bits: Tensor, out: Tensor) -> None:
        torch.index_select(float_values(out.device), 0, bits.to(torch.int32), out=out.view(-1))
        out.mul_(load(header, torch.float32).view(-1, 1))
