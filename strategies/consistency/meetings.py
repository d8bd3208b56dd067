"""Collectives of the ranks that live: meetings, where all wait for all, and a board, where nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from .wire import Header
from .worker import Worker

Answer = Callable[[Worker, Header, Header, bytes], Any]
Request = tuple[Worker, Header, bytes]
Said = tuple[int, Header, bytes]  # by which rank, and what

_MOST_KEPT_BYTES = 1 << 28  # of a meeting, for those who come late


class Meetings:
    """Who has come to which meeting, and what was said at those that are over.

    Args:
        answer: Answers a worker's request.

    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._open: dict[str, dict[int, Request]] = {}
        self._over: dict[str, tuple[Header, bytes]] = {}

    def come(self, worker: Worker, header: Header, payload: bytes) -> None:
        """A worker comes; if it is late, it hears what was said."""
        key = str(header["key"])
        if key in self._over:
            reply, data = self._over[key]
            self._answer(worker, header, {**reply, "late": True}, data)
            return
        self._open.setdefault(key, {})[worker.rank] = (worker, header, payload)

    def leave(self, worker: Worker) -> list[Header]:
        """A worker is lost; returns the requests that nobody will answer it any more."""
        left = []
        for arrived in self._open.values():
            if worker.rank in arrived and arrived[worker.rank][0] is worker:
                left.append(arrived.pop(worker.rank)[1])
        return left

    def end(self, is_complete: Callable[[set[int]], bool]) -> bool:
        """Hold the meetings that all have come to.

        Args:
            is_complete: Whether these ranks are all that have to come.

        Returns:
            Whether there were any.

        """
        ended = [key for key, arrived in self._open.items() if not arrived or is_complete(set(arrived))]
        for key in ended:
            self._hold(key, self._open.pop(key))
        return bool(ended)

    def _hold(self, key: str, arrived: dict[int, Request]) -> None:
        if not arrived:
            return
        order = [arrived[rank] for rank in sorted(arrived)]
        reply, data = in_parts([(worker.rank, {"value": header.get("value")}, said) for worker, header, said in order])
        if len(data) < _MOST_KEPT_BYTES:
            self._over[key] = (reply, data)
        for worker, header, _ in order:
            self._answer(worker, header, reply, data)


class Board:
    """Where workers leave values for the others."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[int, tuple[Header, bytes]]] = {}

    def share(self, worker: Worker, header: Header, payload: bytes, alive: Container[int]) -> tuple[Header, bytes]:
        """Leave a value, if there is one, and take everybody's latest.

        Args:
            worker: Who comes.
            header: ``key``, ``value``, and whether to ``write`` it.
            payload: Of the value.
            alive: Ranks whose values count.

        """
        entries = self._entries.setdefault(str(header["key"]), {})
        if header.get("write", True):
            entries[worker.rank] = ({"value": header.get("value")}, payload)
        return in_parts([(rank, *entries[rank]) for rank in sorted(entries) if rank in alive])


def in_parts(said: Sequence[Said]) -> tuple[Header, bytes]:
    """Several ranks' values as one message."""
    reply = {
        "parts": [{"rank": rank, **value} for rank, value, _ in said],
        "sizes": [len(data) for _, _, data in said],
    }
    return reply, b"".join(data for _, _, data in said)
