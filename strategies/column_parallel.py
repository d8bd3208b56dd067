"""Columns: each layer's outputs split over the ranks, as AlexNet's were over two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizer_to_device, _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ._mesh import MeshStrategy
from ._placing import INTERRUPTED, log_graph, num_images, refuse_interrupted, run_eagerly
from .placement import checkpoint as distributed_checkpoint
from .placement.batches import BatchSource
from .placement.columns import Crossing
from .placement.layout import Layout, derive_layout, plan_layout, read_layout
from .placement.module import place, unplace, whole_state_dict
from .placement.optimizers import gather_optimizer_state, take_optimizer_state, whole_optimizer_state, wrap_step
from .placement.rules.norms import synchronize_buffers
from .placement.tensor import no_dispatch, whole


class ColumnParallelStrategy(MeshStrategy):
    """Split the layers of a stock LightningModule by output channels over several ranks.

    The two-GPU AlexNet (Krizhevsky, Sutskever and Hinton 2012, section 3.5 and figure 2), for any convolutional
    network: each rank holds, computes and trains its own outputs of every convolution and linear layer, and fetches
    from the other columns only what its own outputs read. Grouped convolutions whose groups fall inside the columns
    exchange nothing. Weights are never exchanged. The module computes what it computes on one device: forward,
    gradients, dropout masks.

    Ranks form a (data x column) mesh: neighbouring ranks are the columns of one replica and see the same batch;
    replicas see different ones and average their gradients.

    Args:
        num_columns: Number of ranks over which the channels of one replica are split.
        data_parallel_size: Number of replicas. Left at 1, it becomes ``devices * num_nodes / num_columns``.
        layout: ``"auto"``, or what differs from it: ``{layer name or pattern: "columns" | "whole"}``, a
            :class:`~squall.placement.Layout`, or the path of a YAML file with such lines.
        sparsity: Reserved for sparse columns; only ``None`` is accepted.
        batches: ``"auto"`` lets every column load its batches, kept equal by seeds and checked; ``"broadcast"`` lets
            the first column load and send, for data that seeds don't govern.
        save_distributed_checkpoint: Write a directory in torch's distributed checkpoint format, each rank its own part,
            instead of one file. ``python -m squall.placement.checkpoint`` turns one into the other.
        start_method: ``"popen"`` runs the script once per rank; ``"spawn"``, ``"fork"`` or ``"forkserver"`` start
            processes from this one.
        process_group_backend: ``"gloo"``, ``"nccl"``; by default what suits the device.
        timeout: How long a collective may wait.
        accelerator: Passed on to Lightning, like all that follow.
        parallel_devices: The devices of this host.
        cluster_environment: Who starts the processes.
        checkpoint_io: How files are written.
        precision_plugin: Numerical precision.

    Raises:
        MisconfigurationException: Before the first batch, if ``num_columns`` does not divide the devices, or
            ``layout`` names no layer.

    What fails: a rank that raises or dies ends the run on all ranks, with one message. ``reduce`` counts what all
    columns of a replica hold in common once, so ``self.log(..., sync_dist=True, reduce_fx="sum")`` is a sum over
    samples, as under DDP.

    Metrics: ``crossings/<layer>`` are the floats that a rank sends for that layer per image in the forward pass,
    ``crossings/forward_floats`` and ``crossings/backward_floats`` their sums, ``crossings/bytes`` both in bytes.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="column_parallel", accelerator="cpu", devices=2)
        >>> trainer.strategy.num_columns
        2

    """

    def __init__(
        self,
        num_columns: int = 2,
        data_parallel_size: int = 1,
        layout: str | Path | Mapping[str, str] | Layout = "auto",
        sparsity: None = None,
        *,
        batches: BatchSource = "auto",
        save_distributed_checkpoint: bool = False,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            num_columns,
            data_parallel_size,
            batches,
            start_method=start_method,
            timeout=timeout,
            process_group_backend=process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if sparsity is not None:
            raise MisconfigurationException(f"sparsity={sparsity!r}: columns hold dense weights. Leave sparsity=None.")
        self.layout: Layout | None = None
        self._overrides = dict(read_layout(layout))
        self._distributed_checkpoint = save_distributed_checkpoint
        self._last_crossings: list[Crossing] = []
        self._stance: Any = None  # of torch.compile, while the module is split
        self._in_training_step = False

    @property
    def crossings(self) -> list[Crossing]:
        """What each crossing of the last training step sent per image, forward and backward."""
        return self._columns.ledger.crossings if self._in_training_step else self._last_crossings

    # ------------------------------------------------------------------ the module

    def setup(self, trainer: Trainer) -> None:
        """Place the module, then let the optimizers see what this rank holds."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        refuse_interrupted(self.lightning_module)
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync and self.data_parallel_size > 1:
            self.model = self._layer_sync.apply(self.lightning_module)
        self.precision_plugin.convert_module(self.lightning_module)
        self.model_to_device()
        self._broadcast_module(self.lightning_module)
        if self.num_columns > 1 and self._stance is None:
            self._stance = run_eagerly(self.lightning_module)
        self.layout = self._derive(self.lightning_module)
        log_graph(self.lightning_module, trainer.loggers)
        place(self.lightning_module, self.layout, self._columns)
        self._adopt_metrics(self.lightning_module)
        if fitting:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                wrap_step(optimizer, self.reduce if self.data_parallel_size > 1 else None)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _derive(self, module: LightningModule) -> Layout:
        example = module.example_input_array
        if example is not None and self.num_columns > 1:
            trainer, module._trainer = module._trainer, None  # no part of what is copied
            try:
                return derive_layout(module, example, self.num_columns, self._overrides)
            except MisconfigurationException:
                raise
            except Exception as error:  # an example that forward can't take must not stop a run that doesn't need it
                rank_zero_info(f"example_input_array was not used to derive the layout: {error}")
            finally:
                module._trainer = trainer
        return plan_layout(module, self.num_columns, self._overrides)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step, and log what crossed."""
        self._start_step(args, training=True)
        output = self._step(super().training_step, *args, **kwargs)
        self._log_crossings()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step; what it returns is whole."""
        self._start_step(args, training=False)
        return self._step(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's step; what it returns is whole."""
        self._start_step(args, training=False)
        return self._step(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; what it returns is whole."""
        self._start_step(args, training=False)
        return self._step(super().predict_step, *args, **kwargs)

    def _start_step(self, args: tuple[Any, ...], training: bool) -> None:
        if self._in_training_step:
            self._last_crossings = self._columns.ledger.crossings
        self._in_training_step = training
        self._columns.ledger.start_step(num_images(args[0]) if args else 1)

    def _step(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        output = step(*args, **kwargs)
        synchronize_buffers()
        with no_dispatch():
            complete: STEP_OUTPUT = tree_map(lambda value: whole(value, "step output"), output)
            return complete

    def _log_crossings(self) -> None:
        module = self.lightning_module
        assert module is not None
        if self.num_columns == 1 or module._trainer is None:
            return
        now = self._columns.ledger.crossings
        past = {crossing.name: crossing for crossing in self._last_crossings}
        values = {f"crossings/{crossing.name or 'module'}": crossing.floats_per_image_forward for crossing in now}
        values["crossings/forward_floats"] = sum(crossing.floats_per_image_forward for crossing in now)
        values["crossings/backward_floats"] = sum(crossing.floats_per_image_backward for crossing in past.values())
        values["crossings/bytes"] = sum(crossing.bytes_per_image_forward for crossing in now) + sum(
            crossing.bytes_per_image_backward for crossing in past.values()
        )
        # The last finished backward pass is that of the step before: nothing to log on the first step of all.
        if not past:
            del values["crossings/backward_floats"], values["crossings/bytes"]
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    # ------------------------------------------------------------------ gradients and optimizers

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer state that one device would hold; each rank's own part in a distributed checkpoint."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._distributed_checkpoint:
            return distributed_checkpoint.labelled_optimizer_state(plain)
        return whole_optimizer_state(plain)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of whole states."""
        in_place = distributed_checkpoint.LOADED in checkpoint
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state if in_place else take_optimizer_state(optimizer, state))
            _optimizer_to_device(optimizer, self.root_device)

    # ------------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A distributed checkpoint is read straight into the placed module."""
        return self._distributed_checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; a distributed checkpoint has put each rank's part in place already."""
        if distributed_checkpoint.LOADED not in checkpoint:
            super().load_model_state_dict(checkpoint, strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict that one device would hold; this rank's labelled parts in a distributed checkpoint."""
        assert self.lightning_module is not None
        if self._distributed_checkpoint:
            return self.lightning_module.state_dict()
        return whole_state_dict(self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one file from rank 0, or a directory from all ranks."""
        if self._distributed_checkpoint:
            if storage_options is not None:
                raise TypeError("save_distributed_checkpoint=True does not take storage_options.")
            distributed_checkpoint.save(checkpoint, Path(self.broadcast(str(filepath))))
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or a directory that a distributed checkpoint was written to."""
        path = Path(checkpoint_path)
        if not distributed_checkpoint.is_distributed(path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        if not self._distributed_checkpoint:
            return distributed_checkpoint.read_whole(path)
        assert self.lightning_module is not None
        return distributed_checkpoint.load(path, self.lightning_module, self.optimizers)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Nobody answers any more: keep teardown from asking, and hang up, so that those who wait hear of it."""
        self._columns.close(INTERRUPTED)
        self._release()
        self.device_mesh = None
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give the module back whole, as it came."""
        if self.lightning_module is not None and not self._columns.closed:
            for optimizer in self.optimizers:
                gather_optimizer_state(optimizer)
            unplace(self.lightning_module)
        self._release()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        super().teardown()
