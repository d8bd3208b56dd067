"""Sandblaster: a batch in portions, dealt out to who is idle, and dealt out twice near its end.

Who gets which portion, and whose is late enough to be given to another, too, is decided by what real runs have:
:class:`~squall.consistency.sandblaster.portions.Portions` and :class:`~squall.consistency.sandblaster.pace.Pace`.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from squall._arguments import check_flag, check_whole
from squall.consistency.order import Order
from squall.consistency.sandblaster.pace import Pace
from squall.consistency.sandblaster.portions import Portions

from .crew import Crew
from .distributions import Distribution
from .outcome import Outcome, Report


class Sandblaster:
    """Batches of many portions, each evaluated by all workers, with a direction found between two of them.

    Args:
        crew: The workers; ``compute`` is of one portion.
        portions: Of a batch.
        push: Seconds in which a portion's gradient is handed in.
        direction: Seconds between two batches, in which shards find where to go.
        backups: Whether idle workers compute what others have, too.
        batch_size: Samples of a portion.

    """

    def __init__(
        self,
        crew: Crew,
        portions: int,
        push: Distribution,
        direction: Distribution,
        *,
        backups: bool = True,
        batch_size: int = 1,
    ) -> None:
        check_whole("sandblaster.portions", portions, 1)
        check_flag("sandblaster.backups", backups)
        self._crew, self._num_portions = crew, portions
        self._push, self._direction = push, direction
        self._backs_up, self._batch_size = backups, batch_size

    def run(self, batches: int, seed: int = 0, report: Report | None = None) -> Outcome:
        """Simulate so many batches.

        Args:
            batches: An update of the weights each.
            seed: Equal ones give equal results.
            report: Hears what share is done.

        Returns:
            What it came to; lost samples are those of portions that another was first to hand in.

        """
        check_whole("batches", batches, 1)
        run = _Run(self._num_portions, self._backs_up)
        *rngs, last = np.random.default_rng(seed).spawn(self._crew.workers + 1)
        for rank, rng in enumerate(rngs):
            run.env.process(run.work(rank, self._crew.of_rank(rank).stream(rng), self._push.stream(rng)))
        direction = self._direction.stream(last)
        seconds = 0.0
        for batch in range(batches):
            run.begin(batch)
            run.env.run(run.over)
            seconds = run.env.now
            run.env.run(run.env.timeout(next(direction)))
            if report is not None:
                report((batch + 1) / batches)
        samples = batches * self._num_portions * self._batch_size
        ideal = self._crew.speed * self._batch_size
        return Outcome("sandblaster", self._crew.workers, seconds, batches, samples, ideal, 0,
                       run.num_in_vain * self._batch_size)  # fmt: skip


class _Run:
    def __init__(self, num_portions: int, backs_up: bool) -> None:
        self.env = simpy.Environment()
        self.num_in_vain = 0
        self._portions, self._pace, self._backs_up = Portions(), Pace(), backs_up
        self._portions.open(0, Order(array("q", [1]) * num_portions, array("q", [0]) * num_portions,
                                     bytearray(num_portions)))  # fmt: skip
        self.over = self._begun = self.env.event()

    def begin(self, number: int) -> None:
        """Open a batch."""
        self._portions.begin(number)
        self.over = self.env.event()
        begun, self._begun = self._begun, self.env.event()
        begun.succeed()

    def work(self, rank: int, compute: Any, push: Any) -> Generator[Any, Any, None]:
        """Compute portions, as long as there are any."""
        env, portions, pace = self.env, self._portions, self._pace
        while True:
            pace.now = env.now
            pace.asks(rank)
            ticket = portions.lease(rank) if portions.is_open else None
            if ticket is None and self._backs_up and portions.is_open:
                ticket = portions.lease_again(rank, lambda holders: pace.are_late(holders, rank))
            if ticket is None:
                yield self._begun  # the next batch
                continue
            pace.is_answered(rank)
            yield env.timeout(next(compute) + next(push))
            if not portions.holds(rank, [ticket]):
                self.num_in_vain += 1
                continue
            portions.complete(rank, [ticket], [0.0])
            if portions.is_done:
                portions.close()
                self.over.succeed()
