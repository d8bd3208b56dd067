"""Every event of a run in its order, to be repeated by a later run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .worker import Worker


class Replay:
    """What happened, and whose turn it is if it is to happen again.

    Args:
        schedule: Says the events of an earlier run, as ``[kind, rank]``; None if there are none to repeat.
        revoke: Gives out again what a lost worker had.

    """

    def __init__(self, schedule: Callable[[], Sequence[Sequence[Any]] | None], revoke: Callable[[Worker], Any]) -> None:
        self.events: list[list[Any]] = []
        self._schedule = schedule
        self._revoke = revoke
        self._position = 0
        self._losses: list[Worker] = []  # lost workers whose samples nobody has had yet

    def happened(self, kind: str, worker: Worker) -> None:
        """Note an event."""
        self.events.append([kind, worker.rank])
        self._position += 1

    @property
    def goes_on(self) -> bool:
        """Whether there is something left to repeat."""
        return self._position < len(self._schedule() or ())

    def is_turn(self, kind: str, worker: Worker, workers: Mapping[int, Worker]) -> bool:
        """Whether the schedule has come to this event; without a schedule it always has.

        Args:
            kind: Of the event.
            worker: Whose it is.
            workers: The latest generation of each rank.

        """
        schedule = self._schedule()
        if schedule is None:
            return True
        while self._position < len(schedule):
            wanted_kind, wanted_rank = schedule[self._position]
            wanted = workers.get(int(wanted_rank))
            if wanted_kind == "lost" and any(worker is wanted for worker in self._losses):
                self.take_losses_down()
                continue
            gone = wanted is not None and (not wanted.alive or wanted.finished)
            if gone and wanted is not None and not wanted.comes_back:
                self._position += 1  # it will not come any more
                continue
            return bool(wanted_kind == kind and wanted_rank == worker.rank)
        self.take_losses_down()
        return True

    def lost(self, worker: Worker, at_once: bool) -> None:
        """A worker is lost in the loop."""
        self._losses.append(worker)
        self.take_losses_down(at_once)

    def take_losses_down(self, at_once: bool = False) -> None:
        """Give out again what lost workers had, where a schedule says that they were lost.

        Args:
            at_once: Whatever a schedule says.

        """
        schedule = self._schedule() or ()
        for worker in list(self._losses):
            event = ["lost", worker.rank]
            scheduled = event in map(list, schedule[self._position :])
            now = scheduled and list(schedule[self._position]) == event
            if scheduled and not now and not at_once:
                continue
            self._losses.remove(worker)
            self._revoke(worker)
            self.events.append(event)
            self._position += now
            # Where the schedule has more of this rank, it was started again.
            worker.comes_back = now and worker.rank in {rank for _, rank in schedule[self._position :]}
