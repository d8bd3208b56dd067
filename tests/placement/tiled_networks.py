"""Small networks that between them use every rule for tiles."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squall.kernels import locally_connected_transpose2d
from squall.models import LocallyConnected2d, LocallyConnectedAutoencoder
from squall.placement import make_grid, place_tiles, plan_tiles

from .parity import assert_close, world_columns


class Halved(nn.AvgPool2d):
    """A pooling of a user's own."""

    def __init__(self) -> None:
        super().__init__(2)


class Pools(nn.Module):
    """Every pooling, with padding, ceil_mode, dilation and odd strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding="same", dilation=(2, 1))
        self.even = nn.Conv2d(4, 4, (4, 2), padding="same")
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
                nn.MaxPool2d((2, 3), (3, 1), dilation=(2, 1)),
                nn.MaxPool2d(2),
                Halved(),
                nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
                nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
                nn.AvgPool2d((3, 2), 2, padding=(1, 0), divisor_override=4),
                nn.AdaptiveAvgPool2d((5, 3)),
                nn.AdaptiveMaxPool2d((3, None)),
                nn.AdaptiveAvgPool2d(1),
                nn.LPPool2d(2, 3),
                nn.Identity(),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.even(torch.tanh(self.stem(x)))
        return torch.stack([pool(x).mean((2, 3)) * (1 + place) for place, pool in enumerate(self.pools)], 1)


class Padded(nn.Module):
    """Padding of all kinds, by layers and by hand, and a kernel larger than a tile."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.large = nn.Conv2d(4, 4, 9, padding=6, stride=2, groups=2)
        self.sparse = nn.Conv2d(4, 5, 2, stride=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(torch.sigmoid(self.reflect(x)), (1, 2, 3, 0), value=0.3)
        x = F.pad(self.circular(x), (0, -1, -2, 1)).mul_(2)
        return self.sparse(torch.tanh(self.large(x)))


class ShortMaps(nn.Module):
    """Maps of fewer rows than ranks, and images of the batch that must not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(5, momentum=None)
        self.second = nn.Conv2d(5, 6, 3, padding=1, stride=2)
        self.group_norm = nn.GroupNorm(2, 6)
        self.third = nn.Conv2d(6, 4, 3, padding=2, stride=2, bias=False)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True)
        self.last = nn.Linear(4 * 3 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.leaky_relu(self.group_norm(F.relu(self.second(x), inplace=True)))
        return self.last(self.instance_norm(self.third(x)).flatten(1))


class Directions(nn.Module):
    """Lengths over dimensions that are split, and over others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.normalize(x, dim=(0, 1)) + F.normalize(x, dim=(1, 2, 3))  # type: ignore[arg-type]


class Encoder(nn.Module):
    """Down and up again, with a loss over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 3, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.gelu(self.norm(self.down(x))))
        return self.out(y) * self.scale - x.mean(1, keepdim=True) + x.amax((2, 3), keepdim=True)


def gradient_penalty(tiles: tuple[int, int]) -> None:
    """A loss of gradients, as critics are trained with; run on every rank."""
    torch.manual_seed(3)
    alone = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(4), nn.AvgPool2d(3, 2), nn.Conv2d(4, 3, 3),
        nn.Flatten(), nn.Linear(3 * 2 * 2, 1),
    ).double()  # fmt: skip
    tiled = copy.deepcopy(alone)
    grid = make_grid(world_columns(), *tiles, 1, "cpu")
    place_tiles(tiled, plan_tiles(tiled, grid), grid)
    images = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    for net in (alone, tiled):
        x = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
        grad.square().sum().backward()
    for (name, expected), actual in zip(alone.named_parameters(), tiled.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        if expected.grad is not None:
            assert_close(actual.grad, expected.grad, name)


class Untied(nn.Module):
    """Locally connected layers between ordinary ones, and their transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LocallyConnected2d(2, 3, (13, 11), 4, stride=2)
        self.second = nn.Conv2d(3, 4, 3, padding=1)
        self.third = LocallyConnected2d(4, 2, (5, 4), 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.third(torch.tanh(self.second(self.first(x)))))
        back = locally_connected_transpose2d(y, self.third.weight, (5, 4))
        return y.mean((2, 3)).sum(1, keepdim=True) + F.softplus(back).flatten(1)


class Autoencoder(nn.Module):
    """The objective of the paper's network, and its features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LocallyConnectedAutoencoder(image_size=15, num_filters=3, kernel_size=5)

    def forward(self, x: Tensor) -> Tensor:
        error, activity = self.net.loss(x)
        return self.net(x).flatten(1) + 10 * error + activity
