"""Ten-crop testing: the corners and the centre of an image, and their mirror images."""

from __future__ import annotations

import torch
from torch import Tensor


def ten_crops(images: Tensor, size: int) -> Tensor:
    """Cut ten views out of each image (Krizhevsky et al. 2012, section 4.1).

    Args:
        images: Shape (N, C, H, W).
        size: Side of a view, at most H and W.

    Returns:
        Shape (N, 10, C, size, size): top left, top right, bottom left, bottom right, centre, then the five mirrored.

    Raises:
        ValueError: The images are smaller than the views.

    Example:
        >>> ten_crops(torch.zeros(2, 3, 256, 256), 224).shape
        torch.Size([2, 10, 3, 224, 224])

    """
    height, width = images.shape[-2:]
    if height < size or width < size:
        raise ValueError(f"size={size} is larger than the images, {height} x {width}; give a smaller size")
    bottom, right = height - size, width - size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    crops = [images[..., top : top + size, left : left + size] for top, left in corners]
    return torch.stack(crops + [crop.flip(-1) for crop in crops], dim=1)
