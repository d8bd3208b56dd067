"""The host's event loop, driven in this process by sockets that are ready before it looks."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

from squall.consistency.host import Host
from squall.consistency.wire import Blocking, Buffered


def test_a_connection_ended_in_the_round_it_spoke_in_is_passed_over() -> None:
    """The end of a run hangs up on its workers, one of which may have said something in the same instant."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    parent, worker = (Buffered(sock) for sock in theirs)
    host = Host(parent)
    heard = []

    def hear(who: str, other: Buffered) -> Any:
        def said(*_: Any) -> None:
            heard.append(who)
            host.forget(other)
            host._parent = None  # and the loop is over

        return SimpleNamespace(said=said)

    # Whichever the system names first ends the other.
    host._selector.unregister(theirs[0])
    host.watch(parent, hear("parent", worker))
    host.watch(worker, hear("worker", parent))
    for sock in ours:
        Blocking(sock).send({"op": "alive"})
    host.serve()
    assert len(heard) == 1
    for sock in (*ours, *theirs):
        sock.close()
    host._selector.close()
