"""A network in tiles computes what it computes on one device: forward, every gradient and some steps, in float64."""

from __future__ import annotations

from functools import partial

import pytest

from squall import models
from tests.ranks import run

from .networks import ConcatNet, Shuffle, dropouts, response_norm
from .parity import check
from .tiled_networks import Autoencoder, Directions, Encoder, Padded, Pools, ShortMaps, Untied, gradient_penalty

GRIDS = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)]
SMALL = {
    "concat": (ConcatNet, (3, 3, 17, 19)),
    "shuffle": (Shuffle, (3, 4, 5)),
    "response_norm": (response_norm, (2, 3, 7, 5)),
    "dropouts": (dropouts, (3, 3, 6, 6)),
    "pools": (Pools, (2, 3, 23, 19)),
    "padded": (Padded, (2, 3, 13, 11)),
    "short_maps": (ShortMaps, (3, 3, 13, 9)),
    "directions": (Directions, (2, 3, 7, 6)),
    "encoder": (Encoder, (2, 3, 16, 12)),
    "untied": (Untied, (3, 2, 13, 11)),
    "autoencoder": (Autoencoder, (2, 1, 15, 15)),
}
MODELS = {
    "alexnet": (partial(models.AlexNet, 10, 32, width=0.125), (3, 3, 32, 32)),
    "vgg16_batch_norm": (partial(models.VGG16, 10, 32, width=0.125, batch_norm=True), (8, 3, 32, 32)),
    "wide_resnet": (partial(models.WideResNet, 10, widen_factor=2, dropout=0.3), (4, 3, 32, 32)),
    "mobilenet": (partial(models.MobileNet, 10, image_size=32, width=0.25), (8, 3, 32, 32)),
}


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str, grid: tuple[int, int]) -> None:
    build, shape = SMALL[name]
    if name == "shuffle" and grid[1] > 1:
        pytest.skip("one dimension of places can't be cut in two")
    run(grid[0] * grid[1], check, build, shape, num_steps=3, tiles=grid)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, grid: tuple[int, int]) -> None:
    build, shape = MODELS[name]
    tolerance = 2e-9 if name == "mobilenet" else 1e-10
    run(
        grid[0] * grid[1],
        check,
        build,
        shape,
        num_steps=3 if tolerance == 1e-10 else 0,
        tiles=grid,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("grid", GRIDS[1:], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("size", [224, 227])
def test_alexnet_2012(size: int, grid: tuple[int, int]) -> None:
    """55 and 56 rows on up to 4 ranks, windows of 11 in steps of 4."""
    run(grid[0] * grid[1], check, partial(models.AlexNet, 10, size, width=0.25), (1, 3, size, size), tiles=grid)


def test_alexnet_2012_at_full_width() -> None:
    run(2, check, models.AlexNet, (1, 3, 224, 224), tiles=(2, 1))


@pytest.mark.parametrize("grid", GRIDS[1:], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_vgg16(grid: tuple[int, int]) -> None:
    run(grid[0] * grid[1], check, partial(models.VGG16, 10, 224, width=0.0625), (1, 3, 224, 224), tiles=grid)


@pytest.mark.parametrize("grid", [(2, 1), (2, 2)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_gradients_of_gradients(grid: tuple[int, int]) -> None:
    run(grid[0] * grid[1], gradient_penalty, grid)


def test_layout_by_hand() -> None:
    """A layer may be kept whole: the function stays the same, and what follows is cut again."""
    build, shape = SMALL["concat"]
    run(2, check, build, shape, {"block.conv1": "whole", "grow": "whole"}, num_steps=3, tiles=(2, 1))
