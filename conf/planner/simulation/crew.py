"""Workers: how long each computes a step, some of them slower than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from squall._arguments import check_whole

from .distributions import Array, Distribution, Scaled, make_distribution


@dataclass(frozen=True)
class Crew:
    """Some workers, of which some are slow.

    Args:
        workers: How many.
        compute: Seconds of a step, of all but the slow ones.
        num_slow: How many are slow.
        slowdown: How many times as long theirs take.
        own: Each rank's own seconds of a step, where they were measured, in place of all that.

    Example:
        >>> crew = Crew.of(4, 0.5, {"number": 1, "slowdown": 2.0})
        >>> crew.of_rank(0).mean, crew.of_rank(3).mean, crew.speed
        (0.5, 1.0, 7.0)

    """

    workers: int
    compute: Distribution
    num_slow: int = 0
    slowdown: float = 1.0
    own: tuple[Distribution, ...] = ()

    def __post_init__(self) -> None:
        if self.own and len(self.own) != self.workers:
            raise ValueError(f"own: {len(self.own)} distributions for {self.workers} workers. Give each one, or none.")

    @classmethod
    def of(cls, workers: int, compute: float | Mapping[str, Any], stragglers: Mapping[str, Any] | None = None) -> Crew:
        """Make what a scenario says.

        Args:
            workers: How many.
            compute: As of :func:`make_distribution`.
            stragglers: ``slowdown``, and how many: ``number``, or ``share`` of the workers; or None.

        Raises:
            MisconfigurationException: If ``workers`` is no whole number above 0.
            ValueError: If the rest makes no sense.

        """
        check_whole("workers", workers, 1)
        said = dict(stragglers or {"number": 0, "slowdown": 1.0})
        if set(said) not in ({"number", "slowdown"}, {"share", "slowdown"}):
            raise ValueError(f"stragglers={said} must have a slowdown, and either a number or a share of the workers.")
        number, slowdown = said.get("number"), said["slowdown"]
        if number is None:
            number = round(said["share"] * workers)
        if not 0 <= number <= workers:
            raise ValueError(f"stragglers={said} must be from none to all of the {workers} workers.")
        if not slowdown >= 1.0:
            raise ValueError(f"stragglers.slowdown={slowdown} must be 1.0 or more.")
        made = make_distribution("compute", compute)
        if made.mean <= 0:
            raise ValueError(f"compute={compute!r} must take time: a mean above 0.")
        return cls(workers, made, int(number), float(slowdown))

    def of_rank(self, rank: int) -> Distribution:
        """How long a rank computes a step; the last ones are the slow ones."""
        if self.own:
            return self.own[rank]
        slow = rank >= self.workers - self.num_slow
        return Scaled(self.compute, self.slowdown) if slow else self.compute

    @property
    def speed(self) -> float:
        """Steps a second of all together, if nobody waits for anybody."""
        if self.own:
            return sum(1.0 / own.mean for own in self.own)
        return (self.workers - self.num_slow + self.num_slow / self.slowdown) / self.compute.mean

    def slowest(self, rng: np.random.Generator, size: int) -> Array:
        """Draw how long the slowest of all takes.

        Args:
            rng: What to draw with.
            size: How many steps.

        Returns:
            ``(size,)`` seconds.

        """
        if self.own:
            return np.asarray(np.max([own.sample(rng, size) for own in self.own], axis=0))
        longest = np.zeros(size)
        for number, factor in ((self.workers - self.num_slow, 1.0), (self.num_slow, self.slowdown)):
            if number:
                longest = np.maximum(longest, factor * self.compute.largest(rng, size, number))
        return longest
