"""A run is recorded, and repeated by workers that come in another order. Scripted; and a million events over a wire."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from squall.consistency.client import Client
from squall.consistency.events import KINDS, EventLog, from_pairs, num_ranks, pack, to_code, to_pairs, unpack

from .loops import LoopInAThread
from .scripted import Asked, ScriptedRun

NUM_EVENTS = 1_000_000


def work(run: ScriptedRun, rank: int, stops_after: int, seen: list[Any]) -> Iterator[Asked]:
    """A worker that trains until its data ends, and shows others what it does; the leader looks at it all, and stops.

    Args:
        run: To work in.
        rank: Of this worker.
        stops_after: Updates of the leader's own after which it ends the run.
        seen: What anybody could make something of.

    """
    fetch = run.fetch(rank)
    yield fetch
    base, number = fetch["version"], 0
    while True:
        lease = run.lease(rank, last=True)
        yield lease
        if "end" in lease:
            break
        header = {"slot": 0, "base": base, "absent": [], "tickets": [lease["ticket"]], "buffers": True}
        push = run.ask(rank, "commit", f"<{rank}: {number}>".encode(), **header)
        yield push
        if "finished" in push:
            continue
        base, number = push["version"], number + 1
        share = run.ask(rank, "share", key="loss", value=number)
        yield share
        seen.append((rank, "share", [(part["rank"], part["value"]) for part in share["parts"]]))
        if rank == 0 and number % 2 == 0:
            shot = run.ask(0, "snapshot")
            yield shot
            run.ask(0, "release")
            buffers = run.ask(0, "buffers")
            yield buffers
            write = run.ask(0, "write", buffer=0)  # what was seen is made something of
            yield write
            seen.append((0, "validation", shot["version"], buffers.payload, write["version"]))
        if rank == 0 and number == stops_after:
            break
    yield run.ask(rank, "leave")


def race(order: list[int], stops_after: int, max_steps: int, schedule: Any = None) -> tuple[list[Any], ...]:
    """Let three workers run, woken in this order.

    Returns:
        The events; who applied what with which staleness; and what each saw, in its order.

    """
    options = {"schedule": None if schedule is None else from_pairs(schedule), "max_steps": max_steps}
    run = ScriptedRun(3, options=options).begin(*[1] * 12)
    seen: list[Any] = []
    workers: dict[int, Iterator[Asked]] = {rank: work(run, rank, stops_after, seen) for rank in range(3)}
    asked: dict[int, Asked] = {}

    def go_on(rank: int) -> None:
        if rank in workers and not (rank in asked and asked[rank].waits):
            try:
                asked[rank] = next(workers[rank])
            except StopIteration:
                del workers[rank]

    for rank in [*order, *[0, 1, 2] * 60]:
        go_on(rank)
    assert not workers, "it hangs"
    updates = [(c["mailbox"], c["staleness"], c["version"]) for c in run.commands if c["op"] == "apply"]
    return run.events, updates, sorted(seen, key=lambda item: item[0])


RACES = st.lists(st.integers(0, 2), max_size=60)


@example(first=[0, *[1] * 3, *[2] * 6, *[1] * 3, 2, 1, 2, 0, 0, 0, 2, 2], second=[], stops_after=1, max_steps=5)
@given(first=RACES, second=RACES, stops_after=st.integers(1, 20), max_steps=st.sampled_from([-1, 5]))
@settings(max_examples=80, deadline=None)
def test_a_schedule_repeats_all_that_could_be_seen(
    first: list[int], second: list[int], stops_after: int, max_steps: int
) -> None:
    events, updates, seen = race(first, stops_after, max_steps)
    assert sum(kind == "commit" for kind, _ in events) > 0
    assert race(second, stops_after, max_steps, events) == (events, updates, seen)


@given(first=RACES, second=RACES)
@settings(max_examples=30, deadline=None)
def test_a_schedule_of_a_run_that_nobody_looked_at_lets_one_look(first: list[int], second: list[int]) -> None:
    """A run is repeated to see what went wrong in it; and early schedules have events of updates alone."""
    events, updates, _ = race(first, 20, -1)
    bare = [event for event in events if event[0] in ("lease", "end", "commit", "fetch", "lost")]
    assert race(second, 20, -1, bare)[1] == updates


def test_a_schedule_passes_over_the_events_of_the_dead() -> None:
    schedule = from_pairs([["lease", 1], ["commit", 1], ["lease", 0], ["commit", 0]])
    run = ScriptedRun(2, options={"schedule": schedule}).begin(1, 1)
    lease = run.lease(0)
    assert lease.waits
    run.lose(1)
    assert run.commit(0, 0, lease["ticket"])["version"] == 1
    assert run.commit(0, 1, run.lease(0)["ticket"])["version"] == 2  # after the last event, anybody


# ---------------------------------------------------------------------- another run's schedule


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([["commit", 1]], "event 0 is 'commit' of rank 1, but rank 1 asks for 'lease'"),
        ([["lost", 0]], "event 0 is 'lost' of rank 0, but rank 0 asks for 'lease'"),
        ([["lease", 5]], "event 0 is 'lease' of rank 5, but rank 5 is not there"),
    ],
)
def test_a_schedule_of_another_run_ends_with_what_does_not_fit(schedule: Any, says: str) -> None:
    run = ScriptedRun(2, options={"schedule": from_pairs(schedule), "join_timeout": 60.0}).begin(1, 1)
    first = run.lease(0)
    run.now = 100.0  # rank 1 computes for long: it may do what is next
    run.ask(0, "alive"), run.ask(1, "alive")
    run.coordinator.tick(run.now)
    second = run.lease(1)
    for run.now in (100.0, 120.0, 140.0, 160.0):
        run.ask(0, "alive"), run.ask(1, "alive")
        run.coordinator.tick(run.now)
        assert first.waits
        assert second.waits
    run.now = 161.0
    run.coordinator.tick(run.now)
    for asked in (first, second):
        assert says in asked["failed"]
        assert "schedule=None" in asked["failed"]


@pytest.mark.parametrize(
    ("events", "says"),
    [
        (5, "it is no list"),
        ("lease", "it is no list"),
        ([["lease", 0], 7], r"event 1 is 7, and not \[kind, rank\]"),
        ([["lease", 0, 1]], r"not \[kind, rank\]"),
        (["ab"], r"not \[kind, rank\]"),
        ([["rest", 0]], "event 0 is of kind 'rest', which is none of lease, end"),
        ([[[], 0]], "of kind"),
        ([["lease", -1]], "of rank -1, which is no rank"),
        ([["lease", True]], "of rank True"),
        ([["lease", 1 << 40]], "no rank"),
    ],
)
def test_what_is_no_schedule_is_refused(events: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_pairs(events)


# ---------------------------------------------------------------------- many events


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99)), max_size=20), st.integers(0, 20))
def test_events_come_back(events: list[tuple[str, int]], at: int) -> None:
    log = EventLog()
    for number, (kind, rank) in enumerate(events):
        if number == at:
            log.packed()  # changes nothing
        log.append(to_code(kind, rank))
    pairs = [list(event) for event in events]
    codes = from_pairs(pairs)
    assert to_pairs(unpack(log.packed())) == to_pairs(unpack(pack(codes))) == to_pairs(codes) == pairs
    assert num_ranks(codes) == max((rank + 1 for _, rank in events), default=0)


def test_a_million_events_pass_the_wire(loop: LoopInAThread) -> None:
    """To the coordinator as a schedule, and back as what happened; and they are little while they are kept."""
    codes = array("I", [to_code(KINDS[n % 4], n * n % 7) for n in range(NUM_EVENTS)])
    begin = time.monotonic()
    loop.parent.send({"op": "run", "id": 1, "options": {"world_size": 1}}, pack(codes))
    run = loop.parent.receive()[0]
    assert loop.host._run is not None
    replay = loop.host._run.coordinator._replay
    assert replay._schedule == codes
    replay._schedule = None
    for code in codes:
        replay.log.append(code)
    assert len(replay.log._packed) < NUM_EVENTS
    client = Client(loop.address, 0, run["run"], 100.0)
    try:
        assert unpack(client.call({"op": "events"})[1]) == codes
    finally:
        client.close()
    assert len(to_pairs(codes)) == NUM_EVENTS
    assert time.monotonic() - begin < 20.0  # a second, on a machine that does nothing else
