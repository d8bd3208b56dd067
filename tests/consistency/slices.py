"""Slices of a few parameters, as a run makes them: planned, filled, pushed to and read back, without processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from squall.consistency import plan as plans
from squall.consistency import snapshot
from squall.consistency.memory import Segment
from squall.consistency.optimizers import carry, carry_groups, hyperparameters, try_state, unpack, unpack_groups
from squall.consistency.packing import Encoder
from squall.consistency.plan import ParameterInfo, Plan, StateEntry, Unit, make_plan
from squall.consistency.rows import Rows
from squall.consistency.staleness import MEAN_SQUARE, StalenessRule
from squall.consistency.updates import SliceMemory, Updater

SHAPES = [(7, 5), (1,), (13,), (4, 3, 2), (3,)]
UNIT = 16  # elements: so few, that these parameters make several units, batches and shards

MakeOptimizers = Callable[[list[nn.Parameter]], list[Optimizer]]
Decode = Callable[[Unit, Tensor, Tensor], Tensor]


def as_it_is(unit: Unit, code: Tensor, scratch: Tensor) -> Tensor:
    return code.view(unit.info.dtype)


def make_parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_pushes(count: int, absent: dict[int, list[int]] | None = None) -> list[list[Tensor | None]]:
    """Gradients of each parameter in each push; None where ``absent`` says so."""
    generator = torch.Generator().manual_seed(2)
    return [
        [
            None if index in (absent or {}).get(number, ()) else gradient
            for index, gradient in enumerate(
                [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
            )
        ]
        for number in range(count)
    ]


class Slices:
    """What the shards of a run hold between them.

    Args:
        make: Makes the optimizers of the parameters.
        elementwise: Whether each of them may be cut.
        num_shards: Number of shards.
        rule: What to do about staleness.
        fused: Decode and step in one pass, in single precision.

    """

    def __init__(
        self,
        make: MakeOptimizers,
        elementwise: Sequence[bool],
        num_shards: int,
        rule: StalenessRule,
        fused: bool = False,
    ) -> None:
        self.fused = fused
        self.parameters = make_parameters(dtype=torch.float32 if fused else torch.float64)
        self.optimizers = make(self.parameters)
        self.rule = rule
        self.parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        infos = []
        for index, optimizer in enumerate(self.optimizers):
            for number, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    shape = (5,) if elementwise[index] else tuple(parameter.shape)
                    entries = try_state(optimizer, group, shape, parameter.dtype)
                    if rule.compensates:
                        entries.append(StateEntry(MEAN_SQUARE, "like", (), parameter.dtype))
                    infos.append(ParameterInfo(tuple(parameter.shape), parameter.dtype, index, number, tuple(entries)))
        with mock.patch.object(plans, "UNIT_ELEMENTS", UNIT):
            self.plan: Plan = make_plan(infos, elementwise, num_shards, lambda n, dtype: n * dtype.itemsize)
        self.names = [f"squall-{os.getpid()}-test-{os.urandom(4).hex()}" for _ in self.plan.slices]
        self.segments = [
            Segment(name, slice_.num_bytes) for name, slice_ in zip(self.names, self.plan.slices, strict=True)
        ]
        snapshot.fill(self.memories(), Rows(self.parameters), self.optimizers)
        self._encoder = Encoder("fp32", self.plan)

    def memories(self) -> list[SliceMemory]:
        return [SliceMemory(segment, slice_) for segment, slice_ in zip(self.segments, self.plan.slices, strict=True)]

    def updater(self, shard: int, decode: Decode = as_it_is) -> Updater:
        """What a new process makes of a shard's memory."""
        return Updater(
            SliceMemory(Segment(self.names[shard]), self.plan.slices[shard]),
            [unpack(carry(optimizer)) for optimizer in self.optimizers],
            unpack_groups(carry_groups(self.optimizers)),
            self.rule,
            decode,
            "fp32" if self.fused else None,
        )

    def updaters(self) -> list[Updater]:
        return [self.updater(shard) for shard in range(len(self.names))]

    def code(self, shard: int, gradients: Sequence[Tensor | None]) -> Tensor:
        """A push to one shard."""
        slice_ = self.plan.slices[shard]
        codes = torch.full((slice_.num_code_bytes,), 0xFF, dtype=torch.uint8)  # where nothing is written there is NaN
        flat = [None if gradient is None else gradient.reshape(-1) for gradient in gradients]
        self._encoder.encode_for(shard, flat, codes)
        return codes

    def push(
        self,
        updaters: Sequence[Updater],
        command: int,
        gradients: Sequence[Tensor | None],
        staleness: int = 0,
        bases: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Apply a push on all shards; the weights that each hands out after it."""
        fetched = []
        for shard, updater in enumerate(updaters):
            fetch = torch.zeros(self.plan.slices[shard].num_fetch_bytes, dtype=torch.uint8)
            absent = {index for index, gradient in enumerate(gradients) if gradient is None}
            base = bases[shard] if bases is not None else None
            updater.apply(command, self.code(shard, gradients), absent, staleness, base, fetch)
            fetched.append(fetch)
        return fetched

    def weights(self) -> list[Tensor]:
        """All weights, as the memory has them."""
        whole = [torch.full(info.shape, torch.nan, dtype=info.dtype) for info in self.plan.parameters]
        for memory in self.memories():
            for unit in memory.slice.units:
                whole[unit.parameter].view(-1)[unit.start : unit.stop] = memory.weights(unit)
        return whole

    def fetched_weights(self, fetched: Sequence[Tensor]) -> list[Tensor]:
        """All weights, as the shards handed them out."""
        whole = [torch.full(info.shape, torch.nan, dtype=info.dtype) for info in self.plan.parameters]
        for bytes_, slice_ in zip(fetched, self.plan.slices, strict=True):
            for unit in slice_.units:
                end = unit.fetch_offset + unit.num_elements * unit.info.dtype.itemsize
                piece = bytes_[unit.fetch_offset : end].view(unit.info.dtype)
                whole[unit.parameter].view(-1)[unit.start : unit.stop] = piece
        return whole

    def image(self, shard: int) -> bytes:
        """Everything in a shard's memory that outlives a command: weights, states, flags and progress."""
        segment, slice_ = self.segments[shard], self.plan.slices[shard]
        whole = segment.tensor(torch.uint8, 0, slice_.journal_offset).clone()
        whole[8:16] = 0  # what the journal is of
        return bytes(whole.numpy().tobytes())

    def adopt(self, updaters: Sequence[Updater]) -> None:
        """Tell the shards what has changed in the param groups."""
        for updater in updaters:
            updater.adopt([hyperparameters(optimizer) for optimizer in self.optimizers])


@contextmanager
def sliced(
    make: MakeOptimizers,
    elementwise: Sequence[bool] = (True,),
    num_shards: int = 1,
    rule: StalenessRule | None = None,
    fused: bool = False,
) -> Iterator[Slices]:
    """Slices whose memory goes when the test does."""
    slices: Any = Slices(make, elementwise, num_shards, rule or StalenessRule(), fused)
    try:
        yield slices
    finally:
        for name in slices.names:
            Segment.unlink(name)
