"""Every event of a run in its order, to be repeated by a later run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

from .events import EventLog, from_code, to_code
from .worker import Worker

# A run has these only if its user's code looks at it, or edits it. A schedule that has none of a kind says nothing of
# that kind: a run can be looked at when it is repeated, though it was not when it was recorded.
_OPTIONAL = frozenset({"snapshot", "buffers", "share", "write", "return", "leave"})


class Replay:
    """What happened, and whose turn it is if it is to happen again.

    Args:
        schedule: The events of an earlier run; None if there are none to repeat.
        revoke: Gives out again what a lost worker had.

    """

    def __init__(self, schedule: array[int] | None, revoke: Callable[[Worker], Any]) -> None:
        self.log = EventLog()
        self._schedule = schedule
        self._free = _OPTIONAL - {from_code(code)[0] for code in set(schedule or ())}
        self._revoke = revoke
        self.position = 0
        self._losses: list[Worker] = []  # lost workers whose samples nobody has had yet
        self._moved_at, self._last_seen = 0.0, -1  # when the position was new, as far as it was looked at

    def happened(self, kind: str, worker: Worker) -> None:
        """Note an event."""
        self.log.append(to_code(kind, worker.rank))
        self.position += kind not in self._free

    @property
    def goes_on(self) -> bool:
        """Whether there is something left to repeat."""
        return self.position < len(self._schedule or ())

    def is_turn(self, kind: str, worker: Worker, workers: Mapping[int, Worker]) -> bool:
        """Whether the schedule has come to this event; without a schedule it always has.

        Args:
            kind: Of the event.
            worker: Whose it is.
            workers: The latest generation of each rank.

        """
        if self._schedule is None or kind in self._free:
            return True
        while self.position < len(self._schedule):
            wanted_kind, wanted_rank = from_code(self._schedule[self.position])
            wanted = workers.get(wanted_rank)
            if wanted_kind == "lost" and any(worker is wanted for worker in self._losses):
                self.take_losses_down()
                continue
            if _is_gone(wanted):
                self.position += 1
                continue
            return wanted_kind == kind and wanted_rank == worker.rank
        self.take_losses_down()
        return True

    def hangs(self, now: float, patience: float, waiting: Mapping[int, str], workers: Mapping[int, Worker]) -> str:
        """Why what is to come next will not come: the run is another one than the schedule is of.

        Args:
            now: Seconds, on any clock that goes on.
            patience: Seconds in which somebody may come who does what is next, when all who are there wait.
            waiting: What each rank that waits in the loop has asked for.
            workers: The latest generation of each rank.

        Returns:
            Nothing, as long as it may come.

        """
        if self._schedule is None or not self.goes_on or not waiting:
            return ""
        kind, rank = from_code(self._schedule[self.position])
        works = any(w.alive and not w.finished and w.rank not in waiting for w in workers.values())
        if works or self.position != self._last_seen or _is_gone(workers.get(rank)):
            self._moved_at, self._last_seen = now, self.position
        if now - self._moved_at <= patience:
            return ""
        does = f"asks for {waiting[rank]!r}" if rank in waiting else "is not there"
        return (
            f"schedule: event {self.position} is {kind!r} of rank {rank}, but rank {rank} {does}, so this run is not"
            " the one that was recorded. Give it the same data, arguments, number of ranks and faults, or leave"
            " schedule=None."
        )

    def lost(self, worker: Worker, at_once: bool) -> None:
        """A worker is lost in the loop."""
        self._losses.append(worker)
        self.take_losses_down(at_once)

    def take_losses_down(self, at_once: bool = False) -> None:
        """Give out again what lost workers had, where a schedule says that they were lost.

        Args:
            at_once: Whatever a schedule says.

        """
        for worker in list(self._losses):
            code = to_code("lost", worker.rank)
            rest = (self._schedule or array("I"))[self.position :]
            now = rest[:1] == array("I", [code])
            if code in rest and not now and not at_once:
                continue
            self._losses.remove(worker)
            self._revoke(worker)
            self.log.append(code)
            self.position += now
            # Where the schedule has more of this rank, it was started again.
            worker.comes_back = now and any(from_code(later)[1] == worker.rank for later in set(rest[1:]))


def _is_gone(worker: Worker | None) -> bool:
    """Whether a rank has been there, and will not come any more."""
    return worker is not None and (not worker.alive or worker.finished) and not worker.comes_back
