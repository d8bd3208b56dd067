"""Start the process beside the workers of a host, and find it from those that didn't start it."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from .memory import Segment, host_prefix
from .wire import Blocking, Header, connect

SECRET = "SQUALL_SECRET"
PORT = "SQUALL_PORT"
_LEAST_SECRET = 16
_HOW_TO_SHARE = (
    f"Set {SECRET} to the same random text on every host, for instance to what"
    " `python -c 'import secrets; print(secrets.token_hex(32))'` prints once, or give the hosts one home directory."
)
_PATIENCE = 120.0

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
_opened: dict[Job, Address] = {}


def get_host() -> HostProcess:
    """The host process of this process, started if need be."""
    global _host
    if _host is None or not _host.is_ours:
        tidy()
        _host = HostProcess()
        _opened.clear()
    return _host


def tidy() -> None:
    """Leave nothing behind of a host process that was killed."""
    if _host is not None and _host._owner == os.getpid():
        _host.clean_up()


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
    """Where a job's coordinator listens, and what it wants to be shown.

    Args:
        host: Its address.
        port: Its port.
        token: The job's secret.
        opening: What tells this job from earlier ones at the same place.

    """

    host: str
    port: int
    token: bytes
    opening: str = ""


@dataclass(frozen=True)
class Job:
    """What ranks know of their job before they have found each other, as a launcher has set it.

    Args:
        main_address: Of the host of rank 0.
        main_port: What tells the job from others of this host.
        num_nodes: Hosts that take part.

    """

    main_address: str = "127.0.0.1"
    main_port: int | str = 0
    num_nodes: int = 1

    @property
    def address(self) -> str:
        """The interface that the job uses: one host's ranks need none but loopback."""
        if self.num_nodes == 1:
            return "127.0.0.1"
        return str(socket.getaddrinfo(self.main_address, None, type=socket.SOCK_STREAM)[0][4][0])

    @property
    def port(self) -> int:
        """The job's own port; 0 if it is known by a name."""
        return self.main_port if isinstance(self.main_port, int) else 0

    @property
    def interface(self) -> str:
        """Where rank 0 listens. On many hosts their own name is a loopback address, which no other host could reach."""
        resolved = self.address
        named = self.main_address not in ("localhost", resolved)
        if self.num_nodes > 1 and named and ipaddress.ip_address(resolved).is_loopback:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(("192.0.2.1", 9))  # sends nothing; the system says which interface it would take
                return str(probe.getsockname()[0])
        return resolved

    @property
    def agreed(self) -> Address | None:
        """Where several hosts meet that have been told the same secret; None if they were told none."""
        secret = os.environ.get(SECRET, "")
        if self.num_nodes == 1 or not secret:
            return None
        if len(secret) < _LEAST_SECRET:
            raise MisconfigurationException(
                f"{SECRET} has {len(secret)} characters, which can be guessed. {_HOW_TO_SHARE}"
            )
        port = int(os.environ.get(PORT, int(self.main_port) + 1))
        return Address(self.address, port, hashlib.sha256(secret.encode()).digest())

    @property
    def record(self) -> Path:
        """The file that says where the coordinator is: of this host, or of all that share a home."""
        if self.num_nodes == 1:
            return Path(tempfile.gettempdir()) / f"squall-{os.getuid()}-{self.main_port}.json"
        name = f"{self.main_address}-{self.main_port}".replace(os.sep, "_")
        return Path.home() / ".squall" / f"{name}.json"


def open_job(job: Job) -> Address:
    """Listen for the workers of a job, and leave word for them.

    Several hosts have to share something to find each other by: either the environment variable ``SQUALL_SECRET``, or
    the user's home directory, where a file that only the user can read has the job's random token.

    Args:
        job: As all ranks know it.

    """
    known = job in _opened and _host is not None and _host.is_ours
    agreed = job.agreed
    if known and agreed is not None:
        return _opened[job]
    host = get_host()
    for other in list(_opened):
        if not known:
            _forget(other)
    # The job's own port is held meanwhile, as under DDP: another job of the same port would have the same record.
    request: Header = {"op": "open", "address": job.interface, "same": known, "preferred": job.port}
    if agreed is not None:
        request |= {"port": agreed.port, "token": agreed.token.hex()}
    else:
        request["record"] = str(job.record)
    try:
        reply = host.request(request)
    except MisconfigurationException as error:
        raise MisconfigurationException(
            f"Rank 0 can't listen on {job.interface}, port {request.get('port', 'any')}: {error}. Set MASTER_ADDR to an"
            f" address of rank 0's host, and {PORT} to a port that is free there."
        ) from error
    found = Address(job.interface, int(reply["port"]), bytes.fromhex(reply["token"]), str(reply["opening"]))
    _opened[job] = found
    if agreed is None:
        _leave_word(job, found)
    return found


def _leave_word(job: Job, address: Address) -> None:
    said = {"host": address.host, "port": address.port, "token": address.token.hex(), "opening": address.opening}
    _write(job.record, {**said, "pid": os.getpid(), "node": socket.gethostname()})


def give_port_back() -> None:
    """Listen on another port than the jobs' own, which what comes after ``fit`` may want: a process group does."""
    if _host is None or not _host.is_ours:
        return
    for job, address in list(_opened.items()):
        if job.agreed is None and address.port == job.port:
            reply = _host.request({"op": "open", "address": job.interface, "same": True})
            _opened[job] = moved = replace(address, port=int(reply["port"]))
            _leave_word(job, moved)


def enlist(address: Address, node: int, run: int) -> bool:
    """Offer this host's help to a job's coordinator, for the memory and the processes of shards.

    Args:
        address: Where it is.
        node: Rank of this host.
        run: Number of the run in its job.

    Returns:
        Whether shards are wanted here.

    """
    request = {"op": "enlist", "address": address.host, "port": address.port, "token": address.token.hex()}
    return bool(get_host().request({**request, "node": node, "run": run})["wanted"])


def _forget(job: Job) -> None:
    address = _opened.pop(job)
    record = _read(job.record)
    if record is not None and record["token"] == address.token.hex():  # and not another job's by now
        with contextlib.suppress(OSError):
            job.record.unlink()


def _write(path: Path, record: dict[str, Any]) -> None:
    if path.parent.name == ".squall":
        path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file)


def find_job(job: Job, timeout: float = _PATIENCE) -> Address:
    """Wait for the word that :func:`open_job` leaves.

    Args:
        job: As there.
        timeout: Seconds.

    Raises:
        RuntimeError: If none is left in time.

    """
    agreed = job.agreed
    deadline = time.monotonic() + timeout
    while True:
        address = agreed
        if address is None:
            record = _read(job.record)
            if record is not None:
                token, opening = bytes.fromhex(record["token"]), str(record["opening"])
                address = Address(str(record["host"]), int(record["port"]), token, opening)
        if address is not None:
            address = _ask(address)  # what was found may be of another job, which is over
        if address is not None:
            return address
        if time.monotonic() > deadline:
            if job.num_nodes > 1:
                raise RuntimeError(
                    f"Rank 0 has not opened the job at {job.main_address}:{job.main_port} within {timeout:g} s, or left"
                    f" word where this host can't read it. {_HOW_TO_SHARE}"
                )
            raise RuntimeError(
                f"Local rank 0 has not opened the job {job.main_port!r} within {timeout:g} s: it has failed, or it runs"
                " under another user or with another TMPDIR."
            )
        time.sleep(0.02)


def _ask(address: Address) -> Address | None:
    """Ask what job an address is of; None if nobody is there."""
    try:
        line = connect((address.host, address.port), address.token, timeout=5.0)
        line.sock.settimeout(5.0)
        try:
            line.send({"op": "which"})
            return replace(address, opening=str(line.receive()[0]["opening"]))
        finally:
            line.close()
    except OSError:
        return None


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
        if record.get("node") == socket.gethostname():
            os.kill(int(record["pid"]), 0)
    except OSError:
        return None  # left behind by a program that is gone
    return dict(record)
