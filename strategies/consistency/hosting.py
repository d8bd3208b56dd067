"""Start the process beside the workers of a host, and find it from those that didn't start it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from .wire import Blocking, Header

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
        return reply

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


_host: HostProcess | None = None
_opened: dict[str, Address] = {}


def get_host() -> HostProcess:
    """The host process of this process, started if need be."""
    global _host
    if _host is None or not _host.is_ours:
        _host = HostProcess()
        _opened.clear()
    return _host


def _close() -> None:
    global _host
    host, _host = _host, None
    for job in list(_opened):
        _forget(job)
    for connection in list(_private):
        connection.close()
    if host is not None:
        host.close()


atexit.register(_close)  # on import, so that a launcher has waited for the other ranks before


@dataclass(frozen=True)
class Address:
    """Where a job's coordinator listens, and what it wants to be shown."""

    host: str
    port: int
    token: bytes


def open_job(job: str, address: str, port: int = 0, token: bytes = b"") -> Address:
    """Listen for the workers of a job, and leave word for those of this host.

    Args:
        job: What tells the job from others of this host, for instance its ``MASTER_PORT``.
        address: The interface that the job uses.
        port: Where to listen; 0 for any free one.
        token: The job's secret; empty to make one.

    """
    if job in _opened and _host is not None and _host.is_ours:
        return _opened[job]
    host = get_host()
    for other in list(_opened):
        _forget(other)
    record = str(_path(job))
    reply = host.request({"op": "open", "address": address, "port": port, "token": token.hex(), "record": record})
    found = Address(address, int(reply["port"]), bytes.fromhex(reply["token"]))
    _opened[job] = found
    _write(_path(job), {"host": found.host, "port": found.port, "token": found.token.hex(), "pid": os.getpid()})
    return found


def _forget(job: str) -> None:
    _opened.pop(job, None)
    with contextlib.suppress(OSError):
        _path(job).unlink()


def _path(job: str) -> Path:
    return Path(tempfile.gettempdir()) / f"squall-{os.getuid()}-{job}.json"


def _write(path: Path, record: dict[str, Any]) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file)


def find_job(job: str, timeout: float = 120.0) -> Address:
    """Wait for the word that :func:`open_job` leaves on this host.

    Args:
        job: As there.
        timeout: Seconds.

    Raises:
        RuntimeError: If none is left in time.

    """
    deadline = time.monotonic() + timeout
    while True:
        record = _read(_path(job))
        if record is not None:
            return Address(str(record["host"]), int(record["port"]), bytes.fromhex(record["token"]))
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"Local rank 0 has not opened the job {job!r} within {timeout:g} s: it has failed, or it runs under"
                " another user or with another TMPDIR."
            )
        time.sleep(0.02)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor) as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None  # somebody else's
        try:
            record = json.load(file)
        except ValueError:  # half written
            return None
    try:
        os.kill(int(record["pid"]), 0)
    except OSError:
        return None  # left behind by a program that is gone
    return record if isinstance(record, dict) else None
