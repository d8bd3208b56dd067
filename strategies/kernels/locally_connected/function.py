"""Untied weights as many small dense products, one a place, over the batch (Coates et al. 2013, section 4.1)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def locally_connected2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Slide windows over images; each place has weights of its own (Coates et al. 2013, section 4.1).

    All units of a place read the same window, so a place's units are one dense matrix, and a layer is a batch of small
    matrix products.

    Args:
        x: Shape (N, C, H, W).
        weight: Shape (H', W', C', C, kernel height, kernel width).
        bias: Shape (H', W', C'), or None.
        stride: Places between two windows.

    Returns:
        Shape (N, C', H', W').

    Raises:
        ValueError: ``weight`` hasn't as many places as windows fit into ``x``, or other channels.

    Example:
        >>> import torch
        >>> locally_connected2d(torch.ones(2, 1, 6, 6), torch.ones(2, 2, 5, 1, 4, 4), stride=2).shape
        torch.Size([2, 5, 2, 2])

    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(locally_connected2d, tensors, x, weight, bias, stride)  # type: ignore[no-any-return]
    height, width, channels, in_channels, *kernel = weight.shape
    _check(x, weight, stride, "windows fit into x", *x.shape[1:])
    patches: Any = x.unfold(2, kernel[0], stride).unfold(3, kernel[1], stride)
    patches = patches.permute(2, 3, 0, 1, 4, 5).reshape(height * width, x.shape[0], in_channels * kernel[0] * kernel[1])
    result = patches @ weight.reshape(height * width, channels, -1).mT
    if bias is not None:
        result = result + bias.reshape(height * width, 1, channels)
    made: Tensor = result.reshape(height, width, x.shape[0], channels).permute(2, 3, 0, 1)
    return made


def locally_connected_transpose2d(y: Tensor, weight: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
    """The transpose of :func:`locally_connected2d`: each place adds its units' windows to an image.

    Args:
        y: Shape (N, C', H', W').
        weight: Shape (H', W', C', C, kernel height, kernel width).
        size: Height and width of the image.
        stride: Places between two windows.

    Returns:
        Shape (N, C, height, width).

    Raises:
        ValueError: ``weight`` hasn't as many places as windows fit into ``size``.

    Example:
        >>> import torch
        >>> locally_connected_transpose2d(torch.ones(2, 5, 2, 2), torch.ones(2, 2, 5, 1, 4, 4), (6, 6), 2).shape
        torch.Size([2, 1, 6, 6])

    """
    if has_torch_function((y, weight)):
        arguments = (y, weight, size, stride)
        return handle_torch_function(locally_connected_transpose2d, (y, weight), *arguments)  # type: ignore[no-any-return]
    height, width, channels, in_channels, *kernel = weight.shape
    _check(y, weight, stride, "windows fit into size", in_channels, *size)
    places: Any = y.permute(2, 3, 0, 1).reshape(height * width, y.shape[0], channels)
    patches = places @ weight.reshape(height * width, channels, -1)
    return F.fold(patches.permute(1, 2, 0), size, (kernel[0], kernel[1]), stride=stride)


def _check(x: Tensor, weight: Tensor, stride: int, what: str, in_channels: int, *size: int) -> None:
    kernel = weight.shape[4:]
    fitting = tuple((side - length) // stride + 1 for side, length in zip(size, kernel, strict=True))
    if x.ndim != 4 or weight.ndim != 6 or fitting != tuple(weight.shape[:2]) or in_channels != weight.shape[3]:
        raise ValueError(
            f"weight has {tuple(weight.shape[:2])} places of {weight.shape[3]} channels, but {fitting} {what} of "
            f"{in_channels} channels. Give the layer the image's size and channels."
        )
