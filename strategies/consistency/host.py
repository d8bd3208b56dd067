"""The process beside the workers of a host: it coordinates the run, and starts, watches and restarts the shards.

It lives outside the workers, so that none of them is missed. It runs no user code; the shards, which do, are forked
from it within milliseconds, since it has imported all that they need and holds nothing else: no thread, no device.
``python -m squall.consistency.host`` is started by :mod:`squall.consistency.hosting`, over a socket of its own.

On the host of rank 0 it coordinates. On another host it is an outpost, which the first one commands.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
from typing import Any

import torch  # noqa: F401  (shards are forked with it)

from .coordinator import RunOptions
from .events import unpack
from .hosting import KILL_WAIT
from .outpost import Outpost, check_carry
from .requests import check_request
from .run import Run
from .supervisor import Shards
from .wire import Buffered, Header, WireError, connect, new_token

_STOPPED_SECONDS = 2.0  # between two looks at the clock, of which there are two a second
_ORPHAN_SECONDS = 120.0  # that a run may go on after the process that began it is gone
_SILENT_SECONDS = 10.0  # that a connection may take to show the token and say something
_CONNECT_SECONDS = 30.0
_PART_OF_WAIT = 0.6  # of the time between SLURM's SIGTERM and its SIGKILL, after which nothing is attached to any more


class _Parent:
    """What is heard of the process that started this one."""

    def __init__(self, host: Host) -> None:
        self.said = host.parent_said
        self.gone = host.parent_gone


class _Visitor:
    """What is heard of those who connect: workers, and other hosts."""

    def __init__(self, host: Host) -> None:
        self.said = host.visitor_said
        self.gone = host.visitor_gone


class Host:
    """The event loop.

    Args:
        parent: The process that started this one.

    """

    def __init__(self, parent: Buffered) -> None:
        self._selector = selectors.DefaultSelector()
        self._parent: Buffered | None = parent
        self._listener: socket.socket | None = None
        self._held: socket.socket | None = None  # listens only to hold its port
        self._token = b""
        self._run: Run | None = None
        self._outpost: Outpost | None = None
        self._num_runs = 0
        self._opening = ""
        self._waiting: list[tuple[Buffered, Header, bytes]] = []  # workers that are ahead of the leader
        self._deadlines: dict[Buffered, float] = {}  # of those that have not shown the token
        self._orphaned = 0.0
        self._killed_at = math.inf  # soon after, SLURM kills all processes of the job at once
        self._record = ""  # the file that tells workers where to find this process
        self._visitor = _Visitor(self)
        self.watch(parent, _Parent(self))

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
        if self._held is not None:
            self._held.close()

    # ------------------------------------------------------------------ the loop

    def expect_kill(self, seconds: float) -> None:
        """SLURM has said that the job is over; whatever it still has to save, it has so long for."""
        self._killed_at = min(self._killed_at, time.monotonic() + seconds)

    def serve(self) -> None:
        """Until the process that started this one is gone, and its run has come to its end."""
        before = time.monotonic()
        while not self._is_over():
            ready = self._selector.select(timeout=0.5)
            before = self._excuse_since(before)
            for key, events in ready:
                if key.data is None:
                    if key.fileobj is self._listener:  # and not one that was closed in this round
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
            before = now = self._excuse_since(before)
            for connection in [c for c, deadline in self._deadlines.items() if deadline < now]:
                self.forget(connection)
            for part in (self._run, self._outpost):
                if part is not None:
                    part.look_after(now)
            if now > self._killed_at and self._shards is not None:
                self._shards.unlink()  # nobody will be left to do so
        for part in (self._run, self._outpost):
            if part is not None:
                part.end()
        self._drop_record()

    def _excuse_since(self, before: float) -> float:
        """Give all that nobody could be heard for, if this process stood still, and perhaps the whole host.

        Args:
            before: When it last looked at the clock.

        Returns:
            The time now.

        """
        now = time.monotonic()
        if now - before > _STOPPED_SECONDS and self._run is not None:
            self._run.excuse(now - before)
        return now

    def _drop_record(self) -> None:
        """Remove what the process that started this one would have, had it not been killed."""
        with contextlib.suppress(OSError, ValueError):
            with open(self._record) as file:
                ours = json.load(file).get("token") == self._token.hex()
            if ours:
                os.unlink(self._record)

    def _is_over(self) -> bool:
        if self._parent is not None or (self._outpost is not None and not self._outpost.is_over):
            return False
        run = self._run
        return run is None or not run.peers or time.monotonic() > self._orphaned + _ORPHAN_SECONDS

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            connection = Buffered(sock, self._token)
            self._deadlines[connection] = time.monotonic() + _SILENT_SECONDS
            self.watch(connection, self._visitor)

    def _read(self, connection: Buffered, who: Any) -> None:
        now = time.monotonic()
        try:
            for header, payload in connection.receive():
                self._deadlines.pop(connection, None)
                who.said(connection, header, payload, now)
        except Exception as error:  # whatever it is: one peer's fault is no end of the others' run
            if isinstance(error, (WireError, ValueError)):
                sys.stderr.write(f"squall: a connection was dropped: {error}\n")
            elif not isinstance(error, ConnectionError):
                sys.stderr.write(f"squall: a connection was dropped:\n{traceback.format_exc()}")
            self.forget(connection)
            who.gone(connection, now)

    # ------------------------------------------------------------------ workers, and other hosts

    def visitor_said(self, peer: Buffered, header: Header, payload: bytes, now: float) -> None:
        """Take one message of whoever has shown the token."""
        run = self._run
        post = None if run is None else run.post_of(peer)
        if post is not None and run is not None:
            run.post_said(post, header, now)
            return
        operation = header.get("op")
        if operation == "which":
            peer.send({"opening": self._opening})
            self.watch(peer)
            return
        if operation == "carry":
            self._carry(peer, header)
            return
        if operation != "enlist":
            operation = check_request(header)
        if operation in ("hello", "enlist"):
            number = header.get("run")
            if type(number) is not int:
                raise ValueError(f"{operation!r} to run {str(number)[:40]}")
            if number > self._num_runs:
                self._waiting.append((peer, header, payload))
                return
            if run is None or run.rests or number < self._num_runs:
                peer.send({"re": header.get("id"), "over": True})
                return
        if run is not None and operation == "enlist":
            run.enlist(peer, header, now)
        elif run is not None:
            run.worker_said(peer, header, payload, now)

    def visitor_gone(self, peer: Buffered, now: float) -> None:
        """A connection has ended."""
        self._waiting = [item for item in self._waiting if item[0] is not peer]
        run = self._run
        if run is None:
            return
        post = run.post_of(peer)
        if post is not None:
            run.post_gone(post)
        else:
            run.worker_gone(peer, now)

    def _carry(self, peer: Buffered, header: Header) -> None:
        number, mailbox, group = check_carry(header)
        outpost, run = self._outpost, self._run
        if outpost is not None and outpost.number == number and outpost.shards is not None:
            outpost.shards.carry(peer, mailbox, group)
        elif run is not None and run.number == number:
            run.shards.carry(peer, mailbox, group)
        else:
            raise ValueError(f"a worker of another host looks for run {number}")

    # ------------------------------------------------------------------ the process that started this one

    def reply(self, header: Header, values: Header) -> None:
        """Answer it."""
        if self._parent is not None:
            self._parent.send({"re": header["id"], **values})
            self.watch(self._parent)

    def parent_gone(self, connection: Buffered, now: float) -> None:
        """It has ended: the run may come to its end without it."""
        self._parent = None
        self._orphaned = now

    def parent_said(self, connection: Buffered, header: Header, payload: bytes, now: float) -> None:
        """Do what it asks for."""
        operation = header["op"]
        try:
            values = getattr(self, f"_do_{operation}")(header, payload)
        except Exception as error:
            values = {"failed": str(error)}
        if values is not None:
            self.reply(header, values)

    def _do_open(self, header: Header, payload: bytes) -> Header:
        """Listen for workers of a job that hold its token."""
        self._token = bytes.fromhex(header["token"]) if header.get("token") else new_token()
        self._num_runs = 0
        self._record = str(header.get("record", ""))
        self._opening = os.urandom(8).hex()
        for peer, _, _ in self._waiting:  # for a run of the job that was here before
            self.forget(peer)
        self._waiting.clear()
        port = self._listen(header["address"], header.get("port", 0))
        return {"port": port, "token": self._token.hex(), "opening": self._opening}

    def _listen(self, address: str, port: int) -> int:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        self._listener = _served(address, port)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        return int(self._listener.getsockname()[1])

    def _do_hold(self, header: Header, payload: bytes) -> Header:
        """Keep others from a port, if it is free, until the next such request."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if "port" in header:
            with contextlib.suppress(OSError):  # a launcher's own store may listen there
                self._held = _served(header["address"], header["port"])
        return {}

    def _do_run(self, header: Header, payload: bytes) -> Header:
        """Begin a run: its workers may come. A schedule comes as the payload."""
        if self._run is not None:
            self._run.end()
        self._num_runs += 1
        options = RunOptions(**header["options"], schedule=unpack(payload) if payload else None)
        self._run = Run(self, self._num_runs, options, header.get("num_nodes", 1), header.get("name", ""))
        waiting, self._waiting = self._waiting, []
        for peer, said, data in waiting:
            self.visitor_said(peer, said, data, time.monotonic())
        return {"name": self._run.name, "run": self._num_runs}

    def _do_enlist(self, header: Header, payload: bytes) -> None:
        """Offer this host's help to the coordinator of a job; answered when it has said whether it wants it."""
        if self._outpost is not None:
            self._outpost.end()
        self._token = bytes.fromhex(header["token"])
        line = connect((header["address"], header["port"]), self._token, _CONNECT_SECONDS)
        port = self._listen(line.sock.getsockname()[0], 0)
        self._outpost = Outpost(
            self, header["node"], header["run"], Buffered(line.sock), port, lambda reply: self.reply(header, reply)
        )

    @property
    def _shards(self) -> Shards | None:
        """Those of this host, wherever they are coordinated."""
        if self._run is not None:
            return self._run.shards
        return None if self._outpost is None else self._outpost.shards

    def _do_memory(self, header: Header, payload: bytes) -> Header:
        """Make the memory of the shards, or of workers that share it without any, for a worker to fill."""
        shards = self._shards
        assert shards is not None
        num_bytes = header["num_bytes"]
        first = header.get("first", 0)
        indices = range(first, first + len(num_bytes))
        if header.get("is_left"):  # by a host process that was lost
            return {"names": shards.take_over_memory(indices)}
        return {"names": shards.make_memory(indices, num_bytes, header.get("num_served", len(num_bytes)))}

    def _do_go(self, header: Header, payload: bytes) -> None:
        """Start the shards on memory that is filled; answered when they are ready."""
        spec = pickle.loads(payload) if payload else None  # from the process that started this one
        if self._run is not None:
            self._run.start(spec, header["version"], lambda reply: self.reply(header, reply))
        else:
            assert self._outpost is not None
            assert spec is not None
            self._outpost.start(spec, lambda reply: self.reply(header, reply))

    def _do_kept(self, header: Header, payload: bytes) -> Header:
        """The memory that is kept for other hosts' shards holds another version now."""
        assert self._run is not None
        self._run.kept(header["version"])
        return {}

    def _do_rest(self, header: Header, payload: bytes) -> Header:
        """The run has come to its end; its workers may still want to talk."""
        if self._run is not None:
            self._run.rest()
        return {}

    def _do_end(self, header: Header, payload: bytes) -> Header:
        if self._run is not None:
            self._run.end()
            self._run = None
        return {}

    def _do_shards(self, header: Header, payload: bytes) -> Header:
        shards = self._shards
        return {"pids": [shard.pid for shard in shards.processes] if shards is not None else []}


def _served(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=128)


def main() -> None:
    """Serve over the socket that was inherited as the given file descriptor."""
    # A terminal's Ctrl-C is for the workers, and so is what SLURM sends to all processes of a job when its time is up:
    # they end what is here.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    host = Host(Buffered(socket.socket(fileno=int(sys.argv[1]))))
    if KILL_WAIT in os.environ:
        seconds = _PART_OF_WAIT * float(os.environ[KILL_WAIT])
        signal.signal(signal.SIGTERM, lambda *_: host.expect_kill(seconds))
    host.serve()


if __name__ == "__main__":
    main()
