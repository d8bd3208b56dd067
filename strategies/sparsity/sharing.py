"""Share weights: k-means in one dimension with linear initialisation, as in Deep Compression (Han et al. 2016, 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arguments import is_whole

MAX_BITS = 16

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SharedWeights:
    """A tensor whose weights are few values.

    Args:
        centroids: The values, in ascending order.
        assignments: Which of them each weight of the mask has, in the order of the tensor.
        mask: Where weights are; elsewhere is zero.

    """

    centroids: Tensor
    assignments: Tensor
    mask: Tensor

    def dense(self) -> Tensor:
        """Lay the values out.

        Returns:
            A tensor of the mask's shape.

        """
        weight = torch.zeros(self.mask.shape, dtype=self.centroids.dtype, device=self.centroids.device)
        weight[self.mask] = self.centroids[self.assignments]
        return weight


def share_weights(weight: Tensor, bits: int, mask: Tensor | None = None, max_iterations: int = 300) -> SharedWeights:
    """Replace weights by the nearest of ``2 ** bits`` centroids.

    The centroids begin at equal distances from the smallest weight to the largest, so that large weights, which are few
    and matter, keep some to themselves; then Lloyd's iterations move each to the mean of its weights. One that is the
    nearest of no weight stays where it is.

    Args:
        weight: Any floating tensor.
        bits: Of the number of a centroid, from 1 to 16.
        mask: Which weights to share; None: those that aren't zero.
        max_iterations: Stop after so many iterations, or when no assignment changes. With 0 the centroids stay linear.

    Returns:
        Centroids in the weight's data type, and assignments. The same input gives the same result on every machine.

    Raises:
        ValueError: If `bits` is none of those, if there are fewer weights than centroids, or if one isn't finite or is
            complex.

    Example:
        >>> share_weights(torch.tensor([-1.0, 0.0, 0.9, 1.1]), bits=1).dense()
        tensor([-1.,  0.,  1.,  1.])

    """
    if not (is_whole(bits) and 1 <= bits <= MAX_BITS):
        raise ValueError(f"bits={bits} must be from 1 to {MAX_BITS}.")
    weight = weight.detach()
    if weight.is_complex():
        raise ValueError("Complex weights can't be shared: share their real and their imaginary parts, as two tensors.")
    mask = weight != 0 if mask is None else mask
    values = weight[mask].double().cpu().numpy()
    if len(values) < 1 << bits:
        raise ValueError(f"bits={bits} makes {1 << bits:,} centroids of {len(values):,} weights: take fewer bits.")
    if not np.isfinite(values).all():
        raise ValueError("A weight isn't finite: weights can't be shared.")
    centroids = _lloyd(np.sort(values), np.linspace(values.min(), values.max(), 1 << bits), max_iterations)
    assignments = np.searchsorted(_midpoints(centroids), values)
    return SharedWeights(torch.from_numpy(centroids).to(weight), torch.from_numpy(assignments).to(weight.device), mask)


def _midpoints(centroids: _Floats) -> _Floats:
    return centroids[:-1] / 2 + centroids[1:] / 2


def _lloyd(values: _Floats, centroids: _Floats, max_iterations: int) -> _Floats:
    """Move centroids among sorted values: a cell is an interval, and its sum the difference of two running ones."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    before: npt.NDArray[np.int64] | None = None
    for _ in range(max_iterations):
        inner = np.searchsorted(values, _midpoints(centroids), side="right")
        edges = np.concatenate(([0], inner, [len(values)]))
        if before is not None and np.array_equal(edges, before):
            break
        before, counts = edges, np.diff(edges)
        centroids = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids)
    return centroids
