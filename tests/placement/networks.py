"""Small networks that between them use every rule of placement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squall.kernels import local_response_norm


class Block(nn.Module):
    """Bottleneck with batch normalisation, squeeze-and-excite and a residual."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.GroupNorm(2, channels)
        self.squeeze = nn.Conv2d(channels, 3, 1)
        self.excite = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + y * gate.expand_as(y)


class ConcatNet(nn.Module):
    """Dense connections, channel shuffle, functional calls, odd channel counts."""

    def __init__(self, channels: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 5, stride=2, padding=2)
        self.block = Block(channels)
        self.grow = nn.Conv2d(2 * channels, 7, 3, padding=1)
        self.depthwise = nn.Conv2d(7, 14, 3, padding=1, groups=7)
        self.prelu = nn.PReLU(14)
        self.mix = nn.Conv2d(14, 8, 1)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8 * 4, 6)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = local_response_norm(self.stem(x), 3, 0.1, 0.75, 1.0, relu=True)
        x = torch.cat([x, self.block(x)], dim=1)
        x = self.prelu(self.depthwise(self.grow(x)))
        x = F.channel_shuffle(x, 2)
        x = self.mix(F.max_pool2d(x, 3, 2)) * self.scale / self.temperature
        x = F.adaptive_avg_pool2d(x, 2)
        x = x.view(x.size(0), x.shape[1] * 4)
        return self.last(torch.tanh(self.head(x)))


class Shuffle(nn.Module):
    """Channel shuffle by hand, chunks along channels, a tied transposed weight, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(4, 12, 3, padding=1, groups=2)
        self.shared = nn.Linear(12, 12)
        self.decode_bias = nn.Parameter(torch.zeros(12))
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, length = x.shape
        x = self.encode(x)
        x = x.view(n, 3, 4, length).transpose(1, 2).reshape(n, 12, length)
        first, second = x.chunk(2, dim=1)
        x = torch.cat([second, first * 2], 1).mean(-1)
        x = self.shared(torch.relu(self.shared(x)))
        x = F.linear(x, self.shared.weight.t(), self.decode_bias)
        return self.last(x) + 0.01 * self.shared.weight.norm() + self.encode.weight.square().sum()


class Volumes(nn.Module):
    """Three dimensions, transposed convolutions with and without groups, instance normalisation, padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 9, 3, padding=1, padding_mode="circular", dilation=1)
        self.norm = nn.InstanceNorm3d(9, affine=True, track_running_stats=True)
        self.up = nn.ConvTranspose3d(9, 8, 2, stride=2)
        self.up_groups = nn.ConvTranspose3d(8, 12, 2, stride=1, groups=4)
        self.last = nn.Conv3d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.silu(self.conv(x)))
        x = self.up_groups(F.leaky_relu(self.up(x)))
        x = F.pad(x, (1, 0, 0, 1))[:, :, ::2]
        return self.last(F.interpolate(x, scale_factor=0.5))


def response_norm(size: int = 5, channels: int = 9) -> nn.Module:
    """Stock response normalisation whose windows reach over every cut."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.LocalResponseNorm(size, 0.3, 0.75, 2.0), nn.Conv2d(channels, 4, 1)
    )


def dropouts() -> nn.Module:
    """Masks of split and of whole activations."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.Dropout2d(0.4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(7 * 16, 9), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(9, 5), nn.Dropout(0.2),
    )  # fmt: skip
