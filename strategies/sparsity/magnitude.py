"""Prune by magnitude: keep the share of a tensor's weights that are largest."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import largest, num_kept


def magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """Say which weights are among the largest.

    Args:
        weight: Any floating tensor.
        density: Share of the weights to keep, above 0 and at most 1. At least one is kept.

    Returns:
        A boolean tensor of the same shape: exactly ``round(density * weight.numel())`` are True. Of equal magnitudes
        the first ones are kept, so the mask is the same wherever it is made.

    Raises:
        ValueError: If `density` is none, or a weight is NaN.

    Example:
        >>> magnitude_mask(torch.tensor([0.1, -0.5, 0.3, -0.2]), density=0.5)
        tensor([False,  True,  True, False])

    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} must be above 0 and at most 1.")
    if bool(weight.isnan().any()):
        raise ValueError("A weight is NaN: magnitudes can't be compared.")
    among = torch.ones_like(weight, dtype=torch.bool)
    return largest(weight.abs(), among, num_kept(density, weight.numel())) if weight.numel() else among
