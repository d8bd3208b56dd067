"""Faults and delays at given steps of given ranks: an asynchronous run, made a script."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ._arguments import check_whole
from ._asynchronous import AsynchronousStrategy


class EventInjector(Callback):
    """Makes ranks of an asynchronous run die, wait for each other, or fall behind, at steps of one's choice.

    Steps count a rank's own batches from 0. A delay or a barrier *at* a step stands before the rank asks for the
    batch after it is done with the ones before: while a rank waits there, it does nothing at all. (A rank always has
    the next batch in hand already. A replica of several ranks waits as one, and is given by its number.) A failure at
    a step is in the midst of it: its samples are dealt to somebody else. Whatever could be waited for in vain, because
    its rank is lost or has finished, is not waited for.

    A script that leaves open who comes first can be replayed all the same: ``trainer.strategy.events`` of one run,
    given as ``schedule`` to the next, repeats the interleaving, and gives identical weights.

    Example:
        >>> from squall import EventInjector
        >>> events = EventInjector().barrier_at([0, 1], 0).delay_at(1, 0, until_version=5).fail_at(1, 3)
        >>> print(events)
        barrier_at([0, 1], 0).delay_at(1, 0, until_version=5).fail_at(1, 3)

    """

    def __init__(self) -> None:
        self._barriers: dict[int, list[list[int]]] = {}
        self._delays: dict[tuple[int, int], int] = {}
        self._failures: set[tuple[int, int]] = set()
        self._ranks: set[int] = set()
        self._script: list[str] = []
        self._step = 0

    def __str__(self) -> str:
        return ".".join(self._script)

    def fail_at(self, rank: int, step: int) -> EventInjector:
        """Have a rank end itself with ``kill -9``, with the batch of this step in hand.

        Args:
            rank: Which.
            step: Number of its own batches before.

        """
        self._failures.add((check_whole("rank", rank, 0), check_whole("step", step, 0)))
        self._ranks.add(rank)
        self._script.append(f"fail_at({rank}, {step})")
        return self

    def delay_at(self, rank: int, step: int, until_version: int) -> EventInjector:
        """Have a rank wait, before this step, until the run has made so many updates.

        Args:
            rank: Which.
            step: Number of its own batches before.
            until_version: Number of updates, by all ranks.

        """
        place = check_whole("rank", rank, 0), check_whole("step", step, 0)
        self._delays[place] = check_whole("until_version", until_version, 0)
        self._ranks.add(rank)
        self._script.append(f"delay_at({rank}, {step}, until_version={until_version})")
        return self

    def barrier_at(self, ranks: list[int], step: int) -> EventInjector:
        """Have ranks wait for each other, before this step of each of them.

        Args:
            ranks: Which.
            step: Number of each one's own batches before.

        """
        chosen = sorted({check_whole("rank", rank, 0) for rank in ranks})
        self._barriers.setdefault(check_whole("step", step, 0), []).append(chosen)
        self._ranks.update(chosen)
        self._script.append(f"barrier_at({chosen}, {step})")
        return self

    # ------------------------------------------------------------------ carried out

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a script that this run can't follow."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, AsynchronousStrategy):
            name = type(trainer.strategy).__name__
            raise MisconfigurationException(
                f"EventInjector scripts asynchronous runs, and this one's strategy is {name}."
                ' Use Trainer(strategy="downpour"), or take the callback out.'
            )
        last, num_here = max(self._ranks, default=0), trainer.world_size
        if last >= num_here:
            raise MisconfigurationException(
                f"EventInjector has events of rank {last}, but the ranks of this run are 0 to {num_here - 1}: {self}."
                f" Give the Trainer {last + 1} devices in all, or take them out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._step = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait before the first batch is asked for."""
        if self._step == 0:
            self._wait(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fail."""
        if (trainer.global_rank, self._step) in self._failures:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait before the next batch is asked for."""
        self._step += 1
        self._wait(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which failures have not come, since a run that was not put to the test looks like one that passed it."""
        rank = trainer.global_rank
        missed = sorted(step for failing, step in self._failures if failing == rank and step >= self._step)
        if missed:
            warnings.warn(
                f"fail_at({rank}, {missed[0]}) did not happen: rank {rank} had only {self._step} batches.", stacklevel=2
            )

    def _wait(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsynchronousStrategy)
        rank = strategy.worker
        for number, ranks in enumerate(self._barriers.get(self._step, ())):
            if rank in ranks:
                strategy.wait_for_ranks(f"{self._step}.{number}", ranks)
        if (rank, self._step) in self._delays:
            strategy.wait_for_version(self._delays[rank, self._step])
