"""A worker's line to the coordinator."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .hosting import keep_private
from .jobs import Address
from .mailbox import HostLostError
from .progress import Progress
from .values import decode, encode
from .wire import Blocking, Header, connect

_CONNECT_SECONDS = 10.0

_Made = TypeVar("_Made")


class RunFailedError(RuntimeError):
    """The run can't go on; the message says why."""


class CoordinatorGoneError(RunFailedError):
    """The process that coordinates the run has ended, or has begun with something else."""


class RevokedError(RuntimeError):
    """This worker was silent for longer than its lease, and counted as lost; it may join again."""


class LeaderLostError(RuntimeError):
    """Rank 0 is gone, and with it the run's logs and checkpoints."""


class Client:
    """Asks the coordinator, and hears from it.

    Args:
        address: Of the job.
        rank: This worker's.
        run: Number of the run in its program.
        heartbeat: Seconds between signs of life.

    """

    def __init__(self, address: Address, rank: int, run: int, heartbeat: float) -> None:
        self.address = address
        self.rank = rank
        self.run = run
        self.done = 0  # the last of this worker's pushes that all shards have applied
        self.progress: Progress | None = None  # the latest that was heard of
        self.generation = 0
        self.welcome: Header = {}
        self._heartbeat = heartbeat
        self._replies: dict[int, tuple[Header, bytearray]] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._heard = threading.Condition()
        self._is_reading = False
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._connection = self._connect()
        self.greet()
        self._thread = threading.Thread(target=self._beat, name="squall-heartbeat", daemon=True)
        self._thread.start()

    def _connect(self) -> Blocking:
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                return keep_private(connect((self.address.host, self.address.port), self.address.token))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def greet(self) -> None:
        """Begin a generation."""
        self.welcome, _ = self.call({"op": "hello", "rank": self.rank, "run": self.run})
        self.done = 0  # what the generation before has pushed was announced before the welcome
        if self.welcome.get("over"):
            raise RunFailedError("This run has ended without this rank.")
        self.generation = int(self.welcome["generation"])

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat):
            try:
                with self._lock:
                    self._connection.send({"op": "alive"})
            except OSError:
                return  # whoever asks next hears of it

    def send(self, header: Header, payload: bytes = b"") -> int:
        """Ask for something; :meth:`wait` brings the answer.

        Returns:
            What to wait for.

        """
        with self._lock:
            self._next += 1
            self._connection.send({**header, "id": self._next}, payload)
            return self._next

    def wait(self, request: int) -> tuple[Header, bytearray]:
        """Wait for an answer.

        Raises:
            RunFailedError: If the run can't go on.
            RevokedError: If this worker was given up.
            HostLostError: If shards are somewhere else since this worker joined.
            ConnectionError: If the coordinator is gone.

        """
        self._hear_until(lambda: request in self._replies)
        reply, payload = self._replies.pop(request)
        if "failed" in reply:
            raise RunFailedError(str(reply["failed"]))
        if reply.get("revoked"):
            raise RevokedError("this worker was silent for longer than its lease")
        if reply.get("moved"):
            raise HostLostError("shards are somewhere else by now")
        if "progress" in reply:
            self.progress = Progress.read(reply["progress"])
        return reply, payload

    def call(self, header: Header, payload: bytes = b"") -> tuple[Header, bytearray]:
        """Ask, and wait for the answer."""
        try:
            return self.wait(self.send(header, payload))
        except HostLostError:
            raise
        except ConnectionError as error:
            raise _gone(error) from error

    def wait_until_done(self, sequence: int) -> None:
        """Wait until all shards have applied one of this worker's pushes."""
        try:
            self._hear_until(lambda: self.done >= sequence)
        except ConnectionError as error:
            raise _gone(error) from error

    def _hear_until(self, is_met: Callable[[], bool]) -> None:
        """Listen, unless another thread does, until what was waited for has come."""
        with self._heard:
            while not is_met():
                if self._is_reading:
                    self._heard.wait()
                    continue
                self._is_reading = True
                self._heard.release()
                try:
                    message = self._connection.receive()
                finally:
                    self._heard.acquire()
                    self._is_reading = False
                    self._heard.notify_all()
                self._take(*message)

    def _take(self, header: Header, payload: bytearray) -> None:
        if "re" in header:
            self._replies[int(header["re"])] = (header, payload)
        elif "failed" in header:
            raise RunFailedError(str(header["failed"]))
        elif "done" in header:
            self.done = max(self.done, int(header["done"]))

    def in_turn(self, make: Callable[[], _Made]) -> _Made:
        """Make something; where ranks share a line, the first makes what the others then find."""
        return make()

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._closed.set()
        if self._pid == os.getpid():
            self._connection.close()
            if self._thread is not threading.current_thread():
                self._thread.join(5.0)

    # ------------------------------------------------------------------ collectives

    def meet(self, key: str, kind: str, value: Any) -> dict[int, Any]:
        """Exchange values with all live workers.

        Returns:
            Everybody's value, by rank.

        """
        said, blob = encode(value)
        return _parts(*self.call({"op": "meet", "key": key, "kind": kind, "value": said}, blob))

    def share(self, key: str, value: Any, write: bool = True) -> dict[int, Any]:
        """Leave a value for the others, and take what they have left; nobody waits."""
        said, blob = encode(value) if write else (None, b"")
        return _parts(*self.call({"op": "share", "key": key, "value": said, "write": write}, blob))


def _gone(error: ConnectionError) -> CoordinatorGoneError:
    return CoordinatorGoneError(
        f"The run has ended without this rank: the process that coordinates it is gone ({error})."
    )


def _parts(reply: Header, payload: bytearray) -> dict[int, Any]:
    values, at = {}, 0
    view = memoryview(payload)
    for part, size in zip(reply["parts"], reply["sizes"], strict=True):
        values[int(part["rank"])] = decode(part["value"], bytes(view[at : at + size]))
        at += size
    return values
