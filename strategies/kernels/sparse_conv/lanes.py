"""What lies side by side while a sparse convolution is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .sizes import Sizes

WIDTH = 16
"""Numbers in a register, or in several of a lesser instruction set; as in kernel.c."""
_CROSSING = 1.4  # what products cost more if loads don't begin where a line of the cache does
_MOVE = 0.9  # what it costs to bring a number to where it is read, or a result away, in products of a register
_FAR_BYTES = 48 << 20  # of images side by side: that many cost twice as much to move


class Lanes(NamedTuple):
    """What lies side by side: neighbours in a row of one image, or a pixel of several strips; see kernel.c.

    Args:
        num: 1 or WIDTH; some may be left over.
        images: Of a block.
        strips: Of an image.
        height: Rows of the output in a strip; the last one of an image may have fewer.

    """

    num: int
    images: int
    strips: int
    height: int


def choose_lanes(sizes: Sizes, num_live: int) -> Lanes:
    """Choose what lies side by side.

    Lanes are read in whole registers. Blocks of few images, in strips, stay nearer while they are worked on; but strips
    bring rows of their neighbours along, may not be equally high, or too few.

    Args:
        sizes: Of the convolution.
        num_live: Weights.

    Returns:
        What promises to cost least.

    """
    outputs, _, *kernel = sizes.weight
    halo = max(0, sizes.dilation[0] * (kernel[0] - 1) + 1 - sizes.stride[0]) / sizes.stride[0]

    def cost(lanes: Lanes) -> float:
        num_blocks = -(-sizes.samples // lanes.images)
        products = num_live * num_blocks * lanes.num * lanes.height * sizes.out_width / WIDTH
        read = sizes.channels * sizes.height * sizes.width * (1 + halo / lanes.height if lanes.num > 1 else 1)
        numbers = read + outputs * sizes.out_height * sizes.out_width
        if lanes.num == 1:
            return _CROSSING * products + _MOVE * numbers * sizes.samples
        far = 4 * numbers * lanes.images / _FAR_BYTES
        return products + _MOVE * (1 + far) * numbers * sizes.samples

    return min(lanes_for(sizes), key=cost)


def lanes_for(sizes: Sizes) -> Iterator[Lanes]:
    """Say what could lie side by side."""
    yield Lanes(1, 1, 1, sizes.out_height)
    for images in range(1, min(sizes.samples, WIDTH) + 1):
        height = -(-sizes.out_height // (WIDTH // images))
        yield Lanes(WIDTH, images, -(-sizes.out_height // height), height)
