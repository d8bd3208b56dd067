"""How fast each worker is, as far as it matters whether another one should do its work, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_MEMORY = 0.5  # share of what a worker's pace was before, in what it is
_LATE = 2.0  # times its own pace after which a worker may be stopped, or lost


class Pace:
    """Seconds that a portion takes each worker: from when it was given one until it asks for another.

    Args:
        now: The time, on any clock that goes on.

    Example:
        >>> pace = Pace()
        >>> for worker, seconds in (("a", 1.0), ("b", 10.0)):
        ...     pace.is_answered(worker)
        ...     pace.now += seconds
        ...     pace.asks(worker)
        ...     pace.is_answered(worker)
        >>> pace.are_late(["b"], "a")  # it needs ten times as long as the one that is idle
        True
        >>> pace.is_answered("a")
        >>> pace.are_late(["a"], "b")
        False

    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._seconds: dict[Any, float] = {}
        self._since: dict[Any, float] = {}

    def asks(self, worker: Any) -> None:
        """A worker wants something to do: it has done what it had, or begins to."""
        since = self._since.pop(worker, None)
        if since is not None:
            seconds = self.now - since
            self._seconds[worker] = _MEMORY * self._seconds.get(worker, seconds) + (1 - _MEMORY) * seconds

    def is_answered(self, worker: Any) -> None:
        """A worker computes from here on."""
        self._since[worker] = self.now

    def are_late(self, holders: Iterable[Any], idle: Any) -> bool:
        """Whether an idle worker would have a portion sooner than those who have it, or these may never have it.

        Args:
            holders: Who has it.
            idle: Who asks.

        """
        mine = self._seconds.get(idle)
        for holder in holders:
            seconds, since = self._seconds.get(holder), self._since.get(holder)
            if mine is None or seconds is None or since is None:
                continue  # nobody knows: an idle worker loses nothing
            elapsed = self.now - since
            if elapsed <= _LATE * seconds and seconds - elapsed <= mine:
                return False
        return True
