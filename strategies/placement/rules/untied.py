"""Locally connected layers over tiles: weights belong to places, so each rank has those of its own outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels import locally_connected2d, locally_connected_transpose2d
from ..exchange import send_back
from ..fringes import over_windows
from ..partition import Partition, Range
from ..reach import Window, reach
from ..tensor import spec_of, tile_rule, to_partition, wrap
from ..tiles import TileSpec, cut_image, even_tiles


def _windows(weight: Tensor, spec: TileSpec, sizes: tuple[int, ...], stride: int) -> tuple[Window, ...]:
    return tuple(
        Window(size, axis.partition.size, weight.shape[4 + axis.dim], stride, 0)
        for axis, size in zip(spec.axes, sizes, strict=False)
    )


@tile_rule(locally_connected2d)
def _locally_connected(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, weight, bias, stride = args
    untied = spec_of(weight)
    if untied is None:
        return NotImplemented
    if spec_of(value) is None:
        value = cut_image(value, untied.grid, 2, untied.name)
    spec = spec_of(value)
    if spec.dims != (2, 3)[: len(untied.axes)]:
        return NotImplemented
    sizes = tuple(axis.partition.size for axis in spec.axes)
    windows = _windows(weight, untied, sizes, stride)
    starts = [axis.partition.ranges[axis.columns.rank] for axis in untied.axes]

    def compute(block: Tensor, outputs: tuple[Range, ...]) -> Tensor:
        own: list[Tensor | None] = [weight, bias]
        for dim, ((first, last), held) in enumerate(zip(outputs, starts, strict=True)):
            start = first - held[0][0] if held else 0
            own = [None if tensor is None else tensor.narrow(dim, start, last - first) for tensor in own]
        if not all(last - first for first, last in outputs):  # connected all the same: no rank may lack a gradient
            shape = [block.shape[0], weight.shape[2], 1, 1]
            shape[2 + len(outputs) :] = weight.shape[len(outputs) : 2]
            tied = sum(tensor.sum() for tensor in own if tensor is not None)
            return block.new_zeros(shape) + tied
        result: Tensor = func(block, own[0], own[1], stride)
        return result

    return wrap(*over_windows(value, spec, windows, compute, 0.0, untied.name))


@tile_rule(locally_connected_transpose2d)
def _locally_connected_transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank adds up the windows of its own places; what falls on other tiles is sent there."""
    value, weight, size, stride = args
    untied = spec_of(weight)
    if untied is None:
        return NotImplemented
    grid, num_axes = untied.grid, len(untied.axes)
    value = to_partition(value, untied.moved((2, 3)[:num_axes]), untied.name)
    windows = _windows(weight, untied, size, stride)
    image = even_tiles(grid, 2, size[:num_axes])
    covered = []
    for axis, window, into in zip(untied.axes, windows, image.axes, strict=True):
        spans = [
            reach(window, into.partition, axis.partition, rank).all.inputs for rank in range(axis.columns.num_columns)
        ]
        covered.append(Partition(into.partition.size, tuple((span,) if span[1] > span[0] else () for span in spans)))
    own = [part.sizes[axis.columns.rank] for part, axis in zip(covered, image.axes, strict=True)]
    if all(own):
        result = func(value, weight, (*own, *size[num_axes:]), stride)
    else:
        result = value.new_zeros(value.shape[0], weight.shape[3], *own, *size[num_axes:]) + value.sum() + weight.sum()
    for part, axis in zip(covered, image.axes, strict=True):
        transfer = (axis.columns, untied.name, False)
        result = send_back(result, axis.dim, axis.partition, part, transfer)
    return wrap(result, image)
