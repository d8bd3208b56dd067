"""What Downpour and Hogwild make of a run: updates that the coordinator counts, and plain checkpoints between them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Checkpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from ._arguments import check_seconds, check_whole
from ._asynchronous import AsynchronousStrategy
from ._due import callbacks_of, checkpoints_of, save_what_is_due
from .consistency import snapshot as snapshots
from .consistency.buffers import BufferAverage
from .consistency.client import RevokedError
from .consistency.coordinator import VALIDATION
from .consistency.events import to_pairs, unpack
from .consistency.hosting import rest
from .consistency.mailbox import HostLostError
from .consistency.optimizers import Hyperparameters, adopt, hyperparameters
from .consistency.staleness import StalenessStatistics

OWN_STATE = "squall_asynchronous"  # the key of what a checkpoint has besides stock Lightning's


class UpdatingStrategy(AsynchronousStrategy):
    """Workers whose every update is counted; where the weights lie, and who steps them, a subclass says.

    Args:
        warm_start_steps: Updates that the leader makes alone before the others begin.
        lease_timeout: Seconds without a sign of life after which a worker counts as lost.
        join_timeout: Seconds that the first workers wait for the others, before they begin without them.
        **options: Passed on to Lightning.

    """

    def __init__(
        self,
        warm_start_steps: int,
        lease_timeout: float,
        join_timeout: float,
        **options: Any,
    ) -> None:
        super().__init__(lease_timeout, **options)
        check_whole("warm_start_steps", warm_start_steps, 0)
        check_seconds("join_timeout", join_timeout)
        self.warm_start_steps = warm_start_steps
        self._join_timeout = join_timeout
        self._parameters: list[nn.Parameter] = []
        self._buffers: BufferAverage | None = None
        self._snapshot: snapshots.Snapshot | None = None
        self._num_steps = 0
        self._log_every = 50
        self._num_members: dict[Optimizer, int] = {}
        self._sent_hyper: list[Hyperparameters] | None = None
        self._heard_hyper: Sequence[Hyperparameters] | None = None
        self._version = 0
        self._all_have_ended = False
        self._last_report: dict[str, Any] = {}
        self._unstep: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        self._own_state: dict[str, Any] = {}  # after fit, at its end
        self._events = b""

    def _run_options(self, trainer: Trainer) -> dict[str, Any]:
        return {
            **super()._run_options(trainer),
            "warm_start_steps": self.warm_start_steps,
            "join_timeout": self._join_timeout,
        }

    def _known_version(self) -> int:
        return self._version

    @property
    def staleness(self) -> StalenessStatistics:
        """How stale the updates of the last run were, all workers'."""
        statistics = StalenessStatistics()
        statistics.counts.update({int(value): int(count) for value, count in self._last_report.get("staleness", [])})
        return statistics

    @property
    def report(self) -> Mapping[str, Any]:
        """What the last run did, in numbers: updates, losses, samples, workers."""
        return self._last_report

    @property
    def events(self) -> list[list[Any]]:
        """The interleaving of the last run, on the leader: every lease, fetch and update in their order.

        It is made into a list each time it is asked for: keep the list.
        """
        return to_pairs(unpack(self._events))

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _digest_of_layout(self) -> str:
        """What must be the same on all ranks."""

    @abstractmethod
    def _lay_out(self) -> None:
        """On the leader: put weights and optimizer state where all can reach them, and let the run begin."""

    @abstractmethod
    def _join(self) -> None:
        """Enter the run, again if need be, and compute with its present weights."""

    @abstractmethod
    def _step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Make an update of the gradients that lie ready; ``step()`` is the optimizer's own."""

    @abstractmethod
    def _read_snapshot(self, with_state: bool) -> snapshots.Snapshot:
        """Read the weights out, and compute with what was read."""

    @abstractmethod
    def _leave_snapshot(self) -> None:
        """Compute with the present weights again."""

    @abstractmethod
    def _leave(self, stop: bool) -> int | None:
        """Wait for the end of the run, and compute with its final weights.

        Args:
            stop: The run ends when the leader's does: the queue has nothing left, or the leader was told to stop.

        Returns:
            None, or the rank that takes over if the leader was lost.

        """

    @abstractmethod
    def _write_edits(self) -> bool:
        """Let what callbacks and user code wrote into this worker's weights be everybody's.

        Returns:
            Whether there was anything.

        """

    # ------------------------------------------------------------------ into the loop

    def setup(self, trainer: Trainer) -> None:
        """Refuse what would change the set of parameters, while nothing has begun."""
        super().setup(trainer)
        if self._fitting:
            self._own_state = {}
            for callback in callbacks_of(trainer):
                if isinstance(callback, BaseFinetuning):
                    raise MisconfigurationException(
                        f"{type(callback).__name__} gives the optimizer more parameters during fit, but those of an"
                        " asynchronous run are laid out at its start. Give configure_optimizers all parameters, and"
                        " switch requires_grad."
                    )

    def on_train_start(self) -> None:
        """Put the weights where all can reach them, and begin."""
        trainer = self._trainer
        assert self.lightning_module is not None
        self._version = self._resumed.get("version", trainer.global_step)
        samples = self._batches.digest() if self._batches is not None and self.world_size > 1 else ""
        digests = self._meet("plan", [self._digest_of_layout(), samples]).values()
        if len({layout for layout, _ in digests}) > 1:
            raise MisconfigurationException(
                "The ranks have not built the same module and optimizers: their parameters differ in number, shape or"
                " order. Build them alike on every rank."
            )
        if len({samples for _, samples in digests}) > 1:
            raise MisconfigurationException(
                "The ranks' samplers list different samples, but one list is dealt out to all ranks: the others' would"
                " never be trained on. Let the sampler list all samples on every rank, or leave it out."
            )
        self._buffers = BufferAverage(self.lightning_module)
        if self._has_shards and not self.client.welcome["started"]:
            self._lay_out()
        self._rejoining(self._join)
        for optimizer in self.optimizers:
            self._num_members[optimizer] = sum(len(group["params"]) for group in optimizer.param_groups)
            self._take_over_step(optimizer)
        self._heard_hyper = [hyperparameters(optimizer) for optimizer in self.optimizers]  # the same on all ranks
        self._num_steps = 0
        self._log_every = max(int(trainer.__dict__.get("log_every_n_steps") or 0), 1)
        self._know_where_it_begins(trainer)
        self._followed_schedulers()
        self._begin_loop(trainer)

    def _take_over_step(self, optimizer: Optimizer) -> None:
        """Where the optimizer would step, make an update; whoever calls it: Lightning, a gradient scaler, the user."""
        original = optimizer.__dict__.get("step")
        own = optimizer.step

        def step(itself: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if sum(len(group["params"]) for group in itself.param_groups) != self._num_members[itself]:
                raise MisconfigurationException(
                    f"{type(itself).__name__} was given more parameters during fit, but those of an asynchronous run"
                    " are laid out at its start. Give configure_optimizers all parameters, and switch requires_grad."
                )
            self._step(itself, lambda: own(*args, **kwargs))
            return loss

        if hasattr(original, "_wrapped_by_lr_sched"):  # or the scheduler takes it for a step that it doesn't see
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer._opt_called = True  # type: ignore[attr-defined]

        def undo() -> None:
            optimizer.__dict__.pop("step", None)
            if original is not None:
                optimizer.step = original  # type: ignore[method-assign]

        self._unstep.append(undo)

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compute with the present weights; while a snapshot was looked at, the others went on."""
        super().on_train_batch_start(batch, batch_idx)
        if self._batches is None and not self.is_leader:  # or the queue says how the run is going, and when to begin
            self._heard(self._call({"op": "gate"})[0])
        assert self._buffers is not None
        if self._snapshot is not None:
            self._keep_edits()
            self._snapshot = None
            self._buffers.take_back()
            self._rejoining(self._leave_snapshot)

    def _keep_edits(self) -> None:
        """Write what was edited; say so once, if there are others who have made something of it meanwhile."""
        if self._write_edits() and self.world_size > 1:
            self._warn_once(
                "The weights were edited between two steps, by a callback or by the module itself. What a rank has"
                " edited replaces, element by element, what others have made of it meanwhile."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"Rank {self.global_rank}: {message}", stacklevel=2)

    def _rejoining(self, action: Callable[[], Any]) -> None:
        """Do what may find this worker given up; it then joins again, and what it was about to push is lost."""
        try:
            action()
        except HostLostError:
            self._rejoin(greets=False)
        except RevokedError:
            self._rejoin()

    def _rejoin(self, greets: bool = True) -> None:
        # Batches in hand keep their tickets, which are worth nothing now: so their gradients will be refused.
        try:
            if greets:
                self.client.greet()
            self._join()
        except RevokedError:
            self._rejoin()

    def _count(self, version: int) -> None:
        """Let ``trainer.global_step`` be the number of updates, once Lightning has counted this step."""
        epoch_loop = self._trainer.fit_loop.epoch_loop
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            total = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        else:
            total = epoch_loop.manual_optimization.optim_step_progress.total
        total.ready, total.completed = version, version - 1

    def _changed_hyperparameters(self) -> list[Hyperparameters] | None:
        """What the leader's schedulers and callbacks have set, if it is not what was sent last."""
        if not self.is_leader:
            return None
        hyper = [hyperparameters(optimizer) for optimizer in self.optimizers]
        changed, self._sent_hyper = hyper != self._sent_hyper, hyper
        return hyper if changed else None

    def _adopt_hyperparameters(self, hyper: Sequence[Hyperparameters] | None) -> None:
        """Learning rates and the like are the leader's, whatever this worker's own schedulers have set meanwhile."""
        self._heard_hyper = hyper or self._heard_hyper
        if self.is_leader or self._heard_hyper is None:
            return
        for optimizer, groups in zip(self.optimizers, self._heard_hyper, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                adopt(group, values)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step, and log how the run is going."""
        output = super().training_step(*args, **kwargs)
        if self.is_leader and self._num_steps % self._log_every == 0:
            self._last_report, _ = self._call({"op": "report"})
        module = self.lightning_module
        assert module is not None
        if self._last_report and module._trainer is not None:
            module.log_dict(self._metrics(), on_step=True, on_epoch=False, batch_size=1)
        return output

    def _metrics(self) -> dict[str, float]:
        report, staleness = self._last_report, self.staleness
        return {
            "staleness/mean": staleness.mean,
            "staleness/max": float(staleness.maximum),
            "updates/applied": float(report["version"]),
            "updates/lost": float(report["num_lost"]),
            "updates/rolled_back": float(report["num_rolled_back"]),
            "queue/samples": float(report["num_samples"]),
            "queue/reissued": float(report["num_reissued"]),
            "workers/live": float(report["num_live"]),
        }

    # ------------------------------------------------------------------ one snapshot

    def _take_snapshot(self, with_state: bool) -> snapshots.Snapshot:
        """Compute with one reading of all weights, and know all that a checkpoint needs of it."""
        if self._snapshot is None or (with_state and not self._snapshot.report.get("with_state")):
            if self._snapshot is None and self._in_loop and self.is_leader:
                self._keep_edits()  # or they are gone when the weights are what was read
            shot = self._read_snapshot(with_state)
            shot.report["with_state"] = with_state
            self._lend_buffers()
            self._snapshot = shot
            self._last_report = shot.report
            self._catch_up()
        return self._snapshot

    def _lend_buffers(self) -> None:
        assert self._buffers is not None
        if self._buffers.floating or self._buffers.counting:
            reply, payload = self.client.call({"op": "buffers"})
            packed, at = [], 0
            for size in reply["sizes"]:
                packed.append(bytes(payload[at : at + size]))
                at += size
            self._buffers.lend(packed)

    def on_validation_start(self) -> None:
        """Validate one reading of the weights, whatever the others do meanwhile."""
        if self._in_loop:
            saves = any(isinstance(callback, Checkpoint) for callback in callbacks_of(self._trainer))
            self._take_snapshot(with_state=saves or self.num_nodes > 1)  # or a host may be lost, and its shards
            self._log_histogram()

    def on_validation_end(self) -> None:
        """Let the others have what validation said, which is the leader's alone."""
        if self._in_loop and self.world_size > 1:
            metrics = self._trainer._logger_connector.metrics["callback"]
            self._insisting(lambda: self.client.share(VALIDATION, dict(metrics)))

    def _log_histogram(self) -> None:
        values = self.staleness.values()
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and len(values):
                logger.experiment.add_histogram("staleness", values, self._version)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of one snapshot, and the average of all workers' running statistics."""
        if self._in_loop:
            self._take_snapshot(with_state=True)
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The state that one device's optimizer would hold."""
        if not self._in_loop:
            return super().optimizer_state(optimizer)
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        index_of = {parameter: index for index, parameter in enumerate(self._parameters)}
        return snapshots.optimizer_state_dict(plain, index_of, self._take_snapshot(with_state=True))

    def _settle(self) -> None:
        shot = self._take_snapshot(with_state=True)
        self._version = shot.version
        self._count(shot.version + 1)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one plain file, with what this Strategy needs to resume under a key of its own."""
        if self.is_leader:
            super().save_checkpoint(self._with_own_state(checkpoint), filepath, storage_options)

    def _with_own_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        own = self._own_state
        if self._in_loop:
            own = {} if self._snapshot is None else self._state_at(self._snapshot)
        return {**checkpoint, OWN_STATE: own} if own else checkpoint

    def _state_at(self, shot: snapshots.Snapshot) -> dict[str, Any]:
        """What a checkpoint needs besides stock Lightning's, to resume from one version."""
        return {"version": shot.version, "queue": shot.report["queue"]}

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of any strategy."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = dict(checkpoint.get(OWN_STATE) or {})
        return checkpoint

    # ------------------------------------------------------------------ out of the loop

    def _end_loop(self, trainer: Trainer) -> None:
        """Hand in what is left, wait for the others, and end with the weights that all end with."""
        if self._in_loop and self._buffers is not None:
            if self.is_leader:
                self._keep_edits()
            self._buffers.take_back()
            self._hand_in_the_rest()
            if self._snapshot is not None:
                self._snapshot = None
                self._rejoining(self._leave_snapshot)
            stop = self._batches is not None or trainer.should_stop
            successor = self._insisting(lambda: self._leave(stop))
            if successor is not None:
                self._end_without_leader(trainer, successor)
            self._keep_the_end()
            if self._snapshot is not None:
                own = self._state_at(self._snapshot)
                whole = not any(value for name, value in own.items() if name != "version")
                self._own_state = {} if whole else own  # nothing is left to train on, and nothing is owed
            self._buffers.keep()
            self._count(self._version + 1)
            self._catch_up()
            if self.is_leader:
                for callback in checkpoints_of(trainer):
                    save_what_is_due(trainer, callback)
            self._give_steps_back()
        super()._end_loop(trainer)
        self._all_have_ended = True

    def _keep_the_end(self) -> None:
        """Know what the run came to: the leader with the optimizers' state, the others without."""
        if self.is_leader:
            self._version = self._take_snapshot(with_state=True).version
            for optimizer in self.optimizers:
                optimizer.load_state_dict(self.optimizer_state(optimizer))
            self._tell_the_end()
        else:
            self._lend_buffers()
            self._last_report, _ = self.client.call({"op": "report"})
            self._version = int(self._last_report["version"])

    def _tell_the_end(self) -> None:
        """The last step's metrics were on their way while the last updates were made."""
        self._events = bytes(self.client.call({"op": "events"})[1])
        self._log_histogram()
        metrics = self._metrics()
        trainer = self._trainer
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._version)
        known = trainer._logger_connector._callback_metrics
        known.update({name: torch.tensor(value) for name, value in metrics.items()})

    def _hand_in_the_rest(self) -> None:
        """Say which batches led to no update."""
        if self._tickets:
            tickets = list(self._tickets)
            self._tickets.clear()
            self._rejoining(lambda: self.client.call({"op": "done", "tickets": tickets}))

    def _give_steps_back(self) -> None:
        while self._unstep:
            self._unstep.pop()()

    def _leave_run(self) -> None:
        self._give_steps_back()
        if self._buffers is not None:
            self._buffers.take_back()
        self._buffers = self._snapshot = None
        self._sent_hyper = self._heard_hyper = None
        self._warned.clear()
        self._num_members.clear()
        if self.is_global_zero and (self._all_have_ended or self.world_size == 1):
            rest()  # after an exception others may still need the weights
        self._all_have_ended = False
        super()._leave_run()
