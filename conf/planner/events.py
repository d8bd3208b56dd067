"""What one rank does in a training step, as data: operations, messages, and what waits for what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["forward", "backward", "update"]
Kind = Literal["gemm", "conv", "memory"]
Collective = Literal["pair", "all_reduce", "all_gather", "broadcast"]


@dataclass(frozen=True)
class Operation:
    """One call of a torch operator.

    Args:
        key: Its name and arguments as JSON, with shapes for tensors: two calls that take equally long have one key.
        kind: What bounds it: matrix products, convolutions, or memory.
        flops: Floating point operations; a multiply-add is two.
        num_bytes: Bytes that it reads and writes, each tensor once.

    """

    key: str
    kind: Kind
    flops: int
    num_bytes: int

    @property
    def name(self) -> str:
        """The operator's name, such as ``aten.convolution.default``."""
        return str(json.loads(self.key)[0])


@dataclass(frozen=True)
class Compute:
    """An operation.

    Args:
        operation: Which.
        layer: Name of the layer that it is done for.
        phase: Forward, backward or update.

    """

    operation: Operation
    layer: str
    phase: Phase


@dataclass(frozen=True)
class Send:
    """The start of a message, which travels while what follows computes.

    Args:
        number: By which a :class:`Wait` names it.
        collective: What kind of message: ``num_bytes`` are those that a rank sends or receives, whichever is more, of a
            ``"pair"``; of other collectives the size of the tensor.
        num_bytes: See there.
        num_ranks: Ranks that take part.
        layer: Name of the layer that it is sent for.
        phase: Forward, backward or update.
        spans: Ranks from one of the group's to the next, 1 for neighbours.
        num_messages: That a rank sends or receives, of a ``"pair"``: one a rank that it deals with.
        alone: Whether one rank at a time sends or receives all of it, of a ``"pair"``.

    """

    number: int
    collective: Collective
    num_bytes: int
    num_ranks: int
    layer: str
    phase: Phase
    spans: int = 1
    num_messages: int = 1
    alone: bool = False


@dataclass(frozen=True)
class Wait:
    """Nothing goes on before a message has arrived.

    Args:
        number: Of the :class:`Send`.

    """

    number: int


@dataclass(frozen=True)
class Ready:
    """The gradient of a parameter is complete.

    Args:
        num_bytes: Its size.
        layer: Name of the layer.

    """

    num_bytes: int
    layer: str


Event = Compute | Send | Wait | Ready


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the fullest moment of a step.

    Args:
        weights: Of parameters and of buffers.
        gradients: Of gradients.
        optimizer: Of the optimizer's state.
        activations: What the forward pass leaves for the backward pass.
        messages: What is on its way.

    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.messages


@dataclass(frozen=True)
class Trace:
    """One rank's step.

    Args:
        events: In the order in which the rank comes to them.
        memory: What it holds.
        num_examples: Of this rank in a step.

    """

    events: tuple[Event, ...]
    memory: Memory
    num_examples: int

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    @property
    def operations(self) -> list[Operation]:
        """Every operation, each key once."""
        found = {event.operation.key: event.operation for event in self.events if isinstance(event, Compute)}
        return list(found.values())

    @property
    def num_computed(self) -> int:
        """How many operations there are."""
        return sum(isinstance(event, Compute) for event in self.events)

    @property
    def num_messages(self) -> int:
        """How many messages there are."""
        return sum(isinstance(event, Send) for event in self.events)

    def sent(self) -> int:
        """Bytes that the rank sends: of an all-reduce in a ring, twice the tensor but for its own part."""
        total = 0.0
        for event in self.events:
            if isinstance(event, Send):
                share = (event.num_ranks - 1) / event.num_ranks
                times = {"pair": 1.0, "all_reduce": 2 * share, "all_gather": share, "broadcast": share}
                total += times[event.collective] * event.num_bytes
        return round(total)

    def with_events(self, events: Sequence[Event]) -> Trace:
        """The same with other events."""
        return replace(self, events=tuple(events))
