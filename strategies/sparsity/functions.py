"""What sparse algorithms are made of: which weights go, how many come to which layer, and which come.

A *prune* function gets a layer and how many weights must go, and returns the mask without them. A *redistribute*
function gets all layers, before any has been pruned, and how many weights each will lose, and returns how many each
gets. A *grow* function gets a layer and how many weights must come, and returns the mask with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import Layer, largest, smallest
from .registry import Registry, reads

Prune = Callable[[Layer, int], Tensor]
Redistribute = Callable[[Sequence[Layer], Sequence[int]], Sequence[int]]
Grow = Callable[[Layer, int], Tensor]

prunes: Registry[Prune] = Registry("prune")
redistributions: Registry[Redistribute] = Registry("redistribute")
grows: Registry[Grow] = Registry("grow")

_FULL = 0.99
_MAX_ROUNDS = 1000


# ------------------------------------------------------------------ prune


@prunes.register("magnitude")
def prune_magnitude(layer: Layer, num: int) -> Tensor:
    """Drop the live weights of smallest magnitude."""
    return layer.mask & ~smallest(layer.weight.abs(), layer.mask, num)


@prunes.register("sign_magnitude")
def prune_sign_magnitude(layer: Layer, num: int) -> Tensor:
    """Drop the smallest positive and the largest negative weights, of each sign in proportion (SET).

    Complex weights have no sign, and go by magnitude.
    """
    if layer.weight.is_complex():
        return prune_magnitude(layer, num)
    positive = layer.mask & (layer.weight >= 0)
    num_positive = round(num * int(positive.sum()) / max(1, layer.num_live))
    gone = smallest(layer.weight, positive, num_positive)
    return layer.mask & ~gone & ~largest(layer.weight, layer.mask & ~positive, num - num_positive)


# ------------------------------------------------------------------ redistribute


@redistributions.register("none")
def redistribute_none(layers: Sequence[Layer], num_pruned: Sequence[int]) -> Sequence[int]:
    """Each layer gets what it loses."""
    return num_pruned


@redistributions.register("momentum")
@reads("momentum")
def redistribute_momentum(layers: Sequence[Layer], num_pruned: Sequence[int]) -> Sequence[int]:
    """By the mean magnitude of the live weights' momentum (Dettmers and Zettlemoyer 2019)."""
    return apportion(sum(num_pruned), momentum_shares(layers), _room(layers, num_pruned))


@redistributions.register("magnitude")
def redistribute_magnitude(layers: Sequence[Layer], num_pruned: Sequence[int]) -> Sequence[int]:
    """By the mean magnitude of the live weights."""
    shares = _normalised([_mean_magnitude(layer.weight, layer.mask) for layer in layers])
    return apportion(sum(num_pruned), shares, _room(layers, num_pruned))


@redistributions.register("nonzeros")
def redistribute_nonzeros(layers: Sequence[Layer], num_pruned: Sequence[int]) -> Sequence[int]:
    """By the number of live weights."""
    shares = _normalised([float(layer.num_live) for layer in layers])
    return apportion(sum(num_pruned), shares, _room(layers, num_pruned))


def momentum_shares(layers: Sequence[Layer]) -> list[float]:
    """Each layer's part of the momentum, which is the mean magnitude over its live weights.

    Args:
        layers: With their ``momentum``.

    Returns:
        Numbers that sum to 1; equal ones where nothing moves.

    """
    return _normalised([_mean_magnitude(layer.momentum, layer.mask) for layer in layers])


def apportion(total: int, shares: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Deal out a number of weights by shares; what a full layer can't take goes to the others.

    As in the code of Dettmers and Zettlemoyer (2019), a layer takes 99 % of its room at most, and what is too much is
    spread over all layers evenly, and again. Unlike there, the numbers sum to the total: none gets lost in rounding.

    Args:
        total: How many.
        shares: Of each layer; they sum to 1.
        capacities: How many each layer has room for.

    Returns:
        How many each layer gets.

    Raises:
        ValueError: The layers have no room for so many.

    Example:
        >>> apportion(10, [0.8, 0.2], [100, 100]), apportion(10, [0.8, 0.2], [4, 100])
        ([8, 2], [4, 6])

    """
    if total > sum(capacities):
        raise ValueError(f"{total} weights can't be grown where there is room for {sum(capacities)}")
    limits = [_FULL * capacity for capacity in capacities]
    wanted = [share * total for share in shares]
    for _ in range(_MAX_ROUNDS):
        excess = sum(max(0.0, want - limit) for want, limit in zip(wanted, limits, strict=True))
        wanted = [min(want, limit) for want, limit in zip(wanted, limits, strict=True)]
        if excess <= 1e-9 * total:
            break
        wanted = [want + excess / len(wanted) for want in wanted]
    # Whole numbers: round down, then up where most is missing, and only then beyond what each was to get.
    numbers = [min(math.floor(want + 1e-9), room) for want, room in zip(wanted, capacities, strict=True)]
    while (rest := total - sum(numbers)) > 0:
        takers = [index for index, room in enumerate(capacities) if numbers[index] < room]
        takers.sort(key=lambda index: numbers[index] - wanted[index])
        for index in takers[:rest]:
            numbers[index] += 1
    return numbers


def _room(layers: Sequence[Layer], num_pruned: Sequence[int]) -> list[int]:
    return [layer.num_dead + num for layer, num in zip(layers, num_pruned, strict=True)]


def _mean_magnitude(values: Tensor, mask: Tensor) -> float:
    live = values.detach()[mask].abs().double()
    return float(live.mean()) if live.numel() else 0.0


def _normalised(statistics: list[float]) -> list[float]:
    total = sum(statistics)
    if not math.isfinite(total) or total <= 0:
        return [1 / len(statistics)] * len(statistics)
    return [value / total for value in statistics]


# ------------------------------------------------------------------ grow


@grows.register("random")
def grow_random(layer: Layer, num: int) -> Tensor:
    """Wake dead weights at random."""
    score = torch.rand(layer.mask.shape, generator=layer.generator, dtype=torch.float64)
    return layer.mask | smallest(score.to(layer.mask.device), ~layer.mask, num)


@grows.register("momentum")
@reads("momentum")
def grow_momentum(layer: Layer, num: int) -> Tensor:
    """Wake the dead weights whose momentum is largest."""
    return layer.mask | largest(layer.momentum.abs(), ~layer.mask, num)


@grows.register("gradient")
@reads("gradient")
def grow_gradient(layer: Layer, num: int) -> Tensor:
    """Wake the dead weights whose gradient is largest (RigL)."""
    return layer.mask | largest(layer.gradient.abs(), ~layer.mask, num)
