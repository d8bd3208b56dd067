"""What is due every so many steps of the run, of which a rank makes, and sees, only some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.types import LRSchedulerConfig

from .consistency.progress import Progress


class Every(int):
    """A number of steps that ``step % every == 0`` never misses, if steps are passed over.

    Args:
        every: The number.
        passed: How many multiples have been passed.
        reached: How many have been before those that count, and at a step, which is as good as ``step // every``.

    Example:
        >>> every = Every(10, 0, lambda step: (0, step // 10))
        >>> [step for step in (4, 9, 12, 19, 31) if step % every == 0]
        [12, 31]

    """

    def __new__(cls, every: int, passed: int, reached: Callable[[int], tuple[int, int]]) -> Every:
        self = super().__new__(cls, every)
        self.passed, self._reached = passed, reached
        return self

    passed: int
    _reached: Callable[[int], tuple[int, int]]

    def __rmod__(self, step: int) -> int:
        return 0 if self.passes(step) else 1

    def passes(self, step: int) -> bool:
        """Whether a multiple has been passed since this was asked last."""
        before, reached = self._reached(step)
        passed, self.passed = max(self.passed, before), reached
        return reached > passed


def save_by_version(callback: ModelCheckpoint, version: int) -> Callable[[], None]:
    """Let checkpoints be written when their step has been passed: the leader does not see every update.

    Args:
        callback: Whose ``every_n_train_steps`` count updates.
        version: Updates so far.

    Returns:
        Takes this back.

    """
    every = callback._every_n_train_steps
    if every > 1:
        callback._every_n_train_steps = Every(every, version // every, lambda step: (0, step // every))

    def undo() -> None:
        callback._every_n_train_steps = every

    return undo


def save_what_is_due(trainer: Trainer, callback: ModelCheckpoint) -> None:
    """Write a checkpoint of the end, if it passed a step since the leader looked.

    Args:
        trainer: Whose ``global_step`` is the run's by now.
        callback: Which writes it; not if it monitors what validation says, since none has been at this step.

    """
    every = callback._every_n_train_steps
    if not isinstance(every, Every) or not every.passes(trainer.global_step) or callback.monitor is not None:
        return
    if not callback._should_skip_saving_checkpoint(trainer):
        candidates = callback._monitor_candidates(trainer)
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)


def validate_by_progress(
    trainer: Trainer, num_batches: int, num_done: int, seen: Callable[[int], int]
) -> Callable[[], None]:
    """Let validation be due when ``val_check_interval`` batches have been done by all, of which the leader does some.

    On its last batch of an epoch, the leader takes the others' for done.

    Args:
        trainer: The leader's.
        num_batches: Of an epoch.
        num_done: Batches of this epoch for which validation has been due.
        seen: Says how many batches of an epoch are done.

    Returns:
        Takes this back.

    """
    interval, loop = trainer.val_check_batch, trainer.fit_loop
    if interval is None or interval == float("inf"):  # after so many minutes; on the last batch
        return lambda: None
    every = int(interval)

    def multiples(epoch: int, num_done: int) -> int:
        if trainer.check_val_every_n_epoch is None:
            return (epoch * num_batches + num_done) // every
        return epoch * (num_batches // every) + num_done // every

    progress: Any = loop.epoch_progress

    def reached(_: int) -> tuple[int, int]:
        epoch = progress.current.processed
        done = num_batches if loop.epoch_loop.batch_progress.is_last_batch else seen(epoch)
        before = 0 if trainer.check_val_every_n_epoch is None else multiples(epoch, 0)  # not of epochs without any
        return before, multiples(epoch, done)

    trainer.val_check_batch = Every(every, multiples(progress.current.processed, num_done), reached)

    def undo() -> None:
        trainer.val_check_batch = interval

    return undo


class StepCount:
    """Steps that one device would have made of the batches that all workers have trained on since this was made.

    So many does ``trainer.estimated_stepping_batches`` foretell. Updates are more: what is left over in each worker's
    hands at the end of an epoch is one; or fewer, if several steps are pushed as one.

    Args:
        progress: How far the run is.
        num_batches: Of an epoch, now.
        num_accumulated: Batches in a step, now: callbacks may change it from epoch to epoch.

    """

    def __init__(
        self, progress: Callable[[], Progress], num_batches: Callable[[], int], num_accumulated: Callable[[], int]
    ) -> None:
        self._progress, self._num_batches, self._num_accumulated = progress, num_batches, num_accumulated
        self._seen = progress()
        self._num_steps = 0

    def __call__(self) -> int:
        """How many by now."""
        seen, options = self._progress(), (self._num_batches(), self._num_accumulated())
        ahead = seen.num_steps(*options) - self._seen.num_steps(*options)
        if ahead > 0:  # not if what a checkpoint says of an epoch is still to be told to the queue
            self._num_steps += ahead
            self._seen = seen
        return self._num_steps


class Followed:
    """Lets a scheduler step as often as a count says, whenever it is asked to.

    Args:
        config: Of the scheduler.
        count: Steps of the run.

    """

    def __init__(self, config: LRSchedulerConfig, count: Callable[[], int]) -> None:
        self.scheduler: Any = config.scheduler
        self._frequency = max(int(config.frequency), 1)
        self._count = count
        self._made = self._due
        self._kind = kind = type(self.scheduler)

        def step(itself: Any, *args: Any, **kwargs: Any) -> None:
            due = self._due
            for _ in range(due - self._made):
                kind.step(itself, *args, **kwargs)
            self._made = max(self._made, due)

        # Not an attribute of the scheduler: it would be saved with its state.
        self.scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})

    @property
    def _due(self) -> int:
        return self._count() // self._frequency

    @property
    def is_behind(self) -> bool:
        """Whether it would step."""
        return self._due > self._made

    def let_go(self) -> None:
        """Let it step by itself again."""
        self.scheduler.__class__ = self._kind


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """A Trainer's callbacks."""
    found: list[Callback] = trainer.__dict__["callbacks"]  # Lightning does not declare it
    return found


def checkpoints_of(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those of them that write checkpoints."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint)]
