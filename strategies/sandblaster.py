"""Sandblaster L-BFGS: an optimization over the whole batch, by ranks that take what they can of it."""

from __future__ import annotations

import hashlib
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from ._arguments import check_flag, check_whole
from ._asynchronous import parameters_of
from ._line_search import check_trainer, decays_of, leased_or_error, warn_of_noise, warn_of_random_data
from ._updating import UpdatingStrategy
from .consistency import snapshot as snapshots
from .consistency.client import Client, CoordinatorGoneError, RunFailedError
from .consistency.hosting import get_host, is_host_lost, replace_host
from .consistency.jobs import Address, find_job
from .consistency.memory import Segment
from .consistency.order import Order
from .consistency.packing import Sums
from .consistency.plan import ParameterInfo, Plan, choose_num_shards, make_plan
from .consistency.queue import Ticket
from .consistency.replica import Replica
from .consistency.sandblaster.lbfgs import LbfgsOptions
from .consistency.sandblaster.state import OptimizerState, fill, read
from .consistency.sandblaster.vectors import VectorSpec, with_vectors
from .consistency.updates import SliceMemory

_MAX_RESTARTS = 5
_PUSHING = 0.05  # share of a worker's time that pushes may take


class SandblasterStrategy(UpdatingStrategy):
    """Distributed L-BFGS under a coordinator (Dean et al. 2012, section 4.2).

    The loss over a whole batch (all training data, or `batch_size` samples of it) is minimised by L-BFGS with a line
    search for the strong Wolfe conditions, in the steps of ``torch.optim.LBFGS(line_search_fn="strong_wolfe")``. Each
    epoch of the Trainer is one *evaluation* of loss and gradient. The batch is dealt out in *portions*, the
    DataLoader's batches: fast ranks take more of them. What slow ranks still have when others are idle is dealt out
    again, and whoever is first is believed, so that nobody waits for the slowest. Each portion counts once.

    The optimizer's vectors lie in *shards*, processes beside the ranks, each of which has the same slice of all of
    them. A direction is made where the vectors are: only scalars travel, some hundred bytes a vector operation.

    The optimizer of ``configure_optimizers`` says which parameters are trained, and its ``weight_decay``, if it is one
    that adds it to the gradient, is a part of the loss. Otherwise it isn't used; nor are learning rate schedulers.
    ``training_step`` must return the mean of its batch's losses. ``trainer.global_step`` and ``max_steps`` count
    iterations of L-BFGS, ``max_epochs`` evaluations. Validation and checkpoints have the weights that the last
    iteration has come to; what is logged in ``training_step`` is of the points that a line search tries.

    A lost rank's portions are others' again; a lost shard is started again where it was; should the process that
    coordinates be lost, another goes on from the last iteration. A checkpoint has the optimizer's history.

    Args:
        history_size: Pairs of steps and changes of the gradient that are kept, ``m``.
        batch_size: Samples that an evaluation is over, the same ones in each; None for all.
        push_every: Portions whose gradients a rank adds up before it hands them in; ``"auto"``: as many as keep the
            time that this takes below 5 %; in any case what it has when no more are left.
        num_shards: Number of shards, or ``"auto"``: one per 8 M parameters, up to half the cores.
        lr: First step length that a line search tries.
        tolerance_grad: The end, when no element of the gradient is larger.
        tolerance_change: The end, when an iteration changes no weight, or not the loss, by more.
        max_line_search: Evaluations of one line search.
        backup_portions: Whether portions are dealt out again to ranks that would otherwise be idle.
        lease_timeout: Seconds without a sign of life after which a rank counts as lost.
        join_timeout: Seconds that the first ranks wait for the others, before they begin without them.
        accelerator: Passed on to Lightning, like all that follow.
        parallel_devices: The devices of this host.
        cluster_environment: Who starts the processes.
        checkpoint_io: How files are written.
        precision_plugin: Numerical precision.

    Raises:
        MisconfigurationException: Before the first batch: several optimizers, manual optimization, gradients that are
            clipped or accumulated, data that can't be dealt out, parameters of half precision.

    Metrics: ``lbfgs/loss`` at the last iteration's weights, ``lbfgs/iterations``, ``lbfgs/evaluations``,
    ``lbfgs/step_length``, ``lbfgs/largest_gradient``; ``portions/again`` dealt out twice, ``portions/reissued`` of lost
    ranks, ``workers/live``; in bytes, of rank 0: ``bytes/pushed`` and ``bytes/fetched`` an evaluation,
    ``bytes/scalars`` an iteration.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="sandblaster", accelerator="cpu", devices=2)
        >>> trainer.strategy.options.history_size
        10

    """

    def __init__(
        self,
        history_size: int = 10,
        batch_size: int | None = None,
        push_every: int | Literal["auto"] = "auto",
        num_shards: int | Literal["auto"] = "auto",
        lr: float = 1.0,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        max_line_search: int = 25,
        backup_portions: bool = True,
        *,
        lease_timeout: float = 30.0,
        join_timeout: float = 120.0,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            0,
            lease_timeout,
            join_timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        for name, value in (
            ("history_size", history_size),
            ("batch_size", 1 if batch_size is None else batch_size),
            ("push_every", 1 if push_every == "auto" else push_every),
            ("num_shards", 1 if num_shards == "auto" else num_shards),
            ("max_line_search", max_line_search),
        ):
            check_whole(name, value, 1)
        for name, number in (("lr", lr), ("tolerance_grad", tolerance_grad), ("tolerance_change", tolerance_change)):
            if (
                not isinstance(number, (int, float))
                or not 0.0 <= number < float("inf")
                or (name == "lr" and not number)
            ):
                raise MisconfigurationException(f"{name}={number!r} must be a number above 0.")
        check_flag("backup_portions", backup_portions)
        self.options = LbfgsOptions(
            history_size, float(lr), float(tolerance_grad), float(tolerance_change), max_line_search
        )
        self.batch_size, self.push_every, self.num_shards = batch_size, push_every, num_shards
        self.backup_portions = backup_portions
        self._plan: Plan | None = None
        self._replica: Replica | None = None
        self._spec: VectorSpec | None = None
        self._portions: Order | None = None
        self._decays: list[float] = []
        self._accrued = Sums(0)
        self._weight = 0.0  # share of the batch that is accrued
        self._losses: list[float] = []
        self._loss: float | None = None
        self._current: Ticket | None = None  # what is computed now
        self._is_computed = True
        self._num_left = 0
        self._pushed_at = self._push_seconds = 0.0
        self._num_evaluations = 0  # that this rank has had a part in
        self._last_serial = -1
        self._num_restarts = 0  # of what coordinates
        self._reached: OptimizerState | None = None

    # ------------------------------------------------------------------ into the loop

    def setup_environment(self) -> None:
        """Come to the run, on one host."""
        module = self.lightning_module
        if module is not None and module._trainer is not None and self.num_nodes > 1:
            raise MisconfigurationException(
                f"num_nodes={self.num_nodes}: sandblaster's shards and coordinator are on one host so far. Set"
                ' num_nodes=1, or use Trainer(strategy="downpour").'
            )
        super().setup_environment()

    def _run_options(self, trainer: Trainer) -> dict[str, Any]:
        options = super()._run_options(trainer)
        return options | {"max_steps": -1, "sandblaster": {"backup_portions": self.backup_portions}}

    def setup(self, trainer: Trainer) -> None:
        """Look at what is to be optimized while nothing has begun."""
        if self._fitting:
            check_trainer(trainer)
        super().setup(trainer)
        if self._fitting:
            assert self.lightning_module is not None
            members = parameters_of(self.optimizers)
            self._parameters = [parameter for parameter, _, _ in members]
            self._decays = decays_of(self.optimizers, trainer, self.options)
            warn_of_noise(self.lightning_module)
            self._plan = self._make_plan()

    def _make_plan(self) -> Plan:
        num_vectors = self.options.num_vectors
        infos = [
            with_vectors(ParameterInfo(tuple(parameter.shape), parameter.dtype, 0, 0), num_vectors)
            for parameter in self._parameters
        ]
        num_elements = sum(info.num_elements for info in infos)
        num_shards = choose_num_shards(self.num_shards, num_elements)
        return make_plan(infos, [True], num_shards, lambda size, dtype: size * dtype.itemsize)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Have the same portions dealt out in each epoch."""
        leased = super().process_dataloader(dataloader)
        if self._makes_training_loaders and self._fitting:
            batches = leased_or_error(leased, dataloader)
            batches.epoch = self._begin_epoch
            self._portions = batches.keep_one_order(self.batch_size)
            warn_of_random_data(dataloader.dataset, list(self._portions.samples[:8]))
        return leased

    def _orders_of_the_checkpoint(self, batches: Any, dataset: Any) -> dict[int, Order]:
        return {}  # an evaluation that was interrupted begins anew

    def _digest_of_layout(self) -> str:
        assert self._plan is not None
        return self._plan.digest

    def _lay_out(self) -> None:
        """Hand the weights, and the history of a checkpoint, to the shards."""
        assert self._plan is not None
        host = get_host()
        sizes = [slice_.num_bytes for slice_ in self._plan.slices]
        names = host.request({"op": "memory", "num_bytes": sizes})["names"]
        memories = [SliceMemory(Segment(name), slice_) for name, slice_ in zip(names, self._plan.slices, strict=True)]
        state = OptimizerState.of(self._resumed, self._function, self._parameters, self.options)
        fill(memories, self._parameters, state)
        options = replace(self.options, max_iterations=self._trainer.max_steps)
        point = None if state is None else state.point
        self._spec = VectorSpec(self._plan, options, point, self._epoch()[0])
        self._version = 0 if point is None else point.iteration
        host.request({"op": "go", "version": self._version}, pickle.dumps(self._spec))

    def _join(self) -> None:
        assert self._plan is not None
        if self._replica is None:
            self._replica = Replica(self.client, self._plan, self._parameters, self._run_name)
            self._accrued = Sums(len(self._parameters))
        self._forget_accrued()
        self._replica.join()
        self._version = self._replica.version

    @property
    def _function(self) -> str:
        """What tells the loss that is minimised from others: its samples, and weight decay."""
        assert self._portions is not None
        samples = np.sort(np.array(self._portions.samples))
        return hashlib.sha256(samples.tobytes() + repr(self._decays).encode()).hexdigest()[:16]

    @property
    def replica(self) -> Replica:
        """This rank's side of the weights, inside the loop."""
        assert self._replica is not None
        return self._replica

    def _followed_schedulers(self) -> None:
        """None: line searches say how long a step is."""

    # ------------------------------------------------------------------ a portion

    def _heard(self, reply: Any) -> None:
        self._num_left = int(reply.get("left", 0))
        if reply.get("stopped"):  # for good: no evaluation is left that could make more steps
            loop = self._trainer.fit_loop
            loop.min_epochs = loop.epoch_loop.min_steps = None
        super()._heard(reply)

    def _begin_epoch(self) -> tuple[int, bool]:
        self._return_left_out()
        return self._epoch()

    def _return_left_out(self) -> None:
        """Give back a portion that a hook has left out: somebody has to compute it."""
        if not self._is_computed and self._current in self._tickets:
            self._tickets.remove(self._current)
            self._call({"op": "return", "tickets": [self._current]})
            self._warn_once("A hook left portions out. Each of them counts, so they are computed in later epochs.")
        self._is_computed = True

    def _has_come(self, ticket: Ticket | None, is_last: bool) -> None:
        self._current, self._is_computed, self._loss = ticket, ticket is None, None
        super()._has_come(ticket, is_last)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compute with the weights of the evaluation that the portion is of."""
        super().on_train_batch_start(batch, batch_idx)
        if self._current is not None and self._current[0] != self.replica.serial:
            self._forget_accrued()
            self._tickets.append(self._current)
            self._keep_edits()
            self._rejoining(self.replica.fetch)
        if self._current is not None and self._current[0] != self._last_serial:
            self._last_serial = self._current[0]
            self._num_evaluations += 1
            self._pushed_at = time.perf_counter()

    def _forget_accrued(self) -> None:
        """What was accrued is worth nothing: its evaluation is over, or this rank was given up."""
        self._accrued.take()
        self._tickets.clear()
        self._losses.clear()
        self._weight = 0.0

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Remember the loss."""
        super().pre_backward(closure_loss)
        if self._in_loop:
            self._loss = float(closure_loss.detach())

    def _write_edits(self) -> bool:
        if self._snapshot is not None:
            if self.replica.find_edits(look=True):
                self._warn_once(
                    "The weights were edited while they were validated or saved. The optimizer goes on with its own."
                )
            return False
        if self.replica.find_edits():
            raise MisconfigurationException(
                "The weights were edited by a callback or by the module itself. Under sandblaster they are those of a"
                " line search, which an edit would make meaningless: leave them alone, put a constraint into the loss,"
                ' or use Trainer(strategy="downpour").'
            )
        return False

    def _step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        self._count(self._version)
        if self._current not in self._tickets:  # a spare portion, or one that was given up with its evaluation
            self._is_computed = True
            return
        assert self._current is not None
        if self._loss is None:
            raise MisconfigurationException(
                "training_step returned None: sandblaster minimises the loss of the whole batch, of which each portion"
                " is a part. Return a loss for each."
            )
        self._num_steps += 1
        self._is_computed = True
        assert self._portions is not None
        weight = self._portions.sizes[self._current[1]] / len(self._portions.samples)
        gradients = [parameter.grad for parameter in self._parameters]
        self._accrued.add([None if gradient is None else gradient * weight for gradient in gradients])
        self._losses.append(weight * self._loss)
        self._weight += weight
        if self._is_time_to_push():
            self._push()
        self._count(self._version)

    def _is_time_to_push(self) -> bool:
        if self._num_left == 0 or self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return True
        if self.push_every != "auto":
            return len(self._losses) >= self.push_every
        return self._push_seconds <= _PUSHING * (time.perf_counter() - self._pushed_at)

    @torch.no_grad()
    def _push(self) -> None:
        gradients = self._accrued.take()
        self._add_decay(gradients)
        assert self._buffers is not None
        buffers, losses, tickets = self._buffers.pack(), list(self._losses), list(self._tickets)
        self._forget_accrued()
        begin = time.perf_counter()

        def push() -> None:
            result = self.replica.push(gradients, tickets, fetch=False, buffers=buffers, losses=losses)
            self._version = max(self._version, result.version)

        self._rejoining(push)
        self._pushed_at = time.perf_counter()
        self._push_seconds = self._pushed_at - begin

    def _add_decay(self, gradients: list[Tensor | None]) -> None:
        """Make ``weight_decay`` a part of the loss, as large a part as is accrued of the batch."""
        for index, (parameter, decay) in enumerate(zip(self._parameters, self._decays, strict=True)):
            if decay:
                gradient = gradients[index]
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                gradients[index] = gradient.add(parameter.detach(), alpha=decay * self._weight)
                self._losses[0] += 0.5 * decay * self._weight * float(parameter.detach().square().sum())

    # ------------------------------------------------------------------ what the run has come to

    def _read_snapshot(self, with_state: bool) -> snapshots.Snapshot:
        trainer = self._trainer
        after = {}
        if self.is_leader and self._in_loop and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            after = {"after": self._epoch()[0]}
        assert self._plan is not None
        plan = self._plan

        def attach(shard: int) -> SliceMemory:
            return SliceMemory(Segment(f"{self._run_name}-s{shard}"), plan.slices[shard])

        self._insisting(self.replica.settle)
        report, weights, self._reached = self._insisting(lambda: read(self.client, attach, plan, with_state, after))
        weights = tuple(flat.view(info.shape) for flat, info in zip(weights, plan.parameters, strict=True))
        nothing: tuple[dict[str, Any], ...] = tuple({} for _ in plan.parameters)
        shot = snapshots.Snapshot(int(report["version"]), weights, nothing, {**report, "queue": {}})
        self.replica.compute_with(weights, shot.version)
        if self._in_loop:  # or what is saved now would count fewer iterations than it has
            self._version = shot.version
            self._count(shot.version + 1)
        return shot

    def _leave_snapshot(self) -> None:
        self.replica.fetch()

    def _state_at(self, shot: snapshots.Snapshot) -> dict[str, Any]:
        state = {} if self._reached is None else self._reached.dump(self._function)
        return {"version": shot.version, "queue": {}} | state

    def _metrics(self) -> dict[str, float]:
        report, replica = self._last_report, self._replica
        metrics = {
            "lbfgs/evaluations": 0.0,
            "lbfgs/iterations": float(report["version"]),
            "portions/again": float(report["num_again"]),
            "portions/reissued": float(report["num_reissued"]),
            "workers/live": float(report["num_live"]),
            "bytes/scalars": report["num_scalar_bytes"] / max(report["num_iterations"], 1),
        }
        if report["point"] is not None:
            point = report["point"]
            metrics["lbfgs/evaluations"] = float(point["num_evaluations"])
            metrics |= {f"lbfgs/{name}": point[name] for name in ("loss", "step_length", "largest_gradient")}
        if replica is not None and self._num_evaluations:
            metrics["bytes/pushed"] = replica.num_bytes_pushed / self._num_evaluations
            metrics["bytes/fetched"] = replica.num_bytes_fetched / self._num_evaluations
        return metrics

    def _log_histogram(self) -> None:
        """Nothing is stale here."""

    # ------------------------------------------------------------------ a coordinator that is lost

    def _rejoining(self, action: Callable[[], Any]) -> None:
        try:
            super()._rejoining(action)
        except CoordinatorGoneError as error:
            self._replace_coordinator(error)

    def _insisting(self, action: Callable[[], Any]) -> Any:
        while True:
            try:
                return super()._insisting(action)
            except CoordinatorGoneError as error:
                self._replace_coordinator(error)

    def _replace_coordinator(self, error: CoordinatorGoneError) -> None:
        """Go on from the last iteration, with another process that coordinates."""
        while self._in_loop and self._num_restarts < _MAX_RESTARTS:
            is_there = not is_host_lost(patience=2.0) if self.is_leader else self._is_same(find_job(self._job))
            if is_there:
                break  # it has hung up on this rank alone
            self._num_restarts += 1
            self.client.close()
            try:
                self._client = self._begin_again() if self.is_leader else self._come_to(self._job)
                self.replica.call_by(self.client)
                self._join()
                return
            except CoordinatorGoneError as again:
                error = again
            except RuntimeError as again:  # lost once more, while it was told what to do
                if isinstance(again, RunFailedError) or not self.is_leader:
                    raise
                error = CoordinatorGoneError(str(again))
        raise error

    def _is_same(self, address: Address) -> bool:
        """Whether a coordinator is the one that this rank spoke with."""
        return address.opening == self.client.address.opening

    def _begin_again(self) -> Client:
        """Have another process coordinate the shards that a lost one has left."""
        assert self._spec is not None
        assert self._portions is not None
        sys.stderr.write("squall: the process that coordinates was lost; another goes on from the last iteration.\n")
        host = replace_host()
        address, number = self._open_run(self._trainer, self._run_name)
        sizes = [slice_.num_bytes for slice_ in self._spec.plan.slices]
        host.request({"op": "memory", "num_bytes": sizes, "is_left": True})
        self._spec = replace(self._spec, num_restarts=self._num_restarts, evaluation=self._epoch()[0])
        host.request({"op": "go", "version": self._version}, pickle.dumps(self._spec))
        client = self._call_up(address, number)
        client.call({"op": "order", "epoch": 0, "num_batches": len(self._portions)}, self._portions.pack())
        return client

    # ------------------------------------------------------------------ out of the loop

    def _hand_in_the_rest(self) -> None:
        self._return_left_out()
        if self._losses:
            self._push()
        super()._hand_in_the_rest()

    def _leave(self, stop: bool) -> int | None:
        return self.replica.leave(stop)

    def _keep_the_end(self) -> None:
        super()._keep_the_end()
        reason = str(self._last_report["stopped"])
        if "tolerance" in reason:
            rank_zero_info(f"L-BFGS ended after {self._version} iterations: {reason}.")

    def _leave_run(self) -> None:
        if self._replica is not None:
            self._replica.close()
        self._replica = self._plan = self._spec = self._portions = self._reached = self._current = None
        self._accrued = Sums(0)
        self._num_restarts = self._num_evaluations = 0
        self._last_serial = -1
        super()._leave_run()
