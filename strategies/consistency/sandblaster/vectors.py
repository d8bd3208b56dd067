"""Vectors in a shard's memory: the same slice of each, made of one another where they lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..journal import Journal
from ..memory import Segment
from ..plan import ParameterInfo, Plan, StateEntry, Unit
from ..shard import PartName, Shard
from ..updates import SliceMemory
from .lbfgs import LbfgsOptions, Point
from .operations import DOT, LARGEST, larger


@dataclass(frozen=True)
class VectorSpec:
    """What the shards of a Sandblaster run are made from.

    Args:
        plan: All slices, of :func:`with_vectors`.
        options: Of the optimizer.
        point: Where it is to go on; None to begin.
        evaluation: Number of its first evaluation: the epoch that training begins with.
        num_restarts: How many coordinators of this run have been lost.
        codec: How gradients are coded.
        num_buffers: Fetch buffers of a worker.

    """

    plan: Plan
    options: LbfgsOptions
    point: Point | None = None
    evaluation: int = 0
    num_restarts: int = 0
    codec: str = "fp32"
    num_buffers: int = 2

    def make_shard(self, index: int, segment: Segment, part: PartName) -> Shard:
        """The shard of a number."""
        return VectorShard(index, segment, self, part)


def with_vectors(info: ParameterInfo, num_vectors: int) -> ParameterInfo:
    """What the shards have to know of a parameter that so many vectors are kept for besides its weights."""
    state = tuple(StateEntry(f"vector {slot}", "like", (), info.dtype) for slot in range(1, num_vectors + 1))
    return ParameterInfo(info.shape, info.dtype, info.optimizer, info.group, state)


def vectors_of(memory: SliceMemory, unit: Unit) -> list[Tensor]:
    """A unit's part of all vectors, flat, by their slots."""
    return [memory.weights(unit), *memory.state(unit)]


class VectorShard(Shard):
    """A shard that adds gradients up, combines vectors, and says what their products are.

    Args:
        index: Which slice it owns.
        segment: The slice's memory.
        spec: Of all shards.
        part: Name of the shared memory that is its group's part of a mailbox of a name.

    """

    def __init__(self, index: int, segment: Segment, spec: VectorSpec, part: PartName) -> None:
        super().__init__(index, spec, part)
        memory = SliceMemory(segment, self.slice)
        self._units = [_UnitVectors(memory, unit) for unit in self.slice.units]
        self._batches = [[self._units[unit.index] for unit in batch.units] for batch in self.slice.batches]
        self._journal = Journal(memory)
        self._journal.recover(lambda index, slot: [vectors.bytes(slot) for vectors in self._batches[index]])

    @property
    def last_command(self) -> int:
        """The last command that was carried out."""
        return self._journal.last_command

    def act(self, command: dict[str, Any]) -> Sequence[float] | None:
        """Carry one command out.

        Returns:
            The numbers that it asks for.

        """
        number, operation = int(command["c"]), command["op"]
        if operation == "add":
            code = self.code(command["mailbox"], command["slot"])
            self._add(number, code, command["into"], set(command["absent"]))
        elif operation == "combine":
            return self._combine(command["out"], command["terms"], command["reductions"])
        elif operation == "fetch":
            self._hand_out(self.buffer(command["mailbox"], command["fetch"]), command["vector"])
        return None

    def finish(self, command: int) -> None:
        """Note that a command has been carried out."""
        self._journal.finish(command)

    def _add(self, number: int, code: Tensor, into: int, absent: Collection[int]) -> None:
        """Add a gradient. Batch after batch is noted down first: what was added must not be added again."""
        for index in range(self._journal.next_batch, len(self._batches)):
            units = self._batches[index]
            self._journal.note_down(index, [vectors.bytes(into) for vectors in units], into)
            for vectors in units:
                unit = vectors.unit
                if unit.parameter not in absent:
                    scratch = torch.empty(unit.num_elements, dtype=unit.info.dtype)
                    vectors[into].add_(self.decode(unit, unit.code_in(code), scratch))
            self._journal.advance(number, index)
        self._journal.finish(number)  # or the next addition would find all its batches seen

    def _combine(
        self, out: int | None, terms: Sequence[tuple[float, int]], reductions: Sequence[tuple[str, int, int]]
    ) -> list[float]:
        numbers = [0.0] * len(reductions)
        for vectors in self._units:  # each fits the cache: what is made is read from there
            if out is not None:
                made = vectors[out]
                if not terms:
                    made.zero_()
                for position, (factor, slot) in enumerate(terms):
                    if position:
                        made.add_(vectors[slot], alpha=factor)
                    else:
                        torch.mul(vectors[slot], factor, out=made)
            for position, (kind, first, second) in enumerate(reductions):
                value = _reduced(kind, vectors[first], vectors[second])
                numbers[position] = larger(numbers[position], value) if kind == LARGEST else numbers[position] + value
        return numbers

    def _hand_out(self, fetch: Tensor, slot: int) -> None:
        for vectors in self._units:
            vectors.unit.weights_in(fetch).copy_(vectors[slot])


class _UnitVectors:
    """All vectors of a unit, found once."""

    def __init__(self, memory: SliceMemory, unit: Unit) -> None:
        self.unit = unit
        self._vectors = vectors_of(memory, unit)

    def __getitem__(self, slot: int) -> Tensor:
        return self._vectors[slot]

    def bytes(self, slot: int) -> Tensor:
        """A vector as bytes."""
        return self._vectors[slot].view(torch.uint8)


def _reduced(kind: str, first: Tensor, second: Tensor) -> float:
    if not len(first):
        return 0.0
    if kind == DOT:
        return float(first.double().dot(second.double()))
    if kind == LARGEST:
        return float(first.abs().max())
    return float(first.abs().sum(dtype=torch.float64))
