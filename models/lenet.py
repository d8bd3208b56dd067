"""The two LeNets that pruning papers report on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least, initialise_he, pooled, scaled


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: 20 and 50 kernels of 5 x 5, each pooled, 500 hidden units; 430,500 weights.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels, at least 16.
        in_channels: Colours of the image.
        width: Multiplier of every layer's width but the last.

    Raises:
        ValueError: ``image_size`` is too small or ``width`` isn't positive.

    Example:
        >>> LeNet5()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    """

    def __init__(self, num_classes: int = 10, image_size: int = 28, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        at_least("image_size", image_size, 16)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        c1, c2, hidden = scaled(20, width), scaled(50, width), scaled(500, width)
        side = pooled(pooled(image_size, 5, 1), 2, 2)
        side = pooled(pooled(side, 5, 1), 2, 2)
        self.conv1 = nn.Conv2d(in_channels, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.fc3 = nn.Linear(c2 * side * side, hidden)
        self.fc4 = nn.Linear(hidden, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, image_size, image_size), as logits, (N, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc4(F.relu(self.fc3(torch.flatten(x, 1))))
        return logits


class LeNet300(nn.Module):
    """LeNet-300-100: two hidden layers, no convolution; 266,200 weights.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels.
        in_channels: Colours of the image.
        width: Multiplier of the hidden layers' widths.

    Raises:
        ValueError: ``image_size`` or ``width`` isn't positive.

    Example:
        >>> LeNet300()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    """

    def __init__(self, num_classes: int = 10, image_size: int = 28, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        at_least("image_size", image_size, 1)
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        h1, h2 = scaled(300, width), scaled(100, width)
        self.fc1 = nn.Linear(in_channels * image_size * image_size, h1)
        self.fc2 = nn.Linear(h1, h2)
        self.fc3 = nn.Linear(h2, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, image_size, image_size), as logits, (N, num_classes)."""
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits
