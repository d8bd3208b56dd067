"""A shard: a process that owns a slice of all parameters and steps the user's optimizer on it, push after push."""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mailbox import NUM_SLOTS, lay_out_mailbox
from .memory import Segment
from .optimizers import unpack, unpack_groups
from .plan import Plan, Unit
from .processes import die_with_parent
from .staleness import StalenessRule
from .updates import SliceMemory, Updater
from .wire import Blocking


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a run are made from. It goes from a worker to processes that it started, and only there.

    Args:
        plan: All slices.
        optimizers: The carried optimizers.
        groups: Each one's groups, parameters left out; carried like the optimizers.
        rule: What to do about staleness.
        codec: How pushes are coded.
        num_buffers: Fetch buffers of a worker.

    """

    plan: Plan
    optimizers: tuple[bytes, ...]
    groups: bytes
    rule: StalenessRule
    codec: str
    num_buffers: int


class Shard:
    """Carries commands out.

    Args:
        index: Which slice it owns.
        segment: The slice's memory.
        spec: Of all shards.
        part: Name of the shared memory that is its group's part of a mailbox of a name.

    """

    def __init__(self, index: int, segment: Segment, spec: ShardSpec, part: Callable[[str], str]) -> None:
        self._slice = spec.plan.slices[index]
        layout = lay_out_mailbox(spec.plan, spec.plan.group_of(index), NUM_SLOTS, spec.num_buffers)
        position = index - layout.shards.start
        self._slots = [starts[position] for starts in layout.slots]
        self._buffers = [starts[position] for starts in layout.buffers]
        self._part = part
        self._mailboxes: dict[str, Segment] = {}
        self._hyper_version = 0
        self._decode = make_decoder(spec.codec)
        self.updater = Updater(
            SliceMemory(segment, self._slice),
            [unpack(data) for data in spec.optimizers],
            unpack_groups(spec.groups),
            spec.rule,
            self._decode,
            spec.codec,
        )

    def carry_out(self, command: dict[str, Any]) -> None:
        """Carry one command out, unless an earlier process has."""
        number = int(command["c"])
        if number <= self.updater.last_command:
            return
        operation = command["op"]
        if operation == "apply":
            version, hyper = command["hyper"]
            if hyper is not None and version != self._hyper_version:
                self.updater.adopt(hyper)
                self._hyper_version = version
            mailbox = command["mailbox"]
            begin = self._slots[command["slot"]]
            code = self._mailbox(mailbox).tensor(torch.uint8, begin, self._slice.num_code_bytes)
            base = None if command["base"] is None else self._buffer(mailbox, command["base"])
            fetch = None if command["fetch"] is None else self._buffer(mailbox, command["fetch"])
            self.updater.apply(number, code, set(command["absent"]), command["staleness"], base, fetch)
        elif operation == "fetch":
            self.updater.hand_out(self._buffer(command["mailbox"], command["fetch"]))
        elif operation == "write":
            self.updater.take_in(self._buffer(command["mailbox"], command["fetch"]))
        self.updater.finish(number)

    def _mailbox(self, name: str) -> Segment:
        if name not in self._mailboxes:
            self._mailboxes[name] = Segment(self._part(name))
        return self._mailboxes[name]

    def _buffer(self, mailbox: str, index: int) -> Tensor:
        begin = self._buffers[index]
        return self._mailbox(mailbox).tensor(torch.uint8, begin, self._slice.num_fetch_bytes)

    def forget(self, mailbox: str) -> None:
        """Let go of the mailbox of a worker that is gone."""
        self._mailboxes.pop(mailbox, None)


def make_decoder(codec: str) -> Any:
    """What turns a unit's code into its gradient."""
    if codec == "fp32":
        return _as_it_is
    from .codecs import get_codec

    found = get_codec(codec)

    def decode(unit: Unit, code: Tensor, scratch: Tensor) -> Tensor:
        found.decode(code, scratch)
        return scratch

    return decode


def _as_it_is(unit: Unit, code: Tensor, scratch: Tensor) -> Tensor:
    return code.view(unit.info.dtype)


def serve(index: int, name: str, sock: socket.socket, spec: ShardSpec, parent: int, part: Callable[[str], str]) -> None:
    """The life of a shard's process: carry out what comes, until the host hangs up."""
    if not die_with_parent(parent):
        return
    torch.set_num_threads(1)
    host = Blocking(sock)
    try:
        shard = Shard(index, Segment(name), spec, part)
        host.send({"ready": shard.updater.last_command})
        while True:
            command, _ = host.receive()
            if command["op"] == "forget":
                shard.forget(command["mailbox"])
                continue
            shard.carry_out(command)
            host.send({"done": command["c"]})
    except ConnectionError:
        return
    except Exception:
        with contextlib.suppress(ConnectionError):
            host.send({"error": traceback.format_exc()})
