"""Downpour SGD: workers that push gradients to sharded parameter servers and wait for nobody."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from ._arguments import check_flag, check_whole
from ._asynchronous import parameters_of
from ._live_ranks import digest
from ._masked import MaskedStrategy
from ._replica_columns import ReplicasInColumns
from ._updating import OWN_STATE
from .consistency import snapshot as snapshots
from .consistency.client import RevokedError
from .consistency.events import from_pairs, num_ranks, pack
from .consistency.hosting import get_host
from .consistency.mailbox import HostLostError
from .consistency.memory import Segment
from .consistency.optimizers import carry, carry_groups, try_state
from .consistency.packing import Sums
from .consistency.plan import ParameterInfo, Plan, StateEntry, choose_num_shards, make_plan
from .consistency.replica import Replica
from .consistency.rows import Rows
from .consistency.shard import ShardSpec
from .consistency.staleness import MEAN_SQUARE, StalenessRule
from .consistency.updates import SliceMemory
from .placement.optimizers import is_elementwise
from .placement.rules.norms import synchronize_buffers
from .placement.tensor import no_dispatch
from .sparsity import Static


class DownpourStrategy(MaskedStrategy, ReplicasInColumns):
    """Asynchronous data parallelism around sharded parameter servers (Dean et al. 2012, section 4.1).

    Every rank is a worker that trains at its own pace on batches from one queue: it computes a gradient, pushes it,
    and fetches weights that others have moved meanwhile. The parameters live in *shards*, processes beside the
    workers, which run the optimizer that ``configure_optimizers`` returned, each on its slice. A slow worker slows
    nobody and a dead one stops nobody: what it had not finished is dealt out again. A killed shard is started again
    where it was. Each push is applied once, or reported lost.

    Rank 0 is the *leader*: it validates, logs and writes checkpoints while the others train on. Should it be lost,
    the run ends, and another rank writes all that was learned to ``rank0-lost-step=….ckpt`` first.

    ``max_epochs`` counts passes over the data by all workers together, ``max_steps`` and ``trainer.global_step``
    updates by all of them. Hooks of an optimizer's step are called by the worker that makes it, around its push.

    Learning rates follow the leader's schedulers. One that counts steps counts those that one device would have made
    of the batches done so far, so it comes to ``trainer.estimated_stepping_batches``; where ``max_steps`` ends the run,
    updates. (With data that the queue can't deal out, the leader's own steps.) One that ``training_step`` steps by hand
    counts those calls on rank 0. ``val_check_interval`` counts batches by all of them.

    Args:
        push_every: Steps whose gradients are summed before they are pushed (``n_push``).
        fetch_every: Steps between fetches (``n_fetch``). In between a worker steps by itself, ``w -= lr g``.
        num_shards: Number of shards on each host, or ``"auto"``: one per 8 M parameters, up to half the cores; one on
            each of several hosts.
        max_staleness: How many steps a worker may be ahead of the slowest live one (stale-synchronous, Ho 2013);
            ``None`` for any number. At a fetch every push, an update misses at most
            ``2 (max_staleness + 1) (workers - 1)`` others.
        staleness_rule: ``"none"``; ``"inverse"`` divides the learning rate by the staleness (Zhang 2016);
            ``"delay_compensated"`` corrects the gradient to the weights that it meets (Zheng 2017).
        codec: How pushes are coded: ``"fp32"`` (as they are), ``"bf16"``, ``"int8"``, ``"1bit"``, ``"topk"``; and how
            changes of weights are, for workers of other hosts than the shards'.
        warm_start_steps: Updates that the leader makes alone before the others begin.
        num_columns: Ranks that hold one replica between them, each the columns of its layers (section 3 of the paper).
            Such a replica computes one batch at a time, and its push is one update. Each rank writes and reads its own
            part of the parameters. If one of its ranks is lost, the replica is. On CPUs of one host, with
            ``codec="fp32"``, and without ``schedule``.
        sparsity: Which weights live: :class:`~squall.sparsity.Static`, a mask that stays, or ``None`` for all. Shards
            have live weights alone, and so have pushes and fetches. A checkpoint of another sparse training goes on
            with its masks.
        overlap: Compute the next gradient while the last one is carried and applied: nobody waits for a shard or a
            wire, and every gradient is an update staler.
        lease_timeout: Seconds without a sign of life after which a worker counts as lost. Workers give such signs
            while they compute.
        join_timeout: Seconds that the first workers wait for the others, before they begin without them.
        schedule: What :meth:`events` of an earlier run said, to repeat that run's interleaving, validations and what
            they lead to included. The rest must be as it was: data, seeds, arguments, number of ranks, and faults,
            except that of a lost host. A run that turns out to be another one ends with an error after
            ``join_timeout``. Metrics that say how the run is going (``staleness/mean`` and the like) may differ.
        accelerator: Passed on to Lightning, like all that follow.
        parallel_devices: The devices of this host.
        cluster_environment: Who starts the processes.
        checkpoint_io: How files are written.
        precision_plugin: Numerical precision.

    Raises:
        MisconfigurationException: Before the first batch, if an argument makes no sense here, or an optimizer can't be
            stepped by slices: it needs a closure, or keeps something outside its state of each parameter.

    On several hosts (``num_nodes``) each has an equal part of the shards. Rank 0's coordinates, and keeps what it last
    saw of the others' shards, at validation or a checkpoint; should a host be lost, its shards go on there from that.
    The hosts find each other by the environment variable ``SQUALL_SECRET``, the same random text on each, or by a file
    in ``~/.squall`` if they share the user's home. Between hosts, pushes and changes of weights go as codes.

    Metrics: ``staleness/mean`` and ``staleness/max`` over all updates so far (and a histogram in TensorBoard),
    ``queue/samples`` trained on, ``queue/reissued`` batches dealt out again, ``updates/applied``, ``updates/lost``,
    ``updates/rolled_back`` by shards of a lost host, ``workers/live``; and in bytes a step, of rank 0:
    ``bytes/pushed``, ``bytes/fetched`` and ``bytes/wire``, which other hosts were sent or have sent.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="downpour", accelerator="cpu", devices=2)
        >>> trainer.strategy.push_every
        1

    """

    def __init__(
        self,
        push_every: int = 1,
        fetch_every: int = 1,
        num_shards: int | Literal["auto"] = "auto",
        max_staleness: int | None = None,
        staleness_rule: str = "none",
        codec: str = "fp32",
        warm_start_steps: int = 0,
        num_columns: int = 1,
        sparsity: Static | None = None,
        *,
        overlap: bool = False,
        lease_timeout: float = 30.0,
        join_timeout: float = 120.0,
        schedule: Sequence[Sequence[Any]] | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            num_columns,
            warm_start_steps,
            lease_timeout,
            join_timeout,
            sparsity=sparsity,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        for name, value, least in (
            ("push_every", push_every, 1),
            ("fetch_every", fetch_every, 1),
            ("num_shards", 1 if num_shards == "auto" else num_shards, 1),
            ("max_staleness", 0 if max_staleness is None else max_staleness, 0),
        ):
            check_whole(name, value, least)
        if num_columns > 1 and codec != "fp32":
            raise MisconfigurationException(
                f"num_columns={num_columns} with codec={codec!r}: columns write their parts of a push into memory as"
                ' they are, where a code would save nothing. Set codec="fp32", or num_columns=1.'
            )
        if num_columns > 1 and schedule is not None:
            raise MisconfigurationException(
                f"num_columns={num_columns} with a schedule: only whole replicas repeat one so far. Set schedule=None,"
                " or num_columns=1."
            )
        if num_columns != 1 and sparsity is not None:
            raise MisconfigurationException(
                f"num_columns={num_columns!r} with sparsity={sparsity!r}: masks are of whole replicas so far. Leave one"
                " of them out, or use ColumnParallelStrategy(sparsity=...)."
            )
        if sparsity is not None and not isinstance(sparsity, Static):
            raise MisconfigurationException(
                f"sparsity={sparsity!r}: workers that don't wait for each other can't move masks so far. Use"
                " squall.sparsity.Static(density=...), which goes on with the masks of a checkpoint, or SparseStrategy."
            )
        check_flag("overlap", overlap)
        _check_codec(codec)
        self.push_every = push_every
        self.fetch_every = fetch_every
        self.num_shards = num_shards
        self.max_staleness = max_staleness
        self.rule = StalenessRule(staleness_rule)
        self.codec = codec
        self.overlap = overlap
        self._num_scheduled = 0  # ranks that the schedule speaks of
        if schedule is not None:
            try:
                events = from_pairs(schedule)
            except ValueError as error:
                raise MisconfigurationException(
                    f"schedule: {error}. Give it what strategy.events of an earlier run said, or None."
                ) from None
            self._schedule, self._num_scheduled = pack(events), num_ranks(events)
        self._replica: Replica | None = None
        self._plan: Plan | None = None
        self._rows = Rows([])
        self._accrued = Sums(0)
        self._begins_epoch = True  # until this worker's first step in it
        self._copied: dict[int, snapshots.Copied] = {}  # what was read of other hosts' shards

    def _run_options(self, trainer: Trainer) -> dict[str, Any]:
        return {
            **super()._run_options(trainer),
            "max_staleness": self.max_staleness,
        }

    @property
    def replica(self) -> Replica:
        """This worker's side of the weights, inside the loop."""
        assert self._replica is not None
        return self._replica

    # ------------------------------------------------------------------ into the loop

    def setup_environment(self) -> None:
        """Come to the run, if it has the ranks that it is to repeat."""
        num_here = self.num_nodes * self.num_processes
        if self._num_scheduled > num_here:
            raise MisconfigurationException(
                f"schedule: it has events of rank {self._num_scheduled - 1}, but the ranks of this run are 0 to"
                f" {num_here - 1}. Give the Trainer {self._num_scheduled} devices in all, or schedule=None."
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Look at the optimizers while nothing has begun."""
        super().setup(trainer)
        if self._fitting:
            self._plan = self._make_plan()

    def _make_plan(self) -> Plan:
        members = parameters_of(self.optimizers)
        self._parameters = [parameter for parameter, _, _ in members]
        self._rows = Rows(self._parameters, self._live)
        elementwise = [is_elementwise(optimizer) for optimizer in self.optimizers]
        tried: dict[Any, tuple[StateEntry, ...]] = {}
        infos = []
        for number, (parameter, index, group) in enumerate(members):
            optimizer = self.optimizers[index]
            if isinstance(optimizer, torch.optim.LBFGS):
                raise MisconfigurationException(
                    "LBFGS asks for the loss several times a step, which shards can't answer. Use another optimizer,"
                    ' or Trainer(strategy="ddp").'
                )
            if not elementwise[index] and not self._rows.is_whole(number):
                raise MisconfigurationException(
                    f"sparsity={self.sparsity}: {type(optimizer).__name__} doesn't treat every weight alone, and shards"
                    " have live ones alone. Use another optimizer, or SparseStrategy."
                )
            shape = (5,) if elementwise[index] else tuple(parameter.shape)
            key = (index, group, parameter.dtype, shape)
            if key not in tried:
                entries = try_state(optimizer, optimizer.param_groups[group], shape, parameter.dtype)
                if self.rule.compensates:
                    entries.append(StateEntry(MEAN_SQUARE, "like", (), parameter.dtype))
                tried[key] = tuple(entries)
            infos.append(ParameterInfo(self._rows.shape(number), parameter.dtype, index, group, tried[key]))
        num_elements = sum(info.num_elements for info in infos)
        num_shards = choose_num_shards(self.num_shards, num_elements, self.num_nodes)
        return make_plan(infos, elementwise, num_shards, _code_size(self.codec), self.num_nodes)

    @property
    def _live(self) -> dict[int, Tensor]:
        """Where masks let live, by number of a parameter."""
        if self._training is None:
            return {}
        masks = {self._training.parameters[name]: mask for name, mask in self.masks.items()}
        return {index: masks[parameter] for index, parameter in enumerate(self._parameters) if parameter in masks}

    def _shared_seed(self, seed: int) -> int:
        """The leader's, of which a worker hears that comes late, too."""
        return seed if self.sparsity is not None and self.sparsity.seed is not None else self._seed

    def _digest_of_layout(self) -> str:
        assert self._plan is not None
        return f"{self._plan.digest} {digest(self._live.values())}"

    def _lay_out(self) -> None:
        """Hand the weights to the shards of this host; the leader keeps those of the others, should one be lost."""
        assert self._plan is not None
        host = get_host()
        mine = self._plan.group(self.node_rank)
        slices = self._plan.slices if self.is_leader else self._plan.slices[mine.start : mine.stop]
        sizes = [slice_.num_bytes for slice_ in slices]
        first = 0 if self.is_leader else mine.start
        names = host.request({"op": "memory", "num_bytes": sizes, "first": first, "num_served": len(mine)})["names"]
        memories = [SliceMemory(Segment(name), slice_) for name, slice_ in zip(names, slices, strict=True)]
        snapshots.fill(memories, self._rows, self.optimizers)
        spec = ShardSpec(
            self._plan,
            tuple(carry(optimizer) for optimizer in self.optimizers),
            carry_groups(self.optimizers),
            self.rule,
            self.codec,
            3 if self.rule.compensates else 2,
        )
        host.request({"op": "go", "version": self._version}, pickle.dumps(spec))

    def _join(self) -> None:
        if self._replica is None:
            assert self._plan is not None
            part = self._split(self._parameters)  # not before the shards have what is whole
            self._replica = Replica(
                self.client, self._plan, self._held or self._parameters, self._run_name,
                3 if self.rule.compensates else 2, self.codec, self.node_rank, 8 * self._lease_timeout, part,
                self._parameters, self._live,
            )  # fmt: skip
            self._accrued = Sums(len(self._parameters))
            for optimizer in self.optimizers:
                optimizer.state.clear()  # it is with the shards
            if self.is_leader and self._resumed.get("owed"):
                self._replica.owe([row.to(torch.float32) for row in self._resumed["owed"]])
        self._replica.join()
        self._return_lost()
        self._version = max(self._version, self._replica.version)

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compute with what came back from the last push, and not further ahead than the run allows."""
        super().on_train_batch_start(batch, batch_idx)
        self._begins_epoch = self._begins_epoch or batch_idx == 0
        if self.max_staleness is not None:
            self._rejoining(lambda: self.client.call({"op": "gate"}))
        if not self.is_leader and self.replica.base < self.warm_start_steps:  # it joined before the leader went ahead
            self._rejoining(self.replica.fetch)
        if self.overlap:
            self._keep_edits()  # which weights on their way would replace
            self._rejoining(lambda: self.replica.land(keep=1))
            self._collect(wait=False)

    def _write_edits(self) -> bool:
        edits = self.replica.find_edits(look=self._begins_epoch or self._snapshot is not None)
        if not self.any_of_worker(bool(edits)):
            return False
        if self._begins_epoch and not self.is_leader:
            self.replica.remember()
            self._warn_once(
                "The weights were edited between two epochs. There only rank 0's edits count, or each rank's own would"
                " be made once more; those between two steps count on every rank."
            )
            return False
        while True:
            try:
                self.replica.write(edits)
                break
            except HostLostError:
                self._rejoin(greets=False)
            except RevokedError:
                self._rejoin()
        self._version = max(self._version, self.replica.version)
        return True

    def _take_over_step(self, optimizer: Optimizer) -> None:
        super()._take_over_step(optimizer)
        # Hooks of the optimizer are called here: at the shards it has none.
        step: Any = optimizer.step
        optimizer.step = MethodType(Optimizer.profile_hook_step(step.__func__), optimizer)  # type: ignore[method-assign]

    def _step(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        self._keep_edits()
        self._begins_epoch = False
        gradients = self._gradients_of(optimizer)
        self._count(self._version)
        if all(gradient is None for gradient in gradients):
            return
        self._num_steps += 1
        trainer = self._trainer
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        push = self._num_steps % self.push_every == 0 or last
        fetch = self._num_steps % self.fetch_every == 0 or last
        adds_later = not push and not fetch  # in one pass with the local step
        if self.push_every > 1 and not adds_later:
            self._accrued.add(gradients)
        if push:
            self._push(self._accrued.take() if self.push_every > 1 else gradients, fetch)
        elif fetch:
            self._rejoining(self.replica.fetch)
        self._adopt_hyperparameters(self.replica.hyper)
        self.replica.hyper = None
        if not fetch:
            self.replica.step_locally(gradients, self._rates(), self._accrued if adds_later else None)
        self._count(self._version)

    def _gradients_of(self, optimizer: Optimizer) -> list[Tensor | None]:
        mine = {p for group in optimizer.param_groups for p in group["params"]} if len(self.optimizers) > 1 else None
        with no_dispatch():
            return self._agreed([p.grad if mine is None or p in mine else None for p in self._parameters])

    def _rates(self) -> list[float]:
        infos = self._plan.parameters if self._plan is not None else ()
        return [float(self.optimizers[info.optimizer].param_groups[info.group].get("lr", 0.0)) for info in infos]

    def _collect(self, wait: bool) -> None:
        """Take what has come back of a push that was carried to other hosts meanwhile."""

        def collect() -> None:
            result = self.replica.collect(wait)
            if result is not None:
                self._version = max(self._version, result.version)
                if not result.applied:
                    self.replica.fetch()

        self._rejoining(collect)

    def _rejoin(self, greets: bool = True) -> None:
        if self._replica is not None:
            self._replica.forget_courier()  # as the generation that sent it
        super()._rejoin(greets)

    def _return_lost(self) -> None:
        """Give batches back whose gradients could not be applied, since shards had moved."""
        if self.replica.lost:
            tickets, self.replica.lost = self.replica.lost, []
            self._sent_hyper = None  # it went with them
            self.client.call({"op": "return", "tickets": tickets, "lost": True})

    def _push(self, gradients: Sequence[Tensor | None], fetch: bool) -> None:
        if self.overlap:
            self._collect(wait=True)
        hyper = self._changed_hyperparameters()
        assert self._buffers is not None
        if self._is_split:  # a step within training_step comes before what that does at its end
            synchronize_buffers()
        buffers = self._buffers.pack()
        tickets = list(self._tickets)
        self._tickets.clear()

        if self.overlap:
            self.replica.remember()  # what is fetched now comes where these weights were

        def push() -> None:
            if self.overlap and fetch and self.replica.is_far:
                self.replica.push_later(gradients, tickets, hyper, buffers)
                return
            result = self.replica.push(gradients, tickets, fetch, hyper, buffers)
            self._version = result.version
            if fetch and not self.overlap:
                self.replica.land()
            elif not result.applied:
                self.replica.fetch()

        self._rejoining(push)
        self._version = max(self._version, self.replica.version)

    def _metrics(self) -> dict[str, float]:
        metrics = super()._metrics()
        if self._replica is not None and self._num_steps:
            replica = self._replica
            counts = {"bytes/pushed": replica.num_bytes_pushed, "bytes/fetched": replica.num_bytes_fetched}
            counts["bytes/wire"] = sum(replica.num_bytes_carried)
            metrics |= {name: count / self._num_steps for name, count in counts.items()}
        return metrics

    # ------------------------------------------------------------------ one consistent snapshot

    def _read_snapshot(self, with_state: bool) -> snapshots.Snapshot:
        """Read one version of all weights."""
        assert self._plan is not None
        self._collect(wait=True)
        while True:
            try:
                self.replica.settle()
                self._copied.clear()
                shot = snapshots.take(self.client, self._plan, self._attach, with_state)
                if with_state:
                    shot = replace(shot, owed=self.replica.owed())
                shot = self._rows.expand(shot)
                break
            except HostLostError:
                self.replica.join()
        if with_state and self.is_leader and self.num_nodes > 1:
            self._keep_copies(shot.version)
        self.replica.compute_with(self._parts_of(shot, self._parameters), shot.version)
        return shot

    def _attach(self, shard: int, with_state: bool) -> SliceMemory:
        """A shard's memory, or a copy of it if it is on another host."""
        assert self._plan is not None
        slice_ = self._plan.slices[shard]
        mailbox = self.replica.remote(shard)
        if mailbox is None:
            prefix = self.replica.prefix(self._plan.group_of(shard))
            return SliceMemory(Segment(f"{prefix}-s{shard}"), slice_)
        ranges = snapshots.ranges_of(slice_, with_state)
        copied = snapshots.Copied(slice_.num_bytes)
        copied.fill(ranges, mailbox.read(shard, ranges))
        self._copied[shard] = copied
        return SliceMemory(copied, slice_)

    def _keep_copies(self, version: int) -> None:
        """Keep what was read of other hosts' shards where it is found should one be lost."""
        assert self._plan is not None
        for shard, copied in self._copied.items():
            num_bytes = self._plan.slices[shard].num_bytes
            kept = Segment(f"{self._run_name}-s{shard}").tensor(torch.uint8, 0, num_bytes)
            kept.copy_(copied.tensor(torch.uint8, 0, num_bytes))
        self._copied.clear()
        get_host().request({"op": "kept", "version": version})

    def _leave_snapshot(self) -> None:
        self.replica.fetch()

    def _state_at(self, shot: snapshots.Snapshot) -> dict[str, Any]:
        state = super()._state_at(shot)
        return state | {"owed": list(shot.owed)} if shot.owed else state

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of any strategy, compressed or not; of one whose weights alone are taken, no run goes on."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = dict(checkpoint.get(OWN_STATE) or {}) if "loops" in checkpoint else {}
        return checkpoint

    def _write_as_successor(self, checkpoint: dict[str, Any], path: _PATH) -> None:
        self._add_masks(checkpoint)
        super()._write_as_successor(checkpoint, path)

    # ------------------------------------------------------------------ out of the loop

    def _hand_in_the_rest(self) -> None:
        accrued = self._accrued.take()
        if any(gradient is not None for gradient in accrued):
            self._push(accrued, fetch=False)
        super()._hand_in_the_rest()

    def _leave(self, stop: bool) -> int | None:
        self._collect(wait=True)
        return self.replica.leave(stop)

    def _leave_run(self) -> None:
        if self._replica is not None:
            self._replica.close()
        self._replica = self._plan = None
        self._accrued = Sums(0)
        super()._leave_run()


def _code_size(codec: str) -> Callable[[int, torch.dtype], int]:
    if codec == "fp32":
        return lambda num_elements, dtype: num_elements * dtype.itemsize
    from .consistency.codecs import get_codec

    found = get_codec(codec)
    return lambda num_elements, dtype: found.num_bytes(num_elements)


def _check_codec(codec: str) -> None:
    if codec != "fp32":
        from .consistency.codecs import get_codec

        get_codec(codec)
