"""Ranks that are one worker between them: their process group, and the one line to the coordinator that they share.

All of a worker's ranks run the same program, and ask the coordinator the same questions in the same order. The first
rank asks, and tells the others what it has heard, be it an answer or an error; so all of them do the same with it, and
to the coordinator they are one worker. It hears of the others only that they live.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .client import Client, CoordinatorGoneError, LeaderLostError, RevokedError, RunFailedError
from .jobs import Address
from .mailbox import HostLostError
from .progress import Progress
from .wire import Header

_FOREVER = timedelta(days=365)  # the first may wait long for an answer; and whoever dies is heard of at once
_SMALL = 2040  # bytes of a message that need no second one
_ERRORS = {
    kind.__name__: kind for kind in (RunFailedError, CoordinatorGoneError, LeaderLostError, RevokedError, HostLostError)
}
# What lies in memory that all of them write or read must be written, or have been read, by all.
_AFTER_ALL = ("commit", "fetch", "write", "join", "release")

_Made = TypeVar("_Made")


class MateLostError(RuntimeError):
    """Another rank of this one's replica is gone, and with it the replica."""


class Together:
    """The process group of the ranks of one worker. It is the default one: these ranks are in no other.

    Args:
        store: Where they meet.
        column: This rank's place.
        num_columns: How many there are.
        patience: How long they wait for each other.

    Raises:
        MateLostError: If they don't all come.

    """

    def __init__(self, store: dist.Store, column: int, num_columns: int, patience: timedelta) -> None:
        self.column = column
        with _noticing_the_lost():
            dist.init_process_group("gloo", store=store, rank=column, world_size=num_columns, timeout=patience)
        self._group: dist.ProcessGroup | None = dist.group.WORLD
        dist.distributed_c10d._set_pg_timeout(_FOREVER, self._group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        if self._group is None:
            raise MateLostError("This replica's ranks have parted.")
        return self._group

    def part(self) -> None:
        """Hang up: whoever waits for this rank hears of it. May be called twice."""
        if self._group is not None:
            self._group = None
            if dist.is_initialized():
                dist.destroy_process_group()

    def tell(self, data: bytes = b"", source: int = 0) -> bytes:
        """Let all have what one of them has to say.

        Args:
            data: What it is; on the others it does not matter.
            source: Which one.

        """
        first = torch.zeros(8 + _SMALL, dtype=torch.uint8)
        if self.column == source:
            first[:8] = torch.tensor([len(data)]).view(torch.uint8)
            first[8 : 8 + len(data[:_SMALL])] = _bytes(data[:_SMALL])
        with _noticing_the_lost():
            dist.broadcast(first, source, self.group)
            size = int(first[:8].view(torch.int64))
            if size <= _SMALL:
                return bytes(first[8 : 8 + size].numpy())
            rest = _bytes(data[_SMALL:]) if self.column == source else torch.empty(size - _SMALL, dtype=torch.uint8)
            dist.broadcast(rest, source, self.group)
        return bytes(first[8:].numpy()) + bytes(rest.numpy())

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of these is true on any of the ranks. Nobody has the answer before all have come to ask."""
        votes = torch.tensor(flags or [False], dtype=torch.uint8)
        with _noticing_the_lost():
            dist.all_reduce(votes, dist.ReduceOp.MAX, self.group)
        return [bool(vote) for vote in votes[: len(flags)]]

    def equalize(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors by the first rank's."""
        with _noticing_the_lost():
            for tensor in tensors:
                data = tensor.contiguous().view(-1).view(torch.uint8)  # gloo knows neither bool nor channels last
                dist.broadcast(data, 0, self.group)
                tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _noticing_the_lost() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MateLostError):
            raise
        raise MateLostError(
            f"Another rank of this replica is gone, so this one leaves the run: {str(error).splitlines()[0]}"
        ) from error


class SharedClient(Client):
    """A line to the coordinator that the ranks of one worker share.

    Args:
        address: Of the job.
        worker: Number of the worker.
        run: Number of the run in its program.
        heartbeat: Seconds between signs of life.
        column: This rank's place in the worker.
        num_columns: How many ranks it has.
        patience: Seconds that they wait for each other at the beginning.

    """

    def __init__(
        self,
        address: Address,
        worker: int,
        run: int,
        heartbeat: float,
        column: int,
        num_columns: int,
        patience: float,
    ) -> None:
        self.together: Together | None = None
        self._column = column
        self._agreed = 0  # the last push of which all know that it is done
        wait = timedelta(seconds=patience)
        self._store: dist.Store | None = None
        self._hello: Header = {"op": "hello", "rank": worker, "run": run, "column": column}
        if column == 0:
            self._store = store = dist.TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False)
            self._hello["rendezvous"] = store.port
        super().__init__(address, worker, run, heartbeat)
        try:
            with _noticing_the_lost():
                if self._store is None:
                    port = int(self.welcome["rendezvous"])
                    self._store = dist.TCPStore("127.0.0.1", port, None, False, wait, wait_for_workers=False)
            meeting = dist.PrefixStore(str(self.generation), self._store)
            self.together = Together(meeting, column, num_columns, wait)
            self._begin(self._shared("hello", lambda: (self.welcome, b""))[0])
        except BaseException:
            self.close()
            raise

    def greet(self) -> None:
        """Begin a generation, all ranks together."""
        if self.together is None:
            self._begin(self._asked())
            return
        welcome, _ = self._shared("hello", lambda: (self._asked(), b""))
        if self._column:
            self._asked()  # the first is there, and this one is a part of it
        self._begin(welcome)

    def _begin(self, welcome: Header) -> None:
        self.welcome, self.generation = welcome, int(welcome["generation"])
        self.done = self._agreed = 0

    def _asked(self) -> Header:
        reply, _ = super().call(self._hello)
        if reply.get("over"):
            raise RunFailedError("This run has ended without this rank.")
        return reply

    def call(self, header: Header, payload: bytes = b"") -> tuple[Header, bytearray]:
        """Ask once, and have all hear the answer. All ranks of the worker call it, with the same question."""
        assert self.together is not None
        operation = str(header["op"])
        if operation in _AFTER_ALL:
            self.together.any([])
        ask = super().call
        reply, data = self._shared(operation, lambda: ask(header, payload))
        if "progress" in reply:
            self.progress = Progress.read(reply["progress"])
        return reply, bytearray(data)

    def wait_until_done(self, sequence: int) -> None:
        """Wait until all shards have applied one of this worker's pushes."""
        if sequence > self._agreed:
            wait = super().wait_until_done

            def ask() -> tuple[Header, bytes]:
                wait(sequence)
                return {}, b""

            self._shared("done", ask)
            self._agreed = sequence

    def in_turn(self, make: Callable[[], _Made]) -> _Made:
        """Make something; the others find what the first has made."""
        assert self.together is not None
        if self._column:
            self.together.any([])
            return make()
        made = make()
        self.together.any([])
        return made

    def _shared(self, operation: str, ask: Callable[[], tuple[Header, bytes | bytearray]]) -> tuple[Header, bytes]:
        """What the first rank is told, or the error that it meets, on all of them."""
        assert self.together is not None
        if self._column == 0:
            try:
                reply, payload = ask()
            except tuple(_ERRORS.values()) as error:
                self._tell({"op": operation, "error": type(error).__name__, "message": str(error)}, b"")
                raise
            self._tell({"op": operation, "reply": reply}, payload)
            return reply, bytes(payload)
        data = self.together.tell()
        size = int.from_bytes(data[:8], "little")
        said: dict[str, Any] = json.loads(data[8 : 8 + size])
        if said["op"] != operation:
            raise RuntimeError(
                f"The ranks of a replica have gone apart: the first asks for {said['op']!r}, and this one, rank"
                f" {self._column} of it, for {operation!r}. Whatever one of them does in a hook (reduce, broadcast,"
                " save a checkpoint, end an epoch), all of them must."
            )
        if "error" in said:
            raise _ERRORS[said["error"]](said["message"])
        return said["reply"], data[8 + size :]

    def _tell(self, said: Header, payload: bytes | bytearray) -> None:
        assert self.together is not None
        header = json.dumps(said).encode()
        self.together.tell(len(header).to_bytes(8, "little") + header + payload)

    def close(self) -> None:
        """Hang up, and part from the other ranks. May be called twice."""
        super().close()
        if self.together is not None:
            self.together.part()


__all__ = ["MateLostError", "SharedClient", "Together"]
