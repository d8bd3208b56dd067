"""The shards of one host: started, watched and started again, and the porters that serve them to other hosts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import porter
from .journal import set_progress
from .mailbox import part_name
from .memory import Segment, host_prefix
from .packing import RESIDUALS
from .shard import Spec, serve
from .wire import Blocking, Buffered, Header

_MAX_RESTARTS = 5  # of a shard that gets no command done in between


OnDone = Callable[[int, int, list[float] | None], None]


class Loop(Protocol):
    """What the event loop offers to those whose connections it looks after."""

    def watch(self, connection: Buffered, who: Any = None) -> None:
        """Hear of what a connection brings; ``who.said(connection, header, payload, now)`` and ``who.gone(...)``."""

    def forget(self, connection: Buffered) -> None:
        """Hang up."""

    def close_all(self) -> None:
        """In a forked process: let go of everybody's connections."""


class ShardProcess:
    """One shard, whichever process it is at the moment."""

    def __init__(self, shards: Shards, index: int, name: str) -> None:
        self.shards = shards
        self.index = index
        self.name = name
        self.pid = 0
        self.connection: Buffered | None = None
        self.ready = False
        self.log: deque[Header] = deque()  # commands that it has not carried out
        self.num_restarts = 0

    def said(self, connection: Buffered, header: Header, payload: bytes, now: float) -> None:
        """Hear what it has done."""
        self.shards.said(self, header)

    def gone(self, connection: Buffered, now: float) -> None:
        """It has ended; another takes its memory over."""
        self.shards.gone(self)


class Shards:
    """All of this host.

    Args:
        loop: Looks after their connections.
        run: Name of the run.
        node: Rank of this host.
        on_done: Hears that a shard has carried out all commands up to one, and the numbers that this one has asked for.
        on_ready: Hears that all shards are ready for the first time.
        on_failure: Hears why the run can't go on.

    """

    def __init__(
        self,
        loop: Loop,
        run: str,
        node: int,
        on_done: OnDone,
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.run, self.node = run, node
        self.prefix = host_prefix(run, node)
        self.processes: list[ShardProcess] = []
        self.spec: Spec | None = None
        self.failure = ""
        self._loop = loop
        self._on_done, self._on_ready, self._on_failure = on_done, on_ready, on_failure
        self._memories: list[str] = []
        self._ending: set[str] = set()  # mailboxes of workers that are gone
        self._porters: dict[int, str] = {}  # by process, the mailbox that it keeps the twin of
        self._was_ready = False

    # ------------------------------------------------------------------ memory

    def make_memory(self, indices: Sequence[int], num_bytes: Sequence[int], num_served: int) -> list[str]:
        """Make the memory of some shards, for a worker to fill.

        Args:
            indices: Numbers of the shards.
            num_bytes: How much each needs.
            num_served: How many of them, from the first on, get a process; the others' memory is kept for later.

        """
        for position, (index, size) in enumerate(zip(indices, num_bytes, strict=True)):
            name = f"{self.prefix}-s{index}"
            Segment(name, size)
            self._memories.append(name)
            if position < num_served:
                self.processes.append(ShardProcess(self, index, name))
        return [f"{self.prefix}-s{index}" for index in indices]

    def take_over_memory(self, indices: Sequence[int]) -> list[str]:
        """Serve shards whose memory an earlier host process has left; commands are numbered from 1 on again.

        Args:
            indices: Numbers of the shards.

        """
        names = [f"{self.prefix}-s{index}" for index in indices]
        for index, name in zip(indices, names, strict=True):
            set_progress(Segment(name), 0)
            self._memories.append(name)
            self.processes.append(ShardProcess(self, index, name))
        return names

    # ------------------------------------------------------------------ shards

    def start(self, spec: Spec) -> None:
        """Start those that have memory."""
        self.spec = spec
        for shard in self.processes:
            self._fork(shard)

    def adopt(self, indices: Sequence[int], last_command: int) -> None:
        """Start shards that were another host's, on the memory that was kept for them here.

        Args:
            indices: Their numbers.
            last_command: The last one that they will not carry out.

        """
        for index in indices:
            name = f"{self.prefix}-s{index}"
            set_progress(Segment(name), last_command)
            shard = ShardProcess(self, index, name)
            self.processes.append(shard)
            self._fork(shard)

    def _fork(self, shard: ShardProcess) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self._loop.close_all()  # or a peer whose other end is gone would not be noticed
                assert self.spec is not None
                serve(shard.index, shard.name, theirs, self.spec, parent, lambda name: self._part(name, shard.index))
            finally:
                os._exit(0)
        theirs.close()
        shard.pid, shard.ready, shard.connection = pid, False, Buffered(ours)
        self._loop.watch(shard.connection, shard)

    def _part(self, mailbox: str, index: int) -> str:
        assert self.spec is not None
        return part_name(mailbox, self.run, self.node, self.spec.plan.group_of(index))

    def command(self, command: Header) -> None:
        """Have all shards carry a command out."""
        for shard in self.processes:
            shard.log.append(command)
            if shard.ready and shard.connection is not None:
                shard.connection.send(command)
                self._loop.watch(shard.connection)

    def said(self, shard: ShardProcess, header: Header) -> None:
        """Hear what a shard has done."""
        if "error" in header:
            self._fail(f"Shard {shard.index} could not apply an update.\n\n{header['error']}")
            return
        done = int(header["ready"] if "ready" in header else header["done"])
        while shard.log and shard.log[0]["c"] <= done:
            shard.log.popleft()
        if "ready" in header:
            shard.ready = True
            assert shard.connection is not None
            for command in shard.log:
                shard.connection.send(command)
            self._loop.watch(shard.connection)
            if not self._was_ready and all(other.ready for other in self.processes):
                self._was_ready = True
                self._on_ready()
        else:
            shard.num_restarts = 0
        self._on_done(shard.index, done, header.get("numbers"))

    def gone(self, shard: ShardProcess) -> None:
        """A shard has ended: another takes its memory over."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(shard.pid, 0)
        shard.pid, shard.connection, shard.ready = 0, None, False
        if self.failure:
            return
        shard.num_restarts += 1
        if shard.num_restarts > _MAX_RESTARTS:
            self._fail(f"Shard {shard.index} was ended {_MAX_RESTARTS} times in the same update.")
            return
        sys.stderr.write(f"squall: shard {shard.index} was lost; another takes its memory over.\n")
        self._fork(shard)

    def _fail(self, message: str) -> None:
        self.failure = self.failure or message
        self._on_failure(self.failure)

    # ------------------------------------------------------------------ mailboxes

    def carry(self, connection: Buffered, mailbox: str, group: int) -> None:
        """Let a process of its own serve a worker of another host.

        Raises:
            ValueError: If the group is not here, or the mailbox none of this run's.

        """
        spec = self.spec
        if spec is None or not 0 <= group < spec.plan.num_groups:
            raise ValueError(f"group {group} is not on this host")
        served = {shard.index: shard.name for shard in self.processes}
        if not served.keys() >= set(spec.plan.group(group)):
            raise ValueError(f"group {group} is not on this host")
        if not mailbox.startswith(f"{self.run}-w") or not mailbox.isascii() or "/" in mailbox:
            raise ValueError(f"{mailbox[:80]!r} is no mailbox of this run")
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                sock = connection.detach()
                self._loop.close_all()
                name = part_name(mailbox, self.run, self.node, group)
                porter.serve(Blocking(sock), spec, group, name, served, parent)
            finally:
                os._exit(0)
        self._porters[pid] = mailbox
        self._loop.forget(connection)  # the porter's now

    def forget(self, mailbox: str) -> None:
        """Let go of a mailbox whose worker is gone, once its pushes are applied."""
        self._ending.add(mailbox)

    def look_after(self) -> None:
        """Do what is due from time to time."""
        for pid in list(self._porters):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            del self._porters[pid]
        if not self._ending:
            return
        used = {str(command.get("mailbox")) for shard in self.processes for command in shard.log}
        for mailbox in self._ending - used:
            self._ending.discard(mailbox)
            num_groups = 1 if self.spec is None else self.spec.plan.num_groups
            for group in range(num_groups):
                Segment.unlink(part_name(mailbox, self.run, self.node, group))
            Segment.unlink(part_name(mailbox, self.run, self.node, 0) + RESIDUALS)
            for shard in self.processes:
                if shard.ready and shard.connection is not None:
                    shard.connection.send({"op": "forget", "mailbox": mailbox})
                    self._loop.watch(shard.connection)

    # ------------------------------------------------------------------ the end

    def end(self) -> None:
        """End all processes, and leave no memory behind."""
        for shard in self.processes:
            if shard.connection is not None:
                self._loop.forget(shard.connection)
        for pid in [*self._porters, *(shard.pid for shard in self.processes if shard.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.processes.clear()
        self._porters.clear()
        self.unlink()

    def unlink(self) -> None:
        """Let memory go with the last process that has it."""
        names = {*self._memories}
        with contextlib.suppress(OSError):  # a worker may be killed before it can tell the name of its mailbox
            names |= {name for name in os.listdir("/dev/shm") if name.startswith(f"{self.prefix}-")}
        for name in names:
            Segment.unlink(name)
