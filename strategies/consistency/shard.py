"""A shard: a process that owns a slice of all parameters and carries out what is to be done to it, push after push."""

from __future__ import annotations

import contextlib
import socket
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

PartName = Callable[[str], str]  # of a mailbox's name: the name of the memory that is a group's part of it


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

    def make_shard(self, index: int, segment: Segment, part: PartName) -> Shard:
        """The shard of a number."""
        return UpdatingShard(index, segment, self, part)


class Spec(Protocol):
    """What shards of any kind are made from."""

    @property
    def plan(self) -> Plan:
        """All slices."""

    @property
    def codec(self) -> str:
        """How pushes are coded."""

    @property
    def num_buffers(self) -> int:
        """Fetch buffers of a worker."""

    def make_shard(self, index: int, segment: Segment, part: PartName) -> Shard:
        """The shard of a number."""


class Shard(ABC):
    """Carries commands out.

    Args:
        index: Which slice it owns.
        spec: Of all shards.
        part: Name of the shared memory that is its group's part of a mailbox of a name.

    """

    def __init__(self, index: int, spec: Spec, part: PartName) -> None:
        self.slice = spec.plan.slices[index]
        layout = lay_out_mailbox(spec.plan, spec.plan.group_of(index), NUM_SLOTS, spec.num_buffers)
        position = index - layout.shards.start
        self._slots = [starts[position] for starts in layout.slots]
        self._buffers = [starts[position] for starts in layout.buffers]
        self._part = part
        self._mailboxes: dict[str, Segment] = {}
        self.decode = make_decoder(spec.codec)

    @property
    @abstractmethod
    def last_command(self) -> int:
        """The last command that was carried out, by this process or one before."""

    @abstractmethod
    def act(self, command: dict[str, Any]) -> Sequence[float] | None:
        """Carry one command out.

        Returns:
            The numbers that it asks for, if any.

        """

    @abstractmethod
    def finish(self, command: int) -> None:
        """Note that a command has been carried out, and that the host was told so."""

    def carry_out(self, command: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
        """Carry one command out, unless an earlier process has.

        Args:
            command: What to do.
            tell: Hears what came of it; before that is noted, for numbers that nobody has heard are to be found again.

        """
        number = int(command["c"])
        numbers = self.act(command) if number > self.last_command else None
        tell({"done": number} | ({} if numbers is None else {"numbers": list(numbers)}))
        if number > self.last_command:
            self.finish(number)

    def code(self, mailbox: str, slot: int) -> Tensor:
        """The code of a push."""
        return self._mailbox(mailbox).tensor(torch.uint8, self._slots[slot], self.slice.num_code_bytes)

    def buffer(self, mailbox: str, index: int) -> Tensor:
        """Where a worker fetches weights."""
        return self._mailbox(mailbox).tensor(torch.uint8, self._buffers[index], self.slice.num_fetch_bytes)

    def _mailbox(self, name: str) -> Segment:
        if name not in self._mailboxes:
            self._mailboxes[name] = Segment(self._part(name))
        return self._mailboxes[name]

    def forget(self, mailbox: str) -> None:
        """Let go of the mailbox of a worker that is gone."""
        self._mailboxes.pop(mailbox, None)


class UpdatingShard(Shard):
    """A shard that steps the user's optimizers.

    Args:
        index: Which slice it owns.
        segment: The slice's memory.
        spec: Of all shards.
        part: Name of the shared memory that is its group's part of a mailbox of a name.

    """

    def __init__(self, index: int, segment: Segment, spec: ShardSpec, part: PartName) -> None:
        super().__init__(index, spec, part)
        self._hyper_version = 0
        self.updater = Updater(
            SliceMemory(segment, self.slice),
            [unpack(data) for data in spec.optimizers],
            unpack_groups(spec.groups),
            spec.rule,
            self.decode,
            spec.codec,
        )

    @property
    def last_command(self) -> int:
        """The last command that was carried out."""
        return self.updater.last_command

    def act(self, command: dict[str, Any]) -> None:
        """Apply a push, hand weights out, or take edited ones in."""
        number, operation = int(command["c"]), command["op"]
        if operation == "apply":
            version, hyper = command["hyper"]
            if hyper is not None and version != self._hyper_version:
                self.updater.adopt(hyper)
                self._hyper_version = version
            mailbox = command["mailbox"]
            code = self.code(mailbox, command["slot"])
            base = None if command["base"] is None else self.buffer(mailbox, command["base"])
            fetch = None if command["fetch"] is None else self.buffer(mailbox, command["fetch"])
            self.updater.apply(number, code, set(command["absent"]), command["staleness"], base, fetch)
        elif operation == "fetch":
            self.updater.hand_out(self.buffer(command["mailbox"], command["fetch"]))
        elif operation == "write":
            self.updater.take_in(self.buffer(command["mailbox"], command["fetch"]))

    def finish(self, command: int) -> None:
        """Note that a command has been carried out."""
        self.updater.finish(command)


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


def serve(index: int, name: str, sock: socket.socket, spec: Spec, parent: int, part: PartName) -> None:
    """The life of a shard's process: carry out what comes, until the host hangs up."""
    if not die_with_parent(parent):
        return
    torch.set_num_threads(1)
    host = Blocking(sock)
    try:
        shard = spec.make_shard(index, Segment(name), part)
        host.send({"ready": shard.last_command})
        while True:
            command, _ = host.receive()
            if command["op"] == "forget":
                shard.forget(command["mailbox"])
                continue
            shard.carry_out(command, host.send)
    except ConnectionError:
        return
    except Exception:
        with contextlib.suppress(ConnectionError):
            host.send({"error": traceback.format_exc()})
