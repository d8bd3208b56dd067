"""A porter: a process beside the shards of a host that serves one worker of another host.

It keeps the twin of the worker's mailbox in its host's shared memory, where the shards look for it: pushes come out
of the socket right into it, and weights go from it into the socket.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .deltas import Deltas
from .mailbox import NUM_SLOTS, LocalMailbox, lay_out_mailbox
from .memory import Segment
from .packing import sum_residuals
from .processes import die_with_parent
from .shard import Spec
from .wire import Blocking, Header, WireError


class Porter:
    """Carries for one worker.

    Args:
        spec: Of all shards.
        group: Whose shards are here.
        name: Of the twin.
        memories: Name of each shard's memory, by its number.

    """

    def __init__(self, spec: Spec, group: int, name: str, memories: dict[int, str]) -> None:
        self._layout = lay_out_mailbox(spec.plan, group, NUM_SLOTS, spec.num_buffers)
        self._twin = LocalMailbox(spec.plan, self._layout, name)
        self._slices = [spec.plan.slices[shard] for shard in self._layout.shards]
        self._memories = {shard: memories[shard] for shard in self._layout.shards}
        self._codec = spec.codec
        self._plan = spec.plan
        self._prefix = name.partition("-w")[0]
        self._keeps_base = spec.num_buffers > 2  # a rule looks at what the worker has
        self._deltas: Deltas | None = None

    def carry_out(self, header: Header, line: Blocking, num_payload: int) -> None:
        """Do what the worker asks for.

        Raises:
            WireError: If it makes no sense.

        """
        operation = header.get("op")
        if operation == "put":
            line.receive_into(self._part(header.get("at"), num_payload))
            line.send({})
        elif num_payload:
            raise WireError(f"{operation!r} with {num_payload} bytes")
        elif operation == "weights":
            buffer = self._number(header, "buffer", len(self._layout.buffers))
            line.send(*self._weights(buffer, bool(header.get("exact"))))
        elif operation == "owed":
            line.send({}, sum_residuals(self._prefix, self._plan).numpy().data.cast("B"))
        elif operation == "read":
            line.send({}, self._read(header))
        else:
            raise WireError(f"there is no {str(operation)[:40]!r}")

    @staticmethod
    def _number(header: Header, name: str, limit: int) -> int:
        value = header.get(name)
        if type(value) is not int or not 0 <= value < limit:
            raise WireError(f"{name}={str(value)[:40]!r} can't be understood")
        return value

    def _part(self, at: Any, count: int) -> memoryview:
        if type(at) is not int or at < 0 or at + count > self._layout.num_bytes:
            raise WireError(f"a mailbox of {self._layout.num_bytes} bytes has no {count} at {str(at)[:40]}")
        return _bytes(self._twin.part(at, count))

    def _weights(self, buffer: int, exact: bool) -> tuple[Header, memoryview | bytes]:
        weights = self._twin.weights(buffer)
        if self._codec == "fp32" or self._deltas is None or exact:
            self._know(weights)
            return {"coded": False}, _bytes(torch.cat(weights)) if len(weights) > 1 else _bytes(weights[0])
        self._deltas.encode(weights, self._code)
        if self._keeps_base:
            for there, known in zip(weights, self._deltas.known, strict=True):
                there.copy_(known)
        return {"coded": True}, _bytes(self._code)

    def _know(self, weights: Sequence[Tensor]) -> None:
        if self._codec == "fp32":
            return
        if self._deltas is None:
            self._deltas = Deltas(self._slices, self._codec, [torch.empty_like(part) for part in weights])
            self._code = torch.empty(self._deltas.num_bytes, dtype=torch.uint8)
        for known, now in zip(self._deltas.known, weights, strict=True):
            known.copy_(now)

    def _read(self, header: Header) -> memoryview | bytes:
        shard = header.get("shard")
        if type(shard) is not int or shard not in self._memories:
            raise WireError(f"shard {str(shard)[:40]} is not here")
        segment = Segment(self._memories[shard])
        parts = []
        for pair in header.get("ranges") or ():
            at, count = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
            if type(at) is not int or type(count) is not int or min(at, count) < 0 or at + count > segment.num_bytes:
                raise WireError(f"shard {shard} has no bytes {str(pair)[:40]}")
            parts.append(segment.tensor(torch.uint8, at, count))
        return _bytes(torch.cat(parts)) if parts else b""


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data


def serve(line: Blocking, spec: Spec, group: int, name: str, memories: dict[int, str], parent: int) -> None:
    """The life of a porter's process, until the worker hangs up."""
    if not die_with_parent(parent):
        return
    torch.set_num_threads(1)
    line.sock.setblocking(True)
    try:
        porter = Porter(spec, group, name, memories)
        line.send({})
        while True:
            porter.carry_out(*_next(line))
    except WireError as error:
        sys.stderr.write(f"squall: a worker's line was dropped: {error}\n")
    except ConnectionError:
        return


def _next(line: Blocking) -> tuple[Header, Blocking, int]:
    header, num_payload = line.receive_header()
    return header, line, num_payload
