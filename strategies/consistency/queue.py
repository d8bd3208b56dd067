"""One queue of data for all workers: an epoch is one order of batches, dealt out one by one under leases.

A fast worker asks more often and gets more. What a worker was dealt and has not trained on when it is lost is dealt
out again, before anything else; so every batch counts exactly once, whoever dies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Ticket = tuple[int, int]  # epoch, position in its order


@dataclass
class _Epoch:
    batches: list[list[int]]
    num_batches: int
    total: int  # samples
    next: int = 0
    again: deque[int] = field(default_factory=deque)
    done: set[int] = field(default_factory=set)
    done_before: frozenset[int] = frozenset()
    num_samples: int = 0


class WorkQueue:
    """Deals batches of sample indices out to workers.

    Example:
        >>> queue = WorkQueue()
        >>> queue.open(0, [[2, 0], [1]])
        >>> queue.lease("a", 0), queue.lease("b", 0)
        ((0, 0), (0, 1))
        >>> queue.complete("a", [(0, 0)])
        >>> queue.revoke("b")
        [(0, 1)]
        >>> queue.lease("a", 0)
        (0, 1)

    """

    def __init__(self) -> None:
        self._epochs: dict[int, _Epoch] = {}
        self._leases: dict[Ticket, Any] = {}
        self.num_samples = 0  # trained on, over all epochs
        self.num_reissued = 0  # batches dealt out again

    def is_open(self, epoch: int) -> bool:
        """Whether the order of an epoch is known."""
        return epoch in self._epochs

    def open(self, epoch: int, batches: Sequence[Sequence[int]], done: Iterable[int] = ()) -> None:
        """Set the order of an epoch. The first to say it is believed; all later ones are ignored.

        Args:
            epoch: Its number.
            batches: Indices of the samples of each batch.
            done: Positions that an earlier run has trained on.

        """
        if epoch not in self._epochs:
            done = set(done)
            total = sum(len(batch) for batch in batches)
            fresh = _Epoch(
                [list(batch) for batch in batches], len(batches), total, done=done, done_before=frozenset(done)
            )
            fresh.num_samples = sum(len(fresh.batches[position]) for position in done)
            self._epochs[epoch] = fresh

    def lease(self, worker: Any, epoch: int, kept: Container[int] = ()) -> Ticket | None:
        """Deal out a batch of an epoch, or of an earlier one that a lost worker left behind.

        Args:
            worker: Who asks.
            epoch: The epoch that it is in.
            kept: Epochs whose batches are kept for somebody else.

        Returns:
            Which, or None if there is none to deal out now.

        """
        for number in sorted(self._epochs):
            if number > epoch:
                break
            if number in kept:
                continue
            pending = self._epochs[number]
            position = None
            if pending.again:
                position = pending.again.popleft()
            else:
                while pending.next < pending.num_batches and pending.next in pending.done:
                    pending.next += 1
                if pending.next < pending.num_batches:
                    position = pending.next
                    pending.next += 1
            if position is not None:
                self._leases[number, position] = worker
                return number, position
        return None

    def num_left(self, epoch: int) -> int:
        """How many batches of an epoch can be dealt out now."""
        pending = self._epochs.get(epoch)
        if pending is None:
            return 0
        ahead = pending.num_batches - pending.next
        if pending.done_before:  # of an earlier run: positions of the order that are passed over
            ahead -= sum(1 for position in pending.done_before if position >= pending.next)
        return ahead + len(pending.again)

    def epochs(self, last: int) -> list[int]:
        """All epochs up to one whose order is known."""
        return [number for number in self._epochs if number <= last]

    @property
    def last_epoch(self) -> int:
        """The newest epoch whose order is known; 0 before any."""
        return max(self._epochs, default=0)

    def samples(self, ticket: Ticket) -> list[int]:
        """The indices of a batch."""
        epoch, position = ticket
        return self._epochs[epoch].batches[position]

    def holds(self, worker: Any, tickets: Iterable[Ticket]) -> bool:
        """Whether all of these are leased to a worker."""
        return all(self._leases.get(ticket) == worker for ticket in tickets)

    def complete(self, worker: Any, tickets: Iterable[Ticket]) -> None:
        """Count batches as trained on."""
        for ticket in tickets:
            assert self._leases.get(ticket) == worker, f"{ticket} is not leased to {worker}"
            del self._leases[ticket]
            epoch, position = ticket
            pending = self._epochs[epoch]
            assert position not in pending.done, f"{ticket} was trained on twice"
            pending.done.add(position)
            pending.num_samples += len(pending.batches[position])
            self.num_samples += len(pending.batches[position])
            if len(pending.done) == pending.num_batches:
                pending.batches = []  # an order of a million samples is not kept for every epoch

    def revoke(self, worker: Any) -> list[Ticket]:
        """Take back all that a worker was dealt and has not completed."""
        lost = sorted(ticket for ticket, holder in self._leases.items() if holder == worker)
        for epoch, position in lost:
            del self._leases[epoch, position]
            self._epochs[epoch].again.append(position)
        self.num_reissued += len(lost)
        return lost

    def give_back(self, worker: Any, tickets: Iterable[Ticket]) -> None:
        """Take back some of what a worker was dealt and will not train on."""
        for ticket in tickets:
            if self._leases.get(ticket) == worker:
                del self._leases[ticket]
                self._epochs[ticket[0]].again.append(ticket[1])

    def is_covered(self, epoch: int, but: Any = None) -> bool:
        """Whether every batch of all epochs up to this one is trained on, or held by one worker.

        Args:
            epoch: The last epoch to look at.
            but: The worker whose own leases don't count.

        """
        for number, pending in self._epochs.items():
            if number <= epoch:
                mine = sum(1 for (at, _), holder in self._leases.items() if at == number and holder == but)
                if len(pending.done) + mine < pending.num_batches:
                    return False
        return True

    def coverage(self, epoch: int) -> tuple[int, int]:
        """Samples of an epoch that were trained on, and all of them."""
        pending = self._epochs[epoch]
        return pending.num_samples, pending.total

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on: the epochs that are not covered whole, with their orders."""
        return {
            str(number): {"batches": pending.batches, "done": sorted(pending.done)}
            for number, pending in self._epochs.items()
            if len(pending.done) < pending.num_batches
        }
