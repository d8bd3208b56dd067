"""The ranks that are alive, and what they tell each other: collectives that a dead rank can't hang."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ._arguments import check_seconds
from .consistency.client import Client, CoordinatorGoneError, LeaderLostError, RevokedError, RunFailedError
from .consistency.coordinator import LEADER
from .consistency.hosting import get_host, tidy
from .consistency.jobs import PATIENCE, Address, Job, enlist, find_job, open_job
from .consistency.mailbox import HostLostError
from .launching import HydraAwareLauncher

# How many runs of each job this process has taken part in. A job is not known by its port: ports are used again.
_runs: dict[str, int] = {}


class LiveRanks(DDPStrategy):
    """Ranks with a coordinator in place of a process group, during ``fit``; all else is Lightning's DDP.

    During ``fit`` there is no process group: workers talk to a coordinator, and a worker that dies is missed by
    nobody. Outside the training loop, ``reduce``, ``broadcast`` and ``barrier`` are collectives of the live workers.
    Inside it, and in ``on_train_end``, nobody waits: ``reduce`` takes each live worker's latest value, ``broadcast``
    the source's latest, and ``barrier`` does nothing. Rank 0, the leader, validates, logs and writes checkpoints
    while the others train on.

    ``validate``, ``test`` and ``predict`` are Lightning's DDP.

    Args:
        lease_timeout: Seconds without a sign of life after which a worker counts as lost.
        **options: Passed on to Lightning.

    """

    def __init__(self, lease_timeout: float, **options: Any) -> None:
        super().__init__(**options)
        check_seconds("lease_timeout", lease_timeout)
        self._lease_timeout = lease_timeout
        self._client: Client | None = None
        self._run_name = ""
        self._schedule = b""  # events of an earlier run to repeat, packed
        self._has_shards = False  # whether this rank looks after its host's
        self._fitting = False
        self._nobody_waits = False  # inside the loop, and in what callbacks do right after it
        self._num_meetings: dict[str, int] = {}
        self._num_shares: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._seed = 0

    # ------------------------------------------------------------------ processes

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = HydraAwareLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, ends_together=False
        )

    @property
    def client(self) -> Client:
        """This worker's line to the coordinator, during ``fit``."""
        assert self._client is not None
        return self._client

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def worker(self) -> int:
        """Number of the worker that this rank is, or is one of the ranks of."""
        return self.global_rank

    @property
    def _speaks(self) -> bool:
        """Whether this rank speaks for its worker."""
        return True

    @property
    def num_workers(self) -> int:
        """How many workers begin the run."""
        return self.world_size

    @property
    def is_leader(self) -> bool:
        """Whether this worker validates, logs and writes checkpoints."""
        return self.worker == LEADER

    def any_of_worker(self, flag: bool) -> bool:
        """Whether any rank of this worker says so: it is the only one, unless a replica is several.

        Args:
            flag: What this one says.

        """
        return flag

    def setup_environment(self) -> None:
        """Come to the run: for ``fit`` to its coordinator, for all else to a process group as under DDP."""
        module = self.lightning_module
        trainer = module._trainer if module is not None else None
        self._fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if not self._fitting:
            super().setup_environment()
            return
        assert trainer is not None
        self._hang_up()
        if dist.is_initialized():  # of an earlier test(); training would broadcast through it
            dist.destroy_process_group()
        self.set_world_ranks()
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        connector = trainer._accelerator_connector
        before = connector.use_distributed_sampler
        connector.use_distributed_sampler = False  # the queue deals training samples out; the leader validates on all
        self._undo.append(lambda: setattr(connector, "use_distributed_sampler", before))
        self._connect(trainer)

    def _connect(self, trainer: Trainer) -> None:
        if self.is_global_zero:
            address, number = self._open_run(trainer)
            self._has_shards = True
            self._client = self._call_up(address, number)
        else:
            self._client = self._come_to(self._job)
        self._num_meetings.clear()
        agreed = self._meet("run", {"name": self._run_name, "seed": torch.initial_seed() % 2**31}).get(LEADER)
        if agreed is None:
            raise LeaderLostError("Rank 0 was lost before training began.")
        self._run_name, self._seed = agreed["name"], agreed["seed"]

    def _call_up(self, address: Address, number: int) -> Client:
        """Say hello to the coordinator of a run.

        Args:
            address: Where it is.
            number: Of the run there.

        """
        return Client(address, self.worker, number, self._lease_timeout / 4)

    @property
    def _job(self) -> Job:
        environment = self.cluster_environment
        assert environment is not None
        return Job(environment.main_address, environment.main_port, self.num_nodes)

    def _open_run(self, trainer: Trainer, name: str = "") -> tuple[Address, int]:
        """Have a coordinator begin a run, or go on with one whose coordinator was lost.

        Args:
            trainer: Whose run it is.
            name: Of the run that is to go on.

        Returns:
            Where the coordinator is, and the number of the run there.

        """
        address = open_job(self._job)
        options = self._run_options(trainer)
        header = {"op": "run", "options": options, "num_nodes": self.num_nodes, "name": name}
        run = get_host().request(header, self._schedule)
        number, self._run_name = int(run["run"]), str(run["name"])
        _runs[address.opening] = number
        return address, number

    def _come_to(self, job: Job) -> Client:
        """Find the coordinator; again, if what was found was another job's, which is over."""
        deadline = time.monotonic() + PATIENCE
        while True:
            address = find_job(job)
            number = _runs.get(address.opening, 0) + 1
            try:
                self._has_shards = job.num_nodes > 1 and self.local_rank == 0
                if self._has_shards:
                    self._has_shards = enlist(address, self.node_rank, number)
                client = self._call_up(address, number)
            except (CoordinatorGoneError, OSError, MisconfigurationException):
                if time.monotonic() > deadline:
                    raise
            except RunFailedError:
                _runs[address.opening] = number
                if job.num_nodes == 1 or time.monotonic() > deadline:
                    raise
            else:
                _runs[address.opening] = number
                return client
            time.sleep(0.2)

    def _run_options(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "world_size": self.num_workers,
            "max_steps": trainer.max_steps,
            "lease_timeout": self._lease_timeout,
        }

    # ------------------------------------------------------------------ collectives

    @property
    def _has_group(self) -> bool:
        """Whether a process group connects the ranks, as under DDP: not from the start of ``fit`` on."""
        return self._client is None or dist.is_initialized()

    def _meet(self, kind: str, value: Any) -> dict[int, Any]:
        """Exchange values with all live workers, which all call collectives of a kind in the same order."""
        number = self._num_meetings[kind] = self._num_meetings.get(kind, -1) + 1
        while True:
            try:
                return self.client.meet(f"{kind} {number}", kind, value)
            except RevokedError:  # given up, but not in the loop: nothing is lost by coming again
                self.client.greet()

    def _share(self, kind: str, value: Any, write: bool = True) -> dict[int, Any]:
        """Exchange values without waiting, under a name that this place of the program has on every rank.

        Values are of a line. What is broadcast is of a function: its source may well call it on another line.
        """
        place = f"{kind} {_call_site(with_lines=kind != 'broadcast')}"
        number = self._num_shares[place] = self._num_shares.get(place, -1) + 1
        parts: dict[int, Any] = self._insisting(lambda: self.client.share(f"{place} {number}", value, write))
        return parts

    # ------------------------------------------------------------------ given up, and back again

    def _insisting(self, action: Callable[[], Any]) -> Any:
        """Do something that can be done again, once this worker has found itself given up and has joined anew."""
        while True:
            try:
                return action()
            except HostLostError:
                self._rejoin(greets=False)
            except RevokedError:
                self._rejoin()

    @abstractmethod
    def _rejoin(self, greets: bool = True) -> None:
        """Enter the run again.

        Args:
            greets: As a new generation: this one was given up.

        """

    def _call(self, header: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """Ask the coordinator for something that can be asked for again."""
        answer: tuple[dict[str, Any], bytearray] = self._insisting(lambda: self.client.call(header, payload))
        return answer

    def wait_for_version(self, version: int) -> None:
        """Wait, inside the loop, until so many updates are made, or nobody is left to make them."""
        self._call({"op": "await", "version": version})

    def wait_for_ranks(self, key: str, ranks: list[int]) -> None:
        """Wait, inside the loop, until all of these ranks that live have come to the same key."""
        self._call({"op": "gather", "key": key, "ranks": ranks})

    # ------------------------------------------------------------------ collectives inside and outside the loop

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        parts = self._share(kind, value) if self._nobody_waits else self._meet(kind, value)
        return [parts[rank] for rank in sorted(parts)]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        """Reduce over the live workers.

        Args:
            tensor: A tensor; anything else comes back as it is.
            group: Not used during ``fit``.
            reduce_op: ``"mean"``, ``"sum"``, or a torch ``ReduceOp``.

        """
        if self._has_group:
            return super().reduce(tensor, group, reduce_op)
        if not isinstance(tensor, Tensor) or self.world_size == 1:
            return tensor
        operation = "mean" if reduce_op is None else str(reduce_op).lower().rsplit(".", 1)[-1]
        return _reduced(self._stacked("reduce", tensor), operation)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Stack the tensors of the live workers that have this one's shape; gradients don't flow between them."""
        if self._has_group:
            return super().all_gather(tensor, group, sync_grads)
        if self.world_size == 1:
            return tensor.unsqueeze(0) if self.num_processes > 1 else tensor
        return self._stacked("gather", tensor)

    def _stacked(self, kind: str, tensor: Tensor) -> Tensor:
        """Everybody's tensors. Those of another shape are of a batch of another size, which nobody waits for."""
        return torch.stack([other.to(tensor.device) for other in self._exchange(kind, tensor)
                            if other.shape == tensor.shape and other.dtype == tensor.dtype])  # fmt: skip

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Take the source's value; inside the loop its latest, or one's own before there is any."""
        if self._has_group:
            return super().broadcast(obj, src)
        if self.world_size == 1:
            return obj
        mine = self.global_rank == src
        if self._nobody_waits:
            return self._share("broadcast", obj if mine else None, write=mine).get(src, obj)
        parts = self._meet("broadcast", obj if mine else None)
        return obj if mine else parts.get(src, obj)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the live workers; inside the loop, don't."""
        if self._has_group:
            super().barrier(*args, **kwargs)
        elif not self._nobody_waits and self.world_size > 1:
            self._meet("barrier", None)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all live workers, or any of them, say yes; inside the loop, by what they said last."""
        if self._has_group:
            return super().reduce_boolean_decision(decision, all)
        if self.world_size == 1:
            return decision
        votes = [bool(vote) for vote in self._exchange("vote", bool(decision))]
        return min(votes) if all else max(votes)

    # ------------------------------------------------------------------ what all begin and end with

    def _state(self) -> dict[str, Tensor]:
        module = self.lightning_module
        assert module is not None
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def _share_leaders_state(self) -> bool:
        """Let all ranks that come to this have the leader's parameters and buffers.

        Returns:
            Whether this rank has come in time.

        """
        tensors = self._state()
        digests = self._meet("digest", digest(tensors.values()))
        if len(set(digests.values())) > 1:  # seeded alike, as a rule
            values = {name: tensor.detach() for name, tensor in tensors.items()} if self.is_leader else None
            self._take_state(self._meet("state", values).get(LEADER))
        return self.worker in digests

    def _take_state(self, given: Mapping[str, Tensor] | None) -> None:
        if given is None or self.is_leader:
            return
        tensors = self._state()
        with torch.no_grad():
            for name in given.keys() & tensors.keys():
                tensors[name].data.copy_(given[name])

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
        tidy()


def _reduced(stacked: Tensor, operation: str) -> Tensor:
    if operation in ("mean", "avg"):
        return stacked.double().mean(0).to(stacked.dtype) if stacked.is_floating_point() else stacked.sum(0) // len(
            stacked
        )  # fmt: skip
    if operation == "sum":
        return stacked.sum(0)
    if operation in ("max", "min"):
        return stacked.amax(0) if operation == "max" else stacked.amin(0)
    if operation == "product":
        return stacked.prod(0)
    raise MisconfigurationException(f"reduce_op={operation!r} is not known; use mean, sum, max, min or product.")


def digest(tensors: Iterable[Tensor]) -> str:
    """What equal tensors have in common."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


_DEPTH = 7  # of callers: an epoch's end and a step reduce in the same lines of Lightning's


def _call_site(with_lines: bool) -> str:
    """Where in the program a collective was called, the same on every rank."""
    frame = sys._getframe(2)
    places: list[str] = []
    while frame is not None and len(places) < _DEPTH:
        name = os.path.basename(frame.f_code.co_filename)
        if name == "launching.py":  # from here on the ranks' ways differ
            break
        if name != os.path.basename(__file__):
            places.append(f"{name}:{frame.f_lineno if with_lines else frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return "<".join(places)
