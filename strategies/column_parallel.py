"""Columns: each layer's outputs split over the ranks, as AlexNet's were over two GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from ._placed import PlacedStrategy
from .placement import checkpoint as distributed_checkpoint
from .placement.batches import BatchSource
from .placement.layout import Layout, derive_layout, plan_layout
from .placement.module import place
from .sparsity import SparseAlgorithm


class ColumnParallelStrategy(PlacedStrategy):
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
            :class:`~squall.placement.Layout`, or the path of a YAML file with such lines. ``"measured"`` keeps those
            layers whole that take longer on the link, as it is measured, than splitting them saves, and says why; it
            needs ``example_input_array`` and a batch size.
        sparsity: Which weights live: an algorithm, such as :class:`~squall.sparsity.SparseMomentum`, or ``None`` for
            all. Masks are decided on by whole layers, as one device decides, and every rank computes with its part.
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
        MisconfigurationException: Before the first batch, if ``num_columns`` does not divide the devices, ``layout``
            names no layer, or ``sparsity`` is asked for with distributed checkpoints or an optimizer that doesn't treat
            every weight alone.
        ValueError: Before the first batch, if ``sparsity`` is Deep Compression, or ``dense`` names no layer.

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
        sparsity: SparseAlgorithm | None = None,
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
            layout,
            sparsity=sparsity,
            start_method=start_method,
            timeout=timeout,
            process_group_backend=process_group_backend,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if sparsity is not None and save_distributed_checkpoint:
            raise MisconfigurationException(
                "save_distributed_checkpoint=True has no place for masks. Leave it out, or leave sparsity=None."
            )
        self._distributed_checkpoint = save_distributed_checkpoint

    def _place(self, module: LightningModule) -> Layout:
        layout = self._derive(
            module, lambda module, example, lines: derive_layout(module, example, self.num_columns, lines)
        )
        layout = layout or plan_layout(module, self.num_columns, self._overrides)
        place(module, layout, self._columns)
        return layout

    # ------------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A distributed checkpoint is read straight into the placed module."""
        return self._distributed_checkpoint

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer state that one device would hold; each rank's own part in a distributed checkpoint."""
        if self._distributed_checkpoint:
            plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            return distributed_checkpoint.labelled_optimizer_state(plain)
        return super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of whole states; a distributed checkpoint has put it in place already."""
        if distributed_checkpoint.LOADED not in checkpoint:
            super().load_optimizer_state_dict(checkpoint)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
            _optimizer_to_device(optimizer, self.root_device)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; a distributed checkpoint has put each rank's part in place already."""
        if distributed_checkpoint.LOADED not in checkpoint:
            super().load_model_state_dict(checkpoint, strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict that one device would hold; this rank's labelled parts in a distributed checkpoint."""
        if self._distributed_checkpoint:
            assert self.lightning_module is not None
            return self.lightning_module.state_dict()
        return super().lightning_module_state_dict()

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
