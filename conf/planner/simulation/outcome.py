"""What a simulated training came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Report = Callable[[float], None]  # hears what share of a simulation is done


@dataclass(frozen=True)
class Outcome:
    """Of one simulated training.

    Args:
        strategy: Its name.
        workers: How many there were.
        seconds: From the start to the last update.
        updates: Of the weights.
        samples: That went into them, each counted once.
        ideal: Samples a second that the workers would do alone, without waiting and without faults.
        restarts: Of workers, or of everything where one stops all.
        lost_samples: Computed, or begun, in vain.
        staleness: Number of updates of each staleness; empty where none is late.

    """

    strategy: str
    workers: int
    seconds: float
    updates: int
    samples: int
    ideal: float
    restarts: int = 0
    lost_samples: int = 0
    staleness: Mapping[int, int] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Share of what the workers would do alone."""
        return self.throughput / self.ideal if self.ideal else 0.0

    @property
    def mean_staleness(self) -> float | None:
        """Of an update; None where none is late."""
        total = sum(self.staleness.values())
        return sum(value * count for value, count in self.staleness.items()) / total if total else None

    def staleness_quantile(self, share: float) -> int | None:
        """The least staleness that this share of updates doesn't exceed; None where none is late.

        Args:
            share: From 0 to 1.

        """
        left = share * sum(self.staleness.values())
        for value, count in sorted(self.staleness.items()):
            left -= count
            if left <= 0:
                return value
        return None


def total_variation(one: Mapping[int, int], other: Mapping[int, int]) -> float:
    """How far two histograms are apart: half the sum of the differences of their shares.

    Args:
        one: Counts of each value.
        other: Counts of each value.

    Returns:
        From 0, equal, to 1, nothing in common.

    Raises:
        ValueError: If one is empty.

    Example:
        >>> total_variation({0: 1, 1: 3}, {0: 2, 1: 2})
        0.25

    """
    totals = sum(one.values()), sum(other.values())
    if not all(totals):
        raise ValueError("total_variation: a histogram is empty. Count at least one update in each.")
    values = set(one) | set(other)
    return 0.5 * sum(abs(one.get(value, 0) / totals[0] - other.get(value, 0) / totals[1]) for value in values)
