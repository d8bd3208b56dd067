"""AlexNet as published in 2012, its columns being groups, and the same net for small images."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LocalResponseNorm, at_least, initialise_he, pooled, scaled

_STEMS = ((64, (5, 1, 2)), (128, (7, 2, 3)))
"""Kernel, stride and padding of the first layer for images below a size; from 128 pixels on it's the paper's."""
_PAPER_STEM = (11, 4, 2)


class AlexNet(nn.Module):
    """The network of Krizhevsky, Sutskever and Hinton (2012, section 3), in ``num_columns`` columns.

    Convolutions 2, 4 and 5 read their own column only (``groups``), and so does response normalisation; convolution 3
    and the fully connected layers read all. With the defaults there are 60,954,656 weights and 10,568 biases. The
    paper's 224 pixels and its 55 x 55 maps agree when the image is padded by 2.

    Below 128 pixels the first layer has a smaller kernel and stride (7/2 from 64 pixels on, else 5/1); everything else
    stays. The paper's initialisation barely starts to learn there, so "he" is the default for those.

    Args:
        num_classes: Outputs.
        image_size: Side of the image in pixels, at least 15.
        num_columns: Groups of convolutions 2, 4, 5 and of the normalisation. Widths are rounded to multiples of it.
        width: Multiplier of every layer's width but the last.
        in_channels: Colours of the image.
        dropout: Probability of dropping a unit of fc6 and fc7.
        init: "paper": weights N(0, 0.01^2), biases 1 in conv2, conv4, conv5, fc6, fc7 and 0 elsewhere (section 5).
            "he": weights N(0, 2 / fan-in), biases 0. None: the paper's from 128 pixels on, else "he".

    Raises:
        ValueError: ``image_size`` is too small, ``width`` isn't positive, ``init`` is unknown.

    Example:
        >>> net = AlexNet(num_classes=10, image_size=28, width=0.25, in_channels=1)
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self,
        num_classes: int = 1000,
        image_size: int = 224,
        num_columns: int = 2,
        width: float = 1.0,
        in_channels: int = 3,
        dropout: float = 0.5,
        init: Literal["paper", "he"] | None = None,
    ) -> None:
        super().__init__()
        at_least("num_columns", num_columns, 1)
        at_least("image_size", image_size, 15)
        if init not in ("paper", "he", None):
            raise ValueError(f'init must be "paper", "he" or None, got {init!r}')
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, in_channels
        self.num_columns = num_columns
        c1, c2, c3, c4, c5, f6, f7 = (
            scaled(channels, width, num_columns) for channels in (96, 256, 384, 384, 256, 4096, 4096)
        )
        kernel, stride, padding = next((stem for below, stem in _STEMS if image_size < below), _PAPER_STEM)
        side = pooled(image_size, kernel, stride, padding)
        for _ in range(3):
            side = pooled(side, 3, 2)

        self.conv1 = nn.Conv2d(in_channels, c1, kernel, stride, padding)
        self.norm1 = LocalResponseNorm(groups=num_columns, relu=True)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=num_columns)
        self.norm2 = LocalResponseNorm(groups=num_columns, relu=True)
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, groups=num_columns)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1, groups=num_columns)
        self.pool5 = nn.MaxPool2d(3, 2)
        self.fc6 = nn.Linear(c5 * side * side, f6)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(f6, f7)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = nn.Linear(f7, num_classes)
        self.init = init or ("paper" if image_size >= _STEMS[-1][0] else "he")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as ``init`` says."""
        if self.conv1.weight.is_meta:
            return  # there is nothing to draw, and torch would take longer over that than over all the rest
        if self.init == "he":
            initialise_he(self)
            return
        for name, layer in self.named_children():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, float(name in ("conv2", "conv4", "conv5", "fc6", "fc7")))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Shape (N, in_channels, image_size, image_size).

        Returns:
            Logits, shape (N, num_classes).

        """
        x = self.pool1(self.norm1(self.conv1(x)))
        x = self.pool2(self.norm2(self.conv2(x)))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = self.pool5(F.relu(self.conv5(x)))
        x = torch.flatten(x, 1)
        x = self.drop6(F.relu(self.fc6(x)))
        x = self.drop7(F.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits
