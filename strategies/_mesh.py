"""The (data x column) mesh under a Strategy: who is who, who sees which batch, and what collectives mean."""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _sync_ddp_if_available
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Module
from torchmetrics import Metric

from .launching import HydraAwareLauncher
from .placement.batches import BatchSource, BatchSupply, agree_on_batches, release_batches, synchronize_generators
from .placement.columns import Columns
from .placement.gradients import average_gradients
from .placement.rules.norms import synchronize_buffers


class MeshStrategy(DDPStrategy):
    """Ranks as replicas of columns: neighbouring ranks are the columns of one replica.

    Columns of a replica see the same batch; replicas see different ones and average their gradients.

    Args:
        num_columns: Ranks of one replica.
        data_parallel_size: Number of replicas; left at 1, as many as the devices make.
        batches: ``"auto"`` or ``"broadcast"``, see :class:`~squall.placement.batches.BatchSupply`.
        timeout: How long a collective may wait; None for torch's default.
        **options: Passed on to Lightning.

    Raises:
        MisconfigurationException: If an argument makes no mesh.

    """

    _argument = "num_columns"  # that says how many ranks a replica has

    def __init__(
        self,
        num_columns: int,
        data_parallel_size: int,
        batches: BatchSource,
        *,
        timeout: timedelta | None = None,
        **options: Any,
    ) -> None:
        super().__init__(timeout=default_pg_timeout if timeout is None else timeout, **options)
        for name, value in ((self._argument, num_columns), ("data_parallel_size", data_parallel_size)):
            if not isinstance(value, int) or value < 1:
                raise MisconfigurationException(f"{name}={value!r} must be a whole number, 1 or more.")
        if batches not in ("auto", "broadcast"):
            raise MisconfigurationException(f"batches={batches!r} must be 'auto' or 'broadcast'.")
        self.num_columns = num_columns
        self.data_parallel_size = data_parallel_size
        self.device_mesh: DeviceMesh | None = None
        self._batches: BatchSource = batches
        self._columns = Columns()
        self._metrics: list[Metric] = []
        self._loaders: list[Any] = []

    def _configure_launcher(self) -> None:
        self._resolve_mesh_shape()
        if self._start_method == "popen":
            assert self.cluster_environment is not None
            self._launcher = HydraAwareLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self._start_method)

    def _resolve_mesh_shape(self) -> None:
        world_size = self.num_processes * self.num_nodes
        if self.data_parallel_size == 1 and world_size % self.num_columns == 0:
            self.data_parallel_size = max(world_size // self.num_columns, 1)
        if self.num_columns * self.data_parallel_size != world_size:
            raise MisconfigurationException(
                f"{self._argument}={self._asked!r} x data_parallel_size={self.data_parallel_size} needs "
                f"{self.num_columns * self.data_parallel_size} processes, but devices={self.num_processes} on "
                f"num_nodes={self.num_nodes} makes {world_size}. Set Trainer(devices=...) to a multiple of "
                f"{self._argument}, or {type(self).__name__}({self._argument}=...) to a divisor of {world_size}."
            )

    @property
    def _asked(self) -> Any:
        """The value of the argument that says how many ranks a replica has."""
        return self.num_columns

    @property
    def column(self) -> int:
        """This process's column."""
        return self.global_rank % self.num_columns

    @property
    def data_rank(self) -> int:
        """This process's replica."""
        return self.global_rank // self.num_columns

    @property
    def columns(self) -> Columns:
        """The columns of this replica."""
        return self._columns

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each replica draws its own samples; its columns draw the same."""
        return {"num_replicas": self.data_parallel_size, "rank": self.data_rank}

    def setup_environment(self) -> None:
        """Join the process group and lay the mesh over it."""
        # Process groups of an earlier run may hang in a cycle of dead objects. A data worker that is forked with it and
        # collects it there joins threads that it has not got, and dies of it.
        gc.collect()
        super().setup_environment()
        if self.device_mesh is None:
            self.device_mesh = init_device_mesh(
                self.root_device.type, (self.data_parallel_size, self.num_columns), mesh_dim_names=("data", "column")
            )
            self._columns = Columns(self.device_mesh.get_group("column"), self.column, self.num_columns)
        synchronize_generators(self._columns, self.root_device)
        module = self.lightning_module
        if self.data_parallel_size == 1 and module is not None and module._trainer is not None:
            # A single replica reads what one device reads, in its order: Lightning's sampler would shuffle any
            # training data.
            module.trainer._accelerator_connector.use_distributed_sampler = False

    @property
    def _data_group(self) -> dist.ProcessGroup:
        assert self.device_mesh is not None
        return self.device_mesh.get_group("data")

    def _broadcast_module(self, module: Module) -> None:
        """All ranks start from rank 0's weights and buffers, seeded or not."""
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, src=0)

    def _share_buffers(self) -> None:
        if self.data_parallel_size > 1 and self.lightning_module is not None:
            synchronize_buffers()
            with torch.no_grad():
                for buffer in self.lightning_module.buffers():
                    if type(buffer) is Tensor:
                        dist.broadcast(buffer.data, src=self.column, group=self._data_group)

    def on_validation_start(self) -> None:
        """Every replica validates with the first one's running statistics, as under DDP."""
        self._share_buffers()

    def on_train_end(self) -> None:
        """Every replica ends with the first one's running statistics."""
        self._share_buffers()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the replicas' gradients, once a step."""
        module = self.lightning_module
        assert module is not None
        if self.data_parallel_size > 1 and not self._accumulates(module):
            average_gradients(module, self._data_group, self._columns.ledger)

    def _accumulates(self, module: LightningModule) -> bool:
        if not module.automatic_optimization or module._trainer is None:
            return False
        return module.trainer.fit_loop._should_accumulate()

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Nothing to prepare: no wrapper stands around the module."""

    def process_dataloader(self, dataloader: Any) -> Any:
        """Have all columns of a replica iterate the same batches."""
        dataset: Any = getattr(dataloader, "dataset", None)
        if self.data_parallel_size > 1 and hasattr(dataset, "__len__") and len(dataset) < self.data_parallel_size:
            raise MisconfigurationException(
                f"A data set of {len(dataset)} samples can't be dealt out to data_parallel_size="
                f"{self.data_parallel_size} replicas. Use fewer devices, more columns, or more data."
            )
        if self.num_columns == 1:
            return dataloader
        supply = BatchSupply(self._columns, self.root_device, self._batches, self._start_epoch)
        self._loaders.append(dataloader)
        return agree_on_batches(dataloader, supply, self.data_rank)

    def _start_epoch(self) -> None:
        synchronize_generators(self._columns, self.root_device)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        """Reduce over all ranks; what the columns of a replica have in common counts once in a sum.

        Args:
            tensor: A tensor; anything else comes back as it is.
            group: Ranks to reduce over instead of all.
            reduce_op: ``"mean"``, ``"sum"``, or a torch ``ReduceOp``.

        """
        if not isinstance(tensor, Tensor):
            return tensor
        summed = str(reduce_op).lower().rsplit(".", 1)[-1] == "sum"
        if group is None and summed and self.num_columns > 1:
            total = _sync_ddp_if_available(tensor, None, reduce_op="sum")
            if total.is_floating_point():
                return total / self.num_columns
            return torch.div(total, self.num_columns, rounding_mode="floor")
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any of them, say yes."""
        votes = torch.tensor(int(decision), device=self.root_device)
        if _distributed_is_initialized():
            dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    def _adopt_metrics(self, module: Module) -> None:
        """Let metrics gather from replicas: the columns of one hold the same state, which must count once."""
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                metric.process_group = self._data_group
                self._metrics.append(metric)

    def _release(self) -> None:
        """Give metrics and loaders back as they came."""
        for metric in self._metrics:
            metric.process_group = None
        self._metrics.clear()
        for loader in self._loaders:
            release_batches(loader)
        self._loaders.clear()
