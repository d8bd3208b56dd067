"""How far all workers together have come in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Batches that were trained on, by anybody.

    Args:
        epoch: The newest that has begun; -1 before any.
        open: Of each epoch that is not finished, how many of its batches are.

    Example:
        >>> progress = Progress(3, {2: 9, 3: 5})  # of 10 batches each
        >>> progress.num_done(1, 10), progress.num_done(2, 10), progress.num_done(4, 10)
        (10, 9, 0)
        >>> progress.num_steps(10, 4)
        11

    """

    epoch: int = -1
    open: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, said: Sequence[Any]) -> Progress:
        """What the coordinator says, see :meth:`WorkQueue.progress`."""
        epoch, pairs = said
        return cls(int(epoch), {int(number): int(done) for number, done in pairs})

    def num_done(self, epoch: int, num_batches: int) -> int:
        """How many batches of an epoch are done.

        Args:
            epoch: Its number.
            num_batches: Of a whole epoch.

        """
        return self.open.get(epoch, num_batches if epoch <= self.epoch else 0)

    def num_steps(self, num_batches: int, num_accumulated: int) -> int:
        """How many steps one device would have made of what is done.

        Args:
            num_batches: Of a whole epoch.
            num_accumulated: Batches in a step; an epoch's last may have fewer.

        """
        whole = (self.epoch + 1 - len(self.open)) * -(-num_batches // num_accumulated)
        return whole + sum(-(-done // num_accumulated) for done in self.open.values())
