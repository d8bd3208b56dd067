"""Which shard owns which elements, and where everything lies in its memory.

All parameters form one row of elements. An optimizer that treats elements alone lets that row be cut anywhere: every
shard gets the same number of elements, in *units* that fit the processor's cache, so that a gradient is decoded,
corrected and applied in one pass. Any other optimizer stays whole, on one shard.

Units that one call of their optimizer updates form a *batch*. A batch's weights and optimizer state are neighbours in
memory: one copy of these bytes is what a shard needs to be killed at any instruction and lose nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .memory import aligned

UNIT_ELEMENTS = 1 << 18
"""1 MB of single precision: with its gradient, states and journal a unit stays in a core's share of the cache, and the
64 microseconds of Python that a batch costs are a tenth of its update. (Half as much was measured 20 % slower.)"""
CONTROL_BYTES = 4096
_ELEMENTS_PER_SHARD = 1 << 23

CodeSize = Callable[[int, torch.dtype], int]


@dataclass(frozen=True)
class StateEntry:
    """One quantity that an optimizer keeps for a unit.

    Args:
        name: Its key.
        kind: ``"like"`` (a value per element), ``"tensor"`` (of any shape), ``"int"``, ``"float"``, ``"bool"`` or
            ``"none"``.
        shape: Of a ``"tensor"``.
        dtype: Of a tensor's elements.

    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64

    def num_elements(self, unit_elements: int) -> int:
        """Its length for a unit of a length."""
        if self.kind == "like":
            return unit_elements
        if self.kind == "tensor":
            return int(torch.Size(self.shape).numel())
        return 0 if self.kind == "none" else 1


@dataclass(frozen=True)
class ParameterInfo:
    """What the shards have to know of a parameter.

    Args:
        shape: Its shape.
        dtype: Of its elements.
        optimizer: Index of the optimizer that it belongs to.
        group: Index of its group there.
        state: What the optimizer keeps for it.

    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    optimizer: int
    group: int
    state: tuple[StateEntry, ...] = ()

    @property
    def num_elements(self) -> int:
        """Its size."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Unit:
    """Neighbouring elements of one parameter, on one shard.

    Args:
        parameter: Index of the parameter.
        start: First element.
        stop: One past the last.
        info: The parameter.
        index: Its number on its shard.
        weight_offset: Where its weights lie in the shard's memory, in bytes.
        state_offsets: Where each entry of its state lies there.
        fetch_offset: Where its weights lie in what a worker fetches.
        code_offset: Where its gradient lies in what a worker pushes.
        num_code_bytes: How many of them.

    """

    parameter: int
    start: int
    stop: int
    info: ParameterInfo
    index: int
    weight_offset: int
    state_offsets: tuple[int, ...]
    fetch_offset: int
    code_offset: int
    num_code_bytes: int

    @property
    def num_elements(self) -> int:
        """Its length."""
        return self.stop - self.start

    def weights_in(self, fetched: Tensor) -> Tensor:
        """Its weights, flat, in what a worker fetches from its shard."""
        end = self.fetch_offset + self.num_elements * self.info.dtype.itemsize
        return fetched[self.fetch_offset : end].view(self.info.dtype)

    def code_in(self, push: Tensor) -> Tensor:
        """The code of its gradient, in a push to its shard."""
        return push[self.code_offset : self.code_offset + self.num_code_bytes]


@dataclass(frozen=True)
class Batch:
    """Units that one call of their optimizer updates.

    Args:
        units: The units.
        optimizer: Index of their optimizer.
        offset: Where their weights and then their states lie in the shard's memory, in bytes.
        num_bytes: How much memory that is.
        num_weight_bytes: How much of it the weights take.
        fetch_offset: Where their weights lie in what a worker fetches.

    """

    units: tuple[Unit, ...]
    optimizer: int
    offset: int
    num_bytes: int
    num_weight_bytes: int
    fetch_offset: int


@dataclass(frozen=True)
class Slice:
    """What one shard owns.

    Args:
        batches: Its units.
        flags_offset: Where the shard notes which units have state: a byte each.
        journal_offset: Where it keeps a batch as it was, while it updates it.
        num_bytes: Its memory.
        num_fetch_bytes: Its weights, as a worker fetches them.
        num_code_bytes: A push to it.

    """

    batches: tuple[Batch, ...]
    flags_offset: int
    journal_offset: int
    num_bytes: int
    num_fetch_bytes: int
    num_code_bytes: int

    @property
    def units(self) -> list[Unit]:
        """All of its units, in order."""
        return [unit for batch in self.batches for unit in batch.units]


@dataclass(frozen=True)
class Plan:
    """All slices, and what they were made from.

    Args:
        parameters: All parameters, in the order of the optimizers.
        slices: One per shard.
        num_groups: Equal parts into which the shards are dealt, in order: one per host of the job.

    """

    parameters: tuple[ParameterInfo, ...]
    slices: tuple[Slice, ...]
    num_groups: int = 1

    def group(self, index: int) -> range:
        """Numbers of the shards of a group."""
        size = len(self.slices) // self.num_groups
        return range(index * size, (index + 1) * size)

    def group_of(self, shard: int) -> int:
        """Number of the group that a shard is in."""
        return shard * self.num_groups // len(self.slices)

    @property
    def digest(self) -> str:
        """Equal on all ranks whose modules and optimizers are."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def choose_num_shards(asked: int | Literal["auto"], num_elements: int, num_nodes: int = 1) -> int:
    """How many shards each host has.

    Args:
        asked: By the user; ``"auto"`` for one per 8 M elements, up to half the cores, or one on each of several hosts.
        num_elements: Of all parameters.
        num_nodes: Hosts of the job.

    """
    if asked != "auto":
        return asked
    if num_nodes > 1:  # whose numbers of cores may differ
        return 1
    return max(1, min((os.cpu_count() or 1) // 2, -(-num_elements // _ELEMENTS_PER_SHARD)))


def make_plan(
    parameters: Sequence[ParameterInfo],
    elementwise: Sequence[bool],
    num_shards: int,
    code_size: CodeSize,
    num_groups: int = 1,
) -> Plan:
    """Deal all parameters out to the shards.

    Args:
        parameters: All of them, in the order of the optimizers.
        elementwise: Whether each optimizer treats elements alone.
        num_shards: How many slices to make for each group.
        code_size: Bytes of the code of so many elements of a type.
        num_groups: How many groups of shards there are.

    Returns:
        A plan with a slice per shard; an empty one where there are fewer elements than shards.

    """
    num_shards *= num_groups
    loads = [0] * num_shards
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(num_shards)]
    for optimizer in range(len(elementwise)):
        if not elementwise[optimizer]:
            whole = [(i, 0, p.num_elements) for i, p in enumerate(parameters) if p.optimizer == optimizer]
            shard = loads.index(min(loads))
            pieces[shard] += whole
            loads[shard] += sum(stop for _, _, stop in whole)
    free = [i for i, parameter in enumerate(parameters) if elementwise[parameter.optimizer]]
    shares = _shares(loads, sum(parameters[i].num_elements for i in free))
    shard = 0
    for i in free:
        start, stop = 0, parameters[i].num_elements
        while start < stop:
            while shares[shard] == 0:
                shard += 1
            end = min(stop, start + shares[shard])
            pieces[shard].append((i, start, end))
            shares[shard] -= end - start
            start = end
    slices = tuple(_lay_out(parameters, elementwise, piece, code_size) for piece in pieces)
    return Plan(tuple(parameters), slices, num_groups)


def _shares(loads: Sequence[int], remaining: int) -> list[int]:
    """How much more each shard takes, so that the fullest ends as empty as it can: water finds its level."""
    order = sorted(range(len(loads)), key=lambda shard: loads[shard])
    shares = [0] * len(loads)
    for num in range(1, len(order) + 1):
        low = order[:num]
        total = sum(loads[shard] for shard in low) + remaining
        if num == len(order) or total <= num * loads[order[num]]:
            for position, shard in enumerate(low):
                target = total * (position + 1) // num - total * position // num
                shares[shard] = target - loads[shard]
            break
    return shares


def _lay_out(
    parameters: Sequence[ParameterInfo],
    elementwise: Sequence[bool],
    pieces: Sequence[tuple[int, int, int]],
    code_size: CodeSize,
) -> Slice:
    groups: list[list[tuple[int, int, int]]] = []
    filled = UNIT_ELEMENTS
    for index, start, stop in pieces:
        optimizer = parameters[index].optimizer
        step = UNIT_ELEMENTS if elementwise[optimizer] else max(stop - start, 1)
        for first in range(start, max(stop, start + 1), step):
            last = min(first + step, stop)
            same = bool(groups) and parameters[groups[-1][0][0]].optimizer == optimizer
            if same and (not elementwise[optimizer] or filled + last - first <= UNIT_ELEMENTS):
                groups[-1].append((index, first, last))
            else:
                groups.append([(index, first, last)])
                filled = 0
            filled += last - first
    flags_offset = CONTROL_BYTES
    num_units = sum(len(group) for group in groups)
    offset = flags_offset + aligned(num_units)
    fetch_offset = code_offset = unit_index = 0
    batches = []
    for group in groups:
        begin, fetch_begin = offset, fetch_offset
        weight_offsets = []
        for index, first, last in group:
            weight_offsets.append(offset)
            offset += aligned((last - first) * parameters[index].dtype.itemsize)
        num_weight_bytes = offset - begin
        fetch_offset += num_weight_bytes
        units = []
        for weight_offset, (index, first, last) in zip(weight_offsets, group, strict=True):
            info = parameters[index]
            state_offsets = []
            for entry in info.state:
                state_offsets.append(offset)
                offset += aligned(entry.num_elements(last - first) * entry.dtype.itemsize)
            num_code_bytes = code_size(last - first, info.dtype)
            fetch = fetch_begin + weight_offset - begin
            units.append(
                Unit(
                    index, first, last, info, unit_index, weight_offset, tuple(state_offsets), fetch,
                    code_offset, num_code_bytes,
                )
            )  # fmt: skip
            code_offset += aligned(num_code_bytes)
            unit_index += 1
        optimizer = parameters[group[0][0]].optimizer
        batches.append(Batch(tuple(units), optimizer, begin, offset - begin, num_weight_bytes, fetch_begin))
    journal = max((batch.num_bytes for batch in batches), default=0)
    journal_flags = max((len(batch.units) for batch in batches), default=0)
    num_bytes = offset + aligned(journal) + aligned(journal_flags) + CONTROL_BYTES
    return Slice(tuple(batches), flags_offset, offset, num_bytes, fetch_offset, code_offset)
