"""Apply a layout to a module, and give the module back as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import rules  # noqa: F401  (registers what each torch function does)
from .columns import Columns
from .exchange import fetch
from .layout import COLUMNS, Layout, parameter_splits
from .partition import Partition
from .rules.norms import synchronize_buffers
from .tensor import Spec, SplitParameter, SplitTensor, no_dispatch, split_in_place, watch_autograd_functions
from .tiles import TileSpec


def place(module: nn.Module, layout: Layout, columns: Columns) -> nn.Module:
    """Split the parameters of ``module`` as ``layout`` says, in place.

    Every rank passes the same whole module and keeps its own outputs of each split layer. The module's code stays as it
    is; parameters keep their identity, so shared weights and references held elsewhere stay valid.

    Args:
        module: A module with whole parameters, the same on all columns.
        layout: Its layout.
        columns: The ranks to split over.

    """
    watch_autograd_functions()
    layers = dict(module.named_modules())
    for row in layout:
        layer = layers[row.name]
        for parameter in layer.parameters(recurse=False):
            if not isinstance(parameter, SplitParameter):
                parameter._squall_layer = row.name  # type: ignore[attr-defined]
        if row.split != COLUMNS:
            continue
        splits = parameter_splits(layer, columns.num_columns)
        assert not isinstance(splits, str), splits
        for key, (dim, partition) in splits.items():
            parameter = layer._parameters[key]
            if isinstance(parameter, SplitParameter):  # shared with a layer that came before
                continue
            assert parameter is not None
            make_split(parameter, Spec(dim, partition, columns, row.name))
    return module


def make_split(parameter: nn.Parameter, spec: Spec | TileSpec) -> None:
    """Keep this rank's part of a whole parameter and of its gradient; the object stays the same."""
    grad = parameter.grad
    parameter.grad = None
    parameter.data = _part(parameter.data, spec)
    if grad is not None:
        parameter.grad = _part(grad, spec)
    split_in_place(parameter, spec)


def make_whole(parameter: nn.Parameter) -> Spec | TileSpec:
    """Gather a split parameter and its gradient on every column. All columns must call it, in the same order.

    Returns:
        How it was split.

    """
    spec: Spec | TileSpec = parameter._spec  # type: ignore[attr-defined]
    with no_dispatch():
        grad = parameter.grad
        parameter.grad = None
        parameter.data = gather_part(parameter.data, spec)
        if grad is not None:
            parameter.grad = gather_part(grad, spec)
    parameter.__class__ = nn.Parameter
    del parameter._spec  # type: ignore[attr-defined]
    return spec


def _part(full: Tensor, spec: Spec | TileSpec) -> Tensor:
    for axis in spec.axes:
        ranges = axis.partition.ranges[axis.columns.rank] or ((0, 0),)
        full = torch.cat([full.narrow(axis.dim, start, stop - start) for start, stop in ranges], axis.dim)
    return full.contiguous()


def gather_part(local: Tensor, spec: Spec | TileSpec) -> Tensor:
    """All ranks' parts of a tensor that is split like ``spec`` says, as a plain tensor."""
    with no_dispatch(), torch.no_grad():
        part = local.detach().as_subclass(Tensor)
        for axis in reversed(spec.axes):
            need = Partition.whole(axis.partition.size, axis.partition.num_ranks)
            part = fetch(part, axis.dim, axis.partition, need, (axis.columns, "", False))
        return part


def take_part(full: Tensor, spec: Spec | TileSpec) -> Tensor:
    """This rank's part of a whole tensor."""
    with no_dispatch(), torch.no_grad():
        return _part(full, spec)


def split_parameters(module: nn.Module) -> Iterator[tuple[str, SplitParameter]]:
    """The split parameters of a module, each once."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, SplitParameter):
            yield name, parameter


def unplace(module: nn.Module) -> None:
    """Give every column the whole, plain module back. All columns must call it."""
    synchronize_buffers()
    for _, parameter in list(split_parameters(module)):
        make_whole(parameter)
    for layer in module.modules():  # a moving average of split activations is split, too
        for name, buffer in layer._buffers.items():
            if isinstance(buffer, SplitTensor):
                layer._buffers[name] = gather_part(buffer, buffer._spec)


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that the module has on one device: same keys, same shapes. All columns must call it."""
    synchronize_buffers()  # a forward pass outside of a step may have left them apart
    state = module.state_dict(keep_vars=True)
    result: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, SplitTensor):
            if id(value) not in shared:
                shared[id(value)] = gather_part(value, value._spec)
            result[key] = shared[id(value)]
        elif isinstance(value, Tensor):
            result[key] = value.detach()
        else:
            result[key] = value
    return result
