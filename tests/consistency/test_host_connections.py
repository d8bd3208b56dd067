"""The host's event loop, driven in this process by sockets that are ready before it looks."""

from __future__ import annotations

import selectors
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from squall.consistency import host as hosts
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


@pytest.mark.parametrize("where", ["waiting", "working"])
def test_workers_are_excused_for_as_long_as_the_host_stood_still(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A machine that sleeps wakes anywhere: nobody may be given up for a silence that was the host's own."""
    ours, theirs = socket.socketpair()
    host = Host(Buffered(theirs))
    seconds, heard, silences = [0.0], [], [0.0]

    def sleep() -> None:
        seconds[0] += 300.0

    class Run:
        peers = ()

        def excuse(self, time: float) -> None:
            silences[-1] -= time

        def look_after(self, now: float) -> None:
            silences.append(now + sum(silences))

        def end(self) -> None:
            pass

    def said(*_: Any) -> None:
        heard.append(True)
        if where == "working":
            sleep()
        host._parent = None

    def select(timeout: float) -> Any:
        if where == "waiting":
            sleep()
        return original(timeout)

    original = host._selector.select
    monkeypatch.setattr(host._selector, "select", select)
    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    host._run = Run()  # type: ignore[assignment]
    host.watch(host._parent, None)  # type: ignore[arg-type]
    host._selector.modify(theirs, selectors.EVENT_READ, (host._parent, SimpleNamespace(said=said)))
    Blocking(ours).send({"op": "alive"})
    host.serve()
    assert heard
    assert silences[-1] <= 0.0
    ours.close()
    theirs.close()
