"""A host with shards that another host's coordinator commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .shard import Spec
from .supervisor import Loop, Shards
from .wire import Buffered, Header, WireError

_ALIVE_SECONDS = 2.0


class Outpost:
    """The end of a line to the coordinator's process, and the shards that it commands here.

    Args:
        loop: Looks after all connections.
        node: Rank of this host.
        run: Number of the run in its job.
        chief: The line.
        port: Where this host listens.
        on_enlisted: Hears once whether shards are wanted here.

    """

    def __init__(
        self, loop: Loop, node: int, run: int, chief: Buffered, port: int, on_enlisted: Callable[[Header], None]
    ) -> None:
        self.number = run
        self.shards: Shards | None = None
        self.is_over = False
        self._loop = loop
        self._node = node
        self._chief = chief
        self._on_enlisted: Callable[[Header], None] | None = on_enlisted
        self._on_go: Callable[[Header], None] | None = None
        self._last_alive = 0.0
        host = chief.sock.getsockname()[0]
        loop.watch(chief, self)
        self._tell({"op": "enlist", "node": node, "run": run, "host": host, "port": port})

    def _tell(self, header: Header) -> None:
        if not self.is_over:
            self._chief.send(header)
            self._loop.watch(self._chief)

    # ------------------------------------------------------------------ the coordinator

    def said(self, connection: Buffered, header: Header, payload: bytes, now: float) -> None:
        """Do what the coordinator's process says."""
        operation = header.get("op")
        if operation == "enlisted" and self.shards is None:
            wanted = bool(header["wanted"])
            if wanted:
                self.shards = Shards(self._loop, str(header["run"]), self._node, self._done, self._ready, self._failed)
            if self._on_enlisted is not None:
                self._on_enlisted({"wanted": wanted, "name": str(header["run"])})
                self._on_enlisted = None
            if not wanted:
                self.end()
        elif operation == "command" and self.shards is not None:
            self.shards.command(header["command"])
        elif operation == "rest":
            if self.shards is not None:
                self.shards.end()
        elif operation == "forget" and self.shards is not None:
            self.shards.forget(str(header["mailbox"]))
        else:
            raise WireError(f"the coordinator says {str(header)[:100]}")

    def gone(self, connection: Buffered, now: float) -> None:
        """The run is over, or can't be reached any more."""
        self.end()

    def _done(self, shard: int, command: int, numbers: list[float] | None) -> None:
        self._tell({"op": "done", "shard": shard, "command": command, "numbers": numbers})

    def _ready(self) -> None:
        self._tell({"op": "ready"})
        self._answer({})

    def _failed(self, message: str) -> None:
        sys.stderr.write(f"squall: {message}\n")
        self._tell({"op": "failed", "message": message})
        self._answer({"failed": message})

    def _answer(self, reply: Header) -> None:
        if self._on_go is not None:
            self._on_go(reply)
            self._on_go = None

    # ------------------------------------------------------------------ the worker that began it

    def start(self, spec: Spec, on_go: Callable[[Header], None]) -> None:
        """Start the shards on memory that is filled."""
        assert self.shards is not None
        self._on_go = on_go
        self.shards.start(spec)

    # ------------------------------------------------------------------ from time to time

    def look_after(self, now: float) -> None:
        """Do what is due."""
        if self.shards is None:
            return
        self.shards.look_after()
        if now - self._last_alive > _ALIVE_SECONDS:
            self._last_alive = now
            self._tell({"op": "alive"})

    def end(self) -> None:
        """Hang up, and leave nothing behind."""
        if self.is_over:
            return
        self.is_over = True
        self._loop.forget(self._chief)
        if self._on_enlisted is not None:
            self._on_enlisted({"failed": "The host of rank 0 has hung up."})
            self._on_enlisted = None
        self._answer({"failed": "The host of rank 0 has hung up."})
        if self.shards is not None:
            self.shards.end()


def check_carry(header: Header) -> tuple[int, str, int]:
    """Look at the form of a worker's wish for a porter.

    Returns:
        The run, the mailbox, the group.

    Raises:
        ValueError: If it makes no sense.

    """
    values: tuple[Any, ...] = header.get("run"), header.get("mailbox"), header.get("group")
    run, mailbox, group = values
    if type(run) is not int or not isinstance(mailbox, str) or type(group) is not int or len(mailbox) > 200:
        raise ValueError(f"a worker of another host says {str(header)[:100]}")
    return run, mailbox, group
