"""The public function: checks, and the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squall.kernels.native.direct import is_direct
from squall.kernels.pairs import pair, whole

from . import op


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    weight_shape: Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Convolve with few weights, directly: work is in proportion to how many there are.

    The compiled kernel takes single precision on a CPU; elsewhere, and in other precisions, a dense convolution serves.
    Gradients by the input, the live weights and the bias are computed, and no dense one of the weight.

    Args:
        x: Shape (N, C, H, W).
        values: The live weights, shape (num_live,).
        positions: Theirs in the flat weight, ascending, int64. What is worked out about them is kept as long as the
            tensor itself: give the same one each time.
        weight_shape: (outputs, inputs of a group, kernel height, kernel width).
        bias: Shape (outputs,).
        stride: As of :func:`torch.nn.functional.conv2d`; one number, or vertical and horizontal.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        relu: Whether to end with a ReLU.

    Returns:
        Shape (N, outputs, ...).

    Raises:
        TypeError: ``groups`` isn't a whole number.
        ValueError: A shape or data type is another, positions don't ascend, or the kernel is larger than the padded
            image.

    Example:
        >>> weight = torch.zeros(8, 4, 3, 3)
        >>> weight[0, 0, 1, 1] = 2.0
        >>> positions = weight.flatten().nonzero().squeeze(1)
        >>> x = torch.ones(1, 4, 5, 5)
        >>> sparse_conv2d(x, weight.flatten()[positions], positions, weight.shape, padding=1)[0, 0, 0, 0]
        tensor(2.)

    """
    shape, groups = [int(size) for size in weight_shape], whole("groups", groups)
    pairs = {
        name: pair(name, value) for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    }
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be images, (N, C, H, W), of floating-point numbers, got {x.dtype} {tuple(x.shape)}")
    if len(shape) != 4 or groups < 1 or shape[0] % groups or x.shape[1] != shape[1] * groups:
        raise ValueError(
            f"weight_shape={tuple(shape)} with groups={groups} doesn't fit x of {x.shape[1]} channels: it must be "
            "(outputs, channels / groups, height, width), and groups divide the outputs"
        )
    if values.shape != positions.shape or values.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"values and positions must be flat and equally long, positions int64, got {tuple(values.shape)} and "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    if values.dtype != x.dtype or values.device != x.device or positions.device != x.device:
        raise ValueError(
            f"values must be {x.dtype} and on {x.device} like x, positions too, got {values.dtype} on {values.device}"
            f" and {positions.device}"
        )
    if bias is not None and (bias.shape != (shape[0],) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {shape[0]} numbers of {x.dtype}, got {bias.dtype} {tuple(bias.shape)}")
    if min(pairs["stride"]) < 1 or min(pairs["dilation"]) < 1 or min(pairs["padding"]) < 0:
        raise ValueError(f"stride and dilation must be at least 1, padding at least 0, got {pairs}")
    sizes = op.sizes_of(tuple(x.shape), shape, pairs["stride"], pairs["padding"], pairs["dilation"], groups)
    if sizes.out_height < 1 or sizes.out_width < 1:
        raise ValueError(f"the kernel, {shape[2]} x {shape[3]}, is larger than x, {x.shape[2]} x {x.shape[3]}, padded")
    if is_direct(x, values, positions, bias):
        return op.convolve(x, values, positions, bias, sizes, bool(relu))
    result: Tensor = op.sparse_conv2d(
        x, values, positions, bias, shape, pairs["stride"], pairs["padding"], pairs["dilation"], groups, relu
    )
    return result
