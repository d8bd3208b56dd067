"""Workers that are several ranks, as the coordinator knows them: one rank speaks, the others are only seen to live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .wire import Header
from .worker import Peer, Worker

Admit = Callable[[Peer, Header, Worker], None]


@dataclass
class _Mate:
    worker: Worker
    column: int
    last_seen: float


class Mates:
    """The other ranks of workers that are several: one of them lost is the worker lost.

    Args:
        admit: Answers the hello of one, once the rank that speaks for its worker is there.
        refuse: Answers the hello of one that has waited for that in vain.
        bury: Gives a worker up.

    """

    def __init__(self, admit: Admit, refuse: Callable[[Peer, Header], None], bury: Callable[[Worker], None]) -> None:
        self._admit = admit
        self._refuse = refuse
        self._bury = bury
        self._mates: dict[Peer, _Mate] = {}
        self._early: list[tuple[Peer, Header, float]] = []  # whose worker is not there yet

    def hello(self, peer: Peer, header: Header, worker: Worker | None, now: float) -> None:
        """Take one in.

        Args:
            peer: Who.
            header: Of its hello.
            worker: Whom it is a part of, as far as that is known.
            now: Seconds.

        """
        column = int(header["column"])
        if worker is not None and worker.alive:
            if any(mate.worker is worker and mate.column == column for mate in self._others(peer)):
                self._bury(worker)  # another process is in its place, which the others know nothing of
            else:
                self._mates[peer] = _Mate(worker, column, now)
                self._admit(peer, header, worker)
                return
        self._early.append((peer, header, now))

    def _others(self, peer: Peer) -> list[_Mate]:
        return [mate for other, mate in self._mates.items() if other != peer]

    def worker_is_there(self, worker: Worker, now: float) -> None:
        """Take in those who came before the one that speaks for them."""
        ours = [item for item in self._early if item[1]["rank"] == worker.rank]
        self._early = [item for item in self._early if item not in ours]
        for peer, header, _ in ours:
            self.hello(peer, header, worker, now)

    def seen(self, peer: Peer, now: float) -> bool:
        """A sign of life; whether it is from one of these at all."""
        mate = self._mates.get(peer)
        if mate is not None:
            mate.last_seen = now
        return mate is not None

    def lost(self, peer: Peer) -> None:
        """A connection has ended."""
        self._early = [item for item in self._early if item[0] != peer]
        mate = self._mates.pop(peer, None)
        if mate is not None:
            self._bury(mate.worker)

    def tick(self, now: float, lease_timeout: float, join_timeout: float) -> None:
        """Look for those who have not been heard of, or who have waited, for too long."""
        late = [item for item in self._early if now - item[2] > join_timeout]
        self._early = [item for item in self._early if item not in late]
        for peer, header, _ in late:
            self._refuse(peer, header)
        for mate in list(self._mates.values()):
            if now - mate.last_seen > lease_timeout:
                self._bury(mate.worker)

    def excuse(self, seconds: float) -> None:
        """Nobody could be heard for so long, through no fault of theirs."""
        for mate in self._mates.values():
            mate.last_seen += seconds
