"""A job that SLURM wants the place of: save together, be queued again, and go on where it was.

The requeue signal has one owner, and it is this. Lightning's own handler writes a checkpoint within the signal, where
each rank happens to be, and those that compute one step together hang in its first collective; submitit's requeues
without one. Here a signal is only noted; after the batch, the ranks agree, and save the same step.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ._allocation import dead_nodes, kill_wait, queue_again
from .consistency.hosting import KILL_WAIT

_PREFIX = "hpc_ckpt_"  # where Lightning looks under SLURM, if it is told of no checkpoint


class Requeue(Callback):
    """What one rank does about its job's end.

    ``SIGUSR1`` (``#SBATCH --signal=USR1@90``) announces the time limit: save, and have the job queued again.
    ``SIGTERM`` is what SLURM sends when it requeues the job by itself, preempts or cancels it: save. What is saved goes
    to ``default_root_dir``, and away again at the end of the fit that it was for.

    Args:
        requeue_signal: Of the cluster environment.
        leads_alone: Whether rank 0 saves by itself, or with the ranks that are one worker with it, and the others go
            on until it tells them to stop.
        is_given: Whether the user has said which checkpoint to go on from.

    """

    def __init__(self, requeue_signal: signal.Signals, leads_alone: bool, is_given: bool) -> None:
        self._requeue_signal = requeue_signal
        self._leads_alone = leads_alone
        self._is_given = is_given
        self._earlier = signal.getsignal(signal.SIGTERM)  # the user's own
        self._pid = os.getpid()
        self._heard: set[int] = set()
        self._saved: set[str] = set()  # what Lightning would go on from at the next start
        self.exit_code: int | None = None  # of a run that was stopped

    def listen(self, *signals: signal.Signals) -> None:
        """Note these signals from now on."""
        for signum in signals:
            signal.signal(signum, self._hear)

    def _hear(self, signum: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a data worker that was forked: SLURM sends signals to it, too
            return
        self._heard.add(signum)
        text = f"squall: {signal.Signals(signum).name}: the run is saved after this batch, and ends.\n"
        os.write(2, text.encode())  # a stream that is being written to must not be entered again
        if signum == signal.SIGTERM and callable(self._earlier):
            self._earlier(signum, frame)  # type: ignore[arg-type]

    def go_on(self, trainer: Trainer) -> str | None:
        """The checkpoint that a job started again goes on from; None if there is none, or it starts for the first time.

        The newest of what was saved for it and what a ``ModelCheckpoint(save_last=True)`` has written.

        """
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
            return None
        saved = trainer._checkpoint_connector._hpc_resume_path
        self._saved = {saved} if saved is not None else set()
        found = set(self._saved)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                found |= callback._find_last_checkpoints(trainer)
        times = {path: os.stat(path).st_mtime for path in found if os.path.exists(path)}
        return max(times, key=lambda path: times[path], default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals over from Lightning, which gives them back at its teardown."""
        self.listen(self._requeue_signal, signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save and stop, if any rank has heard a signal."""
        if self.exit_code is not None or trainer.fit_loop._should_accumulate():
            return
        strategy: Any = trainer.strategy
        if self._leads_alone and not strategy.is_leader:
            return

        def any_of(said: bool) -> bool:
            if self._leads_alone:
                return bool(strategy.any_of_worker(said))
            return bool(strategy.reduce_boolean_decision(said, all=False))

        if not any_of(bool(self._heard)):
            return
        is_announced = any_of(self._requeue_signal in self._heard)
        path = self._save(trainer)
        self.exit_code = 128 + signal.SIGTERM
        if is_announced:
            self.exit_code = 0
            if trainer.is_global_zero and not queue_again():
                self.exit_code = 1
                sys.stderr.write(f"SLURM would not queue this job again. Submitted anew, it goes on from {path}.\n")
        if not self._leads_alone:
            raise SIGTERMException(self.exit_code)
        # Others hear of the end from the coordinator, so it must be one: less what takes time.
        trainer.should_stop = True
        trainer.limit_val_batches = 0
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def _save(self, trainer: Trainer) -> str:
        root = trainer.default_root_dir
        path = trainer._checkpoint_connector.hpc_save_path(root)
        if not self._leads_alone:
            path = trainer.strategy.broadcast(path)
        # A job that is killed while it saves must not find half a checkpoint.
        at_once = "://" in path or isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        written = path if at_once else os.path.join(root, f".unfinished-{os.environ.get('SLURM_JOB_ID', '')}.ckpt")
        trainer.save_checkpoint(written)
        if trainer.is_global_zero and not at_once:
            os.replace(written, path)
        self.forget(trainer)
        self._saved = {path}
        return path

    def forget(self, trainer: Trainer) -> None:
        """Remove what was saved: it is out of date, and whoever fits or tests next would take it for theirs."""
        found = str(trainer.ckpt_path or "")  # by Lightning
        folder, name = os.path.split(found)
        if not self._is_given and name.startswith(_PREFIX) and folder == str(trainer.default_root_dir):
            self._saved.add(found)
        for path in self._saved if trainer.is_global_zero else ():
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                os.unlink(path)
        self._saved = set()


@contextmanager
def _signals_kept(*signals: signal.Signals) -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)


def run_in_slurm(
    environment: ClusterEnvironment,
    leads_alone: bool,
    trainer: Trainer | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call what a Trainer does, as a job that may be queued again.

    Args:
        environment: Nothing happens under another than SLURM's, or without its ``auto_requeue``.
        leads_alone: As of :class:`Requeue`.
        trainer: Whose `function` it is.
        function: What to call.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What `function` returns.

    Raises:
        SystemExit: If the run was stopped for a signal, or for a node that has died.

    """
    owned = isinstance(environment, SLURMEnvironment) and environment.auto_requeue and trainer is not None
    if not owned or threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
    assert isinstance(environment, SLURMEnvironment)
    assert trainer is not None
    if leads_alone:
        os.environ.setdefault(KILL_WAIT, kill_wait())
    requeue_signal = environment.requeue_signal or signal.SIGUSR1
    with _signals_kept(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, requeue_signal):
        if trainer.state.fn != TrainerFn.FITTING:
            return function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs)
        requeue = Requeue(requeue_signal, leads_alone, bound.arguments.get("ckpt_path") not in (None, "hpc"))
        requeue.listen(requeue_signal)
        path = requeue.go_on(trainer)
        if path is not None:
            bound.arguments["ckpt_path"] = path
        trainer.callbacks.append(requeue)  # type: ignore[attr-defined]
        try:
            result = function(*bound.args, **bound.kwargs)
        except Exception:
            lost = dead_nodes() if trainer.num_nodes > 1 else []
            if not lost:
                raise
            traceback.print_exc()
            sys.stderr.write(f"SLURM's {', '.join(lost)} is gone: the job is queued again.\n")
            queue_again()  # which every rank that is left asks for; nobody knows who that is
            raise SystemExit(1) from None
        finally:
            trainer.callbacks.remove(requeue)  # type: ignore[attr-defined]
        exit_code = trainer.strategy.broadcast(requeue.exit_code) if leads_alone else None
        if exit_code is not None:
            raise SystemExit(exit_code)
        requeue.forget(trainer)
        return result
