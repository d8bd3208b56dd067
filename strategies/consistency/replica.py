"""A worker's side of the weights: what it pushes, what it fetches, and which version it computes with."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .client import Client, RevokedError
from .courier import Courier
from .mailbox import NUM_SLOTS, HostLostError, Mailbox, Place, RemoteMailbox, open_mailboxes, part_name
from .memory import host_prefix, make_or_attach
from .optimizers import Hyperparameters
from .packing import (
    RESIDUALS,
    Encoder,
    Part,
    Piece,
    Sums,
    cut_pieces,
    find_pieces,
    num_residuals,
    sum_residuals,
)
from .plan import Plan
from .queue import Ticket
from .rows import Rows
from .watching import EditWatch
from .wire import Header

_MOVE_SECONDS = 0.2  # between two looks for where a lost host's shards have gone


@dataclass
class PushResult:
    """What became of a push.

    Args:
        applied: Whether it was given a place in the order of updates.
        version: The version that it made, or that the run has stopped at.
        staleness: Number of updates that it had missed.
        reason: Why it was not applied.

    """

    applied: bool
    version: int
    staleness: int = 0
    reason: str = ""


class Replica:
    """The parameters of a worker, kept close to the shards'.

    Args:
        client: The worker's line to the coordinator.
        plan: All slices.
        parameters: The worker's own, in the plan's order.
        name: Of the run; mailboxes are named after it.
        num_buffers: Fetch buffers: two, or three if a rule looks at the weights that a push was computed from.
        codec: How pushes, and changes of weights for workers of other hosts, are coded.
        node: Rank of the worker's host.
        patience: Seconds in which a lost host's shards must be somewhere else.
        part: What this rank holds, if it is one of several that hold a replica between them; they call all methods
            together, and ``parameters`` are its own parts, flat or not.
        owners: Parameters whose ``data`` are ``parameters``, if these are not parameters themselves.
        live: By number of a parameter, where its mask lets live: what else it has, shards don't know.

    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        parameters: Sequence[Tensor],
        name: str,
        num_buffers: int = 2,
        codec: str = "fp32",
        node: int = 0,
        patience: float = 120.0,
        part: Part | None = None,
        owners: Sequence[nn.Parameter] | None = None,
        live: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.client = client
        self.plan = plan
        self.parameters = list(parameters)
        self._rows = Rows(parameters, live)
        self.version = 0  # the latest version heard of
        self.base = 0  # the version that the weights come from
        self.serial = -1  # the evaluation that the weights are for, in an optimization over whole batches
        self.hyper: list[Hyperparameters] | None = None
        self.hyper_version = 0
        self.num_bytes_pushed = 0
        self.num_bytes_fetched = 0
        self._name = name
        self._num_buffers = num_buffers
        self._codec = codec
        self._node = node
        self._patience = patience
        pieces = find_pieces(plan, lambda unit: unit.fetch_offset)
        held, pushed = (None, None) if part is None else (part.held, part.pushed)
        self._fetch_pieces = cut_pieces(plan, pieces, held)
        self._edit_pieces = cut_pieces(plan, pieces, pushed)
        self._encoder = Encoder(codec, plan, pushed)
        self._num_code_bytes = sum(slice_.num_code_bytes for slice_ in plan.slices)
        if part is not None:  # which is not coded
            itemsizes = (plan.parameters[piece.parameter].dtype.itemsize for piece in self._edit_pieces)
            self._num_code_bytes = sum(
                (p.stop - p.start) * s for p, s in zip(self._edit_pieces, itemsizes, strict=True)
            )
        self._mailboxes: list[Mailbox] = []
        self.lost: list[Ticket] = []  # of pushes that were not applied, since shards had moved
        self._num_joins = 0
        self._courier = Courier()
        self._carried_before = (0, 0)
        self._watch = EditWatch(parameters, owners)
        self._owners = owners
        self._kept: list[Tensor] = []
        self._expected: list[Tensor] | None = None  # what unedited weights are, if not what was fetched last
        self._pending: deque[tuple[int, int, int]] = deque()  # sequence, buffer and version of fetches under way

    # ------------------------------------------------------------------ coming and going

    def join(self) -> None:
        """Enter the run, or enter again after shards have moved, and compute with its present weights.

        Raises:
            HostLostError: If a lost host's shards are nowhere else in time.

        """
        self.forget_courier()
        deadline, waits = time.monotonic() + self._patience, False
        while True:
            try:
                self._join()
                self._watch.begin()
                return
            except HostLostError as error:
                if time.monotonic() > deadline:
                    raise
                if not waits:
                    sys.stderr.write(f"squall: rank {self.client.rank} looks for its shards again: {error}\n")
                waits = True
                time.sleep(_MOVE_SECONDS)

    def _join(self) -> None:
        self.close()
        places = [Place(0)]
        if self.plan.num_groups > 1:
            said, _ = self.client.call({"op": "places"})
            here = self.client.address
            places = [Place(p["node"], p.get("host", here.host), p.get("port", here.port)) for p in said["places"]]
        again = f".{self._num_joins}" if self._num_joins else ""
        name = f"{self._name}-w{self.client.rank}.{self.client.generation}{again}"
        self._places = places
        self._mailboxes = self.client.in_turn(lambda: open_mailboxes(
            self.plan, self._num_buffers, name, self._name, places, self._node,
            token=self.client.address.token, number=self.client.run, codec=self._codec,
        ))  # fmt: skip
        if self._encoder.has_residuals:
            of_residuals = part_name(name, self._name, self._node, 0) + RESIDUALS
            memory = make_or_attach(of_residuals, 4 * num_residuals(self.plan))
            self._encoder.keep_in(memory.tensor(torch.float32, 0, num_residuals(self.plan)))
        reply, _ = self.client.call({"op": "join", "mailbox": name})
        self._num_joins += 1
        self._slots = [[code for mailbox in self._mailboxes for code in mailbox.codes(n)] for n in range(NUM_SLOTS)]
        self._buffers = [
            [weights for mailbox in self._mailboxes for weights in mailbox.weights(n)] for n in range(self._num_buffers)
        ]
        self.version = int(reply["version"])
        self._last_use = [0] * NUM_SLOTS
        self._slot = 0
        self._buffer = 0
        self._base_buffer = 0
        self.fetch()

    @property
    def num_bytes_carried(self) -> tuple[int, int]:
        """Bytes sent to other hosts, and received from them."""
        sent, received = self._carried_before
        sent += sum(mailbox.num_bytes_sent for mailbox in self._mailboxes)
        received += sum(mailbox.num_bytes_received for mailbox in self._mailboxes)
        return sent, received

    def close(self) -> None:
        """Let go of the mailboxes, and of the parameters."""
        self._watch.end()
        self._carried_before = self.num_bytes_carried
        for mailbox in self._mailboxes:
            mailbox.close()
        self._mailboxes = []

    def prefix(self, group: int) -> str:
        """What names of shared memory begin with where a group of shards of this host is."""
        return host_prefix(self._name, self._places[group].node)

    def owe(self, rows: Sequence[Tensor]) -> None:
        """Let the next pushes make up for what an earlier run's codes have lost.

        Args:
            rows: Of each whole parameter, flat.

        """
        if not self._encoder.has_residuals:
            return
        shaped = [row.view(parameter.shape) for row, parameter in zip(rows, self.parameters, strict=True)]
        self._encoder.owe([self._rows.of(index, row) for index, row in enumerate(shaped)])

    def owed(self) -> tuple[Tensor, ...]:
        """What the codes of all workers of all hosts have lost, and have not made up for.

        Returns:
            Of each parameter, flat; nothing where codes lose nothing for good.

        """
        if not self._encoder.has_residuals:
            return ()
        total = sum_residuals(host_prefix(self._name, self._node), self.plan)
        nodes = {self._node}
        for place, mailbox in zip(self._places, self._mailboxes, strict=True):
            if isinstance(mailbox, RemoteMailbox) and place.node not in nodes:
                nodes.add(place.node)
                total += mailbox.owed()
        rows: tuple[Tensor, ...] = total.split([info.num_elements for info in self.plan.parameters])
        return rows

    def remote(self, shard: int) -> RemoteMailbox | None:
        """The mailbox through which a shard of another host is reached; None for one of this host."""
        mailbox = self._mailboxes[self.plan.group_of(shard)]
        return mailbox if isinstance(mailbox, RemoteMailbox) else None

    def leave(self, stop: bool) -> int | None:
        """Wait for the end of the run, and take its final weights.

        Args:
            stop: The run ends when the leader's does: the queue has nothing left.

        Returns:
            None, or the rank that takes over if the leader was lost.

        """
        self.settle()
        reply, _ = self.client.call({"op": "leave", "stop": stop})
        if reply["leader_lost"]:
            return int(reply["successor"])
        self.fetch(exact=True)
        return None

    # ------------------------------------------------------------------ fetching

    def fetch(self, exact: bool = False) -> None:
        """Compute with the weights as they are now.

        Args:
            exact: To the last bit, though shards are on other hosts and changes are coded.

        """
        self.forget_courier()
        buffer = self._next_buffer()
        reply, _ = self.client.call({"op": "fetch", "buffer": buffer})
        self._learn(reply)
        self._pending.clear()
        self._receive(buffer, exact)
        self._install(buffer, int(reply["version"]))

    def _receive(self, buffer: int, exact: bool = False) -> None:
        for mailbox in self._mailboxes:
            mailbox.receive(buffer, exact)

    def land(self, keep: int = 0) -> bool:
        """Compute with the weights that come back with pushes.

        Args:
            keep: How many of the last pushes not to wait for.

        Returns:
            Whether there were any.

        """
        landed = None
        while len(self._pending) > keep:
            landed = self._pending.popleft()
        if landed is None:
            return False
        sequence, buffer, version = landed
        self.client.wait_until_done(sequence)
        self._receive(buffer)
        self._install(buffer, version)
        return True

    # ------------------------------------------------------------------ weights that were edited

    @torch.no_grad()
    def find_edits(self, look: bool = False) -> dict[int, Tensor]:
        """What somebody but the optimizer has made of the weights: a callback, the user's own code.

        Args:
            look: Compare all weights, even if nobody seems to have edited any.

        Returns:
            Of each edited parameter, by its number: its edited elements, flat, and NaN in place of all others.

        """
        edits: dict[int, Tensor] = {}
        if not look and not self._watch.may_be_edited():
            return edits
        self._follow_owners()
        for piece in self._fetch_pieces:
            parameter = self.parameters[piece.parameter]
            here = self._rows.of(piece.parameter, parameter)[piece.start : piece.stop].cpu()
            if self._expected is None:
                before = self._fetched(piece, self._base_buffer)
            else:
                before = self._expected[piece.parameter][piece.start : piece.stop]
            if torch.equal(before, here) or not _has_nan(parameter.dtype):
                continue
            if piece.parameter not in edits:
                size = self._rows.num_elements(piece.parameter)
                edits[piece.parameter] = torch.full((size,), torch.nan, dtype=parameter.dtype)
            edits[piece.parameter][piece.start : piece.stop] = here.masked_fill(before == here, torch.nan)
        self._watch.reset()
        # A weight that has become NaN equals nothing, and was not edited for that.
        return {index: edited for index, edited in edits.items() if not bool(edited.isnan().all())}

    def _follow_owners(self) -> None:
        """Look at the memory that parameters have now: whoever sets ``data`` gives them another."""
        with torch._C.DisableTorchFunctionSubclass():
            for owner, parameter in zip(self._owners or (), self.parameters, strict=False):
                if owner is not parameter and owner.data_ptr() != parameter.data_ptr():
                    parameter.data = owner.detach().as_subclass(Tensor)

    @torch.no_grad()
    def write(self, edits: Mapping[int, Tensor]) -> None:
        """Put edited elements in place of the shards' own, and go on with them.

        Args:
            edits: As :meth:`find_edits` gave them.

        Raises:
            HostLostError: If shards have moved.

        """
        result = self.collect(wait=True)
        if result is not None and not result.applied:
            self.fetch()
        self.settle()
        self.land()
        for index, edited in edits.items():
            parameter = self.parameters[index]
            mine, row = edited.to(parameter.device), self._rows.of(index, parameter)
            parameter.data.copy_(self._rows.whole(index, torch.where(mine.isnan(), row, mine)))
        buffer = self._next_buffer()
        parts = [part for mailbox in self._mailboxes for part in mailbox.edits(buffer)]
        for piece in self._edit_pieces:
            there = piece.of(parts[piece.shard], self.parameters[piece.parameter].dtype)
            if piece.parameter not in edits:
                there.fill_(torch.nan if _has_nan(there.dtype) else 0)
                continue
            there.copy_(edits[piece.parameter][piece.start : piece.stop])
            if self._num_buffers > 2 and self.remote(piece.shard) is None:  # a rule looks at what this computes with
                base = self._fetched(piece, self._base_buffer)
                base.copy_(torch.where(there.isnan(), base, there))
        for mailbox in self._mailboxes:
            mailbox.send_edits(buffer)
        reply, _ = self.client.call({"op": "write", "buffer": buffer})
        self._learn(reply)
        self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Take the weights as they are for unedited, though they are not what was fetched last, or it may be lost."""
        for index, kept in enumerate(self._to_keep()):
            kept.copy_(self._rows.of(index, self.parameters[index]))
        self._take_for_unedited(self._kept)

    def _to_keep(self) -> list[Tensor]:
        if not self._kept:
            sizes = map(self._rows.num_elements, range(len(self.parameters)))
            self._kept = [torch.empty(size, dtype=p.dtype) for size, p in zip(sizes, self.parameters, strict=True)]
        return self._kept

    def _take_for_unedited(self, weights: list[Tensor] | None) -> None:
        """The parameters hold these, or what was fetched last."""
        self._expected = weights
        self._watch.reset()

    @torch.no_grad()
    def compute_with(self, weights: Sequence[Tensor], version: int) -> None:
        """Compute with weights that were not fetched.

        Args:
            weights: Of each parameter.
            version: Theirs.

        """
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.data.copy_(weight)
        self._take_for_unedited([self._rows.of(index, weight) for index, weight in enumerate(weights)])
        self.base = version

    def _fetched(self, piece: Piece, buffer: int) -> Tensor:
        return piece.of(self._buffers[buffer][piece.shard], self.parameters[piece.parameter].dtype)

    def _next_buffer(self) -> int:
        self._buffer = (self._buffer + 1) % self._num_buffers
        if self._num_buffers > 2 and self._buffer == self._base_buffer:  # a rule looks at it until the next landing
            self._buffer = (self._buffer + 1) % self._num_buffers
        return self._buffer

    @torch.no_grad()
    def _install(self, buffer: int, version: int) -> None:
        scattered: dict[int, Tensor] = {}
        for piece in self._fetch_pieces:
            parameter = self.parameters[piece.parameter]
            source = self._fetched(piece, buffer)
            self.num_bytes_fetched += source.nbytes
            if parameter.is_contiguous() and self._rows.is_whole(piece.parameter):
                parameter.data.view(-1)[piece.start : piece.stop].copy_(source)
            else:
                size = self._rows.num_elements(piece.parameter)
                row = scattered.setdefault(piece.parameter, torch.empty(size, dtype=parameter.dtype))
                row[piece.start : piece.stop].copy_(source)
        for index, row in scattered.items():
            self.parameters[index].data.copy_(self._rows.whole(index, row))
        self.base = version
        self._base_buffer = buffer
        self._take_for_unedited(None)

    def _learn(self, reply: Mapping[str, Any]) -> None:
        self.version = max(self.version, int(reply.get("version", 0)))
        self.serial = int(reply.get("serial", self.serial))
        if reply.get("hyper") is not None and reply["hyper_version"] != self.hyper_version:
            self.hyper, self.hyper_version = reply["hyper"], int(reply["hyper_version"])

    # ------------------------------------------------------------------ pushing

    @torch.no_grad()
    def push(
        self,
        gradients: Sequence[Tensor | None],
        tickets: Sequence[Ticket],
        fetch: bool,
        hyper: Any = None,
        buffers: bytes | None = None,
        losses: Sequence[float] | None = None,
    ) -> PushResult:
        """Hand in gradients; they are applied while this worker goes on.

        Args:
            gradients: Of each parameter; None where there is none.
            tickets: The batches that they come from.
            fetch: Ask for the weights after it, for :meth:`land`.
            hyper: What the optimizers' hyperparameters have become, from the leader.
            buffers: The worker's running statistics.
            losses: Each batch's share of a loss that is summed over all of them.

        Raises:
            HostLostError: If shards have moved, and it was not applied; ``lost`` has its tickets.

        """
        slot, header = self._prepare(gradients, tickets, fetch, hyper, buffers)
        if losses is not None:
            header["losses"] = list(losses)
        try:
            for mailbox in self._mailboxes:
                mailbox.send(slot)
            reply, _ = self.client.call(header, buffers or b"")
        except HostLostError:
            self._encoder.take_back(self._rows_of(gradients), self._slots[slot])
            self.lost += tickets
            raise
        return self._pushed(slot, header, reply)

    @torch.no_grad()
    def push_later(
        self, gradients: Sequence[Tensor | None], tickets: Sequence[Ticket], hyper: Any, buffers: bytes | None
    ) -> None:
        """Hand in gradients, and have the weights after them brought, while this worker computes on.

        Where no shard is on another host, :meth:`push` takes hardly any time, and is better. :meth:`collect` tells what
        became of it. Arguments are those of :meth:`push`.
        """
        slot, header = self._prepare(gradients, tickets, True, hyper, buffers)

        def errand() -> tuple[int, Header, Header]:
            try:
                for mailbox in self._mailboxes:
                    mailbox.send(slot)
                reply, _ = self.client.call(header, buffers or b"")
            except HostLostError:
                self.lost += tickets
                raise
            if "sequence" in reply:
                self.client.wait_until_done(int(reply["sequence"]))
                self._receive(header["fetch"])
            return slot, header, reply

        self._courier.go(errand)

    def collect(self, wait: bool) -> PushResult | None:
        """Take what the courier has brought.

        Args:
            wait: Wait for it.

        Returns:
            What became of the push; None if nothing is under way, or not back yet.

        Raises:
            HostLostError: If shards have moved. Was it not applied, ``lost`` has its tickets.

        """
        if not (self._courier.is_back or (wait and self._courier.is_under_way)):
            return None
        slot, header, reply = self._courier.wait()
        result = self._pushed(slot, header, reply)
        if result.applied:
            self._pending.clear()
            self._install(header["fetch"], result.version)
        return result

    @property
    def is_far(self) -> bool:
        """Whether pushes have to be carried to other hosts."""
        return any(isinstance(mailbox, RemoteMailbox) for mailbox in self._mailboxes)

    def call_by(self, client: Client) -> None:
        """Speak to another coordinator from here on, which knows nothing of what was pushed."""
        self.client = client
        self._pending.clear()

    def forget_courier(self) -> None:
        """Wait for what is under way, and do without what it brings."""
        if self._courier.is_under_way:
            with contextlib.suppress(RevokedError, ConnectionError):
                slot, header, reply = self._courier.wait()
                self._pushed(slot, header, reply)

    def _prepare(
        self,
        gradients: Sequence[Tensor | None],
        tickets: Sequence[Ticket],
        fetch: bool,
        hyper: Any,
        buffers: bytes | None,
    ) -> tuple[int, Header]:
        """Code a push, and say what it is."""
        slot = self._slot
        self.client.wait_until_done(self._last_use[slot])
        self._encoder.encode(self._rows_of(gradients), self._slots[slot])
        self.num_bytes_pushed += self._num_code_bytes
        return slot, {
            "op": "commit",
            "slot": slot,
            "base": self.base,
            "base_buffer": self._base_buffer,
            "tickets": list(tickets),
            "absent": [index for index, gradient in enumerate(gradients) if gradient is None],
            "fetch": self._next_buffer() if fetch else None,
            "hyper": hyper,
            "hyper_version": self.hyper_version,
            "buffers": buffers is not None,
        }

    def _rows_of(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if tensor is None else self._rows.of(index, tensor) for index, tensor in enumerate(gradients)]

    def _pushed(self, slot: int, header: Header, reply: Header) -> PushResult:
        """Learn what became of a push."""
        self._learn(reply)
        if "lost" in reply:
            return PushResult(False, self.version, reason=str(reply["lost"]))
        if "finished" in reply:
            return PushResult(False, int(reply["version"]), reason=str(reply["finished"]))
        sequence, version = int(reply["sequence"]), int(reply["version"])
        self._last_use[slot] = sequence
        self._slot = (slot + 1) % NUM_SLOTS
        if header["fetch"] is not None:
            self._pending.append((sequence, header["fetch"], version))
        return PushResult(True, version, int(reply["staleness"]))

    def settle(self) -> None:
        """Wait until all that was pushed is applied."""
        self.collect(wait=True)
        self.client.wait_until_done(max(self._last_use))

    @torch.no_grad()
    def step_locally(
        self, gradients: Sequence[Tensor | None], rates: Sequence[float], sums: Sums | None = None
    ) -> None:
        """The paper's local step between fetches: ``w -= lr g``, with each parameter's learning rate.

        Args:
            gradients: None where there is none.
            rates: The learning rates.
            sums: What to add the gradients to in the same pass, if to any.

        """
        if sums is not None and not self._rows.are_whole:
            sums.add(gradients)
        elif sums is not None:
            sums.add_and_step(gradients, [parameter.data for parameter in self.parameters], rates, self._to_keep())
            self._take_for_unedited(self._kept)
            return
        for parameter, gradient, rate in zip(self.parameters, gradients, rates, strict=True):
            if gradient is not None:
                parameter.data.add_(gradient.to(parameter.dtype), alpha=-rate)
        self.remember()


def _has_nan(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
