"""The process beside the workers of a host: it coordinates the run, and starts, watches and restarts the shards.

It lives outside the workers, so that none of them is missed. It runs no user code; the shards, which do, are forked
from it within milliseconds, since it has imported all that they need and holds nothing else: no thread, no device.
``python -m squall.consistency.host`` is started by :mod:`squall.consistency.hosting`, over a socket of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

import torch  # noqa: F401  (shards are forked with it)

from .coordinator import Coordinator, RunOptions
from .memory import Segment
from .requests import check_request
from .shard import NUM_SLOTS, ShardSpec, serve
from .wire import Buffered, Header, WireError, new_token

_MAX_RESTARTS = 5  # of a shard that gets no command done in between
_STOPPED_SECONDS = 2.0  # between two looks at the clock, of which there are two a second
_ORPHAN_SECONDS = 120.0  # that a run may go on after the process that began it is gone
_SILENT_SECONDS = 10.0  # that a connection may take to show the token and say something


class _ShardProcess:
    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.pid = 0
        self.connection: Buffered | None = None
        self.ready = False
        self.log: deque[Header] = deque()  # commands that it has not carried out
        self.num_restarts = 0


class _Run:
    def __init__(self, host: Host, number: int, options: RunOptions) -> None:
        self.host = host
        self.number = number
        self.name = f"squall-{os.getpid()}-{number}-{os.urandom(4).hex()}"
        self.coordinator = Coordinator(options, self._send, self._command)
        self.shards: list[_ShardProcess] = []
        self.peers: set[Buffered] = set()
        self.spec: ShardSpec | None = None
        self.go: Header | None = None
        self.version = 0
        self.mailboxes: set[str] = set()
        self.memories: list[str] = []

    def _send(self, peer: Any, header: Header, payload: bytes) -> None:
        if peer in self.peers:
            peer.send(header, payload)
            self.host.watch(peer)

    def _command(self, command: Header) -> None:
        for shard in self.shards:
            shard.log.append(command)
            if shard.ready and shard.connection is not None:
                shard.connection.send(command)
                self.host.watch(shard.connection)

    # ------------------------------------------------------------------ shards

    def make_memory(self, num_bytes: list[int], with_shards: bool) -> list[str]:
        for index, size in enumerate(num_bytes):
            name = f"{self.name}-s{index}"
            Segment(name, size)
            self.memories.append(name)
            if with_shards:
                self.shards.append(_ShardProcess(index, name))
        return self.memories

    def start(self, spec: ShardSpec, version: int) -> None:
        self.spec, self.version = spec, version
        for shard in self.shards:
            self.fork(shard)

    def fork(self, shard: _ShardProcess) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.host.close_all()  # or a peer whose other end is gone would not be noticed
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                assert self.spec is not None
                serve(shard.index, shard.name, theirs, self.spec, parent)
            finally:
                os._exit(0)
        theirs.close()
        shard.pid, shard.ready, shard.connection = pid, False, Buffered(ours)
        self.host.watch(shard.connection, shard)

    def shard_said(self, shard: _ShardProcess, header: Header) -> None:
        if "error" in header:
            self.coordinator.fail(f"Shard {shard.index} could not apply an update.\n\n{header['error']}")
            return
        done = int(header["ready"] if "ready" in header else header["done"])
        while shard.log and shard.log[0]["c"] <= done:
            shard.log.popleft()
        if "ready" in header:
            shard.ready = True
            assert shard.connection is not None
            for command in shard.log:
                shard.connection.send(command)
            self.host.watch(shard.connection)
            if self.go is not None and all(other.ready for other in self.shards):
                self.coordinator.start(self.version, len(self.shards))
                self.host.reply(self.go, {})
                self.go = None
        else:
            shard.num_restarts = 0
        if self.coordinator.started:
            self.coordinator.shard_done(shard.index, done)

    def shard_gone(self, shard: _ShardProcess) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(shard.pid, 0)
        shard.pid, shard.connection, shard.ready = 0, None, False
        if self.coordinator.failure:
            if self.go is not None:
                self.host.reply(self.go, {"failed": self.coordinator.failure})
                self.go = None
            return
        shard.num_restarts += 1
        if shard.num_restarts > _MAX_RESTARTS:
            self.coordinator.fail(f"Shard {shard.index} was ended {_MAX_RESTARTS} times in the same update.")
            self.shard_gone(shard)
            return
        sys.stderr.write(f"squall: shard {shard.index} was lost; another takes its memory over.\n")
        self.fork(shard)

    # ------------------------------------------------------------------ workers

    def worker_said(self, peer: Buffered, header: Header, payload: bytes, now: float) -> None:
        self.peers.add(peer)
        operation = check_request(header)
        if operation == "join" and header.get("mailbox"):
            self._find_mailbox(header["mailbox"])
            self.mailboxes.add(header["mailbox"])
        elif operation == "join" and self.shards:
            raise ValueError("a worker has to name the mailbox that the shards read its pushes from")
        elif operation in ("commit", "fetch", "write"):
            self._check_places(header)
        self.coordinator.handle(peer, header, payload, now)

    def _find_mailbox(self, name: str) -> None:
        """Shards attach to it by its name, and it is unlinked in the end: it must be there, and one of this run's."""
        if not name.startswith(f"{self.name}-w") or not name.isascii():
            raise ValueError(f"{name[:80]!r} is no mailbox of this run")
        try:
            Segment(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"the mailbox {name[:80]!r} can't be attached to: {error}") from error

    def _check_places(self, header: Header) -> None:
        """A place that no mailbox has would be an error in a shard, and the end of the run."""
        num_buffers = 2 if self.spec is None else self.spec.num_buffers
        buffers = [header.get(name) for name in ("base_buffer", "fetch", "buffer")]
        if header.get("slot", 0) >= NUM_SLOTS or any(b is not None and b >= num_buffers for b in buffers):
            raise ValueError(f"a mailbox has {NUM_SLOTS} slots and {num_buffers} buffers: {str(header)[:200]}")

    def worker_gone(self, peer: Buffered, now: float) -> None:
        if peer in self.peers:
            self.peers.discard(peer)
            self.coordinator.lost(peer, now)

    def drop_mailboxes(self) -> None:
        """Let go of mailboxes whose worker is gone and whose pushes are applied."""
        used = {worker.mailbox for worker in self.coordinator.live}
        for shard in self.shards:
            used |= {str(command.get("mailbox")) for command in shard.log}
        for name in self.mailboxes - used:
            Segment.unlink(name)
            self.mailboxes.discard(name)
            for shard in self.shards:
                if shard.ready and shard.connection is not None:
                    shard.connection.send({"op": "forget", "mailbox": name})
                    self.host.watch(shard.connection)

    def end(self) -> None:
        for shard in self.shards:
            if shard.connection is not None:
                self.host.forget(shard.connection)
            if shard.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(shard.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(shard.pid, 0)
        for peer in list(self.peers):
            self.host.forget(peer)
        names = {*self.mailboxes, *self.memories}
        with contextlib.suppress(OSError):  # a worker killed before it could tell the name of its mailbox
            names |= {name for name in os.listdir("/dev/shm") if name.startswith(self.name)}
        for name in names:
            Segment.unlink(name)


class Host:
    """The event loop.

    Args:
        parent: The process that started this one.

    """

    def __init__(self, parent: Buffered) -> None:
        self._selector = selectors.DefaultSelector()
        self._parent: Buffered | None = parent
        self._listener: socket.socket | None = None
        self._token = b""
        self._run: _Run | None = None
        self._num_runs = 0
        self._waiting: list[tuple[Buffered, Header, bytes]] = []  # workers that are ahead of the leader
        self._deadlines: dict[Buffered, float] = {}  # of those that have not shown the token
        self._orphaned = 0.0
        self._record = ""  # the file that tells workers where to find this process
        self.watch(parent, "parent")

    # ------------------------------------------------------------------ connections

    def watch(self, connection: Buffered, who: Any = None) -> None:
        """Hear of what a connection brings, and of its readiness to take what waits."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_to_write else 0)
        try:
            key = self._selector.get_key(connection.sock)
        except (KeyError, ValueError):
            if connection.sock.fileno() >= 0:
                self._selector.register(connection.sock, events, (connection, who))
            return
        if key.events != events:
            self._selector.modify(connection.sock, events, key.data)

    def forget(self, connection: Buffered) -> None:
        """Hang up."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        self._deadlines.pop(connection, None)
        connection.close()

    def close_all(self) -> None:
        """In a forked shard: let go of everybody else's connections."""
        for key in list(self._selector.get_map().values()):
            with contextlib.suppress(OSError):
                os.close(key.fd)
        self._selector.close()

    # ------------------------------------------------------------------ the loop

    def serve(self) -> None:
        """Until the process that started this one is gone, and its run has come to its end."""
        before = time.monotonic()
        while not self._is_over():
            ready = self._selector.select(timeout=0.5)
            begun = time.monotonic()
            if begun - before > _STOPPED_SECONDS and self._run is not None:
                self._run.coordinator.excuse(begun - before)  # this process stood still, perhaps the whole host
            before = begun
            for key, events in ready:
                if key.fileobj is self._listener:
                    self._accept()
                    continue
                connection, who = key.data
                if connection.sock.fileno() < 0:  # what came before it in this round ended it
                    continue
                if events & selectors.EVENT_WRITE:
                    connection.flush()
                    self.watch(connection)
                if events & selectors.EVENT_READ:
                    self._read(connection, who)
            now = time.monotonic()
            for connection in [c for c, deadline in self._deadlines.items() if deadline < now]:
                self.forget(connection)
            if self._run is not None:
                self._run.coordinator.tick(now)
                self._run.drop_mailboxes()
        if self._run is not None:
            self._run.end()
        self._drop_record()

    def _drop_record(self) -> None:
        """Remove what the process that started this one would have, had it not been killed."""
        with contextlib.suppress(OSError, ValueError):
            with open(self._record) as file:
                ours = json.load(file).get("token") == self._token.hex()
            if ours:
                os.unlink(self._record)

    def _is_over(self) -> bool:
        if self._parent is not None:
            return False
        run = self._run
        return run is None or not run.peers or time.monotonic() > self._orphaned + _ORPHAN_SECONDS

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            connection = Buffered(sock, self._token)
            self._deadlines[connection] = time.monotonic() + _SILENT_SECONDS
            self.watch(connection, "worker")

    def _read(self, connection: Buffered, who: Any) -> None:
        now = time.monotonic()
        try:
            for header, payload in connection.receive():
                self._deadlines.pop(connection, None)
                if who == "parent":
                    self._parent_said(header, payload)
                elif who == "worker":
                    self._worker_said(connection, header, payload, now)
                elif self._run is not None:
                    self._run.shard_said(who, header)
        except (ConnectionError, ValueError) as error:
            if isinstance(error, (WireError, ValueError)):
                sys.stderr.write(f"squall: a connection was dropped: {error}\n")
            self.forget(connection)
            if who == "parent":
                self._parent = None
                self._orphaned = now
            elif who == "worker":
                self._waiting = [item for item in self._waiting if item[0] is not connection]
                if self._run is not None:
                    self._run.worker_gone(connection, now)
            elif self._run is not None:
                self._run.shard_gone(who)

    def _worker_said(self, peer: Buffered, header: Header, payload: bytes, now: float) -> None:
        if check_request(header) == "hello":
            number = int(header["run"])
            if number > self._num_runs:
                self._waiting.append((peer, header, payload))
                return
            if self._run is None or number < self._num_runs:
                peer.send({"re": header.get("id"), "over": True})
                return
        if self._run is not None:
            self._run.worker_said(peer, header, payload, now)

    # ------------------------------------------------------------------ the process that started this one

    def reply(self, header: Header, values: Header) -> None:
        """Answer it."""
        if self._parent is not None:
            self._parent.send({"re": header["id"], **values})
            self.watch(self._parent, "parent")

    def _parent_said(self, header: Header, payload: bytes) -> None:
        operation = header["op"]
        try:
            values = getattr(self, f"_do_{operation}")(header, payload)
        except Exception as error:
            values = {"failed": str(error)}
        if values is not None:
            self.reply(header, values)

    def _do_open(self, header: Header, payload: bytes) -> Header:
        """Listen, for workers of a job that hold its token."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        self._token = bytes.fromhex(header["token"]) if header.get("token") else new_token()
        family = socket.AF_INET6 if ":" in header["address"] else socket.AF_INET
        self._listener = socket.create_server((header["address"], header.get("port", 0)), family=family, backlog=128)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._num_runs = 0
        self._record = str(header.get("record", ""))
        return {"port": self._listener.getsockname()[1], "token": self._token.hex()}

    def _do_run(self, header: Header, payload: bytes) -> Header:
        """Begin a run: its workers may come."""
        if self._run is not None:
            self._run.end()
        self._num_runs += 1
        self._run = _Run(self, self._num_runs, RunOptions(**header["options"]))
        waiting, self._waiting = self._waiting, []
        for peer, said, data in waiting:
            self._worker_said(peer, said, data, time.monotonic())
        return {"name": self._run.name, "run": self._num_runs}

    def _do_memory(self, header: Header, payload: bytes) -> Header:
        """Make the memory of the shards, or of workers that share it without any, for the leader to fill."""
        assert self._run is not None
        return {"names": self._run.make_memory(header["num_bytes"], header.get("shards", True))}

    def _do_go(self, header: Header, payload: bytes) -> Header | None:
        """Start the shards on memory that is filled; answered when they are ready."""
        assert self._run is not None
        if not self._run.shards:
            self._run.coordinator.start(header["version"], 0)
            return {}
        self._run.go = header
        self._run.start(pickle.loads(payload), header["version"])  # from the process that started this one
        return None

    def _do_options(self, header: Header, payload: bytes) -> Header:
        """Change options before the workers begin."""
        assert self._run is not None
        for name, value in header["options"].items():
            setattr(self._run.coordinator.options, name, value)
        return {}

    def _do_end(self, header: Header, payload: bytes) -> Header:
        if self._run is not None:
            self._run.end()
            self._run = None
        return {}

    def _do_shards(self, header: Header, payload: bytes) -> Header:
        return {"pids": [shard.pid for shard in self._run.shards] if self._run is not None else []}


def main() -> None:
    """Serve over the socket that was inherited as the given file descriptor."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # a terminal's Ctrl-C is for the workers; they end what is here
    sock = socket.socket(fileno=int(sys.argv[1]))
    Host(Buffered(sock)).serve()


if __name__ == "__main__":
    main()
