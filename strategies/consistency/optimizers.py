"""The user's own optimizer, away from home: carried to a shard, and stepped there on a slice of its parameters."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cloudpickle
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from .outside import copied, outside, refuse_changes, refuse_parameters
from .plan import StateEntry

Hyperparameters = list[dict[str, Any]]  # of each group of an optimizer: all but its parameters

_PER_PROCESS = ("state", "param_groups", "step", "zero_grad")
_FUSED_ON_CPU = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW)
_NUMBERS: dict[str, Callable[[float], Any]] = {"int": int, "float": float, "bool": bool}


def carry(optimizer: Optimizer) -> bytes:
    """Pack an optimizer without its parameters and state, by value where its class lives in the user's script.

    Raises:
        MisconfigurationException: If something that it holds can't be carried to another process.

    """
    try:
        return bytes(cloudpickle.dumps((type(optimizer), _attributes(optimizer))))
    except Exception as error:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} can't be carried to the shards, which step it: {error}. Keep what can't be"
            " pickled (open files, locks, modules' hooks) out of the optimizer."
        ) from error


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What makes an optimizer what it is: all but its parameters, their state, and who listens to it."""
    return {
        key: value
        for key, value in vars(optimizer).items()
        if key not in _PER_PROCESS and "hook" not in key and not key.startswith("_squall") and "zero_grad" not in key
    }


def unpack(data: bytes) -> Optimizer:
    """The optimizer that :func:`carry` packed, without parameters.

    Args:
        data: From a process of the same job, over a channel of its own: it is unpickled.

    """
    kind, attributes = cloudpickle.loads(data)
    return _bare(kind, attributes)


def carry_groups(optimizers: Sequence[Optimizer]) -> bytes:
    """Pack the groups of optimizers, without their parameters."""
    groups = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    try:
        return bytes(cloudpickle.dumps(groups))
    except Exception as error:
        raise MisconfigurationException(
            f"An optimizer's param_groups can't be carried to the shards: {error}."
        ) from error


def unpack_groups(data: bytes) -> list[list[dict[str, Any]]]:
    """The groups that :func:`carry_groups` packed."""
    groups: list[list[dict[str, Any]]] = cloudpickle.loads(data)
    return groups


def _bare(kind: type[Optimizer], attributes: Mapping[str, Any]) -> Optimizer:
    optimizer: Optimizer = object.__new__(kind)
    optimizer.__dict__.update(attributes)
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(optimizer, name, OrderedDict())
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = []
    return optimizer


def hyperparameters(optimizer: Optimizer) -> Hyperparameters:
    """All that a scheduler or a callback may change in an optimizer, as plain numbers.

    Returns:
        Per group, what can be said in JSON; the rest a shard keeps as it was carried.

    """
    return [
        {key: plain for key, value in group.items() if key != "params" and (plain := _plain(value)) is not _NOTHING}
        for group in optimizer.param_groups
    ]


_NOTHING = object()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return _NOTHING if any(item is _NOTHING for item in items) else items
    return value if value is None or isinstance(value, (bool, int, float, str)) else _NOTHING


def adopt(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set a group's hyperparameters, each in the form (tensor, tuple) that it had."""
    for key, value in values.items():
        old = group.get(key)
        if isinstance(old, Tensor):
            old.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(old, tuple) else value


def make_faster(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Let torch's own optimizers update in a single pass, where they can and the user didn't say otherwise."""
    if type(optimizer) in _FUSED_ON_CPU and not any(
        group.get(key) for key in ("foreach", "differentiable", "capturable", "sparse")
    ):
        group["fused"] = True


def try_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    at_shard: bool = True,
) -> list[StateEntry]:
    """Find out what an optimizer keeps for a parameter, by stepping a copy of it on one.

    Args:
        optimizer: Any optimizer.
        group: The parameter's group.
        shape: The parameter's shape.
        dtype: The type of its elements.
        at_shard: Step it as a shard would, by :func:`make_faster`, and refuse what a shard can't be.

    Raises:
        MisconfigurationException: If the optimizer can't be stepped with gradients alone, or keeps what can't lie in
            shared memory; at a shard, if it keeps anything outside its state of the parameter.

    """
    name = type(optimizer).__name__
    attributes = _attributes(optimizer)
    before = outside(attributes, group)
    if at_shard:
        refuse_parameters(name, before)
        attributes = {key: copied(value) for key, value in attributes.items()}
        group = {key: copied(value) for key, value in group.items() if key != "params"}
    trial = _bare(type(optimizer), attributes)
    parameter = nn.Parameter(torch.full(tuple(shape), 0.5, dtype=dtype))
    trial.param_groups = [{**group, "params": [parameter]}]
    if at_shard:
        make_faster(trial, trial.param_groups[0])
    for value in (0.25, -0.5):
        parameter.grad = torch.full_like(parameter, value)
        if isinstance(optimizer, torch.optim.SparseAdam) and not at_shard:
            parameter.grad = parameter.grad.to_sparse()
        try:
            type(optimizer).step(trial)
        except Exception as error:
            raise MisconfigurationException(
                f"{name} can't be stepped on a shard, from gradients alone: {type(error).__name__}: {error}."
                " Use an optimizer whose step() needs no closure, or another strategy."
            ) from error
    if at_shard:
        after = outside(_attributes(trial), trial.param_groups[0])
        refuse_changes(name, before, after, [key for key in trial.state if key is not parameter])
    entries = []
    for key, value in trial.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.numel() > 1:
            entries.append(StateEntry(str(key), "like", (), value.dtype))
        elif isinstance(value, Tensor):
            entries.append(StateEntry(str(key), "tensor", tuple(value.shape), value.dtype))
        elif value is None or isinstance(value, (bool, int, float)):
            kind = "none" if value is None else type(value).__name__
            entries.append(StateEntry(str(key), kind))
        else:
            raise MisconfigurationException(
                f"{name} keeps a {type(value).__name__} ({key!r}) for each parameter. Shards keep tensors and numbers:"
                " they must be found again after a shard is killed. Use another optimizer, or another strategy."
            )
    return entries


def read_entry(entry: StateEntry, memory: Tensor, shape: Sequence[int]) -> Any:
    """An optimizer's quantity, from the memory it lies in.

    Args:
        entry: Which.
        memory: The flat memory; tensors share it.
        shape: Of the unit.

    """
    if entry.kind == "none":
        return None
    if entry.kind == "like":
        return memory.view(tuple(shape))
    if entry.kind == "tensor":
        return memory.view(entry.shape)
    return _NUMBERS[entry.kind](memory.item())


def write_entry(entry: StateEntry, memory: Tensor, value: Any) -> None:
    """Put an optimizer's quantity where it lies, unless it does so already."""
    if entry.kind == "none":
        return
    if isinstance(value, Tensor):
        if value.data_ptr() != memory.data_ptr():
            memory.copy_(value.detach().reshape(-1))
    else:
        memory.fill_(float(value))
