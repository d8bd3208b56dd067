"""Which layers of a network are in columns and which are replicated, under one weird trick.

Krizhevsky 2014, section 1: convolutions have few weights and many activations, so their gradients are what should
travel; fully connected layers have many weights and few activations, so their activations should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from ..choosing import UPDATED, is_worthwhile
from ..layout import (
    COLUMNS,
    WHOLE,
    LayerPlacement,
    Layout,
    check_placeable,
    match_layers,
    parameter_splits,
    plan_layout,
)
from ..speeds import Speeds


def plan_hybrid(
    module: nn.Module,
    num_ranks: int,
    overrides: Mapping[str, str] | None = None,
    num_examples: int | None = None,
    measure: Callable[[], Speeds] | None = None,
) -> Layout:
    """The layout of ``module`` under one weird trick: linear layers in columns, all else on every rank.

    Args:
        module: The network, or the LightningModule that holds it.
        num_ranks: Number of ranks.
        overrides: ``{layer name or pattern: "columns" | "whole"}``, of linear layers.
        num_examples: Examples of a step, of all ranks. Where columns of a layer would send more for them than replicas,
            it is replicated if that is faster.
        measure: How fast ranks compute and send; asked once, if there is such a layer.

    Raises:
        MisconfigurationException: If no linear layer can be in columns, nothing is left for data parallelism, or an
            override names no layer, or asks for columns of another kind of layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> plan_hybrid(net, 2).to_dict()
        {'0': 'whole', '2': 'columns'}

    """
    check_placeable(module)
    layers = dict(module.named_modules())
    linear = {
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and not isinstance(parameter_splits(layer, num_ranks), str)
    }
    own = {name for name, layer in layers.items() if next(layer.parameters(recurse=False), None) is not None}
    # The last layer, too: every rank's loss needs its own examples only.
    derived = {name: COLUMNS if name in linear else WHOLE for name in own}
    asked = match_layers(overrides or {}, {name: layers[name] for name in own})
    free = {name: layer for name in linear - asked.keys() if isinstance(layer := layers[name], nn.Linear)}
    times = _times(free, num_ranks, num_examples, measure)
    replicated = {name for name, (columns, replicas) in times.items() if is_worthwhile(columns, replicas)}
    derived |= dict.fromkeys(replicated, WHOLE)
    table = plan_layout(module, num_ranks, {**derived, **(overrides or {})})
    for layer in table:
        if layer.split == COLUMNS and not isinstance(layers[layer.name], nn.Linear):
            raise MisconfigurationException(
                f"layout[{layer.name!r}]='columns': under HybridParallelStrategy only linear layers can be in columns, "
                f"not {layer.kind}. Leave the line out, or use ColumnParallelStrategy."
            )
    reasons = {row.name: _reason(row, layers[row.name], num_ranks, row.name in asked) for row in table}
    for name, (columns, replicas) in times.items():
        reasons[name] += (
            f"; {num_examples:,} examples: {columns * 1e3:,.1f} ms in columns, {replicas * 1e3:,.1f} replicated"
        )
    table = replace(table, layers=tuple(replace(layer, reason=reasons[layer.name]) for layer in table))
    if num_ranks == 1 or (replicated and linear == replicated):
        return table
    in_columns = [layer.name for layer in table if layer.split == COLUMNS]
    if not in_columns:
        raise MisconfigurationException(
            f"{type(module).__name__} has no linear layer with outputs for {num_ranks} ranks"
            f"{' but for those that layout keeps whole' if linear else ''}, so there is no boundary between "
            "convolutions and fully connected layers at which HybridParallelStrategy could change from data to model "
            "parallelism. Use strategy='ddp' or 'column_parallel'."
        )
    split = {id(p) for name in in_columns for p in layers[name].parameters(recurse=False)}
    if not any(p.requires_grad and id(p) not in split for p in module.parameters()):
        raise MisconfigurationException(
            f"{type(module).__name__} trains nothing but linear layers ({', '.join(in_columns)}), so there is no "
            "boundary between convolutions and fully connected layers at which HybridParallelStrategy could change "
            "from data to model parallelism. Use strategy='column_parallel', or keep one: "
            f"layout={{{in_columns[0]!r}: 'whole'}}."
        )
    return table


def break_even(layer: nn.Linear) -> int:
    """Up to how many examples a step, of all ranks, columns of a layer send less than replicas of it.

    Replicas send gradients of m x n weights around twice (a ring's all-reduce); columns send m inputs and n outputs of
    each of B examples, forward and backward: B(m + n) < 2mn.

    Example:
        >>> break_even(nn.Linear(9216, 4096, device="meta"))  # AlexNet's fc6
        5671

    """
    m, n = layer.in_features, layer.out_features
    return 2 * m * n // (m + n)


def seconds_of(layer: nn.Linear, num_ranks: int, num_examples: int, speeds: Speeds) -> tuple[float, float]:
    """What a layer costs in a step, in columns and in replicas, but for the matrix products: those are the same.

    In columns ranks send inputs and outputs, forward and backward, in as many passes as there are ranks, and update
    their own outputs' weights; replicas send gradients around a ring, twice, and update all weights. What of it hides
    behind the computing of others is not counted on either side.

    Example:
        >>> speeds = Speeds(flops=1e11, bytes=1e10, link=1.25e8, latency=1e-4)
        >>> columns, replicas = seconds_of(nn.Linear(9216, 4096, device="meta"), 2, 256, speeds)
        >>> round(columns, 2), round(replicas, 2)
        (0.13, 1.28)

    """
    m, n, others = layer.in_features, layer.out_features, num_ranks - 1
    size = layer.weight.element_size()
    own = num_examples / num_ranks
    crossing = 2 * others * own * (m + n / num_ranks) * size / speeds.link
    averaging = 2 * others / num_ranks * m * n * size / speeds.link
    update = UPDATED * m * n * size / speeds.bytes
    return crossing + update / num_ranks, averaging + update


def _times(
    layers: Mapping[str, nn.Linear], num_ranks: int, num_examples: int | None, measure: Callable[[], Speeds] | None
) -> dict[str, tuple[float, float]]:
    """Of those layers that could be faster in replicas: seconds in columns, and replicated."""
    if measure is None or num_examples is None or num_ranks == 1:
        return {}
    doubtful = {name: layer for name, layer in layers.items() if num_examples > break_even(layer)}
    if not doubtful:
        return {}
    speeds = measure()
    return {name: seconds_of(layer, num_ranks, num_examples, speeds) for name, layer in doubtful.items()}


def _reason(row: LayerPlacement, layer: nn.Module, num_ranks: int, is_asked: bool) -> str:
    splits = parameter_splits(layer, num_ranks)
    if row.reason == "one column" or (is_asked and isinstance(layer, nn.Linear)):
        return row.reason
    if not isinstance(layer, nn.Linear):
        return f"replicated: {row.num_parameters:,} gradients a step, however many examples"
    if isinstance(splits, str):
        return f"replicated: {splits}"
    if row.split == COLUMNS:
        return f"B(m + n) < 2mn up to {break_even(layer):,} examples a step"
    return f"B(m + n) > 2mn from {break_even(layer) + 1:,} examples a step on"
