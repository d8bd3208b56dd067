"""AlexNet-s and AlexNet-b: the 32-pixel forms with batch normalisation that sparse training is measured on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNormReLU, at_least, initialise_he, pooled, scaled

_CONVOLUTIONS = ((96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1))
"""Channels, kernel and padding; the stride is always 2 and takes the place of pooling."""


class AlexNetS(nn.Module):
    """AlexNet-s of Dettmers and Zettlemoyer (2019) and of SNIP: strided convolutions, batch normalisation, fc 1024.

    At 32 pixels and 10 classes it has 5.07 million weights in convolutions and linear layers.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels, at least 7.
        in_channels: Colours of the image.
        width: Multiplier of every layer's width but the last.
        num_columns: Groups of convolutions 2, 4 and 5, as in 2012; the sparse papers have one column.

    Raises:
        ValueError: ``image_size`` is too small or ``width`` isn't positive.

    Example:
        >>> AlexNetS(width=0.125).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    num_hidden = 1024

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        width: float = 1.0,
        num_columns: int = 1,
    ) -> None:
        super().__init__()
        at_least("num_columns", num_columns, 1)
        at_least("image_size", image_size, 7)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        side, channels = image_size, in_channels
        for number, (made, kernel, padding) in enumerate(_CONVOLUTIONS, start=1):
            groups = num_columns if number in (2, 4, 5) else 1
            made = scaled(made, width, num_columns)
            layer = ConvNormReLU(channels, made, kernel, stride=2, groups=groups, padding=padding)
            self.add_module(f"conv{number}", layer)
            side, channels = pooled(side, kernel, 2, padding), made
        hidden = scaled(self.num_hidden, width, num_columns)
        self.fc6 = nn.Linear(channels * side * side, hidden, bias=False)
        self.norm6 = nn.BatchNorm1d(hidden)
        self.fc7 = nn.Linear(hidden, hidden, bias=False)
        self.norm7 = nn.BatchNorm1d(hidden)
        self.fc8 = nn.Linear(hidden, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, image_size, image_size), as logits, (N, num_classes)."""
        for number in range(1, len(_CONVOLUTIONS) + 1):
            x = self.get_submodule(f"conv{number}")(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.norm6(self.fc6(x)))
        x = F.relu(self.norm7(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits


class AlexNetB(AlexNetS):
    """AlexNet-b: `AlexNetS` with hidden layers of 2048; 8.48 million weights at 32 pixels and 10 classes.

    Example:
        >>> AlexNetB(width=0.125).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    num_hidden = 2048
