"""Tiles: images split by place over the ranks, as Coates' machines split them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.hooks import RemovableHandle

from ._placed import PlacedStrategy
from .placement.batches import BatchSource
from .placement.layout import TILES, Layout
from .placement.tiles import Grid, make_grid
from .placement.tiling import derive_tiles, place_tiles, plan_tiles
from .sparsity import SparseAlgorithm


class SpatialParallelStrategy(PlacedStrategy):
    """Split the images of a stock LightningModule in tiles over several ranks.

    The distributed arrays of Coates et al. (2013, section 4), for any convolutional network: each rank holds and
    computes its own rows, or rows and columns, of every map. A convolution or pooling fetches the fringe that its
    windows read of other tiles while its interior computes, and sends the fringe's gradients home. Batch
    normalisation has the statistics of all tiles. What needs a whole map gathers it; from there on every rank
    computes the same. Weights are whole on every rank, and their gradients are added up over the tiles, but for those
    of locally connected layers, which live only where their tile is. The module computes what it computes on one
    device: forward, gradients, dropout masks. So an image whose activations are too large for one rank trains on
    several.

    Ranks form a (data x tile) mesh: neighbouring ranks hold the tiles of one replica and see the same batch; replicas
    see different ones and average their gradients.

    Args:
        num_tiles: Number of ranks over which the rows of an image are split, or a pair (rows, columns).
        data_parallel_size: Number of replicas. Left at 1, it becomes ``devices * num_nodes`` over the tiles.
        layout: ``"auto"``, or what differs from it: ``{layer name or pattern: "tiles" | "whole"}``, a
            :class:`~squall.placement.Layout`, or the path of a YAML file with such lines. A layer that is kept whole
            gathers what it is given. ``"measured"`` as for columns.
        sparsity: Which weights live: an algorithm, such as :class:`~squall.sparsity.SparseMomentum`, or ``None`` for
            all.
        batches: ``"auto"`` lets every rank load its batches, kept equal by seeds and checked; ``"broadcast"`` lets
            the first rank of a replica load and send, for data that seeds don't govern.
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
        MisconfigurationException: Before the first batch, if the tiles do not divide the devices, or ``layout`` names
            no layer; and if an image has fewer rows or columns than tiles.

    Metrics: ``crossings/<layer>`` are the floats that a rank sends for that layer per image in the forward pass,
    ``crossings/forward_floats`` and ``crossings/backward_floats`` their sums, ``crossings/bytes`` both in bytes; the
    backward pass has the sums of the weights' gradients, too.

    Example:
        >>> import squall
        >>> from lightning.pytorch import Trainer
        >>> strategy = squall.SpatialParallelStrategy(num_tiles=(2, 2))
        >>> Trainer(strategy=strategy, accelerator="cpu", devices=4).strategy.num_tiles
        (2, 2)

    """

    _argument = "num_tiles"
    _split = TILES

    def __init__(
        self,
        num_tiles: int | Sequence[int] = 2,
        data_parallel_size: int = 1,
        layout: str | Path | Mapping[str, str] | Layout = "auto",
        *,
        sparsity: SparseAlgorithm | None = None,
        batches: BatchSource = "auto",
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        sides: tuple[Any, ...] = tuple(num_tiles) if isinstance(num_tiles, Sequence) else (num_tiles, 1)
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            raise MisconfigurationException(
                f"num_tiles={num_tiles!r} must be a whole number of rows, 1 or more, or a pair (rows, columns) of such."
            )
        super().__init__(
            sides[0] * sides[1],
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
        self.num_tiles = num_tiles
        self._sides: tuple[int, int] = sides
        self._grid: Grid | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def _asked(self) -> Any:
        return self.num_tiles

    @property
    def tile(self) -> tuple[int, int]:
        """This process's tile: row and column."""
        return divmod(self.column, self._sides[1])

    def setup_environment(self) -> None:
        """Join the process group, lay the mesh over it, and the grid of tiles over each replica."""
        super().setup_environment()
        if self._grid is None:
            self._grid = make_grid(self._columns, *self._sides, self.data_parallel_size, self.root_device.type)

    def _place(self, module: LightningModule) -> Layout:
        grid = self._grid
        assert grid is not None
        dry = Grid.dry(*self._sides)
        layout = self._derive(module, lambda module, example, lines: derive_tiles(module, example, dry, lines))
        layout = layout or plan_tiles(module, grid, self._overrides)
        if self.num_columns > 1:
            self._handles = place_tiles(module, layout, grid)
            rank_zero_info(f"Where each layer lives:\n{layout}")
        return layout

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        super()._release()

    def on_exception(self, exception: BaseException) -> None:
        """Hang up on the lines of tiles, too."""
        super().on_exception(exception)
        if self._grid is not None:
            for line in self._grid.lines:
                line.close(str(exception))
        self._grid = None
