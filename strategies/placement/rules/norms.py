"""Normalisations: a rank normalises its own channels, and fetches what its windows reach into."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import local_response_norm
from ..exchange import exchange, share
from ..partition import Partition, Range, union
from ..tensor import Spec, rule, spec_of, to_partition, wrap

# Running statistics are plain, whole buffers on every rank. A training step writes each rank's own channels; what the
# other ranks wrote is fetched once a step (``synchronize_buffers``), so user code never reads a stale one.
_written: list[tuple[Tensor, Spec]] = []


def synchronize_buffers() -> None:
    """Exchange the running statistics that the last forward pass updated, all in one message."""
    if not _written:
        return
    latest = {id(buffer): (buffer, spec) for buffer, spec in _written}
    _written.clear()
    by_split: dict[tuple[Any, ...], list[tuple[Tensor, Spec]]] = {}
    for buffer, spec in latest.values():
        by_split.setdefault((id(spec.columns), buffer.dtype, buffer.device), []).append((buffer, spec))
    for entries in by_split.values():
        columns = entries[0][1].columns
        if columns.closed:  # left over from a run that broke off
            continue
        total = torch.cat([_own(buffer, spec) for buffer, spec in entries])
        columns.sum_(total)
        columns.ledger.record("running statistics", total.numel(), total.element_size(), False)
        for (buffer, _), part in zip(entries, total.split([buffer.numel() for buffer, _ in entries]), strict=True):
            buffer.copy_(part)


def _own(buffer: Tensor, spec: Spec) -> Tensor:
    """The buffer with zeros where other ranks have written."""
    own = torch.zeros_like(buffer)
    for start, stop in spec.partition.ranges[spec.columns.rank]:
        own[start:stop] = buffer[start:stop]
    return own


def _statistics(buffer: Tensor, spec: Spec) -> Tensor:
    """This rank's channels of a running statistic; a view where they are contiguous."""
    held = spec.partition.ranges[spec.columns.rank]
    if len(held) == 1:
        return buffer.narrow(0, held[0][0], held[0][1] - held[0][0])
    return torch.cat([buffer[start:stop] for start, stop in held]) if held else buffer[:0]


def _write_back(buffer: Tensor, local: Tensor, spec: Spec) -> None:
    held = spec.partition.ranges[spec.columns.rank]
    if len(held) > 1:
        offset = 0
        for start, stop in held:
            buffer[start:stop] = local[offset : offset + stop - start]
            offset += stop - start
    _written.append((buffer, spec))


def _affine(value: Tensor | None, spec: Spec, name: str) -> Tensor | None:
    return None if value is None else to_partition(value, Spec(0, spec.partition, spec.columns, name), name)


def _channel_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flag: str) -> Any:
    """BatchNorm and InstanceNorm: statistics of each channel, no crossing."""
    keys = ("input", "running_mean", "running_var", "weight", "bias", flag, "momentum", "eps")
    named = dict(zip(keys, args, strict=False))
    named.update(kwargs)
    spec = spec_of(named["input"])
    if spec is None or spec.dim != 1:
        return NotImplemented
    name = func.__name__
    buffers = {key: named.get(key) for key in ("running_mean", "running_var")}
    # Through ``.data``: the exchange after the forward pass must not look like a change of what backward needs.
    local = {key: None if buffer is None else _statistics(buffer.data, spec) for key, buffer in buffers.items()}
    affine = {key: _affine(named.get(key), spec, name) for key in ("weight", "bias")}
    result = func(**{**named, **local, **affine})
    updates = named.get(flag, flag == "use_input_stats")
    if updates:
        for key, buffer in buffers.items():
            part = local[key]
            if buffer is not None and part is not None:
                _write_back(buffer, part, spec)
    return wrap(result, spec.moved(1))


@rule(F.batch_norm)
def _batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _channel_norm(func, args, kwargs, "training")


@rule(F.instance_norm)
def _instance_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _channel_norm(func, args, kwargs, "use_input_stats")


@rule(F.group_norm)
def _group_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Groups that fall inside the columns need no exchange; others are gathered."""
    named = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False))
    named.update(kwargs)
    spec, num_groups = spec_of(named["input"]), named["num_groups"]
    if spec is None or spec.dim != 1 or spec.partition.size % num_groups:
        return NotImplemented
    groups = spec.partition.divide(spec.partition.size // num_groups)
    if groups is None or 0 in groups.sizes:  # all ranks must come to the same answer
        return NotImplemented
    named["num_groups"] = groups.sizes[spec.columns.rank]
    for key in ("weight", "bias"):
        named[key] = _affine(named.get(key), spec, "group_norm")
    return wrap(func(**named), spec.moved(1))


@rule(F.layer_norm)
def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False))
    named.update(kwargs)
    value = named["input"]
    spec = spec_of(value)
    if spec is None or spec.dim >= value.ndim - len(named["normalized_shape"]):
        return NotImplemented
    for key in ("weight", "bias"):
        if named.get(key) is not None:
            if spec_of(named[key]) is not None:
                return NotImplemented
            named[key] = share(named[key], spec.columns, "layer_norm")
    return wrap(func(**named), spec.moved(spec.dim))


@lru_cache(maxsize=1024)
def _windows(held: Partition, size: int, groups: int) -> Partition:
    """The channels that the windows of each rank's channels reach, within their groups."""
    width = held.size // groups

    def reach(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        return union(
            [
                (max(start - size // 2, start // width * width), min(stop + (size - 1) // 2, -(-stop // width) * width))
                for start, stop in ranges
            ]
        )

    return Partition(held.size, tuple(reach(ranges) for ranges in held.ranges))


def _response_norm(
    value: Tensor, size: int, alpha: float, beta: float, k: float, groups: int, relu: bool = False
) -> Any:
    spec = spec_of(value)
    if spec is None or spec.dim != 1 or spec.partition.size % groups:
        return NotImplemented
    rank, width = spec.columns.rank, spec.partition.size // groups
    held = spec.partition.ranges[rank]
    if spec.partition.divide(width) is not None:  # whole groups everywhere: no window reaches across a cut
        local_groups = sum(stop - start for start, stop in held) // width
        plain = value.as_subclass(Tensor)  # what an autograd function saves must not be taken for a split tensor
        result = local_response_norm(plain, size, alpha, beta, k, local_groups, relu) if local_groups else value.clone()
        return wrap(result, spec.moved(1))
    need = _windows(spec.partition, size, groups)
    local = exchange(value, 1, spec.partition, need, spec.columns, "local_response_norm")
    parts = []
    for start, stop in held:
        while start < stop:  # a group at a time: a window stops at its group's edge
            edge = min(stop, (start // width + 1) * width)
            first = max(start - size // 2, start // width * width)
            last = min(edge + (size - 1) // 2, (start // width + 1) * width)
            offset = sum(min(max(first - begin, 0), end - begin) for begin, end in need.ranges[rank])
            window = local.narrow(1, offset, last - first)
            normed = local_response_norm(window, size, alpha, beta, k, relu=relu)
            parts.append(normed.narrow(1, start - first, edge - start))
            start = edge
    return wrap(torch.cat(parts, 1) if parts else value.clone(), spec.moved(1))


@rule(F.local_response_norm)
def _torch_response_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "size", "alpha", "beta", "k"), args, strict=False))
    named.update(kwargs)
    return _response_norm(
        named["input"], named["size"], named.get("alpha", 1e-4), named.get("beta", 0.75), named.get("k", 1.0), 1
    )


@rule(local_response_norm)
def _squall_response_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("x", "size", "alpha", "beta", "k", "groups", "relu"), args, strict=False))
    named.update(kwargs)
    return _response_norm(
        named["x"], named["size"], named["alpha"], named["beta"], named["k"], named.get("groups", 1),
        named.get("relu", False),
    )  # fmt: skip
