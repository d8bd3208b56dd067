"""Workers that are several ranks each: the columns of one replica, which to all others are one worker."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from ._arguments import check_whole
from ._leases import leased_batches
from ._placing import INTERRUPTED, refuse_interrupted, run_eagerly
from ._split_steps import SplitSteps
from ._updating import UpdatingStrategy
from .consistency.client import Client, LeaderLostError
from .consistency.jobs import Address
from .consistency.packing import Part, Runs
from .consistency.snapshot import Snapshot
from .consistency.together import SharedClient, Together
from .consistency.values import decode, encode
from .placement.batches import BatchSupply, agree_on_batches, release_batches, synchronize_generators
from .placement.columns import Columns
from .placement.layout import plan_layout
from .placement.module import place, take_part, unplace, whole_state_dict
from .placement.tensor import SplitParameter, no_dispatch


class ReplicasInColumns(SplitSteps, UpdatingStrategy):
    """Model parallelism inside each replica (Dean et al. 2012, section 3): neighbouring ranks are one worker.

    The ranks of a replica have a process group of their own, for what crosses between columns. The first of them
    speaks to the coordinator, and the others do what it hears; see :mod:`squall.consistency.together`. Each rank
    writes its own part of a push, and reads its own part of the weights.

    Args:
        num_columns: Ranks of one replica.
        *args: Passed on.
        **options: Passed on.

    """

    def __init__(self, num_columns: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_columns = check_whole("num_columns", num_columns, 1)
        self._columns = Columns()
        self._held: list[Tensor] = []  # of each parameter, the part that this rank holds, while the module is split
        self._stance: Any = None  # of torch.compile, meanwhile

    # ------------------------------------------------------------------ who is who

    @property
    def worker(self) -> int:
        """Number of this rank's replica."""
        return self.global_rank // self.num_columns

    @property
    def num_workers(self) -> int:
        """Number of replicas that begin the run."""
        return self.world_size // self.num_columns

    @property
    def column(self) -> int:
        """This rank's place in its replica."""
        return self.global_rank % self.num_columns

    @property
    def columns(self) -> Columns:
        """The columns of this replica."""
        return self._columns

    @property
    def _speaks(self) -> bool:
        return self.column == 0

    @property
    def _is_split(self) -> bool:
        return bool(self._held)

    @property
    def _together(self) -> Together | None:
        return self._client.together if isinstance(self._client, SharedClient) else None

    def _configure_launcher(self) -> None:
        num_here = self.num_processes * self.num_nodes
        if self.num_columns > 1 and self.num_nodes > 1:
            raise MisconfigurationException(
                f"num_columns={self.num_columns}: the columns of Downpour's replicas are processes of one host, and"
                f" num_nodes={self.num_nodes}. Set num_columns=1, or Trainer(num_nodes=1)."
            )
        if num_here % self.num_columns:
            raise MisconfigurationException(
                f"num_columns={self.num_columns} ranks make one replica, but devices={self.num_processes}. Set"
                f" Trainer(devices=...) to a multiple of num_columns, or num_columns to a divisor of {num_here}."
            )
        super()._configure_launcher()

    # ------------------------------------------------------------------ into the run

    def setup_environment(self) -> None:
        """Come to the run, this replica's ranks together."""
        if self._together is not None:
            self._hang_up()  # all that is left of an earlier fit
            gc.collect()  # a data worker that collected its process group would join threads that it has not got
        super().setup_environment()

    def _call_up(self, address: Address, number: int) -> Client:
        if self.num_columns == 1:
            return super()._call_up(address, number)
        client = SharedClient(
            address, self.worker, number, self._lease_timeout / 4, self.column, self.num_columns, self._join_timeout
        )
        assert client.together is not None
        self._columns = Columns(client.together.group, self.column, self.num_columns)
        synchronize_generators(self._columns, self.root_device)
        return client

    def setup(self, trainer: Trainer) -> None:
        """Look at the module while it is whole."""
        if self.num_columns > 1 and self._fitting:
            assert self.lightning_module is not None
            if self.root_device.type != "cpu":
                raise MisconfigurationException(
                    f"num_columns={self.num_columns}: the columns of Downpour's replicas are computed on CPUs so far,"
                    f' and this rank has {self.root_device}. Use Trainer(accelerator="cpu"), or num_columns=1.'
                )
            refuse_interrupted(self.lightning_module)
            self._keep_metrics_apart(self.lightning_module)
        super().setup(trainer)

    def _share_initial_state(self) -> None:
        super()._share_initial_state()
        if self._together is not None:
            self._together.equalize([tensor.data for tensor in self._state().values()])

    def _keep_metrics_apart(self, module: LightningModule) -> None:
        """The columns of a replica count the same samples, and other replicas' wait for nobody."""
        for metric in module.modules():
            if isinstance(metric, Metric):
                before = metric.distributed_available_fn
                metric.distributed_available_fn = _never
                self._undo.append(partial(setattr, metric, "distributed_available_fn", before))

    # ------------------------------------------------------------------ data

    def process_dataloader(self, dataloader: Any) -> Any:
        """Have the queue deal batches out to replicas, whose columns all see them."""
        loader = super().process_dataloader(dataloader)
        if self._together is None:
            return loader
        supply = BatchSupply(
            self._columns,
            self.root_device,
            "auto",
            lambda: synchronize_generators(self._columns, self.root_device),
            all_load=leased_batches(loader) is not None,  # whose leases each column has to know
        )
        self._undo.append(partial(release_batches, loader))
        return agree_on_batches(loader, supply, self.worker)

    # ------------------------------------------------------------------ the module, split and whole

    def _split(self, parameters: Sequence[Tensor]) -> Part | None:
        """Split the module over the columns, in place.

        Args:
            parameters: All that optimizers step.

        Returns:
            What this rank holds of each; None if it holds all.

        """
        if self.num_columns == 1:
            return None
        module = self.lightning_module
        assert module is not None
        self._stance = run_eagerly(module)
        self.layout = plan_layout(module, self.num_columns, {})
        place(module, self.layout, self._columns)
        with no_dispatch():
            self._held = [parameter.detach().as_subclass(Tensor) for parameter in parameters]
        held = tuple(_runs_of(parameter) for parameter in parameters)
        pushed = held if self._speaks else tuple(() if runs is None else runs for runs in held)
        return Part(held, pushed)

    def _parts_of(self, shot: Snapshot, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What this rank holds of a version's weights."""
        if not self._is_split:
            return shot.weights
        return [
            take_part(weight, parameter._spec) if isinstance(parameter, SplitParameter) else weight
            for weight, parameter in zip(shot.weights, parameters, strict=True)
        ]

    def _agreed(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """This rank's parts of gradients: of those that any rank of the replica has."""
        together = self._together
        if together is None or not self._is_split:
            return gradients
        there = together.any([gradient is not None for gradient in gradients])
        return [
            (torch.zeros_like(held) if gradient is None else gradient.as_subclass(Tensor)) if is_there else None
            for gradient, held, is_there in zip(gradients, self._held, there, strict=True)
        ]

    def any_of_worker(self, flag: bool) -> bool:
        """Whether any rank of this replica says so.

        Args:
            flag: What this one says; all of them call it.

        """
        return flag if self._together is None else self._together.any([flag])[0]

    def _make_whole(self) -> None:
        if self._is_split:
            assert self.lightning_module is not None
            unplace(self.lightning_module)
            self._held = []
            self._run_as_before()

    def _run_as_before(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _keep_the_end(self) -> None:
        super()._keep_the_end()
        self._make_whole()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict that one device would hold."""
        state = super().lightning_module_state_dict()
        if not self._is_split:
            return state
        assert self.lightning_module is not None
        return whole_state_dict(self.lightning_module)

    # ------------------------------------------------------------------ collectives

    @property
    def _has_group(self) -> bool:
        """Whether a process group connects all ranks: that of a replica is for its columns."""
        return self._together is None and super()._has_group

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Take the source's value; inside the loop its latest, or one's own before there is any."""
        together = self._together
        if together is None:
            return super().broadcast(obj, src)
        worker, column = divmod(src, self.num_columns)
        mine = worker == self.worker
        if mine and column:  # the first of its replica speaks for it
            said, blob = encode(obj if self.column == column else None)
            told = together.tell(json.dumps([said, len(blob)]).encode() + b"\n" + blob, column)
            header, _, blob = told.partition(b"\n")
            obj = decode(json.loads(header)[0], blob)
        value = obj if mine else None
        parts = self._share("broadcast", value, mine) if self._nobody_waits else self._meet("broadcast", value)
        return obj if self.global_rank == src else parts.get(worker, obj)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """A replica without one of its ranks is none: those who wait for this rank hear that it leaves."""
        if self._together is not None:
            if self._in_loop and not isinstance(exception, (LeaderLostError, KeyboardInterrupt)):
                first = self.worker * self.num_columns
                sys.stderr.write(
                    f"squall: rank {self.global_rank} leaves the run, and with it its replica, ranks {first} to"
                    f" {first + self.num_columns - 1}"
                    + (".\n" if self.is_leader else ". What it had not finished is dealt out to the others.\n")
                )
            self._columns.close(INTERRUPTED)
        super().on_exception(exception)

    def _leave_run(self) -> None:
        self._held = []
        self._run_as_before()
        super()._leave_run()


def _never() -> bool:
    return False


def _runs_of(parameter: Tensor) -> Runs | None:
    """Where a split parameter's elements are in the whole one; None of a whole one."""
    if not isinstance(parameter, SplitParameter):
        return None
    shape = parameter.shape
    index = take_part(torch.arange(shape.numel()).view(shape), parameter._spec).reshape(-1)
    if not index.numel():
        return ()
    begins = torch.cat([torch.tensor([0]), (index.diff() != 1).nonzero().reshape(-1) + 1])
    ends = torch.cat([begins[1:], torch.tensor([index.numel()])])
    starts = index[begins]
    return tuple(zip(starts.tolist(), (starts + ends - begins).tolist(), begins.tolist(), strict=True))
