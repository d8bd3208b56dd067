"""One queue of data for all workers: an epoch is one order of batches, dealt out one by one under leases.

A fast worker asks more often and gets more. What a worker was dealt and has not trained on when it is lost is dealt
out again, before anything else; so every batch counts exactly once, whoever dies.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from .order import Order

Ticket = tuple[int, int]  # epoch, position in its order


@dataclass
class _Epoch:
    order: Order | None  # an order of a million samples is not kept once it is done
    num_batches: int
    num_ahead: int  # batches that have not been dealt out
    num_done: int
    num_samples: int  # in the done ones
    total: int  # samples
    next: int = 0
    again: deque[int] = field(default_factory=deque)


class WorkQueue:
    """Deals batches of sample indices out to workers.

    Example:
        >>> queue = WorkQueue()
        >>> queue.open(0, Order.of([[2, 0], [1]]))
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

    def open(self, epoch: int, order: Order) -> None:
        """Set the order of an epoch. The first to say it is believed; all later ones are ignored.

        Args:
            epoch: Its number.
            order: Its batches, and which of them an earlier run has trained on.

        """
        if epoch not in self._epochs:
            num_done = sum(order.done)
            num_samples = sum(size for size, done in zip(order.sizes, order.done, strict=True) if done)
            self._epochs[epoch] = _Epoch(
                order, len(order), len(order) - num_done, num_done, num_samples, len(order.samples)
            )

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
            pending = self._epochs[number]
            if number in kept or pending.order is None:
                continue
            if pending.again:
                position = pending.again.popleft()
            elif pending.num_ahead:
                position = pending.order.done.index(0, pending.next)  # what an earlier run has done is passed over
                pending.next = position + 1
                pending.num_ahead -= 1
            else:
                continue
            self._leases[number, position] = worker
            return number, position
        return None

    def num_left(self, epoch: int) -> int:
        """How many batches of an epoch can be dealt out now."""
        pending = self._epochs.get(epoch)
        return 0 if pending is None else pending.num_ahead + len(pending.again)

    def epochs(self, last: int) -> list[int]:
        """All epochs up to one whose order is known."""
        return [number for number in self._epochs if number <= last]

    @property
    def last_epoch(self) -> int:
        """The newest epoch whose order is known; 0 before any."""
        return max(self._epochs, default=0)

    def samples(self, ticket: Ticket) -> array[int]:
        """The indices of a batch that is leased to somebody."""
        epoch, position = ticket
        order = self._epochs[epoch].order
        assert order is not None
        return order.batch(position)

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
            order = pending.order
            assert order is not None
            assert not order.done[position], f"{ticket} was trained on twice"
            order.done[position] = 1
            pending.num_done += 1
            pending.num_samples += order.sizes[position]
            self.num_samples += order.sizes[position]
            if pending.num_done == pending.num_batches:
                pending.order = None

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
                if pending.num_done + mine < pending.num_batches:
                    return False
        return True

    def coverage(self, epoch: int) -> tuple[int, int]:
        """Samples of an epoch that were trained on, and all of them."""
        pending = self._epochs[epoch]
        return pending.num_samples, pending.total

    def progress(self) -> tuple[int, list[tuple[int, int]]]:
        """The newest epoch, -1 before any, and of each that is not covered whole how many batches are done."""
        open_epochs = [
            (number, pending.num_done)
            for number, pending in self._epochs.items()
            if pending.num_done < pending.num_batches
        ]
        return max(self._epochs, default=-1), open_epochs

    def state(self) -> dict[int, Order]:
        """What a later run needs to go on: the orders of epochs that are not covered whole, as they are now."""
        return {
            number: pending.order
            for number, pending in self._epochs.items()
            if pending.order is not None and pending.num_done < pending.num_batches
        }
