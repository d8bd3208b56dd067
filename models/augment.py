"""Random changes to training images: crops, mirrors, shifts, and lighting along the principal colours.

Each works on one image, (C, H, W), or a batch, (N, C, H, W), of which every image gets its own draw, and draws from
Torch's default generator only, so that equal seeds make equal images whoever loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def _batched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function of a batch take a single image too."""

    @wraps(function)
    def either(images: Tensor, *args: object, **kwargs: object) -> Tensor:
        if images.ndim == 3:
            return function(images.unsqueeze(0), *args, **kwargs).squeeze(0)
        return function(images, *args, **kwargs)

    return either


@_batched
def random_crop(images: Tensor, size: int) -> Tensor:
    """Cut a square at a random place out of each image (Krizhevsky et al. 2012, section 4.1: 224 out of 256).

    Args:
        images: Shape (N, C, H, W) or (C, H, W).
        size: Side of the square.

    Returns:
        Shape (N, C, size, size) or (C, size, size).

    Raises:
        ValueError: An image is smaller than the square.

    Example:
        >>> random_crop(torch.zeros(8, 3, 256, 256), 224).shape
        torch.Size([8, 3, 224, 224])

    """
    num_images, _, height, width = images.shape
    if height < size or width < size:
        raise ValueError(f"size={size} is larger than the images, {height} x {width}; give a smaller size")
    rows = torch.randint(height - size + 1, (num_images, 1)) + torch.arange(size)
    columns = torch.randint(width - size + 1, (num_images, 1)) + torch.arange(size)
    if num_images == 1:  # a slice is no copy
        top, left = int(rows[0, 0]), int(columns[0, 0])
        return images[..., top : top + size, left : left + size]
    number = torch.arange(num_images)[:, None, None]
    return images[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@_batched
def random_flip(images: Tensor) -> Tensor:
    """Mirror each image, left and right, with probability 1/2.

    Args:
        images: Shape (N, C, H, W) or (C, H, W); so is the result.

    Example:
        >>> random_flip(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])

    """
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


@_batched
def random_shift(images: Tensor, max_shift: int) -> Tensor:
    """Shift each image by up to ``max_shift`` pixels in both directions; what comes in is 0.

    Args:
        images: Shape (N, C, H, W), square, or (C, H, W); so is the result.
        max_shift: Largest shift.

    Example:
        >>> random_shift(torch.zeros(8, 1, 28, 28), 2).shape
        torch.Size([8, 1, 28, 28])

    """
    return random_crop(F.pad(images, (max_shift,) * 4), images.shape[-1])


@_batched
def pca_noise(images: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, std: float = 0.1) -> Tensor:
    """Change each image's lighting along the principal colours (Krizhevsky et al. 2012, section 4.1).

    To every pixel of an image the same ``eigenvectors @ (a * eigenvalues)`` is added, with a drawn from N(0, std^2).

    Args:
        images: Shape (N, C, H, W) or (C, H, W), values from 0 to 1; so is the result, which isn't clipped.
        eigenvalues: Of the colours' covariance, shape (C,), of values from 0 to 1: on 0 to 255 the paper's product
            would drown the image.
        eigenvectors: The columns are the principal colours, shape (C, C).
        std: Standard deviation of the factors.

    Example:
        >>> values, vectors = principal_colours(torch.rand(4, 3, 8, 8))
        >>> pca_noise(torch.zeros(8, 3, 32, 32), values, vectors).shape
        torch.Size([8, 3, 32, 32])

    """
    factors = torch.randn(len(images), len(eigenvalues)) * std
    colours = (factors * eigenvalues) @ eigenvectors.T
    return images + colours[:, :, None, None]


def principal_colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues and eigenvectors of the colours' covariance over all pixels.

    Args:
        images: Shape (N, C, H, W), values from 0 to 1.

    Returns:
        Eigenvalues, shape (C,), ascending, and eigenvectors as columns, shape (C, C).

    Example:
        >>> principal_colours(torch.rand(4, 3, 8, 8))[1].shape
        torch.Size([3, 3])

    """
    pixels = images.transpose(0, 1).flatten(1).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(pixels, correction=0))
    return eigenvalues.float(), eigenvectors.float()
