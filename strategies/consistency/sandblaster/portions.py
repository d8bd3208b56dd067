"""Portions of the batch that an evaluation is over: dealt out, dealt out twice if need be, each counted once."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..order import Order
from ..queue import Ticket


class Portions:
    """The portions of one evaluation after the other; all evaluations have the same ones.

    A portion that somebody has and nobody has handed in may be given to others, too, who are idle. Whoever hands it in
    first is believed, and the others' work is worth nothing.

    Example:
        >>> portions = Portions()
        >>> portions.open(0, Order.of([[0], [1]]))
        >>> portions.begin(7)
        >>> portions.lease("a"), portions.lease("b"), portions.lease("a")
        ((7, 0), (7, 1), None)
        >>> portions.complete("a", [(7, 0)], [0.5])
        >>> portions.lease_again("a")
        (7, 1)
        >>> portions.complete("a", [(7, 1)], [0.25])
        >>> portions.is_done, portions.loss
        (True, 0.75)
        >>> portions.holds("b", [(7, 1)])
        False

    """

    def __init__(self) -> None:
        self.order: Order | None = None
        self.serial = -1  # the present evaluation's own number
        self.last_epoch = 0  # that it belongs to
        self.num_samples = 0  # over all evaluations
        self.num_reissued = 0  # portions that a lost worker had
        self.num_again = 0  # portions that were given out though somebody had them
        self.is_open = False
        self._waiting: deque[int] = deque()
        self._holders: dict[int, list[Any]] = {}
        self._losses: dict[int, float] = {}

    def open(self, epoch: int, order: Order) -> None:
        """Say which samples make up which portion, in all epochs. The first to say so is believed."""
        if self.order is None:
            self.order = order
            self._waiting.extend(range(len(order)) if self.is_open else ())

    def begin(self, serial: int, epoch: int = 0) -> None:
        """Open an evaluation: all portions are to be computed.

        Args:
            serial: Its own number, which tickets have.
            epoch: That it belongs to.

        """
        self.serial, self.last_epoch, self.is_open = serial, epoch, True
        self._holders.clear()
        self._losses.clear()
        self._waiting = deque(range(0 if self.order is None else len(self.order)))

    def close(self) -> None:
        """The evaluation is over, or given up."""
        self.is_open = False
        self._waiting.clear()
        self._holders.clear()

    @property
    def num_left(self) -> int:
        """How many nobody has."""
        return len(self._waiting)

    @property
    def num_done(self) -> int:
        """How many of the present evaluation are handed in."""
        return len(self._losses)

    def has_any(self, worker: Any) -> bool:
        """Whether a worker has portions that are not handed in."""
        return any(worker in holders for holders in self._holders.values())

    @property
    def is_done(self) -> bool:
        """Whether all are handed in."""
        return self.order is not None and len(self._losses) == len(self.order)

    @property
    def loss(self) -> float:
        """The sum of all portions' losses, the same in whatever order they came."""
        return math.fsum(self._losses.values())

    def lease(self, worker: Any) -> Ticket | None:
        """Deal out a portion that nobody has."""
        if not self._waiting:
            return None
        position = self._waiting.popleft()
        self._holders[position] = [worker]
        return self.serial, position

    def lease_again(
        self, worker: Any, are_late: Callable[[Sequence[Any]], bool] = lambda holders: True
    ) -> Ticket | None:
        """Deal out a portion that others have: of those that fewest have, the one that was dealt out first.

        Args:
            worker: Who asks.
            are_late: Says whether it is to be given out again, though some workers have it.

        """
        others = [
            position for position, holders in self._holders.items() if worker not in holders and are_late(holders)
        ]
        if not others:
            return None
        position = min(others, key=lambda position: len(self._holders[position]))
        self._holders[position].append(worker)
        self.num_again += 1
        return self.serial, position

    def is_covered(self, but: Any) -> bool:
        """Whether every portion is handed in, or somebody has it: this worker alone."""
        return not self._waiting and all(but in holders for holders in self._holders.values())

    def holds(self, worker: Any, tickets: Iterable[Ticket]) -> bool:
        """Whether a worker has all of these, and nobody has handed them in."""
        return all(serial == self.serial and worker in self._holders.get(position, ()) for serial, position in tickets)

    def complete(self, worker: Any, tickets: Iterable[Ticket], losses: Iterable[float]) -> None:
        """Count portions.

        Args:
            worker: Who hands them in, and holds them.
            tickets: The portions.
            losses: Their shares of the loss.

        """
        assert self.order is not None
        for (_, position), loss in zip(tickets, losses, strict=True):
            assert worker in self._holders[position], f"portion {position} is not leased to {worker}"
            assert position not in self._losses, f"portion {position} is counted twice"
            del self._holders[position]
            self._losses[position] = loss
            self.num_samples += self.order.sizes[position]

    def revoke(self, worker: Any) -> None:
        """Take back all that a worker has."""
        for position in [position for position, holders in self._holders.items() if worker in holders]:
            self._return(worker, position)
            self.num_reissued += position not in self._holders

    def give_back(self, worker: Any, tickets: Iterable[Ticket]) -> None:
        """Take back some of what a worker has."""
        for serial, position in tickets:
            if serial == self.serial and worker in self._holders.get(position, ()):
                self._return(worker, position)

    def _return(self, worker: Any, position: int) -> None:
        self._holders[position].remove(worker)
        if not self._holders[position]:
            del self._holders[position]
            self._waiting.append(position)

    def samples(self, ticket: Ticket) -> array[int]:
        """The indices of a portion."""
        assert self.order is not None
        return self.order.batch(ticket[1])

    def progress(self) -> tuple[int, list[tuple[int, int]]]:
        """The epoch of the present evaluation, and how many portions are done if it isn't over."""
        return self.last_epoch, [(self.last_epoch, self.num_done)] if self.is_open else []

    def state(self) -> dict[int, Order]:
        """Nothing: an evaluation that was interrupted begins anew."""
        return {}
