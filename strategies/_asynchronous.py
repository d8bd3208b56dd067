"""Ranks that don't wait for each other, under a stock Trainer: who gets which batch, who validates, how it ends."""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sized
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from ._due import Followed, StepCount, callbacks_of, checkpoints_of, save_by_version, validate_by_progress
from ._lease_fetcher import LeaseFetcher
from ._leases import LeasedBatches, can_be_leased, lease, leased_batches, split
from ._live_ranks import LiveRanks
from .consistency.client import LeaderLostError
from .consistency.coordinator import LEADER, VALIDATION
from .consistency.hosting import tidy
from .consistency.jobs import give_port_back
from .consistency.optimizers import adopt, hyperparameters
from .consistency.order import Order
from .consistency.progress import Progress
from .consistency.queue import Ticket
from .launching import HydraAwareLauncher


class AsynchronousStrategy(LiveRanks):
    """What Downpour and Hogwild have in common: a stock training loop over the queue, with one leader.

    Rank 0, the leader, validates, logs and writes checkpoints while the others train on.

    Args:
        lease_timeout: Seconds without a sign of life after which a worker counts as lost.
        **options: Passed on to Lightning.

    """

    def __init__(self, lease_timeout: float, **options: Any) -> None:
        super().__init__(lease_timeout, **options)
        self._in_loop = False
        self._tickets: list[Ticket] = []  # batches whose gradients have not been handed in
        self._batches: LeasedBatches | None = None
        self._makes_training_loaders = False
        self._num_training_loaders = 1
        self._resumed: dict[str, Any] = {}
        self._begins_at = Progress()
        self._num_validations = 0  # of which this worker has heard
        self._followed: list[Followed] = []

    # ------------------------------------------------------------------ the model

    def setup(self, trainer: Trainer) -> None:
        """Prepare the module; during ``fit`` nothing wraps it."""
        if not self._fitting:
            super().setup(trainer)
            return
        self._refuse_layer_sync()
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._share_initial_state()
        self._enter_as_late(trainer)
        self._take_over_loaders(trainer)
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = value.to(self.root_device)

    def _refuse_layer_sync(self) -> None:
        assert self.lightning_module is not None
        if self._layer_sync and self.world_size > 1:
            for name, layer in self.lightning_module.named_modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    raise MisconfigurationException(
                        f"sync_batchnorm=True: {name} can't normalise over the batches of ranks that don't wait for"
                        " each other. Set sync_batchnorm=False: each rank normalises its own batches, and validation"
                        " and checkpoints have the average of all running statistics."
                    )

    def _share_initial_state(self) -> None:
        """All workers begin with the leader's weights and buffers, seeded or not."""
        module = self.lightning_module
        assert module is not None
        for name, parameter in module.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise MisconfigurationException(
                    f"{name} is an uninitialized parameter, whose shape the ranks can't agree on. Call the module on"
                    " one example before fit."
                )
        if self.world_size == 1:
            return
        in_time = self._share_leaders_state()
        # Who comes late fetches the weights, and finds what is not trained on the board.
        fixed = {name: tensor.detach() for name, tensor in self._state().items() if not tensor.requires_grad}
        shown = self.client.share("fixed", fixed if self.is_leader else None, write=self.is_leader).get(LEADER)
        if not in_time or self.client.generation > 0 or self.client.welcome["started"]:
            self._take_state(shown)

    def _enter_as_late(self, trainer: Trainer) -> None:
        """A worker that comes while the others train begins in their epoch."""
        welcome = self.client.welcome
        if welcome.get("started"):
            progress: Any = trainer.fit_loop.epoch_progress.current
            progress.ready = progress.started = progress.processed = progress.completed = int(welcome["epoch"])

    def model_to_device(self) -> None:
        """Move the module to this worker's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Nothing to prepare: no wrapper stands around the module."""
        if not self._fitting:
            super().pre_backward(closure_loss)

    # ------------------------------------------------------------------ data

    def _take_over_loaders(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop
        original, ended = type(loop).setup_data, type(loop).on_run_end

        def setup_data() -> None:
            if loop._combined_loader is not None and not loop._should_reload_train_dl:
                return
            self._makes_training_loaders = True
            source = loop._data_source

            def dataloader() -> Any:
                made = type(source).dataloader(source)
                loaders = made if isinstance(made, CombinedLoader) else CombinedLoader(made)
                self._num_training_loaders = len(loaders.flattened)
                return made

            source.dataloader = dataloader  # type: ignore[method-assign]
            try:
                original(loop)
            finally:
                self._makes_training_loaders = False
                source.__dict__.pop("dataloader", None)
            self._know_the_last_batch(trainer)

        def on_run_end() -> None:
            self._end_loop(trainer)
            ended(loop)
            self._agree_at_last()
            self._nobody_waits = False

        loop.setup_data = setup_data  # type: ignore[method-assign]
        loop.on_run_end = on_run_end  # type: ignore[method-assign]
        self._undo.append(lambda: loop.__dict__.pop("setup_data", None))
        self._undo.append(lambda: loop.__dict__.pop("on_run_end", None))

    def process_dataloader(self, dataloader: Any) -> Any:
        """Have the training batches dealt out by the queue."""
        if not self._makes_training_loaders:
            return dataloader
        trainer = self._trainer
        if self._num_training_loaders > 1 and can_be_leased(dataloader):
            rank_zero_warn(
                f"{self._num_training_loaders} training dataloaders: the queue deals out one, so every rank reads its"
                " share of each, as under DDP. What a lost rank had is not trained on by others."
            )
            return split(dataloader, self.num_workers, self.worker, self._seed)
        if not can_be_leased(dataloader):
            rank_zero_warn(
                f"{type(dataloader).__name__} has no samples that could be dealt out by number, so every rank reads"
                " all of it, as under DDP: give each rank another part, or use a data set with __getitem__ and"
                " __len__. What a lost rank had is not trained on by others."
            )
            return dataloader
        leased = lease(dataloader, trainer.limit_train_batches, self.num_workers, self._seed)
        batches = leased_batches(leased)
        assert batches is not None
        batches.call = self._call
        batches.epoch = self._epoch
        batches.on_reply = self._heard
        batches.done_before = self._orders_of_the_checkpoint(batches, dataloader.dataset)
        return leased

    def _orders_of_the_checkpoint(self, batches: LeasedBatches, dataset: Sized) -> dict[int, Order]:
        """Epochs that an earlier run has begun: what is left of them is all that this run has of them."""
        found = {}
        for epoch, state in self._resumed.get("queue", {}).items():
            order = Order.from_state(state)
            last = max(order.samples, default=-1)
            if last >= len(dataset):
                rank_zero_warn(
                    f"The checkpoint was written in the middle of an epoch over other data: it has a sample {last}, and"
                    f" the data set is of {len(dataset)}. So this epoch begins anew."
                )
                continue
            found[int(epoch)] = batches.continued(order)
        return found

    def _epoch(self) -> tuple[int, bool]:
        """The epoch that this worker is in, and whether it is the last."""
        trainer = self._trainer
        progress: Any = trainer.fit_loop.epoch_progress.current
        epoch = int(progress.processed)
        limit = trainer.fit_loop.max_epochs
        return epoch, limit is not None and limit != -1 and epoch + 1 >= limit

    def _know_where_it_begins(self, trainer: Trainer) -> None:
        """How far the run is at its start: as the checkpoint says, or nowhere."""
        before = self._batches.done_before if self._batches is not None else {}
        known = {epoch: sum(order.done) for epoch, order in before.items()}
        is_late = bool(self.client.welcome["started"]) and trainer.ckpt_path is None
        epoch = 0 if is_late else self._epoch()[0]
        newest = max([epoch, *known])
        if newest == epoch and not (trainer.fit_loop.epoch_loop.restarting and "queue" in self._resumed):
            known.setdefault(epoch, 0)  # or it has been done whole, and the checkpoint says nothing of it
        self._begins_at = Progress(newest, known)

    @property
    def _progress(self) -> Progress:
        """How far all workers together have come, as far as this one has heard."""
        return self.client.progress or self._begins_at

    def _know_the_last_batch(self, trainer: Trainer) -> None:
        """Replace what depends on how many batches this worker will get, which nobody knows."""
        loop = trainer.fit_loop
        combined = loop._combined_loader
        if combined is None:
            return
        found = [batches for batches in map(leased_batches, combined.flattened) if batches is not None]
        if not found:
            self._batches = None
            return
        self._batches = found[0]
        combined.limits = None
        loop.max_batches = len(found[0])
        begun = found[0].done_before.get(self._epoch()[0])
        if begun is not None and 0 in begun.done:  # not over for having had so many batches, if these were smaller
            loop.max_batches = max(loop.max_batches, loop.epoch_loop.batch_progress.current.ready + 1)
        interval = trainer.val_check_interval
        if isinstance(interval, float) and interval == 1.0 and trainer.val_check_batch is not None:
            trainer.val_check_batch = float("inf")  # on the last batch, whichever that is
        if self._in_loop and self.is_leader:  # loaders that are made anew every so many epochs
            self._validate_by_progress(trainer, 0)
        limit = trainer.limit_train_batches
        trainer.limit_train_batches = 1.0  # the queue keeps to it
        self._undo.append(lambda: setattr(trainer, "limit_train_batches", limit))
        if isinstance(loop._data_fetcher, LeaseFetcher):
            return
        assert loop._data_fetcher is not None
        loop._data_fetcher = LeaseFetcher.in_place_of(
            loop._data_fetcher, found[0], self._has_come, lambda: self._empty_epoch(trainer), self.is_leader
        )

    def _has_come(self, ticket: Ticket | None, is_last: bool) -> None:
        """A batch that is the next to be computed; None if its gradient is worth nothing."""
        if ticket is not None:
            self._tickets.append(ticket)
        assert self._batches is not None
        # An epoch has no more batches than that, but what lost workers have left of the ones before comes on top.
        loop = self._trainer.fit_loop
        needed = 0 if is_last else loop.epoch_loop.batch_progress.current.ready + 2
        loop.max_batches = max(len(self._batches), needed)

    def _empty_epoch(self, trainer: Trainer) -> None:
        """An epoch whose batches were all taken by others is an epoch nevertheless."""
        loop = trainer.fit_loop.epoch_loop
        loop.batch_progress.is_last_batch = True
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)

    def _heard(self, reply: Mapping[str, Any]) -> None:
        """What the coordinator says besides the batch."""
        trainer = self._trainer
        if reply.get("leader_lost"):
            self._end_without_leader(trainer, int(reply["successor"]))
        if not self.is_leader and reply.get("validations", 0) > self._num_validations:
            self._num_validations = int(reply["validations"])
            said = self._insisting(lambda: self.client.share(VALIDATION, None, write=False)).get(LEADER, {})
            trainer._logger_connector._callback_metrics.update(said)
        if reply.get("stopped"):
            trainer.should_stop = True
            if not self.is_leader:
                trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def _end_without_leader(self, trainer: Trainer, successor: int) -> None:
        message = "Rank 0 is gone, which logs and writes checkpoints, so the run ends."
        if self.worker == successor and self._in_loop:
            self._settle()
            path = os.path.join(trainer.default_root_dir, f"rank0-lost-step={self._known_version()}.ckpt")
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
            message += f" All that it had learned is in {path}."
            if self._speaks:
                self._write_as_successor(checkpoint, path)
                sys.stderr.write(f"{message}\n")
        raise LeaderLostError(message)

    def _settle(self) -> None:
        """Take one version of the weights, for a checkpoint that counts as many updates as it holds."""

    def _write_as_successor(self, checkpoint: dict[str, Any], path: _PATH) -> None:
        self.checkpoint_io.save_checkpoint(self._with_own_state(checkpoint), path)

    def _with_own_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        return checkpoint

    @abstractmethod
    def _known_version(self) -> int:
        """The latest version that this worker has heard of."""

    # ------------------------------------------------------------------ the loop

    def _begin_loop(self, trainer: Trainer) -> None:
        """From here on nobody waits for anybody."""
        self._in_loop = self._nobody_waits = True
        if self.is_leader:
            for callback in checkpoints_of(trainer):
                self._undo.append(save_by_version(callback, self._known_version()))
            epoch_loop, (epoch, _) = trainer.fit_loop.epoch_loop, self._epoch()
            num_done = self._progress.num_done(epoch, len(self._batches or ()))
            # Lightning asks whether a checkpoint was written in a validation that was due: then it goes on behind it.
            self._validate_by_progress(trainer, num_done - epoch_loop.restarting if num_done else 0)
        else:
            self._quieten(trainer)

    def _validate_by_progress(self, trainer: Trainer, num_done: int) -> None:
        if self._batches is None:
            return
        total = len(self._batches)

        def seen(epoch: int) -> int:
            mine = sum(1 for number, _ in self._tickets if number == epoch)
            return min(self._progress.num_done(epoch, total) + mine, total)

        self._undo.append(validate_by_progress(trainer, total, num_done, seen))

    def _quieten(self, trainer: Trainer) -> None:
        """What the leader alone does: validate, and what hangs on it."""
        limit, callbacks = trainer.limit_val_batches, callbacks_of(trainer)
        bounds = trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps
        trainer.limit_val_batches = 0
        trainer.__dict__["callbacks"] = [c for c in callbacks if not isinstance(c, (Checkpoint, EarlyStopping))]
        plateaus = [(config, config.interval) for config in self.lr_scheduler_configs if config.reduce_on_plateau]
        for config, _ in plateaus:
            config.interval = "never"  # the learning rate is the leader's

        def restore() -> None:
            for config, interval in plateaus:
                config.interval = interval
            trainer.limit_val_batches = limit
            trainer.__dict__["callbacks"] = callbacks
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = bounds

        self._loop_undo = restore

    _loop_undo: Callable[[], None] | None = None

    def _end_loop(self, trainer: Trainer) -> None:
        """Wait for the others, and agree on how it ended."""
        self._in_loop = False
        if self._loop_undo is not None:
            self._loop_undo()
            self._loop_undo = None
        if self.world_size == 1:
            return
        current: Any = trainer.fit_loop.epoch_progress.current
        kept = {name: value for name, value in trainer.callback_metrics.items() if isinstance(value, Tensor)}
        told = {
            "callbacks": [c.state_dict() if isinstance(c, Checkpoint) else None for c in callbacks_of(trainer)],
            "epochs": [current.ready, current.started, current.processed, current.completed],
            "metrics": kept,
            "hyper": [hyperparameters(optimizer) for optimizer in self.optimizers],
        }
        said = self._meet("end", told if self.is_leader else None).get(LEADER)
        if said is None or self.is_leader:
            return
        current.ready, current.started, current.processed, current.completed = said["epochs"]
        for callback, state in zip(callbacks_of(trainer), said["callbacks"], strict=False):
            if isinstance(callback, Checkpoint) and state is not None:
                callback.load_state_dict(state)
        trainer._logger_connector._callback_metrics.update(said["metrics"])
        for optimizer, groups in zip(self.optimizers, said["hyper"], strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                adopt(group, values)

    def _agree_at_last(self) -> None:
        """What callbacks made of the weights at the end (averages, pruning), they made on each rank by itself."""
        if self.world_size > 1 and self._client is not None:
            self._share_leaders_state()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A new batch, in which each line of the program shares its first value first."""
        self._num_shares.clear()

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Nobody waits for this worker any more; the leader's end is the run's, which another rank writes down."""
        if self.is_leader and self._in_loop and isinstance(self._launcher, HydraAwareLauncher):
            self._launcher.let_others_end()
        self._hang_up()
        super().on_exception(exception)

    def _leave_run(self) -> None:
        """Give everything back as it was. The line to the coordinator stays, for collectives after ``fit``."""
        self._in_loop = self._nobody_waits = False
        if self._loop_undo is not None:
            self._loop_undo()
            self._loop_undo = None
        while self._undo:
            self._undo.pop()()
        self._batches = None
        self._tickets.clear()
        while self._followed:
            self._followed.pop().let_go()
        self._num_validations = 0
        self._resumed = {}

    def teardown(self) -> None:
        """Leave the run, or what validates and tests."""
        self._fitting = False
        self._leave_run()
        tidy()
        give_port_back()
        super().teardown()

    # ------------------------------------------------------------------ optimizers

    def _followed_schedulers(self) -> None:
        """Let schedulers that count steps count the run's, of which this worker makes only some.

        They come to ``trainer.estimated_stepping_batches``. Where batches are not dealt out each worker makes as many
        steps as that says; and whoever steps a scheduler by hand knows when.
        """
        trainer = self._trainer
        assert self.lightning_module is not None
        count: Callable[[], int]
        if trainer.max_steps >= 0 and trainer.estimated_stepping_batches == trainer.max_steps:
            count = self._known_version
        elif self._batches is not None:
            count = StepCount(
                lambda: self._progress, lambda: len(self._batches or ()), lambda: trainer.accumulate_grad_batches
            )
        else:
            return
        for config in self.lr_scheduler_configs if self.lightning_module.automatic_optimization else ():
            if config.interval == "step" and not config.reduce_on_plateau:
                self._followed.append(Followed(config, count))

    def _catch_up(self) -> None:
        """Let schedulers be where the run is, and not where it was at this worker's last step."""
        assert self.lightning_module is not None
        for followed in self._followed:
            if followed.is_behind:
                self.lightning_module.lr_scheduler_step(followed.scheduler, None)


def parameters_of(optimizers: list[Optimizer]) -> list[tuple[nn.Parameter, int, int]]:
    """Every parameter that an optimizer steps, once, with the indices of its optimizer and of its group there.

    Raises:
        MisconfigurationException: If two optimizers have the same one.

    """
    found: dict[nn.Parameter, tuple[int, int]] = {}
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                first, _ = found.setdefault(parameter, (index, number))
                if first != index:
                    raise MisconfigurationException(
                        f"A parameter of shape {tuple(parameter.shape)} is given to two optimizers"
                        f" ({type(optimizers[first]).__name__} and {type(optimizer).__name__}), which can't share one"
                        " state. Give it to one of them."
                    )
    return [(parameter, *place) for parameter, place in found.items()]
