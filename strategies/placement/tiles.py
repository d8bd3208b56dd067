"""Tiles: images cut in rows, or in rows and columns, each rank with the whole of its tile's channels.

The second way to cut a network (Coates et al. 2013, section 4): activations are split by place, and weights are whole
on every rank, but for those of locally connected layers, which belong to places. A tile is split along one or two
dimensions; along each, the ranks that share the other coordinate form a line, and whatever is done to a tile is done
along one line after the other, so corners need no messages of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .columns import Columns, DryColumns
from .exchange import cut
from .partition import Partition
from .tensor import TILE_HANDLERS, Spec, SplitParameter, SplitTensor, wrap


class Grid:
    """The ranks that hold one replica's tiles.

    Args:
        everyone: All of them, row by row.
        lines: Those along each split dimension: the rows, or the rows and the columns.

    """

    def __init__(self, everyone: Columns, lines: tuple[Columns, ...]) -> None:
        self.everyone = everyone
        self.lines = lines
        self.layer = ""  # that is at work, if it has no parameter to carry its name
        for line in lines:
            line.ledger = everyone.ledger

    @staticmethod
    def dry(num_rows: int, num_columns: int) -> Grid:
        """Ranks that aren't there, see :class:`~squall.placement.DryColumns`."""
        everyone = DryColumns(num_rows * num_columns)
        return Grid(everyone, (DryColumns(num_rows), DryColumns(num_columns)) if num_columns > 1 else (everyone,))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of tiles along each split dimension."""
        return tuple(line.num_columns for line in self.lines)


@dataclass(frozen=True)
class TileSpec:
    """How a tensor is split in tiles.

    Args:
        axes: The split dimensions, ascending, one for each line of the grid.
        grid: The ranks.
        name: The layer that a parameter belongs to.

    """

    axes: tuple[Spec, ...]
    grid: Grid
    name: str = ""

    @property
    def columns(self) -> Columns:
        """All ranks that hold a tile."""
        return self.grid.everyone

    @property
    def unnamed(self) -> TileSpec:
        """The same for what comes of a parameter, which is no parameter."""
        return TileSpec(self.axes, self.grid)

    @property
    def dims(self) -> tuple[int, ...]:
        """The split dimensions."""
        return tuple(axis.dim for axis in self.axes)

    @property
    def tensor_class(self) -> type[SplitTensor]:
        """Of tensors that are split so."""
        return TileTensor

    @property
    def parameter_class(self) -> type[SplitParameter]:
        """Of parameters that are split so."""
        return TileParameter

    def along(self, axes: tuple[Spec, ...]) -> TileSpec:
        """The same ranks with other dimensions or partitions."""
        return TileSpec(axes, self.grid)

    def moved(self, dims: tuple[int, ...]) -> TileSpec:
        """The same partitions of other dimensions."""
        return self.along(tuple(axis.moved(dim) for axis, dim in zip(self.axes, dims, strict=True)))

    def resized(self, partitions: tuple[Partition, ...]) -> TileSpec:
        """Other partitions of the same dimensions."""
        return self.along(tuple(axis.moved(axis.dim, part) for axis, part in zip(self.axes, partitions, strict=True)))


class TileTensor(SplitTensor):
    """This rank's tile of a tensor that is split by place."""

    _spec: TileSpec
    _handlers = TILE_HANDLERS


class TileParameter(TileTensor, SplitParameter):
    """A parameter that belongs to places: this rank holds and trains that of its tile."""


def even_tiles(grid: Grid, first_dim: int, sizes: tuple[int, ...], name: str = "") -> TileSpec:
    """Tiles whose sides differ by one at the most.

    Args:
        grid: The ranks.
        first_dim: The first split dimension; the others follow it.
        sizes: Lengths of the split dimensions.
        name: The layer, for a parameter.

    """
    axes = (
        Spec(first_dim + offset, Partition.even(size, line.num_columns), line)
        for offset, (line, size) in enumerate(zip(grid.lines, sizes, strict=True))
    )
    return TileSpec(tuple(axes), grid, name)


def cut_image(image: Tensor, grid: Grid, num_dims: int, name: str) -> TileTensor:
    """This rank's tile of a replicated tensor whose last ``num_dims`` dimensions are places."""
    first = image.ndim - num_dims
    spec = even_tiles(grid, first, tuple(image.shape[first : first + len(grid.lines)]))
    tile: TileTensor = wrap(cut(image, spec.axes, name), spec)
    return tile


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor that isn't split."""
    return isinstance(value, Tensor) and not isinstance(value, SplitTensor | nn.Parameter)


def make_grid(everyone: Columns, num_rows: int, num_columns: int, num_replicas: int, device_type: str) -> Grid:
    """Lay a grid over the ranks of each replica. All ranks must call it.

    Args:
        everyone: This replica's ranks, row by row.
        num_rows: Tiles above one another.
        num_columns: Tiles beside one another.
        num_replicas: Replicas that do the same.
        device_type: ``"cpu"``, ``"cuda"``.

    """
    if num_columns == 1:
        return Grid(everyone, (everyone,))
    names = ("replica", "row", "column")
    mesh = init_device_mesh(device_type, (num_replicas, num_rows, num_columns), mesh_dim_names=names)
    row, column = divmod(everyone.rank, num_columns)
    down = Columns(mesh.get_group("row"), row, num_rows)
    across = Columns(mesh.get_group("column"), column, num_columns)
    return Grid(everyone, (down, across))
