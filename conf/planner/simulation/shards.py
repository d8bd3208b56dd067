"""The shards' side of a push: a line before each, served in the one order that the coordinator sets."""

from __future__ import annotations

import numpy as np

from squall._arguments import check_whole

from .distributions import Array, Constant, Distribution


class ShardLines:
    """When shards have done what they are told, command after command.

    Every command goes to all of them; each takes its own time for it, first come, first served. A command is done when
    the last shard has done it. No events are needed for that: a shard begins when the command is there and the one
    before is done (Lindley's recursion).

    Args:
        number: How many.
        service: Seconds that one takes for its slice of a push.
        rng: What to draw with.

    Example:
        >>> lines = ShardLines(2, Constant(1.0), np.random.default_rng(0))
        >>> lines.serve(0.0), lines.serve(0.5), lines.serve(5.0)
        (1.0, 2.0, 6.0)

    """

    def __init__(self, number: int, service: Distribution, rng: np.random.Generator) -> None:
        check_whole("shards.number", number, 1)
        if isinstance(service, Constant):
            number = 1  # they all do the same at the same time
        self._number = number
        self._free: Array = np.zeros(number)
        self._free_alone = 0.0
        self._service, self._rng = service, rng
        self._stream = service.stream(rng)
        self.busy = 0.0  # seconds of one shard's work

    def serve(self, now: float) -> float:
        """Give all of them a command.

        Args:
            now: When; not before the last one.

        Returns:
            When the last of them is done with it.

        """
        if self._number == 1:
            seconds = next(self._stream)
            self.busy += seconds
            self._free_alone = max(self._free_alone, now) + seconds
            return self._free_alone
        drawn = self._service.sample(self._rng, self._number)
        self.busy += float(drawn.mean())
        self._free = np.maximum(self._free, now) + drawn
        return float(self._free.max())
