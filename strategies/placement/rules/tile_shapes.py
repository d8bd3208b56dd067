"""Reductions over tiles, and functions that move elements about but leave the places where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exchange import add_up
from ..fringes import over_windows
from ..partition import Range
from ..reach import Window
from ..tensor import global_shape, layer_of, spec_of, tile_rule, to_partition, wrap
from ..tiles import TileSpec
from .channelwise import REDUCTIONS, SCANS, reduced_dims, wrap_all
from .shapes import sizes_of


def _without(spec: TileSpec, gone: set[int]) -> TileSpec:
    """The split of what is left when dimensions have been removed."""
    return spec.moved(tuple(dim - sum(other < dim for other in gone) for dim in spec.dims))


def _total(func: Any, value: Tensor, spec: TileSpec, dims: set[int], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A sum or mean over all places: each rank's own sum first."""
    if not dims >= set(spec.dims) or len(args) > 3:
        return NotImplemented
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    own = torch.sum(value, sorted(dims), keepdim, dtype=kwargs.get("dtype"))
    total = add_up(own, spec.columns, func.__name__)
    if func in (torch.sum, Tensor.sum):
        return total
    shape = global_shape(value)
    return total / math.prod(shape[dim] for dim in dims)


def _reduce(position: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for reductions whose ``dim`` is the argument at ``position``."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, spec = args[0], spec_of(args[0])
        dims = args[position] if len(args) > position else kwargs.get("dim")
        if spec is None or kwargs.get("out") is not None or isinstance(dims, Tensor):
            return NotImplemented
        reduced = reduced_dims(value, dims)
        adds = func in (torch.sum, Tensor.sum, torch.mean, Tensor.mean) and value.is_floating_point()
        if adds and (reduced is None or reduced & set(spec.dims)):
            every = set(range(value.ndim))
            rest = () if reduced is None else args
            return _total(func, value, spec, every if reduced is None else reduced, rest, kwargs)
        if reduced is None or reduced & set(spec.dims):
            return NotImplemented
        result = func(*args, **kwargs)
        first = result if isinstance(result, Tensor) else result[0]
        return wrap_all(result, spec.unnamed if first.ndim == value.ndim else _without(spec, reduced))

    return handler


def _along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A rule for functions that keep the shape and work along one dimension."""
    value, spec = args[0], spec_of(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if spec is None or not isinstance(dim, int) or dim % value.ndim in spec.dims or "out" in kwargs:
        return NotImplemented
    return wrap_all(func(*args, **kwargs), spec.unnamed)


_space: Any
for _space in (torch, Tensor, F):
    for _name in REDUCTIONS:
        tile_rule(getattr(_space, _name, None))(_reduce(1))
    for _name in SCANS:
        tile_rule(getattr(_space, _name, None))(_along)


@tile_rule(F.normalize)
def _normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, spec = args[0], spec_of(args[0])
    reduced = reduced_dims(value, kwargs.get("dim", 1))
    if spec is None or kwargs.get("out") is not None or reduced is None or reduced & set(spec.dims):
        return NotImplemented
    return wrap(func(*args, **kwargs), spec.unnamed)


@tile_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along a dimension that isn't split: the parts must lie alike."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    spec = next(spec for tensor in tensors if (spec := spec_of(tensor)) is not None)
    num_dims = max(tensor.ndim for tensor in tensors)
    if "out" in kwargs or any(tensor.ndim != num_dims for tensor in tensors) or dim % num_dims in spec.dims:
        return NotImplemented
    sizes = [axis.partition.size for axis in spec.axes]
    if any([global_shape(tensor)[place] for place in spec.dims] != sizes for tensor in tensors):
        return NotImplemented
    parts = [to_partition(tensor, spec, "cat") for tensor in tensors]
    return wrap(torch.cat(parts, dim), spec.unnamed)


@tile_rule(Tensor.split, torch.split, Tensor.chunk, torch.chunk, Tensor.narrow, torch.narrow)
def _cut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pieces along a dimension that isn't split."""
    value, spec = args[0], spec_of(args[0])
    position = 1 if func in (Tensor.narrow, torch.narrow) else 2
    dim = args[position] if len(args) > position else kwargs.get("dim", 0)
    return NotImplemented if spec is None or dim % value.ndim in spec.dims else wrap_all(func(*args, **kwargs), spec)


@tile_rule(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What regroups the dimensions before the places only, such as a shuffle of channels."""
    value, spec = args[0], spec_of(args[0])
    if spec is None or (len(args) == 2 and isinstance(args[1], torch.dtype)) or "dtype" in kwargs:
        return NotImplemented
    target, shape, first = sizes_of(args, kwargs), list(global_shape(value)), spec.dims[0]
    behind = len(shape) - first
    before = target[: len(target) - behind]
    if len(target) <= behind or target[len(before) :] != shape[first:] or not math.prod(shape):
        return NotImplemented
    if before.count(-1) == 1:
        before[before.index(-1)] = math.prod(shape[:first]) // -math.prod(before)
    if math.prod(before) != math.prod(shape[:first]):
        return NotImplemented
    moved = spec.moved(tuple(dim + len(before) - first for dim in spec.dims))
    return wrap(func(value, [*before, *value.shape[first:]]), moved)


@tile_rule(F.channel_shuffle, torch.channel_shuffle)
def _channel_shuffle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = spec_of(args[0])
    return NotImplemented if spec is None or spec.dims[0] < 2 else wrap(func(*args, **kwargs), spec.unnamed)


@tile_rule(Tensor.permute, torch.permute)
def _permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, spec = args[0], args[0]._spec
    order = [dim % value.ndim for dim in sizes_of(args, kwargs, "dims")]
    dims = tuple(order.index(dim) for dim in spec.dims)
    return wrap(func(*args, **kwargs), spec.moved(dims)) if list(dims) == sorted(dims) else NotImplemented


@tile_rule(Tensor.transpose, torch.transpose)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3:
        return NotImplemented
    order = list(range(args[0].ndim))
    first, second = args[1], args[2]
    order[first], order[second] = order[second], order[first]
    return _permute(torch.permute, (args[0], order), {})


@tile_rule(Tensor.__getitem__)
def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Slices of the dimensions before the places."""
    value, index = args
    spec = spec_of(value)
    index = index if isinstance(index, tuple) else (index,)
    if spec is None or not all(isinstance(item, slice) for item in index):
        return NotImplemented
    if any(item != slice(None) for item in index[spec.dims[0] :]):
        return NotImplemented
    return wrap(func(value, index[: spec.dims[0]]), spec.unnamed)


@tile_rule(Tensor.expand_as)
def _expand_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A replicated tensor that takes a split one's shape."""
    return NotImplemented if spec_of(args[0]) is not None else args[0].expand(global_shape(args[1]))


@tile_rule(F.pad, torch._C._nn.pad)
def _pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Constants around an image, or an image cut at its edges: windows of one place."""
    named = dict(zip(("input", "pad", "mode", "value"), args, strict=False))
    named.update(kwargs)
    value, pad = named["input"], list(named["pad"])
    spec = spec_of(value)
    if spec is None:
        return NotImplemented
    pad += [0] * (2 * value.ndim - len(pad))
    sides = {dim: (pad[2 * (value.ndim - 1 - dim)], pad[2 * (value.ndim - 1 - dim) + 1]) for dim in range(value.ndim)}
    if not any(any(sides[dim]) for dim in spec.dims):
        return wrap(func(*args, **kwargs), spec.unnamed)
    if named.get("mode", "constant") != "constant":
        return NotImplemented
    fill = named.get("value") or 0.0
    windows = tuple(
        Window(axis.partition.size, axis.partition.size + sum(sides[axis.dim]), 1, 1, sides[axis.dim][0])
        for axis in spec.axes
    )
    if any(window.num_outputs < 1 for window in windows):
        return NotImplemented
    rest = [0 if dim in spec.dims else side for dim in reversed(range(value.ndim)) for side in sides[dim]]

    def compute(block: Tensor, outputs: tuple[Range, ...]) -> Tensor:
        return F.pad(block, rest, value=fill)

    return wrap(*over_windows(value, spec, windows, compute, fill, layer_of([value]) or "pad"))
