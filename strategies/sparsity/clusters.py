"""Weights that share values, as they are trained: one gradient a value, and one value for all its weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Clusters:
    """Which weights of a layer have one value.

    Args:
        mask: Which weights live.
        codes: The cluster of each of them, in the order of the tensor. None of the numbers from 0 on is left out.

    Example:
        >>> clusters = Clusters(torch.tensor([True, False, True, True]), torch.tensor([0, 1, 0]))
        >>> clusters.sums(torch.tensor([1.0, 9.0, 2.0, 3.0]))
        tensor([4., 2.], dtype=torch.float64)

    """

    def __init__(self, mask: Tensor, codes: Tensor) -> None:
        self.mask = mask
        self.codes = codes.to(mask.device, torch.int64)
        self.counts = torch.bincount(self.codes)
        self._first = torch.argsort(self.codes, stable=True)[self.counts.cumsum(0) - self.counts]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def mean_count(self) -> float:
        """Weights a value, on the average."""
        return len(self.codes) / len(self)

    def sums(self, tensor: Tensor) -> Tensor:
        """Sum each cluster up: the gradient of a centroid, from those of its weights.

        Args:
            tensor: Of the layer's shape.

        Returns:
            A double a cluster.

        """
        return self._sums(tensor[self.mask])

    def means(self, tensor: Tensor) -> Tensor:
        """Average each cluster. Equal values have exactly that value as their mean, however they are rounded.

        Args:
            tensor: Of the layer's shape.

        Returns:
            A number a cluster, of the tensor's type.

        """
        values = tensor[self.mask]
        first = values[self._first]
        off = self._sums(values - first[self.codes])
        return (first.double() + off / self.counts).to(tensor.dtype)

    def _sums(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self), dtype=torch.float64, device=values.device).index_add_(
            0, self.codes, values.double()
        )

    def fill(self, tensor: Tensor, values: Tensor) -> None:
        """Give all weights of each cluster one value, in place.

        Args:
            tensor: Of the layer's shape.
            values: A number a cluster.

        """
        tensor[self.mask] = values.to(tensor.dtype)[self.codes]

    def tie(self, tensor: Tensor) -> None:
        """Give all weights of each cluster their mean, in place.

        Args:
            tensor: Of the layer's shape.

        """
        self.fill(tensor, self.means(tensor))


def used(centroids: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the centroids that no weight has.

    Args:
        centroids: The values.
        assignments: Which of them each weight has.

    Returns:
        The values that are used, and which of these each weight has.

    Example:
        >>> used(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2]))
        (tensor([1., 3.]), tensor([1, 0, 1]))

    """
    numbers, codes = torch.unique(assignments, return_inverse=True)
    return centroids[numbers], codes
