"""What goes wrong, how often, and how long it takes to mend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from .distributions import Constant, Distribution, Exponential, make_distribution


@dataclass(frozen=True)
class Faults:
    """Of workers, each by itself.

    Args:
        mtbf: Mean seconds between two failures of one worker, without memory; infinite for none.
        restart: Seconds from a failure until what has failed computes again.
        notice: Seconds until the others are told: 0 where a process dies, whose connection ends with it;
            ``lease_timeout`` where a host vanishes.

    """

    mtbf: float = math.inf
    restart: Distribution = field(default_factory=lambda: Constant(0.0))
    notice: float = 0.0

    @classmethod
    def of(cls, said: Mapping[str, Any] | None) -> Faults:
        """Make what a scenario says.

        Args:
            said: ``mtbf`` and ``restart``, in seconds, and perhaps ``notice``; or None for none.

        Raises:
            ValueError: If something has to be above 0 and isn't, or isn't known.

        """
        said = dict(said or {})
        unknown = sorted(set(said) - {"mtbf", "restart", "notice"})
        if unknown:
            raise ValueError(f"faults: there is no {', '.join(unknown)}. Say mtbf, restart or notice, in seconds.")
        mtbf = said.get("mtbf")
        if mtbf is not None and (isinstance(mtbf, bool) or not isinstance(mtbf, int | float) or mtbf <= 0):
            raise ValueError(f"faults.mtbf={mtbf!r} must be seconds above 0, or null for no failures.")
        notice = make_distribution("faults.notice", said.get("notice", 0.0)).mean
        restart = make_distribution("faults.restart", said.get("restart", 0.0))
        return cls(math.inf if mtbf is None else float(mtbf), restart, notice)

    def gaps(self, rng: np.random.Generator, among: int = 1) -> Iterator[float]:
        """Seconds between failures, one after the other.

        Args:
            rng: What to draw with.
            among: Of how many workers: any of them counts.

        """
        if self.mtbf == math.inf:
            return repeat(math.inf)
        return Exponential(self.mtbf / among).stream(rng)
