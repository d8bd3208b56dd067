"""``1bit``: a sign for each number, and two values for each block.

Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech
DNNs" (2014), section 3.2: each number becomes the mean of its side of zero, and what that loses is kept and added to
the next gradient. Without this error feedback training doesn't converge. On a CPU a compiled kernel does all of a block
at once (:mod:`squall.kernels.block_codes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from squall.kernels.block_codes import decode_signs, encode_signs

from .blocks import BlockCodec
from .codec import load, store

GATHER_BITS = 0x0102040810204080
"""Times eight bytes of 0 or 1 in an int64, it has those eight bits, the first byte's lowest, in its highest byte."""


@lru_cache(maxsize=16)
def _masks_on(device: torch.device) -> Tensor:
    """For each byte the eight bytes, 0 or 255, that its bits stand for, as one int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 255).to(torch.uint8).view(torch.int64).view(-1).to(device)


def _means(blocks: Tensor, positive: Tensor) -> Tensor:
    """The mean of the non-negative numbers of each block, and that of the negative ones: shape (blocks, 2).

    Args:
        blocks: Shape (blocks, length).
        positive: 1.0 where a number isn't negative; the same shape, and used up.

    """
    num_positive = positive.sum(1)
    counts = torch.stack((num_positive, blocks.shape[1] - num_positive), 1).clamp_min_(1.0)
    # In float64, or large numbers' sum is infinite where their mean isn't.
    above = torch.clamp(blocks, min=0.0, out=positive).sum(1, dtype=torch.float64)
    below = torch.clamp(blocks, max=0.0, out=positive).sum(1, dtype=torch.float64)
    means = torch.stack((above, below), 1).div_(counts).float()
    invalid = means - means  # infinity less itself is NaN
    return means.add_(invalid).add_(invalid.flip(1))


@dataclass(frozen=True)
class SignCodec(BlockCodec):
    """1 bit a number, the first of a byte its lowest, and two float32 for each block.

    The first of the two is the mean of the numbers whose bit is set, those that aren't negative; the second that of
    the others. A block with a NaN or an infinity has NaN for both.
    """

    name = "1bit"
    has_residual = True
    header_bytes = 8
    num_bits = 1

    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        if not encode_signs(values, out, residual):
            super()._encode(values, out, residual)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        if not decode_signs(data, out):
            super()._decode(data, out)

    def _encode_blocks(self, blocks: Tensor, header: Tensor, bits: Tensor) -> None:
        positive = torch.ge(blocks, 0.0, out=torch.empty_like(blocks))
        num_numbers, padded = positive.numel(), bits.numel() * 8
        # A comparison to bool isn't vectorised in Torch, one to float32 and a conversion are.
        if num_numbers == padded:
            bytes_ = positive.to(torch.int8).view(-1)
        else:
            bytes_ = torch.zeros(padded, dtype=torch.int8, device=blocks.device)
            bytes_[:num_numbers] = positive.view(-1)
        bits.copy_(bytes_.view(torch.int64).mul(GATHER_BITS).bitwise_right_shift_(56))
        store(_means(blocks, positive), header)

    def _decode_blocks(self, header: Tensor, bits: Tensor, out: Tensor) -> None:
        # As bits of float32, so that either value comes out as it is, infinite ones included.
        above, below = load(header, torch.int32).view(-1, 2, 1).unbind(1)
        mask = torch.index_select(_masks_on(out.device), 0, bits.to(torch.int32)).view(torch.int8)[: out.numel()]
        pattern = out.view(torch.int32)
        pattern.copy_(mask.view(out.shape)).bitwise_and_(above ^ below).bitwise_xor_(below)
