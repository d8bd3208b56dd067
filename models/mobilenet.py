"""MobileNet, first version: depthwise and pointwise convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNormReLU, at_least, initialise_he, scaled

_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Channels of each pointwise convolution and stride of the depthwise one before it."""


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017, table 1): a convolution, 13 depthwise-pointwise pairs, mean, linear layer.

    With the defaults there are 4,231,976 parameters. Below 64 pixels the first convolution has stride 1, so that the
    deep pairs still see an image.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels.
        in_channels: Colours of the image.
        width: The paper's width multiplier alpha.

    Raises:
        ValueError: ``image_size`` or ``width`` isn't positive.

    Example:
        >>> MobileNet(num_classes=10, image_size=32, width=0.25).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self, num_classes: int = 1000, image_size: int = 224, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        at_least("image_size", image_size, 1)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        channels = scaled(32, width)
        self.conv1 = ConvNormReLU(in_channels, channels, stride=2 if image_size >= 64 else 1)
        self.pairs = nn.Sequential()
        for number, (made, stride) in enumerate(_PAIRS, start=1):
            made = scaled(made, width)
            self.pairs.add_module(f"depthwise{number}", ConvNormReLU(channels, channels, 3, stride, groups=channels))
            self.pairs.add_module(f"pointwise{number}", ConvNormReLU(channels, made, 1))
            channels = made
        self.fc = nn.Linear(channels, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, H, W), as logits, (N, num_classes)."""
        x = self.pairs(self.conv1(x))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
