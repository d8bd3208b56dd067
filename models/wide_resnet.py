"""Wide residual networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import at_least, initialise_he, scaled


class _Block(nn.Module):
    """Normalise, rectify, convolve, twice, and add what came in; the shortcut is 1 x 1 where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        # Where the shape changes the shortcut reads the normalised activity, as in the authors' code.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.drop(F.relu(self.norm2(self.conv1(y))))
        total: Tensor = self.conv2(y) + shortcut
        return total


class WideResNet(nn.Module):
    """WRN-depth-widen_factor (Zagoruyko and Komodakis 2016) with dropout between a block's convolutions.

    Args:
        depth: Convolutions along the path, 6 n + 4: 10, 16, 22, 28, 40.
        widen_factor: Multiplier of the three groups' 16, 32 and 64 channels.
        num_classes: Outputs.
        image_size: Side of the image in pixels; the mean over it is taken, so any size works.
        in_channels: Colours of the image.
        dropout: Probability of dropping an activity; 0.3 in the sparse-momentum paper.

    Raises:
        ValueError: ``depth`` isn't 6 n + 4, or another argument isn't positive.

    Example:
        >>> WideResNet(depth=10, widen_factor=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self,
        depth: int = 16,
        widen_factor: float = 8,
        num_classes: int = 10,
        image_size: int = 32,
        in_channels: int = 3,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        at_least("image_size", image_size, 1)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n at least 1 (10, 16, 22, 28, ...), got {depth}")
        if widen_factor <= 0:
            raise ValueError(f"widen_factor must be positive, got {widen_factor}")
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels = 16
        for number, base in enumerate((16, 32, 64), start=1):
            group = nn.Sequential()
            made = scaled(base, widen_factor)
            for index in range((depth - 4) // 6):
                stride = 2 if number > 1 and index == 0 else 1
                group.append(_Block(channels, made, stride, dropout))
                channels = made
            self.add_module(f"group{number}", group)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, H, W), as logits, (N, num_classes)."""
        x = self.conv1(x)
        for number in (1, 2, 3):
            x = self.get_submodule(f"group{number}")(x)
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1)
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits
