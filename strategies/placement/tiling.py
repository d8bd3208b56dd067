"""Which layers work on tiles: the table, and a module made to follow it.

Images are cut where they first meet a convolution, and stay cut through all that has a rule for tiles. What has none,
such as ``flatten`` before a linear layer, gathers them, and every rank computes the rest alike. A convolution that
meets a whole image after that cuts it again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.hooks import RemovableHandle

from . import rules  # noqa: F401  (registers what each torch function does)
from .layout import (
    CONVOLUTIONS,
    TILES,
    WHOLE,
    LayerPlacement,
    Layout,
    call_on,
    check_placeable,
    match_layers,
    to_meta,
    without_values,
)
from .module import make_split
from .tensor import SplitParameter, SplitTensor, no_dispatch, watch_autograd_functions, whole
from .tiles import Grid, cut_image, even_tiles

_POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def num_places(layer: nn.Module) -> int:
    """Number of dimensions of the images that a layer slides windows over; 0 for any other layer."""
    if isinstance(layer, CONVOLUTIONS):
        return len(layer.kernel_size)
    if isinstance(layer, _POOLS):
        of_torch = (kind for kind in type(layer).__mro__ if kind.__module__ == nn.MaxPool2d.__module__)
        return int(next(of_torch).__name__[-2])
    return int(getattr(layer, "num_places", 0))


def plan_tiles(module: nn.Module, grid: Grid, overrides: Mapping[str, str] | None = None) -> Layout:
    """The layout of ``module`` without running it.

    Args:
        module: The network, or the LightningModule that holds it.
        grid: The ranks of a replica.
        overrides: ``{layer name or pattern: "tiles" | "whole"}``.

    Raises:
        MisconfigurationException: If an override names no layer, or asks for tiles of what has no places.

    """
    check_placeable(module)
    named = {
        name: layer
        for name, layer in module.named_modules()
        if num_places(layer) or next(layer.parameters(recurse=False), None) is not None
    }
    asked = match_layers(overrides or {}, named)
    rows = []
    for name, layer in named.items():
        reason, places = "", num_places(layer)
        if asked.get(name) == TILES and not places:
            raise MisconfigurationException(
                f"layout[{name!r}]='tiles' is not possible for {type(layer).__name__}: it slides no windows over an "
                f"image. Write layout={{{name!r}: 'whole'}} or leave the line out."
            )
        if asked.get(name) == WHOLE:
            reason = "by layout"
        elif places and places < len(grid.lines):
            reason = f"{places} dimension of places for tiles in {len(grid.lines)}"
        elif not places and not isinstance(layer, _NORMS):
            reason = "needs the whole map"
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        split = WHOLE if reason else TILES
        held = _held(layer, grid) if split == TILES else own
        rows.append(LayerPlacement(name, type(layer).__name__, split, own, held, reason))
    return Layout(grid.everyone.num_columns, tuple(rows))


def _held(layer: nn.Module, grid: Grid) -> int:
    """Elements of a layer's parameters on the rank that holds most."""
    total = 0
    for key, parameter in layer.named_parameters(recurse=False):
        share = parameter.numel()
        for size, tiles in zip(_placed_shape(layer, key, parameter), grid.shape, strict=False):
            share = share // size * -(-size // tiles)
        total += share
    return total


def _placed_shape(layer: nn.Module, key: str, parameter: Tensor) -> tuple[int, ...]:
    """The dimensions of a parameter that are places: untied weights say which of theirs are."""
    num_dims = getattr(layer, "placed_parameters", {}).get(key, 0)
    return tuple(parameter.shape[:num_dims])


def derive_tiles(
    module: nn.Module, example_input: Any, grid: Grid, overrides: Mapping[str, str] | None = None
) -> Layout:
    """The layout of ``module``, and what crosses, from a dry run of a copy in one process.

    Args:
        module: Any network. It is not changed.
        example_input: Its input with the batch in the first dimension.
        grid: Ranks that aren't there, :meth:`Grid.dry`.
        overrides: As of :func:`plan_tiles`.

    Raises:
        MisconfigurationException: As :func:`plan_tiles`, and if an image is smaller than its tiles are many.

    """
    with torch.no_grad():
        try:
            return _derive(without_values(module), to_meta(example_input), grid, overrides)
        except MisconfigurationException:
            raise
        except Exception:  # a network that looks at its values has to be run with them
            return _derive(copy.deepcopy(module), example_input, grid, overrides)


def _derive(dry: nn.Module, example_input: Any, grid: Grid, overrides: Mapping[str, str] | None) -> Layout:
    dry.eval()
    table = plan_tiles(dry, grid, overrides)
    tiled: set[str] = set()
    place_tiles(dry, table, grid)
    for name, layer in dry.named_modules():
        layer.register_forward_hook(
            lambda _, args, result, name=name: tiled.add(name) if isinstance(result, SplitTensor) else None
        )
    first = next(leaf for leaf in tree_flatten(example_input)[0] if isinstance(leaf, Tensor))
    grid.everyone.ledger.start_step(first.shape[0] if first.ndim else 1)
    call_on(dry, example_input)
    sent = {crossing.name: round(crossing.floats_per_image_forward) for crossing in grid.everyone.ledger.crossings}
    rows = []
    for row in table:
        is_whole = row.split == TILES and row.name not in tiled and row.num_parameters == row.parameters_per_rank
        row = replace(row, crosses=row.name in sent, floats_per_image=sent.pop(row.name, 0))
        rows.append(replace(row, split=WHOLE, reason="reads a whole map") if is_whole else row)
    return Layout(table.num_columns, tuple(rows), tuple(sent.items()))


class _Named:
    """Says which layer is at work, for the ledger, where no parameter does."""

    def __init__(self, name: str, grid: Grid) -> None:
        self.name, self.grid = name, grid

    def __deepcopy__(self, memo: dict[int, Any]) -> _Named:
        return self

    def __call__(self, *_: Any) -> None:
        self.grid.layer = self.name


class _Entrance:
    """Cuts what a layer is given, or gathers it, as the layout says."""

    def __init__(self, name: str, split: str, num_dims: int, grid: Grid, shared: list[str]) -> None:
        self.name, self.split, self.num_dims, self.grid = name, split, num_dims, grid
        self.cut_before = shared

    def __deepcopy__(self, memo: dict[int, Any]) -> _Entrance:
        return self

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with no_dispatch():
            if self.split == WHOLE:
                return tree_map(lambda value: whole(value, self.name), (args, kwargs))
            if args and isinstance(args[0], Tensor) and not isinstance(args[0], SplitTensor) and self._can_cut(args[0]):
                return (cut_image(args[0], self.grid, self.num_dims, self.name), *args[1:]), kwargs
        return None

    def _can_cut(self, image: Tensor) -> bool:
        if image.ndim not in (self.num_dims + 1, self.num_dims + 2):
            return False  # torch says so
        first = image.ndim - self.num_dims
        places = tuple(image.shape[first : first + len(self.grid.lines)])
        if all(size >= tiles for size, tiles in zip(places, self.grid.shape, strict=True)):
            self.cut_before.append(self.name)
            del self.cut_before[1:]
            return True
        if not self.cut_before:
            tiles = self.grid.shape[0] if len(self.grid.shape) == 1 else self.grid.shape
            raise MisconfigurationException(
                f"num_tiles={tiles!r} is more than an image of {' x '.join(map(str, places))} at layer {self.name!r} "
                "has places for. Use fewer tiles or larger images."
            )
        return False


def place_tiles(module: nn.Module, layout: Layout, grid: Grid) -> list[RemovableHandle]:
    """Let ``module`` work on tiles as ``layout`` says, in place.

    Args:
        module: A module with whole parameters, the same on all ranks.
        layout: Its layout.
        grid: The ranks.

    Returns:
        What to ``remove()`` when the module is to be as it was; :func:`~squall.placement.unplace` gathers parameters.

    """
    watch_autograd_functions()
    layers = dict(module.named_modules())
    handles, cut_before = [], list[str]()
    for row in layout:
        layer = layers[row.name]
        for key, parameter in layer.named_parameters(recurse=False):
            if isinstance(parameter, SplitParameter):  # shared with a layer that came before
                continue
            places = _placed_shape(layer, key, parameter)[: len(grid.lines)] if row.split == TILES else ()
            if places:
                make_split(parameter, even_tiles(grid, 0, places, row.name))
            else:
                parameter._squall_layer = row.name  # type: ignore[attr-defined]
        if isinstance(layer, _POOLS):
            handles.append(layer.register_forward_pre_hook(_Named(row.name, grid)))
            handles.append(layer.register_forward_hook(_Named("", grid), always_call=True))
        is_cut = row.split == TILES and isinstance(layer, CONVOLUTIONS)
        if is_cut or row.reason == "by layout":
            entrance = _Entrance(row.name, row.split, num_places(layer), grid, cut_before)
            handles.append(layer.register_forward_pre_hook(entrance, with_kwargs=True))
    return handles
