"""A worker, as the coordinator knows it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

Peer = Hashable

LEADER = 0


@dataclass
class Worker:
    """One generation of one rank, or of several that are one replica."""

    rank: int
    generation: int
    peer: Peer
    last_seen: float
    alive: bool = True
    joined: bool = False
    in_loop: bool = False
    finished: bool = False
    is_leaving: bool = False  # it has asked for the end, and computes nothing more
    displaced: bool = False  # shards that it had a mailbox at are somewhere else: it has to join again
    comes_back: bool = False  # lost, and started again later, in the schedule that is replayed
    idle: bool = False  # waits for data: holds nobody up
    clock: int = 0
    epoch: int = -1
    sequence: int = 0
    mailbox: str = ""
    buffers: bytes = b""
    rendezvous: int = 0  # the port where its ranks meet, if it is several

    @property
    def key(self) -> tuple[int, int]:
        """Its name in the queue."""
        return self.rank, self.generation
