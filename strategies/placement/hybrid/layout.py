"""Which layers of a network are in columns and which are replicated, under one weird trick.

Krizhevsky 2014, section 1: convolutions have few weights and many activations, so their gradients are what should
travel; fully connected layers have many weights and few activations, so their activations should.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from ..layout import COLUMNS, WHOLE, LayerPlacement, Layout, parameter_splits, plan_layout


def plan_hybrid(module: nn.Module, num_ranks: int, overrides: Mapping[str, str] | None = None) -> Layout:
    """The layout of ``module`` under one weird trick: linear layers in columns, all else on every rank.

    Args:
        module: The network, or the LightningModule that holds it.
        num_ranks: Number of ranks.
        overrides: ``{layer name or pattern: "columns" | "whole"}``, of linear layers.

    Raises:
        MisconfigurationException: If no linear layer can be in columns, nothing is left for data parallelism, or an
            override names no layer, or asks for columns of another kind of layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> plan_hybrid(net, 2).to_dict()
        {'0': 'whole', '2': 'columns'}

    """
    layers = dict(module.named_modules())
    linear = {
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and not isinstance(parameter_splits(layer, num_ranks), str)
    }
    own = {name for name, layer in layers.items() if next(layer.parameters(recurse=False), None) is not None}
    # The last layer, too: every rank's loss needs its own examples only.
    derived = {name: COLUMNS if name in linear else WHOLE for name in own}
    table = plan_layout(module, num_ranks, {**derived, **(overrides or {})})
    for layer in table:
        if layer.split == COLUMNS and not isinstance(layers[layer.name], nn.Linear):
            raise MisconfigurationException(
                f"layout[{layer.name!r}]='columns': under HybridParallelStrategy only linear layers can be in columns, "
                f"not {layer.kind}. Leave the line out, or use ColumnParallelStrategy."
            )
    rows = (replace(layer, reason=_reason(layer, layers[layer.name], num_ranks)) for layer in table)
    table = replace(table, layers=tuple(rows))
    if num_ranks == 1:
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


def _reason(row: LayerPlacement, layer: nn.Module, num_ranks: int) -> str:
    if row.split == COLUMNS and isinstance(layer, nn.Linear):
        return f"sends less than its gradients up to {break_even(layer):,} examples a step"
    if row.split == COLUMNS or row.reason == "one column":
        return row.reason
    splits = parameter_splits(layer, num_ranks)
    if isinstance(layer, nn.Linear):
        return f"replicated: {splits}" if isinstance(splits, str) else row.reason
    return "replicated"
