"""VGG-16 for 224 pixels, and the 32-pixel forms C, D and like that sparse training is measured on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNormReLU, at_least, initialise_he, scaled

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each block; a pooling ends a block."""


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman 2015, configuration D): 13 convolutions in five blocks, three linear layers.

    With the defaults there are 138,357,544 parameters. Pooling rounds up, so that images whose side isn't a multiple of
    32 work; where it is, nothing differs.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels, at least 8.
        in_channels: Colours of the image.
        batch_norm: Whether a batch normalisation follows each convolution.
        width: Multiplier of every layer's width but the last.
        num_hidden: Units of the two hidden linear layers before ``width``. None: 4096 from 128 pixels on, else 512.
        dropout: Probability of dropping a hidden unit.

    Raises:
        ValueError: ``image_size`` is too small or ``width`` isn't positive.

    Example:
        >>> VGG16(num_classes=10, image_size=32, width=0.125)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        batch_norm: bool = False,
        width: float = 1.0,
        num_hidden: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        at_least("image_size", image_size, 8)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        self.features, num_features = _features(image_size, in_channels, width, batch_norm, last_kernel=3)
        if num_hidden is None:
            num_hidden = 4096 if image_size >= 128 else 512
        hidden = scaled(num_hidden, width)
        self.fc6 = nn.Linear(num_features, hidden)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(hidden, hidden)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = nn.Linear(hidden, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, image_size, image_size), as logits, (N, num_classes)."""
        x = torch.flatten(self.features(x), 1)
        x = self.drop6(F.relu(self.fc6(x)))
        x = self.drop7(F.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits


class VGGD(nn.Module):
    """VGG-D of SNIP and of Dettmers and Zettlemoyer (2019): VGG-16 for 32 pixels with normalisation for dropout.

    Two hidden layers of 512, each normalised after its rectifier. At 32 pixels and 10 classes: 15.24 million weights.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels, at least 8.
        in_channels: Colours of the image.
        width: Multiplier of every layer's width but the last.

    Raises:
        ValueError: ``image_size`` is too small or ``width`` isn't positive.

    Example:
        >>> VGGD(width=0.125).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    last_kernel = 3
    num_hidden_layers = 2

    def __init__(self, num_classes: int = 10, image_size: int = 32, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        at_least("image_size", image_size, 8)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        self.features, num_features = _features(image_size, in_channels, width, True, self.last_kernel)
        hidden = scaled(512, width)
        layers: list[nn.Module] = []
        for _ in range(self.num_hidden_layers):
            layers += [nn.Linear(num_features, hidden), nn.ReLU(), nn.BatchNorm1d(hidden)]
            num_features = hidden
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden, num_classes))
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, image_size, image_size), as logits, (N, num_classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


class VGGC(VGGD):
    """VGG-C: `VGGD` whose third convolution in each block of three is 1 x 1; 10.52 million weights.

    The sparse-momentum code pads these by 1 as if they were 3 x 3, which makes its maps grow; here they don't.

    Example:
        >>> VGGC(width=0.125).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    last_kernel = 1


class VGGLike(VGGD):
    """VGG-like: `VGGD` with one hidden layer of 512; 14.98 million weights.

    Example:
        >>> VGGLike(width=0.125).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    num_hidden_layers = 1


def _features(
    image_size: int, in_channels: int, width: float, batch_norm: bool, last_kernel: int
) -> tuple[nn.Sequential, int]:
    """Build the five blocks; ``last_kernel`` is the kernel of the third convolution where a block has three.

    Returns:
        The blocks, and how many features an image has after them.

    """
    blocks = nn.Sequential()
    for number, (channels, num_convolutions) in enumerate(_BLOCKS, start=1):
        channels = scaled(channels, width)
        for index in range(1, num_convolutions + 1):
            kernel = last_kernel if index == 3 else 3
            layer = ConvNormReLU(in_channels, channels, kernel, batch_norm=batch_norm)
            blocks.add_module(f"conv{number}_{index}", layer)
            in_channels = channels
        blocks.add_module(f"pool{number}", nn.MaxPool2d(2, 2, ceil_mode=True))
        image_size = -(-image_size // 2)
    return blocks, in_channels * image_size * image_size
