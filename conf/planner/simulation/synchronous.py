"""Training with a barrier a step: all wait for the slowest, and a failure of one stops all."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any

import numpy as np
import simpy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall._arguments import check_whole

from .crew import Crew
from .distributions import Distribution
from .faults import Faults
from .outcome import Outcome, Report

_BLOCK = 1024
_PATIENCE = 1000  # failures without a step that lasts: such a run never ends


class Synchronous:
    """DDP, or columns: every worker computes its part of each step, and an exchange ends it.

    Args:
        crew: The workers.
        exchange: Seconds of a step's exchange, such as an all-reduce.
        faults: Of each worker; any of them stops all, and they go on from the last checkpoint.
        barriers: Exchanges of a step, between which the workers compute equal parts of it: 1 of DDP, one a crossing
            of columns.
        checkpoint_every: Steps between checkpoints; None for none, after which a failure costs everything.
        checkpoint: Seconds that a checkpoint holds all up.
        batch_size: Samples of one worker's step.

    """

    def __init__(
        self,
        crew: Crew,
        exchange: Distribution,
        faults: Faults,
        *,
        barriers: int = 1,
        checkpoint_every: int | None = None,
        checkpoint: float = 0.0,
        batch_size: int = 1,
    ) -> None:
        check_whole("synchronous.barriers", barriers, 1)
        if checkpoint_every is not None:
            check_whole("synchronous.checkpoint_every", checkpoint_every, 1)
        self._crew, self._exchange, self._faults = crew, exchange, faults
        self._barriers = barriers
        self._every = math.inf if checkpoint_every is None else checkpoint_every
        self._checkpoint = checkpoint
        self._batch_size = batch_size

    def run(self, steps: int, seed: int = 0, report: Report | None = None) -> Outcome:
        """Simulate until so many steps are done.

        Args:
            steps: Of all together.
            seed: Equal ones give equal results.
            report: Hears what share is done.

        Returns:
            What it came to.

        Raises:
            MisconfigurationException: If failures come so often that it would never end.

        """
        check_whole("steps", steps, 1)
        env = simpy.Environment()
        counts = {"restarts": 0, "lost": 0}
        env.run(env.process(self._train(env, steps, np.random.default_rng(seed), counts, report)))
        per_step = self._crew.workers * self._batch_size
        return Outcome(
            "synchronous", self._crew.workers, env.now, steps, steps * per_step, self._crew.speed * self._batch_size,
            counts["restarts"], counts["lost"] * per_step,
        )  # fmt: skip

    def durations(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds of one step after the other: at each barrier the slowest's, and the exchange."""

        def block() -> list[float]:
            total = np.zeros(_BLOCK)
            for _ in range(self._barriers):
                total += self._crew.slowest(rng, _BLOCK) / self._barriers + self._exchange.sample(rng, _BLOCK)
            return list(map(float, total))

        return chain.from_iterable(block() for _ in iter(int, 1))

    def _train(
        self,
        env: simpy.Environment,
        steps: int,
        rng: np.random.Generator,
        counts: dict[str, int],
        report: Report | None,
    ) -> Generator[Any, Any, None]:
        fault_rng, step_rng = rng.spawn(2)
        gaps = self._faults.gaps(fault_rng, self._crew.workers)
        restarts = self._faults.restart.stream(fault_rng)
        durations = self.durations(step_rng)
        fails_at = next(gaps)
        done = kept = in_vain = 0
        while done < steps:
            is_due = done - kept >= self._every
            seconds = self._checkpoint if is_due else next(durations)
            if env.now + seconds < fails_at:
                yield env.timeout(seconds)
                if is_due:
                    kept, in_vain = done, 0
                    continue
                done += 1
                if report is not None and done % _BLOCK == 0:
                    report(done / steps)
                continue
            yield env.timeout(fails_at - env.now)
            counts["restarts"] += 1
            counts["lost"] += done - kept + (not is_due)
            done, in_vain = kept, in_vain + 1
            if in_vain > _PATIENCE:
                raise MisconfigurationException(
                    f"faults.mtbf={self._faults.mtbf:g} s of each of {self._crew.workers} workers: {_PATIENCE} failures"
                    " came before a checkpoint, and training goes nowhere. Set a longer faults.mtbf, fewer workers, or"
                    " a shorter synchronous.checkpoint_every."
                )
            yield env.timeout(next(restarts))
            fails_at = env.now + next(gaps)
