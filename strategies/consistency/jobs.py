"""How the ranks of a job find each other: rank 0 listens and leaves word, the others look for it and ask."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from .addresses import resolve, served
from .hosting import HostProcess, get_host
from .wire import Header, connect

SECRET = "SQUALL_SECRET"
PORT = "SQUALL_PORT"
_LEAST_SECRET = 16
_HOW_TO_SHARE = (
    f"Set {SECRET} to the same random text on every host, for instance to what"
    " `python -c 'import secrets; print(secrets.token_hex(32))'` prints once, or give the hosts one home directory."
)
PATIENCE = 120.0  # seconds in which the ranks of a job must find each other


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
        return resolve(self.main_address)

    @property
    def port(self) -> int:
        """The job's own port; 0 if it is known by a name."""
        return self.main_port if isinstance(self.main_port, int) else 0

    @property
    def interface(self) -> str:
        """Where rank 0 listens. On many hosts their own name is a loopback address, which no other host could reach."""
        return self.address if self.num_nodes == 1 else served(self.main_address)

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


_opened: dict[Job, tuple[HostProcess, Address]] = {}


def open_job(job: Job) -> Address:
    """Listen for the workers of a job, and leave word for them; for all runs of this program, at the same place.

    Several hosts have to share something to find each other by: either the environment variable ``SQUALL_SECRET``, or
    the user's home directory, where a file that only the user can read has the job's random token.

    Args:
        job: As all ranks know it.

    """
    host = get_host()
    opened_by, found = _opened.get(job, (None, None))
    if found is None or opened_by is not host:
        found = _open(job, host)
    if job.agreed is None and job.port:
        # Held as under DDP: another job of the same port would leave its word where this one does.
        host.request({"op": "hold", "address": job.interface, "port": job.port})
    return found


def _open(job: Job, host: HostProcess) -> Address:
    for other in list(_opened):
        _forget(other)
    agreed = job.agreed
    request: Header = {"op": "open", "address": job.interface}
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
    _opened[job] = host, found
    if agreed is None:
        said = {"host": found.host, "port": found.port, "token": found.token.hex(), "opening": found.opening}
        _write(job.record, {**said, "pid": os.getpid(), "node": socket.gethostname()})
    return found


def give_port_back() -> None:
    """Let go of the job's own port, which what comes after ``fit`` may want: a process group does."""
    for host, _ in _opened.values():
        if host.is_ours:
            host.request({"op": "hold"})


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
    _, address = _opened.pop(job)
    record = _read(job.record)
    if record is not None and record["token"] == address.token.hex():  # and not another job's by now
        with contextlib.suppress(OSError):
            job.record.unlink()


@atexit.register  # after the import of hosting, so that this comes before the end of the host process
def _forget_all() -> None:
    for job in list(_opened):
        _forget(job)


def _write(path: Path, record: dict[str, Any]) -> None:
    if path.parent.name == ".squall":
        path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file)


def find_job(job: Job, timeout: float = PATIENCE) -> Address:
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
