"""How dense each layer is at the start, and which of its weights live."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .layers import largest, num_kept

Shape = Sequence[int]
Masks = dict[str, Tensor]


def uniform(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """The same density in every layer.

    Args:
        shapes: Of the weights, by name.
        density: Of all layers together.

    """
    return dict.fromkeys(shapes, density)


def erk(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """Erdős-Rényi kernels: a layer's live weights grow with the sum of its dimensions, not with their product.

    Mocanu et al. (2018) for matrices, Evci et al. (2020, section 3) for kernels: the density is proportional to
    (n_in + n_out + w + h) / (n_in n_out w h). Layers for which that is above 1 are dense, and the others sparser.

    Args:
        shapes: Of the weights, by name.
        density: Of all layers together.

    Example:
        >>> {name: round(value, 3) for name, value in erk({"wide": (100, 100), "narrow": (10, 10)}, 0.1).items()}
        {'wide': 0.092, 'narrow': 0.918}

    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    dense: set[str] = set()
    while len(dense) < len(shapes):
        left = [name for name in shapes if name not in dense]
        scale = (budget - sum(sizes[name] for name in dense)) / sum(sum(shapes[name]) for name in left)
        over = {name for name in left if scale * sum(shapes[name]) / sizes[name] >= 1.0}
        if not over:
            return {n: 1.0 if n in dense else scale * sum(shapes[n]) / sizes[n] for n in shapes}
        dense |= over
    return dict.fromkeys(shapes, 1.0)


INITIALISATIONS: dict[str, Callable[[Mapping[str, Shape], float], dict[str, float]]] = {"uniform": uniform, "erk": erk}


def random_masks(weights: Mapping[str, Tensor], densities: Mapping[str, float], generator: torch.Generator) -> Masks:
    """Let weights live at random, an exact number in each layer.

    Args:
        weights: By name.
        densities: By the same names; a layer of density 1 gets no mask.
        generator: Where the randomness comes from.

    Returns:
        The masks of the layers that aren't dense.

    """
    score = {n: torch.rand(w.shape, generator=generator, dtype=torch.float64) for n, w in weights.items()}
    return _masks({name: value.to(weights[name].device) for name, value in score.items()}, densities)


def magnitude_masks(weights: Mapping[str, Tensor], densities: Mapping[str, float]) -> Masks:
    """Let the largest weights live, where there are trained ones. Otherwise as :func:`random_masks`."""
    return _masks({name: weight.detach().abs() for name, weight in weights.items()}, densities)


def _masks(scores: Mapping[str, Tensor], densities: Mapping[str, float]) -> Masks:
    masks = {}
    for name, score in scores.items():
        if densities[name] < 1.0:
            among = torch.ones_like(score, dtype=torch.bool)
            masks[name] = largest(score, among, num_kept(densities[name], score.numel()))
    return masks
