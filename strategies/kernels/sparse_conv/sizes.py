"""The sizes of a convolution."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """The sizes of a convolution.

    Args:
        samples: N.
        channels: Of the input, all groups.
        height: Of the input.
        width: Of the input.
        weight: Shape of the weight, (outputs, inputs of a group, kernel height, kernel width).
        stride: Vertical and horizontal.
        padding: Likewise; may be negative, which crops.
        dilation: Likewise.
        groups: Groups of channels.
        out_height: Of the output.
        out_width: Of the output.

    """

    samples: int
    channels: int
    height: int
    width: int
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    out_height: int
    out_width: int
