"""A worker's side of the weights: what it pushes, what it fetches, and which version it computes with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .client import Client
from .memory import Segment
from .optimizers import Hyperparameters
from .plan import Plan, Unit
from .queue import Ticket
from .shard import NUM_SLOTS, lay_out_mailbox

Encode = Callable[[Unit, Tensor, Tensor], None]  # unit, gradient, where its code goes


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


@dataclass(frozen=True)
class _Piece:
    """Neighbouring elements of a parameter that are neighbours in the mailbox, too."""

    parameter: int
    start: int
    stop: int
    shard: int
    offset: int


def _pieces(plan: Plan, offset_of: Callable[[Unit], int]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for shard, slice_ in enumerate(plan.slices):
        for unit in slice_.units:
            offset = offset_of(unit)
            last = pieces[-1] if pieces else None
            size = unit.info.dtype.itemsize
            if (
                last is not None
                and (last.parameter, last.shard, last.stop) == (unit.parameter, shard, unit.start)
                and last.offset + (last.stop - last.start) * size == offset
            ):
                pieces[-1] = _Piece(last.parameter, last.start, unit.stop, shard, last.offset)
            else:
                pieces.append(_Piece(unit.parameter, unit.start, unit.stop, shard, offset))
    return pieces


class Replica:
    """The parameters of a worker, kept close to the shards'.

    Args:
        client: The worker's line to the coordinator.
        plan: All slices.
        parameters: The worker's own, in the plan's order.
        name: Of the run; mailboxes are named after it.
        num_buffers: Fetch buffers: two, or three if a rule looks at the weights that a push was computed from.
        codec: How pushes are coded.

    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        parameters: Sequence[nn.Parameter],
        name: str,
        num_buffers: int = 2,
        codec: str = "fp32",
    ) -> None:
        self.client = client
        self.plan = plan
        self.parameters = list(parameters)
        self.version = 0  # the latest version heard of
        self.base = 0  # the version that the weights come from
        self.hyper: list[Hyperparameters] | None = None
        self.hyper_version = 0
        self.num_bytes_pushed = 0
        self.num_bytes_fetched = 0
        self._name = name
        self._num_buffers = num_buffers
        self._fetch_pieces = _pieces(plan, lambda unit: unit.fetch_offset)
        self._encoder = make_encoder(codec, plan)
        self._residual_units: dict[Unit, Tensor] = {}
        self._stepped = False  # locally, since the last fetch
        self._seen = 0
        self._pending: deque[tuple[int, int, int]] = deque()  # sequence, buffer and version of fetches under way

    # ------------------------------------------------------------------ coming and going

    def join(self) -> None:
        """Enter the run, and compute with its present weights."""
        layouts, num_bytes = lay_out_mailbox(self.plan, NUM_SLOTS, self._num_buffers)
        name = f"{self._name}-w{self.client.rank}.{self.client.generation}"
        mailbox = Segment(name, num_bytes)
        reply, _ = self.client.call({"op": "join", "mailbox": name})
        self._slots = [
            [
                mailbox.tensor(torch.uint8, layout.slots[slot], slice_.num_code_bytes)
                for layout, slice_ in zip(layouts, self.plan.slices, strict=True)
            ]
            for slot in range(NUM_SLOTS)
        ]
        self._buffers = [
            [
                mailbox.tensor(torch.uint8, layout.buffers[buffer], slice_.num_fetch_bytes)
                for layout, slice_ in zip(layouts, self.plan.slices, strict=True)
            ]
            for buffer in range(self._num_buffers)
        ]
        self.version = int(reply["version"])
        self._last_use = [0] * NUM_SLOTS
        self._slot = 0
        self._buffer = 0
        self._base_buffer = 0
        self.fetch()

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
        self.fetch()
        return None

    # ------------------------------------------------------------------ fetching

    def fetch(self) -> None:
        """Compute with the weights as they are now."""
        buffer = self._next_buffer()
        reply, _ = self.client.call({"op": "fetch", "buffer": buffer})
        self._learn(reply)
        self._pending.clear()
        self._install(buffer, int(reply["version"]))

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
        self._install(buffer, version)
        return True

    # ------------------------------------------------------------------ weights that were edited

    @torch.no_grad()
    def write_if_edited(self, reference: Sequence[Tensor] | None = None, look: bool = False) -> bool:
        """Give the shards what somebody but the optimizer has made of the weights: a callback, the user's own code.

        Args:
            reference: What the weights were; without it, what was fetched last.
            look: Compare them even if torch has seen no edit: it overlooks those of ``parameter.data``.

        Returns:
            Whether they were edited.

        """
        if reference is None and (self._stepped or self._pending):
            return False  # a local step is an edit, too
        if not look and self._stamp() == self._seen:
            return False
        self._seen = self._stamp()
        if reference is not None:
            same = all(torch.equal(p.detach().cpu(), old) for p, old in zip(self.parameters, reference, strict=True))
        else:
            same = all(torch.equal(there, here.cpu()) for there, here in self._pairs(self._base_buffer))
        if same:
            return False
        buffer = self._next_buffer()
        for there, here in self._pairs(buffer):
            there.copy_(here)
        reply, _ = self.client.call({"op": "write", "buffer": buffer})
        self._learn(reply)
        self.base, self._base_buffer = int(reply["version"]), buffer
        return True

    def _stamp(self) -> int:
        return sum(parameter._version for parameter in self.parameters)

    def _pairs(self, buffer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each piece of the weights lies in a buffer, and where in the parameters."""
        for piece in self._fetch_pieces:
            parameter = self.parameters[piece.parameter]
            size = (piece.stop - piece.start) * parameter.dtype.itemsize
            there = self._buffers[buffer][piece.shard][piece.offset : piece.offset + size].view(parameter.dtype)
            yield there, parameter.detach().reshape(-1)[piece.start : piece.stop]

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
            size = (piece.stop - piece.start) * parameter.dtype.itemsize
            source = self._buffers[buffer][piece.shard][piece.offset : piece.offset + size].view(parameter.dtype)
            self.num_bytes_fetched += size
            if parameter.is_contiguous():
                parameter.data.view(-1)[piece.start : piece.stop].copy_(source)
            else:
                flat = scattered.setdefault(piece.parameter, torch.empty(parameter.numel(), dtype=parameter.dtype))
                flat[piece.start : piece.stop].copy_(source)
        for index, flat in scattered.items():
            parameter = self.parameters[index]
            parameter.data.copy_(flat.view(parameter.shape))
        self.base = version
        self._base_buffer = buffer
        self._stepped = False
        self._seen = self._stamp()

    def _learn(self, reply: Mapping[str, Any]) -> None:
        self.version = max(self.version, int(reply.get("version", 0)))
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
    ) -> PushResult:
        """Hand in gradients; they are applied while this worker goes on.

        Args:
            gradients: Of each parameter; None where there is none.
            tickets: The batches that they come from.
            fetch: Ask for the weights after it, for :meth:`land`.
            hyper: What the optimizers' hyperparameters have become, from the leader.
            buffers: The worker's running statistics.

        """
        slot = self._slot
        self.client.wait_until_done(self._last_use[slot])
        absent = [index for index, gradient in enumerate(gradients) if gradient is None]
        flat = [None if gradient is None else _flat(gradient) for gradient in gradients]
        for shard, slice_ in enumerate(self.plan.slices):
            codes = self._slots[slot][shard]
            self._encoder(slice_.units, flat, codes, shard)
            self.num_bytes_pushed += slice_.num_code_bytes
        buffer = self._next_buffer() if fetch else None
        reply, _ = self.client.call(
            {
                "op": "commit",
                "slot": slot,
                "base": self.base,
                "base_buffer": self._base_buffer,
                "tickets": list(tickets),
                "absent": absent,
                "fetch": buffer,
                "hyper": hyper,
                "hyper_version": self.hyper_version,
                "buffers": buffers is not None,
            },
            buffers or b"",
        )
        self._learn(reply)
        if "lost" in reply:
            return PushResult(False, self.version, reason=str(reply["lost"]))
        if "finished" in reply:
            return PushResult(False, int(reply["version"]), reason=str(reply["finished"]))
        sequence, version = int(reply["sequence"]), int(reply["version"])
        self._last_use[slot] = sequence
        self._slot = (slot + 1) % NUM_SLOTS
        if buffer is not None:
            self._pending.append((sequence, buffer, version))
        return PushResult(True, version, int(reply["staleness"]))

    def settle(self) -> None:
        """Wait until all that was pushed is applied."""
        self.client.wait_until_done(max(self._last_use))

    @torch.no_grad()
    def step_locally(self, gradients: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        """The paper's local step between fetches: ``w -= lr g``, with each parameter's learning rate."""
        for parameter, gradient, rate in zip(self.parameters, gradients, rates, strict=True):
            if gradient is not None:
                parameter.data.add_(gradient.to(parameter.dtype), alpha=-rate)
        self._stepped = True


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.detach().reshape(-1)


Encoder = Callable[[Sequence[Unit], Sequence[Tensor | None], Tensor, int], None]


def make_encoder(codec: str, plan: Plan) -> Encoder:
    """What writes the code of a push to one shard."""
    if codec == "fp32":
        pieces: dict[int, list[_Piece]] = {}
        for piece in _pieces(plan, lambda unit: unit.code_offset):
            pieces.setdefault(piece.shard, []).append(piece)

        def copy(units: Sequence[Unit], flat: Sequence[Tensor | None], codes: Tensor, shard: int) -> None:
            for piece in pieces.get(shard, ()):
                gradient = flat[piece.parameter]
                if gradient is not None:
                    dtype = plan.parameters[piece.parameter].dtype
                    end = piece.offset + (piece.stop - piece.start) * dtype.itemsize
                    codes[piece.offset : end].view(dtype).copy_(gradient[piece.start : piece.stop])

        return copy

    from .codecs import get_codec

    found = get_codec(codec)
    residuals: dict[tuple[int, int], Tensor] = {}

    def encode(units: Sequence[Unit], flat: Sequence[Tensor | None], codes: Tensor, shard: int) -> None:
        for unit in units:
            gradient = flat[unit.parameter]
            if gradient is None:
                continue
            residual = None
            if found.has_residual:
                key = (unit.parameter, unit.start)
                if key not in residuals:
                    residuals[key] = torch.zeros(unit.num_elements)
                residual = residuals[key]
            mine = codes[unit.code_offset : unit.code_offset + unit.num_code_bytes]
            found.encode(gradient[unit.start : unit.stop].cpu(), mine, residual)

    return encode
