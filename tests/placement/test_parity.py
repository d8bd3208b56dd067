"""A placed network computes what it computes on one device: forward, every gradient and ten steps, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

from squall import models
from tests.ranks import run, stop_all

from .networks import ConcatNet, Shuffle, Volumes, dropouts, response_norm
from .parity import TOLERANCE, check

SMALL = {
    "concat": (ConcatNet, (3, 3, 17, 19)),
    "concat_even": (partial(ConcatNet, 12), (2, 3, 16, 16)),
    "shuffle": (Shuffle, (3, 4, 5)),
    "volumes": (Volumes, (2, 2, 4, 5, 3)),
    "response_norm": (response_norm, (2, 3, 7, 5)),
    "response_norm_even_window": (partial(response_norm, 4, 10), (2, 3, 5, 5)),
    "dropouts": (dropouts, (3, 3, 6, 6)),
}
# Fresh, with 27 batch normalisations, it turns a flip of the input's last bit into 1.2e-10 of its gradients on one
# device.
SENSITIVE = {"mobilenet": 2e-9}


def evaluated(build: Callable[[], nn.Module]) -> nn.Module:
    """The same network with its running statistics, where rounding is not magnified."""
    return build().eval()


MODELS = {
    "alexnet": (partial(models.AlexNet, 10, 32, width=0.125), (3, 3, 32, 32)),
    "alexnet_one_column": (partial(models.AlexNet, 10, 28, num_columns=1, width=0.1, in_channels=1), (2, 1, 28, 28)),
    "alexnet_s": (partial(models.AlexNetS, 10, width=0.25), (8, 3, 32, 32)),
    "vgg16": (partial(models.VGG16, 10, 32, width=0.125), (2, 3, 32, 32)),
    "vgg16_batch_norm": (partial(models.VGG16, 10, 32, width=0.125, batch_norm=True), (8, 3, 32, 32)),
    "mobilenet": (partial(models.MobileNet, 10, image_size=32, width=0.25), (8, 3, 32, 32)),
    "mobilenet_evaluated": (partial(evaluated, partial(models.MobileNet, 10, 32, width=0.25)), (2, 3, 32, 32)),
    "wide_resnet": (partial(models.WideResNet, 10, widen_factor=2, dropout=0.3), (4, 3, 32, 32)),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str, num_ranks: int) -> None:
    build, shape = SMALL[name]
    run(num_ranks, check, build, shape, num_steps=3)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, num_ranks: int) -> None:
    build, shape = MODELS[name]
    tolerance = SENSITIVE.get(name, TOLERANCE)
    run(num_ranks, check, build, shape, num_steps=10 if tolerance == TOLERANCE else 0, tolerance=tolerance)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_alexnet_2012(num_ranks: int) -> None:
    """The paper's network at its full size; in two columns it sends what the paper's figure 2 shows, and no more."""
    floats = run(num_ranks, check, models.AlexNet, (1, 3, 224, 224), num_steps=10 if num_ranks == 2 else 0)
    if num_ranks == 2:
        assert floats[0] == floats[1] == {"conv3": 21632, "fc6": 4608, "fc7": 2048, "fc8": 2048}
        assert sum(floats[0].values()) == 30_336


def test_vgg16_at_full_size() -> None:
    stop_all()  # this takes 6 GB a rank
    run(2, check, models.VGG16, (1, 3, 224, 224))


def test_layout_by_hand() -> None:
    """Any layer may be kept whole, or the last one split: the function stays the same."""
    build, shape = SMALL["concat"]
    run(2, check, build, shape, {"block.*": "whole", "last": "columns"}, num_steps=3)
    run(3, check, build, shape, {"stem": "whole", "head": "whole", "grow": "whole"}, num_steps=3)
