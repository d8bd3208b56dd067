"""All weights and optimizer state at one version, read out of the shards' memory while others train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .client import Client
from .optimizers import read_entry
from .order import unpack_orders
from .plan import Plan, Slice, Unit
from .rows import Rows
from .staleness import MEAN_SQUARE
from .updates import SliceMemory


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of.

    Args:
        version: Number of updates in it.
        weights: Of each parameter, in the plan's order.
        state: What the optimizers keep for each; empty for parameters that have had no update.
        report: The coordinator's numbers, and the state of the queue, at that version.
        owed: What the codes of all workers' pushes have lost of each parameter's gradients, if that is kept.

    """

    version: int
    weights: tuple[Tensor, ...]
    state: tuple[dict[str, Any], ...]
    report: dict[str, Any]
    owed: tuple[Tensor, ...] = ()


def fill(memories: Sequence[SliceMemory], rows: Rows, optimizers: Sequence[Optimizer]) -> None:
    """Give the shards their first weights, and the state that the optimizers bring along."""
    with torch.no_grad():
        for memory in memories:
            for unit in memory.slice.units:
                parameter = rows.parameters[unit.parameter]
                memory.weights(unit).copy_(rows.of(unit.parameter, parameter)[unit.start : unit.stop])
                state = optimizers[unit.info.optimizer].state.get(parameter)
                if state:
                    memory.write_state(unit, _cut(state, rows, unit))


def _cut(state: Mapping[str, Any], rows: Rows, unit: Unit) -> dict[str, Any]:
    shape = rows.parameters[unit.parameter].shape
    return {
        key: rows.of(unit.parameter, value)[unit.start : unit.stop]
        if isinstance(value, Tensor) and value.shape == shape and value.numel() > 1
        else value
        for key, value in state.items()
    }


class Copied:
    """A shard's memory, as far as it was copied from another host.

    Args:
        num_bytes: Of the shard's memory.

    """

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8)

    def fill(self, ranges: Sequence[tuple[int, int]], data: bytearray) -> None:
        """Take what was read of it.

        Args:
            ranges: Where each piece begins, and its length.
            data: All pieces.

        """
        source, at = torch.frombuffer(data, dtype=torch.uint8), 0
        for start, count in ranges:
            self._bytes[start : start + count].copy_(source[at : at + count])
            at += count

    def tensor(self, dtype: torch.dtype, offset: int, num_elements: int) -> Tensor:
        """As :meth:`Segment.tensor`."""
        return self._bytes[offset : offset + num_elements * dtype.itemsize].view(dtype)


def ranges_of(slice_: Slice, with_state: bool) -> list[tuple[int, int]]:
    """What to copy of a slice's memory: flags and weights, and the state behind these."""
    batches = [(b.offset, b.num_bytes if with_state else b.num_weight_bytes) for b in slice_.batches]
    return [(0, slice_.flags_offset + len(slice_.units)), *batches]


def ask(client: Client, with_state: bool) -> dict[str, Any]:
    """Have later updates held back, until ``release``.

    Args:
        client: The worker's line to the coordinator.
        with_state: For a checkpoint, which needs to know which samples are left, too.

    Returns:
        The coordinator's numbers at this version.

    """
    report, payload = client.call({"op": "snapshot", "queue": with_state})
    orders = unpack_orders(report["queue"], payload)
    return {**report, "queue": {str(epoch): order.state() for epoch, order in orders.items()}}


Attach = Callable[[int, bool], SliceMemory]  # number of a shard, and whether its state is wanted


def take(client: Client, plan: Plan, attach: Attach, with_state: bool) -> Snapshot:
    """Read one version.

    Args:
        client: The worker's line to the coordinator, which holds later updates back meanwhile.
        plan: All slices.
        attach: Finds a shard's memory.
        with_state: Read the optimizers' state, too.

    """
    report = ask(client, with_state)
    try:
        memories = [attach(shard, with_state) for shard in range(len(plan.slices))]
        weights = tuple(torch.empty(info.num_elements, dtype=info.dtype) for info in plan.parameters)
        state: tuple[dict[str, Any], ...] = tuple({} for _ in plan.parameters)
        for memory in memories:
            for unit in memory.slice.units:
                weights[unit.parameter][unit.start : unit.stop].copy_(memory.weights(unit))
                if with_state and memory.flags[unit.index]:
                    _read_state(memory, unit, state[unit.parameter])
    finally:
        client.call({"op": "release"})
    shaped = tuple(weight.view(info.shape) for weight, info in zip(weights, plan.parameters, strict=True))
    return Snapshot(int(report["version"]), shaped, state, report)


def _read_state(memory: SliceMemory, unit: Any, state: dict[str, Any]) -> None:
    for entry, flat in zip(unit.info.state, memory.state(unit), strict=True):
        if entry.name == MEAN_SQUARE:
            continue
        if entry.kind == "like":
            if entry.name not in state:
                state[entry.name] = torch.zeros(unit.info.shape, dtype=entry.dtype)
            state[entry.name].view(-1)[unit.start : unit.stop].copy_(flat)
        elif entry.kind == "tensor":
            state[entry.name] = flat.view(entry.shape).clone()
        else:
            state[entry.name] = read_entry(entry, flat, ())


def optimizer_state_dict(
    optimizer: Optimizer, index_of: Mapping[nn.Parameter, int], snapshot: Snapshot
) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would give on one device.

    Args:
        optimizer: A worker's, whose groups are right and whose state is with the shards.
        index_of: Number of each parameter in the plan.
        snapshot: Where the state is.

    """
    groups: dict[str, Any] = optimizer.state_dict()
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = ((number, snapshot.state[index_of[p]]) for number, p in enumerate(members) if p in index_of)
    return {**groups, "state": {number: state for number, state in states if state}}
