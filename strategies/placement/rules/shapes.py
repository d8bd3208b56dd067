"""Functions that move elements about: the split follows its channels, wherever they go."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..partition import Partition
from ..tensor import Spec, global_shape, rule, spec_of, to_partition, wrap


def sizes_of(args: tuple[Any, ...], kwargs: dict[str, Any], key: str = "shape") -> list[int]:
    """The sizes given as ``f(x, 2, 3)``, ``f(x, (2, 3))`` or by name."""
    rest = args[1:] or (kwargs[key] if key in kwargs else kwargs["size"],)
    return list(rest[0]) if len(rest) == 1 and not isinstance(rest[0], int) else list(rest)


def reshape_spec(shape: torch.Size, spec: Spec, target: list[int]) -> Spec | None:
    """Where the split dimension goes when ``shape`` is reshaped to ``target``.

    It may be merged with the dimensions behind it, or split in several whose first one takes the ranges. Anything
    else scatters the channels: ``None``.
    """
    before = math.prod(shape[: spec.dim])
    dim, product = 0, 1
    while dim < len(target) and product < before:
        product *= target[dim]
        dim += 1
    while dim < len(target) and target[dim] == 1 != spec.partition.size:
        dim += 1
    if product != before or dim == len(target):
        return None
    size, channels = target[dim], spec.partition.size
    if size == channels:
        return spec.moved(dim)
    if channels and size % channels == 0:  # merged with what stands behind it
        behind = math.prod(shape[spec.dim + 1 :])
        merged = size // channels
        end, tail = spec.dim + 1, 1
        while end < len(shape) and tail < merged:
            tail *= shape[end]
            end += 1
        return spec.moved(dim, spec.partition.scale(merged)) if tail == merged and behind % merged == 0 else None
    if size and channels % size == 0:  # split in rows
        rows = spec.partition.divide(channels // size)
        inner, product = dim + 1, 1
        while inner < len(target) and product < channels // size:
            product *= target[inner]
            inner += 1
        return spec.moved(dim, rows) if rows is not None and product == channels // size else None
    return None


def _reshape(func: Any, tensor: Tensor, target: list[int]) -> Any:
    spec = spec_of(tensor)
    assert spec is not None
    shape = global_shape(tensor)
    if target.count(-1) == 1:
        known = -math.prod(target)
        if known == 0 or shape.numel() % known:
            return NotImplemented
        target = [shape.numel() // known if size == -1 else size for size in target]
    if math.prod(target) != shape.numel() or shape.numel() == 0:
        return NotImplemented
    result = reshape_spec(shape, spec, target)
    if result is None:
        return NotImplemented
    local = list(target)
    local[result.dim] = result.partition.sizes[spec.columns.rank]
    return wrap(func(tensor, local), result)


@rule(Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten, Tensor.view_as, Tensor.reshape_as)
def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if spec_of(tensor) is None or (len(args) == 2 and isinstance(args[1], torch.dtype)) or "dtype" in kwargs:
        return NotImplemented
    if func in (Tensor.view_as, Tensor.reshape_as):
        return _reshape(Tensor.reshape, tensor, list(global_shape(args[1] if len(args) > 1 else kwargs["other"])))
    if func in (Tensor.unflatten, torch.unflatten):
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % tensor.ndim
        sizes = list(args[2] if len(args) > 2 else kwargs["sizes"])
        shape = list(global_shape(tensor))
        if -1 in sizes:
            sizes[sizes.index(-1)] = shape[dim] // -math.prod(sizes)
        return _reshape(Tensor.reshape, tensor, shape[:dim] + sizes + shape[dim + 1 :])
    return _reshape(Tensor.view if func is Tensor.view else Tensor.reshape, tensor, sizes_of(args, kwargs))


@rule(Tensor.flatten, torch.flatten)
def _flatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    start = (args[1] if len(args) > 1 else kwargs.get("start_dim", 0)) % max(tensor.ndim, 1)
    stop = (args[2] if len(args) > 2 else kwargs.get("end_dim", -1)) % max(tensor.ndim, 1)
    shape = list(global_shape(tensor))
    return _reshape(Tensor.reshape, tensor, [*shape[:start], math.prod(shape[start : stop + 1]), *shape[stop + 1 :]])


def _permuted(func: Any, tensor: Tensor, order: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = tensor._spec  # type: ignore[attr-defined]
    return wrap(func(*args, **kwargs), spec.moved(order.index(spec.dim)))


@rule(Tensor.permute, torch.permute)
def _permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    return _permuted(func, tensor, [dim % tensor.ndim for dim in sizes_of(args, kwargs, "dims")], args, kwargs)


@rule(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3:
        return NotImplemented
    tensor = args[0]
    first, second = args[1] % tensor.ndim, args[2] % tensor.ndim
    order = list(range(tensor.ndim))
    order[first], order[second] = second, first
    return _permuted(func, tensor, order, args, kwargs)


@rule(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _matrix_transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if tensor.ndim != 2:
        return NotImplemented
    return _permuted(func, tensor, [1, 0], args, kwargs)


@rule(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % (tensor.ndim + 1)
    spec = tensor._spec
    return wrap(func(*args, **kwargs), spec.moved(spec.dim + (dim <= spec.dim)))


@rule(Tensor.squeeze, torch.squeeze)
def _squeeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, spec = args[0], args[0]._spec
    shape = global_shape(tensor)
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None:
        dims = tuple(range(tensor.ndim))
    gone = {dim % tensor.ndim for dim in ((dims,) if isinstance(dims, int) else dims)}
    gone = {dim for dim in gone if shape[dim] == 1}
    if spec.dim in gone:
        return NotImplemented
    local = [size for dim, size in enumerate(tensor.shape) if dim not in gone]
    return wrap(tensor.reshape(local), spec.moved(spec.dim - sum(dim < spec.dim for dim in gone)))


@rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def _expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    spec = spec_of(tensor)
    if spec is None:  # a replicated tensor that takes a split one's shape
        return tensor.expand(global_shape(args[1])) if func is Tensor.expand_as else NotImplemented
    target = list(global_shape(args[1])) if func is Tensor.expand_as else sizes_of(args, kwargs, "size")
    dim = spec.dim + len(target) - tensor.ndim
    if target[dim] not in (-1, spec.partition.size):
        return NotImplemented
    target[dim] = -1
    return wrap(tensor.expand(target), spec.moved(dim))


@rule(torch.cat, torch.concat, torch.concatenate)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along the channels each rank concatenates what it holds; along any other dimension the parts must match."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = next(spec_of(tensor) for tensor in tensors if spec_of(tensor) is not None)
    assert lead is not None
    num_dims = max(tensor.ndim for tensor in tensors)
    if "out" in kwargs or any(tensor.ndim != num_dims for tensor in tensors):
        return NotImplemented
    if any((spec := spec_of(tensor)) is not None and spec.dim != lead.dim for tensor in tensors):
        return NotImplemented
    dim %= num_dims
    parts, partitions = [], []
    for tensor in tensors:
        own = spec_of(tensor)
        if dim != lead.dim:
            wanted = lead
        elif own is not None:
            wanted = own
        else:
            wanted = lead.moved(dim, Partition.even(tensor.shape[dim], lead.partition.num_ranks))
        parts.append(to_partition(tensor, wanted, "cat"))
        partitions.append(wanted.partition)
    partition = Partition.concatenate(partitions) if dim == lead.dim else lead.partition
    return wrap(torch.cat(parts, dim), lead.moved(lead.dim, partition))


@rule(torch.stack)
def _stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = next(spec_of(tensor) for tensor in tensors if spec_of(tensor) is not None)
    assert lead is not None
    if "out" in kwargs or any(global_shape(tensor) != global_shape(tensors[0]) for tensor in tensors):
        return NotImplemented
    dim %= tensors[0].ndim + 1
    parts = [to_partition(tensor, lead, "stack") for tensor in tensors]
    return wrap(torch.stack(parts, dim), lead.moved(lead.dim + (dim <= lead.dim)))


@rule(
    Tensor.split,
    torch.split,
    Tensor.chunk,
    torch.chunk,
    Tensor.narrow,
    torch.narrow,
    torch.tensor_split,
    Tensor.tensor_split,
)
def _cut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pieces along a dimension that isn't split."""
    tensor, spec = args[0], spec_of(args[0])
    narrow = func in (Tensor.narrow, torch.narrow)
    position = 1 if narrow else 2
    dim = args[position] if len(args) > position else kwargs.get("dim", 0)
    if spec is None or dim % tensor.ndim == spec.dim:
        return NotImplemented
    result = func(*args, **kwargs)
    return wrap(result, spec.moved(spec.dim)) if narrow else tuple(wrap(part, spec.moved(spec.dim)) for part in result)


@rule(Tensor.unbind, torch.unbind)
def _unbind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, spec = args[0], args[0]._spec
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % tensor.ndim
    if dim == spec.dim:
        return NotImplemented
    return tuple(wrap(part, spec.moved(spec.dim - (dim < spec.dim))) for part in func(*args, **kwargs))


@rule(Tensor.select, torch.select)
def _select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, spec = args[0], args[0]._spec
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % tensor.ndim
    if dim == spec.dim:
        return NotImplemented
    return wrap(func(*args, **kwargs), spec.moved(spec.dim - (dim < spec.dim)))


@rule(Tensor.__getitem__)
def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Basic indexing that leaves the split dimension alone."""
    tensor, index = args
    spec = spec_of(tensor)
    index = index if isinstance(index, tuple) else (index,)
    basic = all(isinstance(item, slice) or item is None or item is Ellipsis or type(item) is int for item in index)
    if spec is None or not basic:
        return NotImplemented
    num_indexed = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    dim = result_dim = 0
    for item in index:
        if item is Ellipsis:
            skipped = tensor.ndim - num_indexed
            if dim <= spec.dim < dim + skipped:
                return wrap(func(tensor, index), spec.moved(result_dim + spec.dim - dim))
            dim, result_dim = dim + skipped, result_dim + skipped
        elif item is None:
            result_dim += 1
        elif dim == spec.dim:
            if item != slice(None):
                return NotImplemented
            return wrap(func(tensor, index), spec.moved(result_dim))
        else:
            dim, result_dim = dim + 1, result_dim + isinstance(item, slice)
    return NotImplemented


@rule(F.pad, torch._C._nn.pad)
def _pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, spec = args[0], spec_of(args[0])
    pad = args[1] if len(args) > 1 else kwargs["pad"]
    if spec is None or spec.dim >= tensor.ndim - len(pad) // 2:
        return NotImplemented
    return wrap(func(*args, **kwargs), spec.moved(spec.dim))
