"""Convolutions and linear layers: each rank computes its own output channels.

A layer needs the input channels that its own outputs read. Where these are not the ones that the rank holds, the
columns cross: that is the one place where a placed network communicates in its forward pass (Krizhevsky 2012, figure
2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exchange import exchange, share
from ..hybrid.linear import ExampleColumns, linear_in_passes
from ..partition import Partition, Range, union
from ..tensor import Spec, rule, spec_of, to_partition, whole, wrap


@dataclass(frozen=True)
class Segment:
    """Consecutive outputs that one call of a grouped convolution can compute.

    Args:
        groups: Number of groups of that call.
        outputs: Offset and length among this rank's outputs.
        inputs: Offset and length among this rank's needed inputs.

    """

    groups: int
    outputs: tuple[int, int]
    inputs: tuple[int, int]


@lru_cache(maxsize=1024)
def input_partition(outputs: Partition, num_inputs: int, groups: int) -> Partition:
    """The input channels that each rank's outputs read."""
    group_out, group_in = outputs.size // groups, num_inputs // groups

    def read(held: tuple[Range, ...]) -> tuple[Range, ...]:
        return union([(start // group_out * group_in, -(-stop // group_out) * group_in) for start, stop in held])

    return Partition(num_inputs, tuple(read(held) for held in outputs.ranges))


@lru_cache(maxsize=1024)
def segments(outputs: Partition, num_inputs: int, groups: int, rank: int) -> tuple[Segment, ...]:
    """Cut this rank's outputs into calls with whole groups: a part of a group, whole groups, a part of a group."""
    group_out, group_in = outputs.size // groups, num_inputs // groups
    needed = input_partition(outputs, num_inputs, groups).ranges[rank]

    def offset(channel: int) -> int:
        return sum(min(max(channel - start, 0), stop - start) for start, stop in needed)

    cuts: list[Segment] = []
    done = 0
    for start, stop in outputs.ranges[rank]:
        while start < stop:
            group = start // group_out
            if start % group_out == 0 and stop - start >= group_out:
                num_groups = (stop - start) // group_out
                length = num_groups * group_out
            else:
                num_groups, length = 1, min(stop, (group + 1) * group_out) - start
            cuts.append(Segment(num_groups, (done, length), (offset(group * group_in), num_groups * group_in)))
            start, done = start + length, done + length
    return tuple(cuts)


def _needed(value: Tensor, dim: int, need: Partition, spec: Spec) -> Tensor:
    """The input channels in ``need``, fetched where they are split, cut where they are replicated."""
    columns, rank = spec.columns, spec.columns.rank
    own = spec_of(value)
    if own is not None and own.dim != dim:
        value, own = whole(value, spec.name), None
    if own is not None:
        return exchange(autocast(value), dim, own.partition, need, columns, spec.name)
    value = share(value, columns, spec.name)
    held = need.ranges[rank]
    if held == ((0, need.size),):
        return value
    return torch.cat([value.narrow(dim, start, stop - start) for start, stop in held], dim)


def autocast(value: Tensor) -> Tensor:
    """What the layer will be computed in is what travels: half the bytes, the same numbers."""
    device = value.device.type
    if value.dtype is torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return value.to(torch.get_autocast_dtype(device))
    return value


def _bias(bias: Tensor | None, outputs: Partition, spec: Spec) -> Tensor | None:
    return None if bias is None else to_partition(bias, Spec(0, outputs, spec.columns, spec.name), spec.name)


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
    named.update(kwargs)
    value, weight, bias, groups = named["input"], named["weight"], named.get("bias"), named.get("groups", 1)
    spec = spec_of(weight)
    if spec is None or spec.dim != 0:
        return NotImplemented  # whole weights: the layer is computed whole, on gathered channels
    dim = value.ndim - weight.ndim + 1
    outputs, num_inputs, rank = spec.partition, weight.shape[1] * groups, spec.columns.rank
    local = _needed(value, dim, input_partition(outputs, num_inputs, groups), spec)
    bias = _bias(bias, outputs, spec)
    rest = (named.get("stride", 1), named.get("padding", 0), named.get("dilation", 1))
    cuts = segments(outputs, num_inputs, groups, rank)
    if len(cuts) == 1:
        result = func(local, weight, bias, *rest, cuts[0].groups)
    else:
        result = torch.cat(
            [
                func(
                    local.narrow(dim, *cut.inputs),
                    weight.narrow(0, *cut.outputs),
                    None if bias is None else bias.narrow(0, *cut.outputs),
                    *rest,
                    cut.groups,
                )
                for cut in cuts
            ],
            dim,
        )
    return wrap(result, Spec(dim, outputs, spec.columns))


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _transposed_convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    keys = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    named = dict(zip(keys, args, strict=False))
    named.update(kwargs)
    value, weight, groups = named["input"], named["weight"], named.get("groups", 1)
    spec = spec_of(weight)
    if spec is None or spec.dim > 1:
        return NotImplemented
    dim = value.ndim - weight.ndim + 1
    if spec.dim == 1:  # one group, split by its outputs
        if groups != 1:
            return NotImplemented
        outputs, need, local_groups = spec.partition, Partition.whole(weight.shape[0], spec.partition.num_ranks), 1
    else:  # whole groups
        group_in = spec.partition.size // groups
        held = spec.partition.divide(group_in)
        if held is None:
            return NotImplemented
        outputs, need = held.scale(weight.shape[1]), spec.partition
        local_groups = weight.shape[0] // group_in
    named["input"] = _needed(value, dim, need, spec)
    named["bias"] = _bias(named.get("bias"), outputs, spec)
    named["groups"] = local_groups
    return wrap(func(**named), Spec(dim, outputs, spec.columns))


@rule(F.linear)
def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "weight", "bias"), args, strict=False))
    named.update(kwargs)
    value, weight = named["input"], named["weight"]
    spec = spec_of(weight)
    if spec is None or spec.dim != 0 or weight.ndim != 2:
        return NotImplemented
    if isinstance(spec.columns, ExampleColumns):
        bias = _bias(named.get("bias"), spec.partition, spec)
        return linear_in_passes(autocast(whole(value, spec.name)), autocast(weight), bias, spec)
    dim = value.ndim - 1
    local = _needed(value, dim, Partition.whole(weight.shape[1], spec.partition.num_ranks), spec)
    result = func(local, weight, _bias(named.get("bias"), spec.partition, spec))
    return wrap(result, Spec(dim, spec.partition, spec.columns))
