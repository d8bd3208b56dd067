"""Hogwild: ranks of one host that step the same weights in shared memory, without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from ._asynchronous import parameters_of
from ._updating import UpdatingStrategy
from .consistency.client import RevokedError
from .consistency.hosting import get_host
from .consistency.memory import Segment
from .consistency.optimizers import Hyperparameters, try_state
from .consistency.plan import ParameterInfo, StateEntry
from .consistency.shared import InPlace, SharedLayout, SharedParameters, lay_out
from .consistency.snapshot import Snapshot, ask
from .placement.optimizers import is_elementwise


class HogwildStrategy(UpdatingStrategy):
    """Asynchronous data parallelism in one host's shared memory (Recht et al. 2011, section 2: Hogwild!).

    Parameters and optimizer state lie in shared memory. Every rank computes gradients at its own pace, on batches
    from one queue, and steps the user's own optimizer right there, with no lock: nobody waits, nothing is sent or
    copied. Two ranks that step the same element at the same instant may lose one of the two updates of that element;
    where gradients are sparse that is rare, which is the paper's point. ``Embedding(sparse=True)`` and parameters
    without a gradient in a step are left alone by optimizers as torch has them, so what they did not touch collides
    with nothing.

    Any element-wise optimizer will do, several of them, with groups and schedules. Its state is shared, too. A scalar
    such as Adam's ``step`` is one number for all ranks, counted up by each update; as with any element, a count can be
    lost, never invented: it lies between the updates of one rank and those of all. An optimizer's first state of a
    parameter is made by one rank at a time.

    Rank 0 is the *leader*: the run begins with its weights and (resumed) optimizer state, and it validates, logs and
    writes checkpoints while the others train on. It does so with a private copy, read in one pass over the memory.
    Others go on writing during this pass: each element is what it was at some moment of it, and an update that was
    being made then may be in some elements and not in others. Should the leader be lost, the run ends, and another
    rank writes all that was learned to ``rank0-lost-step=….ckpt`` first.

    ``max_epochs`` counts passes over the data by all ranks together, ``max_steps`` and ``trainer.global_step``
    updates by all of them. An update is counted right before it is made: what is lost with a killed rank is at most
    the one that it was making. Running statistics (BatchNorm) are each rank's own; validation and checkpoints have
    their average.

    Learning rates follow the leader's schedulers. One that counts steps counts those that one device would have made
    of the batches done so far, so it comes to ``trainer.estimated_stepping_batches``; where ``max_steps`` ends the run,
    updates. (With data that the queue can't deal out, the leader's own steps.) One that ``training_step`` steps by hand
    counts those calls on rank 0. ``val_check_interval`` counts batches by all of them.

    After ``fit`` the parameters, the same objects, are ordinary private tensors with the final weights, equal on all
    ranks, and so is the optimizers' state.

    Args:
        warm_start_steps: Updates that the leader makes alone before the others begin.
        lease_timeout: Seconds without a sign of life after which a rank counts as lost, and its batch is dealt out
            again. Ranks give such signs while they compute.
        join_timeout: Seconds that the first ranks wait for the others, before they begin without them.
        accelerator: Passed on to Lightning, like all that follow.
        parallel_devices: The devices of this host: CPUs.
        cluster_environment: Who starts the processes.
        checkpoint_io: How files are written.
        precision_plugin: Numerical precision.

    Raises:
        MisconfigurationException: Before the first batch, on several hosts, on devices other than CPUs, and with an
            optimizer that does not treat every element alone.

    Metrics: ``staleness/mean`` and ``staleness/max``: how many updates, by anybody, were counted since a rank began
    the gradient of its own; ``queue/samples``, ``queue/reissued``, ``updates/applied``, ``updates/lost``,
    ``workers/live`` as under :class:`DownpourStrategy`.

    Example:
        >>> import squall
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from torch.utils.data import DataLoader
        >>> class Mean(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.zeros(3))
        ...     def training_step(self, batch, batch_idx):
        ...         return ((self.weight - batch) ** 2).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adagrad(self.parameters(), lr=0.5)
        >>> options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer = Trainer(strategy="hogwild", accelerator="cpu", devices=1, max_epochs=20, barebones=False,
        ...                   enable_model_summary=False, **options)  # devices=4 in a script
        >>> module = Mean()
        >>> trainer.fit(module, DataLoader(torch.ones(8, 3), batch_size=2))
        >>> trainer.global_step, module.weight.detach().round(decimals=1)
        (80, tensor([1., 1., 1.]))

    """

    def __init__(
        self,
        warm_start_steps: int = 0,
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
            warm_start_steps,
            lease_timeout,
            join_timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._layout: SharedLayout | None = None
        self._shared: SharedParameters | None = None
        self._in_place: dict[Optimizer, InPlace] = {}
        self._base = 0  # the version that the gradient in the making began with
        self._begins_gradient = True
        self._hyper_version = 0

    @property
    def shared(self) -> SharedParameters:
        """The memory that all ranks step, inside the loop."""
        assert self._shared is not None
        return self._shared

    # ------------------------------------------------------------------ into the loop

    def setup_environment(self) -> None:
        """Come to the run, on the processors of one host."""
        module = self.lightning_module
        trainer = module._trainer if module is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            if self.num_nodes > 1:
                raise MisconfigurationException(
                    f"num_nodes={self.num_nodes}: hogwild's weights lie in one host's memory. Set num_nodes=1, or use"
                    ' Trainer(strategy="ddp").'
                )
            if self.root_device.type != "cpu":
                raise MisconfigurationException(
                    f"hogwild's weights lie in the host's shared memory, which an optimizer on {self.root_device} can't"
                    ' step in place. Set accelerator="cpu", or use Trainer(strategy="ddp").'
                )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Look at the optimizers while nothing has begun."""
        super().setup(trainer)
        if self._fitting:
            self._layout = self._make_layout()

    def _make_layout(self) -> SharedLayout:
        for optimizer in self.optimizers:
            # Sparse gradients are all that SparseAdam takes, so it can't be tried like others.
            if not is_elementwise(optimizer) and type(optimizer) is not torch.optim.SparseAdam:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} does not treat every element alone, so it can't step weights that"
                    " other ranks change meanwhile. Use an element-wise optimizer (SGD, Adagrad, Adam, ...), or"
                    ' Trainer(strategy="ddp").'
                )
        members = parameters_of(self.optimizers)
        self._parameters = [parameter for parameter, _, _ in members]
        tried: dict[Any, tuple[StateEntry, ...]] = {}
        infos = []
        for parameter, index, group in members:
            key = (index, group, parameter.dtype)
            if key not in tried:
                optimizer = self.optimizers[index]
                tried[key] = tuple(
                    try_state(optimizer, optimizer.param_groups[group], (5,), parameter.dtype, at_shard=False)
                )
            infos.append(ParameterInfo(tuple(parameter.shape), parameter.dtype, index, group, tried[key]))
        return lay_out(infos, self._parameters)

    def _digest_of_layout(self) -> str:
        assert self._layout is not None
        return self._layout.digest

    def _lay_out(self) -> None:
        assert self._layout is not None
        host = get_host()
        (name,) = host.request({"op": "memory", "num_bytes": [self._layout.num_bytes], "num_served": 0})["names"]
        shared = SharedParameters(Segment(name), self._layout)
        for index, info in enumerate(self._layout.parameters):
            parameter = self._parameters[index]
            shared.write(index, parameter, self.optimizers[info.optimizer].state.get(parameter, {}))
        host.request({"op": "go", "version": self._version})

    @property
    def _segment_name(self) -> str:
        return f"{self._run_name}-s0"

    def _join(self) -> None:
        reply, _ = self.client.call({"op": "join"})
        if self._shared is None:
            self._attach()
        now, _ = self.client.call({"op": "fetch", "buffer": 0})
        self._learn(now)
        self._base = self._version = max(self._version, int(reply["version"]), int(now["version"]))
        self._begins_gradient = True

    def _attach(self) -> None:
        assert self._layout is not None
        self._shared = SharedParameters(Segment(self._segment_name), self._layout)
        index_of = {parameter: index for index, parameter in enumerate(self._parameters)}
        for parameter, index in index_of.items():
            self._shared.attach(index, parameter)
        self._in_place = {optimizer: InPlace(optimizer, self._shared, index_of) for optimizer in self.optimizers}

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note which updates have been made before this gradient."""
        super().on_train_batch_start(batch, batch_idx)
        self._keep_edits()
        if self._begins_gradient:
            self._rejoining(self._note_base)
            self._begins_gradient = False

    def _note_base(self) -> None:
        reply, _ = self.client.call({"op": "gate"})
        self._base = self._version = int(reply["version"])

    def _step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        in_place = self._in_place[optimizer]
        members = in_place.stepped()
        self._count(self._version)
        if not members:
            return
        if self._snapshot is not None:  # written in the middle of a step
            self._snapshot = None
            self._leave_snapshot()
        self._num_steps += 1
        try:
            if self._commit():
                self._apply(in_place, members, step)
        except RevokedError:
            self._rejoin()
        self._begins_gradient = True
        self._count(self._version)

    def _commit(self) -> bool:
        """Count an update; False if it is not to be made."""
        assert self._buffers is not None
        buffers = self._buffers.pack()
        tickets = list(self._tickets)
        self._tickets.clear()
        reply, _ = self.client.call(
            {
                "op": "commit",
                "slot": 0,
                "base": self._base,
                "tickets": tickets,
                "hyper": self._changed_hyperparameters(),
                "hyper_version": self._hyper_version,
                "buffers": buffers is not None,
            },
            buffers or b"",
        )
        self._learn(reply)
        self._base = self._version = max(self._version, int(reply.get("version", 0)))
        return "sequence" in reply

    def _learn(self, reply: dict[str, Any]) -> None:
        hyper: list[Hyperparameters] | None = reply.get("hyper")
        if hyper is not None:
            self._hyper_version = int(reply["hyper_version"])
        self._adopt_hyperparameters(hyper)

    def _apply(self, in_place: InPlace, members: list[tuple[int, nn.Parameter]], step: Callable[[], Any]) -> None:
        if in_place.attach(members):
            step()
            in_place.put_back(members)
            return
        self.client.call({"op": "claim"})
        try:
            in_place.attach(members)  # others may have been first meanwhile
            step()
            in_place.put_back(members)
        finally:
            self.client.call({"op": "free"})

    # ------------------------------------------------------------------ one pass over the memory

    def _read_snapshot(self, with_state: bool) -> Snapshot:
        report = ask(self.client, with_state)
        self.client.call({"op": "release"})
        weights, state = self.shared.read(with_state)
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight.clone()  # so that it shows if somebody edits it
        return Snapshot(int(report["version"]), weights, state, report)

    @torch.no_grad()
    def _write_edits(self) -> bool:
        edited = False
        for index, parameter in enumerate(self._parameters):
            weight = self.shared.weights[index]
            read = weight if self._snapshot is None else self._snapshot.weights[index]
            if parameter.data_ptr() != weight.data_ptr() and not torch.equal(parameter, read):
                weight.copy_(parameter)
                edited = True
            if self._snapshot is None:
                self.shared.attach(index, parameter)
        return edited

    def _leave_snapshot(self) -> None:
        for index, parameter in enumerate(self._parameters):
            self.shared.attach(index, parameter)

    # ------------------------------------------------------------------ out of the loop

    def _leave(self, stop: bool) -> int | None:
        reply, _ = self.client.call({"op": "leave", "stop": stop})
        return int(reply["successor"]) if reply.get("leader_lost") else None

    def _keep_the_end(self) -> None:
        shot = self._take_snapshot(with_state=True)
        self._version = shot.version
        self._keep(shot.weights, shot.state)
        if self.is_leader:
            self._tell_the_end()

    def _keep(self, weights: tuple[torch.Tensor, ...], state: tuple[dict[str, Any], ...]) -> None:
        """Make parameters and optimizer state private again."""
        assert self._layout is not None
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for parameter, info, weight, values in zip(
            self._parameters, self._layout.parameters, weights, state, strict=True
        ):
            parameter.data = weight
            if values:
                self.optimizers[info.optimizer].state[parameter] = values
        self._shared = None
        self._in_place = {}

    def _leave_run(self) -> None:
        if self._shared is not None:
            self._keep(*self._shared.read(with_state=True))
        if self.is_leader and self._run_name:
            Segment.unlink(self._segment_name)  # the host process does, unless it is what was lost
        self._layout = None
        super()._leave_run()
