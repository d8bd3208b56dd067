"""A layout is data: layer -> split, in a table that prints, loads from YAML and can be overridden line by line.

Krizhevsky's cuda-convnet2 wrote its two-GPU network down as a file that named a GPU for each layer; this is that file,
derived. ``auto`` splits every convolution and linear layer by its outputs, with what follows it channel by channel, and
keeps whole the last one, whose outputs every rank needs for the loss (Krizhevsky 2012 kept its softmax layer on one
GPU), and what can't be split.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .columns import DryColumns
from .partition import Partition

COLUMNS, TILES, WHOLE = "columns", "tiles", "whole"
MEASURED = "measured"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNELWISE = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.PReLU,
)


@dataclass(frozen=True)
class LayerPlacement:
    """Where one layer lives.

    Args:
        name: Name of the layer in ``named_modules()``.
        kind: Its class.
        split: ``"columns"``, ``"tiles"`` or ``"whole"``.
        num_parameters: Elements of its parameters on one device.
        parameters_per_rank: The same on the rank that holds most.
        reason: Why it is kept whole, or what splitting it is good for, if that is known.
        crosses: Whether it needs what other ranks hold; ``None`` until an example input has told.
        floats_per_image: Elements that a rank sends for it per image in the forward pass, likewise.

    """

    name: str
    kind: str
    split: str
    num_parameters: int
    parameters_per_rank: int
    reason: str = ""
    crosses: bool | None = None
    floats_per_image: int | None = None


@dataclass(frozen=True)
class Layout:
    """A table of layers and where they live.

    Args:
        num_columns: Number of ranks of a replica that the table is for.
        layers: Its rows, in the order of ``named_modules()``.
        other_floats_per_image: What operations that are no layers send per image, by name.

    Example:
        >>> import squall, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = net(torch.zeros(1, 3, 8, 8))
        >>> layout = squall.placement.derive_layout(net, torch.zeros(1, 3, 8, 8), num_columns=2)
        >>> [(layer.name, layer.split) for layer in layout]
        [('0', 'columns'), ('3', 'whole')]

    """

    num_columns: int
    layers: tuple[LayerPlacement, ...]
    other_floats_per_image: tuple[tuple[str, int], ...] = ()

    def __iter__(self) -> Iterator[LayerPlacement]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerPlacement:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, str]:
        """The part that a user may write: ``{layer: split}``."""
        return {layer.name: layer.split for layer in self.layers}

    def to_yaml(self) -> str:
        """The same as YAML, to keep in a file and edit."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def rows(self) -> list[dict[str, Any]]:
        """Every column of the table, a dictionary a layer."""
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        header = ("layer", "kind", "split", "parameters", "per rank", "crosses", "floats/image", "")
        lines = [header]
        for layer in self.layers:
            crosses = "?" if layer.crosses is None else ("yes" if layer.crosses else "no")
            floats = "" if not layer.floats_per_image else f"{layer.floats_per_image:,}"
            lines.append(
                (
                    layer.name, layer.kind, layer.split, f"{layer.num_parameters:,}",
                    f"{layer.parameters_per_rank:,}", crosses, floats, layer.reason,
                )
            )  # fmt: skip
        for name, sent in self.other_floats_per_image:
            lines.append((name, "operation", "", "", "", "yes", f"{sent:,}", "needs what other ranks hold"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        right = {3, 4, 6}
        text = [
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths).rstrip())
        return "\n".join(text)


def read_layout(layout: str | Path | Mapping[str, str] | Layout, split: str = COLUMNS) -> Mapping[str, str]:
    """The overrides in ``layout``: a mapping, a :class:`Layout`, the path of a YAML file; none if it is to be derived.

    Args:
        layout: What a user passes.
        split: What a layer may be instead of ``"whole"``.

    Raises:
        MisconfigurationException: If it is none of these, or says neither ``split`` nor ``whole``.

    """
    if isinstance(layout, Layout):
        return layout.to_dict()
    if isinstance(layout, (str, Path)):
        if layout in ("auto", MEASURED):
            return {}
        path = Path(layout)
        if not path.is_file():
            raise MisconfigurationException(
                f"layout={str(layout)!r} is neither 'auto' nor a YAML file that exists. "
                f"Write 'auto', 'measured', {{layer name: {split!r} or 'whole'}}, or the path of a file of such lines."
            )
        layout = yaml.safe_load(path.read_text()) or {}
    if not isinstance(layout, Mapping):
        raise MisconfigurationException(f"layout must map layer names to {split!r} or 'whole', not {layout!r}.")
    for name, asked in layout.items():
        if asked not in (split, WHOLE):
            raise MisconfigurationException(
                f"layout[{name!r}]={asked!r}: a layer is split in {split!r} or kept 'whole'."
            )
    return dict(layout)


def parameter_splits(layer: nn.Module, num_columns: int) -> dict[str, tuple[int, Partition]] | str:
    """How a layer's own parameters are split by its output channels.

    Returns:
        ``{parameter: (dim, partition)}``, or why the layer has to stay whole.

    """
    weight = layer._parameters.get("weight")
    if not isinstance(layer, (*CONVOLUTIONS, *_TRANSPOSED, nn.Linear, *_CHANNELWISE)):
        return "no rule to split this kind of layer"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "part of an attention layer"
    if weight is None:
        return "no parameters of its own" if "weight" not in dir(layer) else "its weight is computed, not a parameter"
    if isinstance(layer, CONVOLUTIONS):
        outputs, granule = layer.out_channels, layer.out_channels // layer.groups
        # Whole groups where there are enough of them, so that a column's groups read what the column holds.
        granule = granule if layer.groups >= num_columns else 1
        dim, partition = 0, Partition.even(outputs, num_columns, granule)
    elif isinstance(layer, _TRANSPOSED):
        if layer.groups == 1:
            dim, partition = 1, Partition.even(layer.out_channels, num_columns)
        elif layer.groups >= num_columns:
            dim, partition = 0, Partition.even(layer.in_channels, num_columns, layer.in_channels // layer.groups)
        else:
            return f"{layer.groups} groups are fewer than {num_columns} columns"
    else:
        dim, partition = 0, Partition.even(weight.shape[0], num_columns)
    if 0 in partition.sizes:
        return f"{partition.size} outputs are fewer than {num_columns} columns"
    splits = {"weight": (dim, partition)}
    if layer._parameters.get("bias") is not None:
        outputs_of = partition
        if isinstance(layer, _TRANSPOSED) and dim == 0:
            rows = partition.divide(layer.in_channels // layer.groups)
            assert rows is not None
            outputs_of = rows.scale(layer.out_channels // layer.groups)
        splits["bias"] = (0, outputs_of)
    return splits


def plan_layout(
    module: nn.Module,
    num_columns: int,
    overrides: Mapping[str, str] | None = None,
    last: str | None = None,
) -> Layout:
    """The layout of ``module`` without running it.

    Args:
        module: The network, or the LightningModule that holds it.
        num_columns: Number of columns.
        overrides: ``{layer name or pattern: "columns" | "whole"}``.
        last: Name of the layer to keep whole for the loss; by default the last convolution or linear layer.

    Raises:
        MisconfigurationException: If an override names no layer, or asks for a split that isn't possible.

    """
    check_placeable(module)
    named = {
        name: layer for name, layer in module.named_modules() if next(layer.parameters(recurse=False), None) is not None
    }
    heavy = (*CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
    if last is None:
        last = next((name for name, layer in reversed(named.items()) if isinstance(layer, heavy)), None)
    asked = match_layers(overrides or {}, named)
    layers = []
    for name, layer in named.items():
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        splits = parameter_splits(layer, num_columns)
        reason = ""
        if isinstance(splits, str):
            reason = splits
            if asked.get(name) == COLUMNS:
                raise MisconfigurationException(
                    f"layout[{name!r}]='columns' is not possible for {type(layer).__name__}: {reason}. "
                    f"Write layout={{{name!r}: 'whole'}} or leave the line out."
                )
        elif asked.get(name) == WHOLE:
            reason = "by layout"
        elif name == last and name not in asked:
            reason = "last layer: the loss needs all of it"
        if num_columns == 1:
            reason = reason or "one column"
        if reason or isinstance(splits, str):
            layers.append(LayerPlacement(name, type(layer).__name__, WHOLE, own, own, reason))
        else:
            held = sum(
                layer._parameters[key].numel() // partition.size * max(partition.sizes)  # type: ignore[union-attr]
                for key, (_, partition) in splits.items()
            )
            layers.append(LayerPlacement(name, type(layer).__name__, COLUMNS, own, held))
    return Layout(num_columns, tuple(layers))


def check_placeable(module: nn.Module) -> None:
    """Refuse what can't be seen into, or isn't there yet.

    Raises:
        MisconfigurationException: That names the layer.

    """
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise MisconfigurationException(
                f"{name or 'the module'} is scripted, and what happens inside it can't be seen. "
                "Pass the original module instead of the result of torch.jit.script."
            )
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
            raise MisconfigurationException(
                f"{name} has uninitialized parameters. Run one forward pass before trainer.fit, or give its sizes."
            )


def match_layers(overrides: Mapping[str, str], named: Mapping[str, nn.Module]) -> dict[str, str]:
    """What is asked of each layer by name or pattern.

    Raises:
        MisconfigurationException: If a line names no layer.

    """
    asked: dict[str, str] = {}
    for pattern, split in overrides.items():
        matches = [name for name in named if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise MisconfigurationException(
                f"layout names {pattern!r}, which is no layer of the module. Its layers are: {', '.join(named)}."
            )
        asked.update(dict.fromkeys(matches, split))
    return asked


def derive_layout(
    module: nn.Module,
    example_input: Any,
    num_columns: int,
    layout: str | Path | Mapping[str, str] | Layout = "auto",
) -> Layout:
    """Derive the layout of a network and what crosses between its columns, in one process.

    A copy of the network runs once on ``example_input`` as one of ``num_columns`` columns that aren't there, so
    whatever its ``forward`` does is followed: loops, functional calls, residuals, concatenation.

    Args:
        module: Any network. It is not changed.
        example_input: Its input with the batch in the first dimension: a tensor, or a tuple or dictionary of
            arguments.
        num_columns: Number of columns.
        layout: Overrides, as :func:`read_layout` takes them.

    Returns:
        The table, with ``crosses`` and ``floats_per_image`` filled in.

    Raises:
        MisconfigurationException: If ``layout`` names no layer or asks for what isn't possible.

    Example:
        >>> import squall, torch
        >>> net = squall.models.AlexNet()
        >>> print(squall.placement.derive_layout(net, torch.zeros(1, 3, 224, 224), num_columns=2))  # doctest: +SKIP

    """
    overrides = read_layout(layout)
    if num_columns < 1:
        raise MisconfigurationException(f"num_columns={num_columns} must be at least 1.")
    if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(example_input)[0]):
        raise MisconfigurationException("example_input holds no tensor; give one batch of inputs.")
    with torch.no_grad():
        try:
            # Without values: no memory, no arithmetic.
            return _derive(without_values(module), to_meta(example_input), num_columns, overrides)
        except MisconfigurationException:
            raise
        except Exception:  # a network that looks at its values has to be run with them
            return _derive(copy.deepcopy(module), example_input, num_columns, overrides)


def _derive(dry: nn.Module, example_input: Any, num_columns: int, overrides: Mapping[str, str]) -> Layout:
    """Run ``dry``, which is changed, once as it is and once as one of the columns."""
    from .module import place  # which needs the layouts of this file

    dry.eval()
    table = plan_layout(dry, num_columns, overrides, _last_executed(dry, example_input))
    if num_columns == 1:
        return Layout(1, tuple(replace(layer, crosses=False, floats_per_image=0) for layer in table))
    columns = DryColumns(num_columns)
    place(dry, table, columns)
    first = next(leaf for leaf in tree_flatten(example_input)[0] if isinstance(leaf, Tensor))
    columns.ledger.start_step(first.shape[0] if first.ndim else 1)
    call_on(dry, example_input)
    sent = {crossing.name: round(crossing.floats_per_image_forward) for crossing in columns.ledger.crossings}
    layers = tuple(
        replace(layer, crosses=layer.name in sent, floats_per_image=sent.pop(layer.name, 0)) for layer in table
    )
    return Layout(num_columns, layers, tuple(sent.items()))


def without_values(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors are shapes only."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, memo)


def to_meta(value: Any) -> Any:
    """The same structure of tensors without values."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value)


def call_on(module: nn.Module, example_input: Any) -> Any:
    """Call ``module`` on one input, a list of arguments, or arguments by name."""
    if isinstance(example_input, Mapping):
        return module(**example_input)
    return module(*example_input) if isinstance(example_input, (tuple, list)) else module(example_input)


def _last_executed(dry: nn.Module, example_input: Any) -> str | None:
    """The convolution or linear layer that runs last."""
    order: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, layer in dry.named_modules()
        if isinstance(layer, (*CONVOLUTIONS, *_TRANSPOSED, nn.Linear))
    ]
    try:
        call_on(dry, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return order[-1] if order else None
