"""What several networks share: response normalisation as a module, initialisation, widths and sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from squall.kernels import local_response_norm


class LocalResponseNorm(nn.Module):
    """Local response normalisation within each of ``groups`` groups of channels (Krizhevsky et al. 2012, section 3.3).

    Args:
        size: Channels in the window.
        alpha: Factor of the mean square over the window; like Torch, and like the 2012 code, it's divided by ``size``.
        beta: Exponent.
        k: What is added to the mean square.
        groups: Groups of channels that are normalised apart: the columns.
        relu: Normalise ``relu(x)``, in fewer passes over memory than a ReLU before this takes.

    Example:
        >>> import torch
        >>> LocalResponseNorm(groups=2)(torch.ones(1, 96, 55, 55)).shape
        torch.Size([1, 96, 55, 55])

    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.groups, self.relu = size, alpha, beta, k, groups, relu

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, shape (N, C, ...); the shape stays."""
        result: Tensor = local_response_norm(x, self.size, self.alpha, self.beta, self.k, self.groups, self.relu)
        return result

    def extra_repr(self) -> str:
        """Show the constants as `torch.nn.LocalResponseNorm` does, and the groups."""
        relu = ", relu=True" if self.relu else ""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, groups={self.groups}{relu}"


def scaled(channels: int, width: float, divisor: int = 1) -> int:
    """Scale a layer's width and round it to a multiple of ``divisor``, at least one multiple.

    Args:
        channels: The published width.
        width: The multiplier.
        divisor: What the result has to be a multiple of, such as the number of columns.

    Raises:
        ValueError: ``width`` isn't positive.

    """
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    return max(1, round(channels * width / divisor)) * divisor


def pooled(size: int, kernel: int, stride: int, padding: int = 0) -> int:
    """Side of what a convolution or pooling makes of an image of side ``size``; may be 0 or less if it doesn't fit."""
    return (size + 2 * padding - kernel) // stride + 1


def at_least(name: str, value: int, smallest: int) -> None:
    """Raise a ValueError that names the argument if an image or a count is too small.

    Args:
        name: The argument.
        value: Its value.
        smallest: The smallest value that works.

    """
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}")


def initialise_he(module: nn.Module) -> None:
    """Initialise for rectifiers: N(0, 2 / fan-in) (He et al. 2015), biases 0, batch normalisation 1 and 0.

    Args:
        module: Changed in place, with everything in it.

    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ConvNormReLU(nn.Module):
    """Convolution, batch normalisation, rectifier.

    Args:
        in_channels: Channels read.
        out_channels: Channels made.
        kernel_size: Side of the kernel, odd; the image is padded by half of it unless ``padding`` says otherwise.
        stride: Stride.
        groups: Groups of the convolution.
        padding: Padding, None for half the kernel.
        batch_norm: Whether to normalise; without it the convolution has a bias.

    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=not batch_norm
        )
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return F.relu(self.norm(self.conv(x)))
