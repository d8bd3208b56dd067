"""A worker's mailboxes: pushes on their way to shards, and weights on their way back.

There is one for each group of shards. On the group's own host it is shared memory, and nothing is carried at all. To
any other host the bytes of a push are carried before it is committed, and weights are brought when they are ready, by
a *porter* there (:mod:`squall.consistency.porter`), which keeps the mailbox's twin in its host's shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .deltas import Deltas
from .hosting import keep_private
from .memory import aligned, host_prefix, make_or_attach
from .plan import Plan, Slice
from .wire import MAX_CARRIED_BYTES, MAX_PAYLOAD_BYTES, Header, connect

NUM_SLOTS = 2


class HostLostError(ConnectionError):
    """A host with shards can't be reached. The worker may join again, when its shards are somewhere else."""


@dataclass(frozen=True)
class Place:
    """Where a group of shards is.

    Args:
        node: Rank of the host.
        host: Its address; empty on one host alone.
        port: Where it listens.

    """

    node: int
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class MailboxLayout:
    """Where everything lies in the mailbox of a group, in bytes. All shards' parts of a slot or buffer are neighbours.

    Args:
        shards: Numbers of the shards.
        slots: For each slot, where each shard's code begins, and where the last one ends.
        buffers: For each fetch buffer, where each shard's weights begin, and where the last ones end.
        num_bytes: Of all.

    """

    shards: range
    slots: tuple[tuple[int, ...], ...]
    buffers: tuple[tuple[int, ...], ...]
    num_bytes: int


def lay_out_mailbox(plan: Plan, group: int, num_slots: int, num_buffers: int) -> MailboxLayout:
    """Lay out the mailbox of a group of shards."""
    shards, offset = plan.group(group), 64

    def lay_out(sizes: Sequence[int]) -> tuple[int, ...]:
        nonlocal offset
        places = [offset]
        for size in sizes:
            offset += aligned(size)
            places.append(offset)
        return tuple(places)

    codes = [plan.slices[shard].num_code_bytes for shard in shards]
    weights = [plan.slices[shard].num_fetch_bytes for shard in shards]
    slots = tuple(lay_out(codes) for _ in range(num_slots))
    buffers = tuple(lay_out(weights) for _ in range(num_buffers))
    return MailboxLayout(shards, slots, buffers, offset)


def part_name(mailbox: str, run: str, node: int, group: int) -> str:
    """The name of the shared memory that is a group's part of a mailbox, on the host where the group is."""
    return mailbox.replace(run, host_prefix(run, node), 1) + (f".g{group}" if group else "")


class LocalMailbox:
    """A mailbox for shards of the same host.

    Args:
        plan: All slices.
        layout: Of the mailbox.
        name: Of its memory.

    """

    num_bytes_sent = num_bytes_received = 0  # over a wire

    def __init__(self, plan: Plan, layout: MailboxLayout, name: str) -> None:
        self._slices = [plan.slices[shard] for shard in layout.shards]
        self._layout = layout
        self._segment = make_or_attach(name, layout.num_bytes)

    def codes(self, slot: int) -> list[Tensor]:
        """Where the code of a push to each shard is written."""
        starts = self._layout.slots[slot]
        return [self.part(start, s.num_code_bytes) for start, s in zip(starts, self._slices, strict=False)]

    def weights(self, buffer: int) -> list[Tensor]:
        """Where weights of each shard are read."""
        starts = self._layout.buffers[buffer]
        return [self.part(start, s.num_fetch_bytes) for start, s in zip(starts, self._slices, strict=False)]

    def part(self, start: int, count: int) -> Tensor:
        """Some of its bytes."""
        return self._segment.tensor(torch.uint8, start, count)

    def send(self, slot: int) -> None:
        """Have a push lie with the shards."""

    def receive(self, buffer: int, exact: bool = False) -> None:
        """Have weights lie here that the shards have written."""

    def edits(self, buffer: int) -> list[Tensor]:
        """Where edited weights for each shard are written."""
        return self.weights(buffer)

    def send_edits(self, buffer: int) -> None:
        """Have edited weights lie with the shards."""

    def close(self) -> None:
        """Let go of it."""


class RemoteMailbox:
    """A mailbox for shards of another host.

    Args:
        plan: All slices.
        layout: Of the mailbox.
        name: Of the mailbox of which this is a part.
        place: Where the shards are.
        token: The job's.
        number: Of the run.
        group: Number of the group.
        codec: How pushes and what has changed in the weights are coded.

    Raises:
        HostLostError: If the host can't be reached.

    """

    def __init__(
        self,
        plan: Plan,
        layout: MailboxLayout,
        name: str,
        place: Place,
        token: bytes,
        number: int,
        group: int,
        codec: str,
    ) -> None:
        self.num_bytes_sent = self.num_bytes_received = 0
        self._layout = layout
        self._slices: list[Slice] = [plan.slices[shard] for shard in layout.shards]
        begin, end = layout.slots[0][0], layout.slots[-1][-1]
        self._codes = torch.zeros(end - begin, dtype=torch.uint8)
        # Weights are looked at as soon as they are here, so one buffer is enough: what the shards know to be here.
        self._weights = [torch.zeros(s.num_fetch_bytes, dtype=torch.uint8) for s in self._slices]
        self._edits: list[Tensor] = []
        self._deltas = None if codec == "fp32" else Deltas(self._slices, codec, self._weights)
        self._incoming = torch.empty(0 if self._deltas is None else self._deltas.num_bytes, dtype=torch.uint8)
        try:
            self._line = keep_private(connect((place.host, place.port), token))
        except OSError as error:
            raise HostLostError(f"host {place.node} at {place.host}:{place.port} can't be reached: {error}") from error
        self._ask({"op": "carry", "run": number, "mailbox": name, "group": group})

    def codes(self, slot: int) -> list[Tensor]:
        """Where the code of a push to each shard is written."""
        begin = self._layout.slots[0][0]
        starts = self._layout.slots[slot]
        return [
            self._codes[start - begin : start - begin + s.num_code_bytes]
            for start, s in zip(starts, self._slices, strict=False)
        ]

    def weights(self, buffer: int) -> list[Tensor]:
        """Where weights of each shard are read."""
        return self._weights

    def send(self, slot: int) -> None:
        """Have a push lie with the shards."""
        begin = self._layout.slots[0][0]
        start, end = self._layout.slots[slot][0], self._layout.slots[slot][-1]
        payload = self._codes[start - begin : end - begin]
        self._ask({"op": "put", "at": start}, payload)
        self.num_bytes_sent += payload.numel()

    def receive(self, buffer: int, exact: bool = False) -> None:
        """Have weights lie here that the shards have written.

        Args:
            buffer: Where.
            exact: To the last bit, whatever the codec.

        """
        try:
            self._line.send({"op": "weights", "buffer": buffer, "exact": exact})
            reply, num_bytes = self._line.receive_header()
            coded = bool(reply["coded"]) and self._deltas is not None
            parts = [self._incoming] if coded else self._weights
            for part in parts:
                self._line.receive_into(part.numpy().data)
        except OSError as error:
            raise HostLostError(f"a host with shards was lost: {error}") from error
        self.num_bytes_received += num_bytes
        if coded and self._deltas is not None:
            self._deltas.add(self._incoming)

    def edits(self, buffer: int) -> list[Tensor]:
        """Where edited weights for each shard are written."""
        self._edits = self._edits or [torch.empty_like(weights) for weights in self._weights]
        return self._edits

    def send_edits(self, buffer: int) -> None:
        """Have edited weights lie with the shards."""
        for start, edits in zip(self._layout.buffers[buffer], self._edits, strict=False):
            self._ask({"op": "put", "at": start}, edits)
            self.num_bytes_sent += edits.numel()

    def read(self, shard: int, ranges: Sequence[tuple[int, int]]) -> bytearray:
        """Read from a shard's memory, for a checkpoint.

        Args:
            shard: Its number.
            ranges: Where each piece begins, and its length, in bytes.

        """
        num_bytes = sum(length for _, length in ranges)
        return self._ask({"op": "read", "shard": shard, "ranges": list(ranges)}, most=num_bytes)[1]

    def owed(self) -> Tensor:
        """What the codes of all workers of that host have lost, and have not made up for."""
        return torch.frombuffer(self._ask({"op": "owed"}, most=MAX_CARRIED_BYTES)[1], dtype=torch.float32)

    def _ask(
        self, header: Header, payload: Tensor | None = None, most: int = MAX_PAYLOAD_BYTES
    ) -> tuple[Header, bytearray]:
        try:
            self._line.send(header, b"" if payload is None else payload.numpy().data)
            reply, data = self._line.receive(most)
            self.num_bytes_received += len(data)
            return reply, data
        except OSError as error:
            raise HostLostError(f"a host with shards was lost: {error}") from error

    def close(self) -> None:
        """Hang up."""
        self._line.close()


Mailbox = LocalMailbox | RemoteMailbox


def open_mailboxes(
    plan: Plan, num_buffers: int, name: str, run: str, places: Sequence[Place], node: int, **remote: Any
) -> list[Mailbox]:
    """Open the mailbox of each group.

    Args:
        plan: All slices.
        num_buffers: Fetch buffers of each.
        name: Of the whole.
        run: Name of the run.
        places: Where each group is.
        node: Where the worker is.
        remote: Passed on to :class:`RemoteMailbox`.

    Raises:
        HostLostError: If a host can't be reached.

    """
    opened: list[Mailbox] = []
    try:
        for group, place in enumerate(places):
            layout = lay_out_mailbox(plan, group, NUM_SLOTS, num_buffers)
            if place.node == node:
                opened.append(LocalMailbox(plan, layout, part_name(name, run, node, group)))
            else:
                opened.append(RemoteMailbox(plan, layout, name, place, group=group, **remote))
    except BaseException:
        for mailbox in opened:
            mailbox.close()
        raise
    return opened
