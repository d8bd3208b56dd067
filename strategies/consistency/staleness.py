"""What a shard does about a gradient that comes late: rules, and the statistics of how late they came."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

RULES = ("none", "inverse", "delay_compensated")
MEAN_SQUARE = "squall.mean_square"  # the state that delay compensation keeps beside the optimizer's


@dataclass(frozen=True)
class StalenessRule:
    """How a stale gradient is applied.

    Args:
        name: ``"none"``: as it is. ``"inverse"``: with the learning rate divided by its staleness (Zhang 2016).
            ``"delay_compensated"``: corrected to the weights it meets, by the diagonal of its own outer product
            (Zheng 2017, DC-ASGD-a).
        strength: ``lambda_0`` of the compensation.
        decay: ``m``, of the running mean of squared gradients that scales it.

    """

    name: str = "none"
    strength: float = 2.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise MisconfigurationException(f"staleness_rule={self.name!r} must be one of {', '.join(RULES)}.")

    @property
    def compensates(self) -> bool:
        """Whether the rule needs the weights that a gradient was computed from."""
        return self.name == "delay_compensated"

    def scale(self, staleness: int) -> float:
        """By what the learning rate of an update is multiplied."""
        return 1.0 / max(staleness, 1) if self.name == "inverse" else 1.0

    def compensate(self, gradient: Tensor, weight: Tensor, base: Tensor, mean_square: Tensor) -> None:
        """Correct a gradient in place: ``g += lambda_t g g (w - base)``, ``lambda_t = lambda_0 / sqrt(ms + 1e-7)``.

        Args:
            gradient: As it came.
            weight: The weights it meets.
            base: The weights it was computed from.
            mean_square: ``ms``, the running mean of squared gradients; updated in place.

        """
        square = gradient * gradient
        mean_square.mul_(self.decay).add_(square, alpha=1 - self.decay)
        square.mul_(weight - base).mul_(self.strength).div_((mean_square + 1e-7).sqrt_())
        gradient.add_(square)


@dataclass
class StalenessStatistics:
    """How stale the updates were: a count of updates for each staleness."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, staleness: int) -> None:
        """Count one update."""
        self.counts[staleness] += 1

    @property
    def total(self) -> int:
        """Number of updates."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean staleness of an update; 0 without any."""
        total = self.total
        return sum(value * count for value, count in self.counts.items()) / total if total else 0.0

    @property
    def maximum(self) -> int:
        """The stalest update."""
        return max(self.counts, default=0)

    def values(self) -> Tensor:
        """The staleness of every update, as a histogram wants it."""
        pairs = sorted(self.counts.items())
        repeats = torch.tensor([count for _, count in pairs], dtype=torch.long)
        return torch.tensor([value for value, _ in pairs], dtype=torch.long).repeat_interleave(repeats)
