"""Start the process beside the workers of a host, and end it."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import weakref

from lightning.fabric.utilities.exceptions import MisconfigurationException

from .memory import Segment, host_prefix
from .wire import Blocking, Header

KILL_WAIT = "SQUALL_KILL_WAIT"  # seconds that SLURM leaves a job between SIGTERM and SIGKILL
_private: weakref.WeakSet[Blocking] = weakref.WeakSet()


def keep_private(connection: Blocking) -> Blocking:
    """Close a connection in forked children: while one of them holds it, nobody notices that this process is gone."""
    _private.add(connection)
    return connection


def _close_in_child() -> None:
    for connection in list(_private):
        with contextlib.suppress(OSError):
            os.close(connection.sock.detach())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class HostProcess:
    """This process's end of the host process that it started.

    It is kept for all runs of a program: starting it takes seconds of imports.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            # Shards find the user's modules where this process does, and use their host's core alone.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "squall.consistency.host", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._connection = keep_private(Blocking(ours))
        self._lock = threading.Lock()
        self._next = 0
        self._owner = os.getpid()
        self._run = ""

    @property
    def is_ours(self) -> bool:
        """Whether it lives, and was started by this very process, not by one that it was forked from."""
        return self._owner == os.getpid() and self.process.poll() is None

    def request(self, header: Header, payload: bytes = b"") -> Header:
        """Ask for something, and wait for the answer.

        Raises:
            RuntimeError: If it can't be done.

        """
        with self._lock:
            self._next += 1
            try:
                self._connection.send({**header, "id": self._next}, payload)
                while True:
                    reply, _ = self._connection.receive()
                    if reply.get("re") == self._next:
                        break
            except ConnectionError:
                raise RuntimeError(
                    "The process that coordinates the run has ended"
                    f" (exit code {self.process.poll()}); what it wrote is above."
                ) from None
        if "failed" in reply:
            raise MisconfigurationException(str(reply["failed"]))
        if header["op"] in ("run", "enlist"):
            self._run = host_prefix(str(reply["name"]), int(header.get("node", 0)))
        return reply

    def clean_up(self) -> None:
        """Remove what it left in shared memory, should it have been killed."""
        if self.process.poll() is not None and self._run:
            for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ():
                if name.startswith(f"{self._run}-"):
                    Segment.unlink(name)

    def close(self) -> None:
        """Let it end."""
        if self._owner != os.getpid():
            return
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10.0)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.clean_up()


_host: HostProcess | None = None


def get_host() -> HostProcess:
    """The host process of this process, started if need be."""
    global _host
    if _host is None or not _host.is_ours:
        tidy()
        _host = HostProcess()
    return _host


def is_host_lost(patience: float) -> bool:
    """Whether the host process of this process has ended, or does so in some seconds."""
    if _host is None or _host._owner != os.getpid():
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        _host.process.wait(patience)
    return _host.process.poll() is not None


def replace_host() -> HostProcess:
    """Start another host process in place of a lost one, whose memory is left for it."""
    global _host
    _host = HostProcess()
    return _host


def tidy() -> None:
    """Leave nothing behind of a host process that was killed."""
    if _host is not None and _host._owner == os.getpid():
        _host.clean_up()


def rest() -> None:
    """The run of this process has come to its end: let its shards end, and give its memory back."""
    if _host is not None and _host.is_ours:
        with contextlib.suppress(RuntimeError):  # it was killed just now
            _host.request({"op": "rest"})


def _close() -> None:
    global _host
    host, _host = _host, None
    for connection in list(_private):
        connection.close()
    if host is not None:
        host.close()


atexit.register(_close)  # on import, so that a launcher has waited for the other ranks before
