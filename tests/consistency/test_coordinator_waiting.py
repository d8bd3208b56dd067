"""Who waits for whom: bounded staleness, the warm start, the leader at the end of an epoch. Scripted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .scripted import Asked, ScriptedRun


def step(run: ScriptedRun, rank: int, base: int = 0) -> int:
    """One lease and commit."""
    return int(run.commit(rank, base, run.lease(rank)["ticket"])["version"])


# ---------------------------------------------------------------------- bounded staleness


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_fastest_waits_for_the_slowest(bound: int) -> None:
    run = ScriptedRun(2, options={"max_staleness": bound}).begin(*[1] * 20)
    for _ in range(bound + 1):
        assert not run.ask(1, "gate").waits
        step(run, 1)
    gate = run.ask(1, "gate")
    assert gate.waits
    assert not run.ask(0, "gate").waits
    step(run, 0)
    assert gate["version"] == bound + 2


def test_without_a_bound_nobody_waits() -> None:
    run = ScriptedRun(2).begin(*[1] * 50)
    for _ in range(40):
        assert not run.ask(1, "gate").waits
        step(run, 1)


@pytest.mark.parametrize("how", ["lost", "silent", "leaves"])
def test_nobody_waits_for_the_dead_or_for_who_has_finished(how: str) -> None:
    run = ScriptedRun(3, options={"max_staleness": 0, "lease_timeout": 10.0}).begin(*[1] * 20)
    step(run, 0)
    step(run, 1)
    gates = [run.ask(rank, "gate") for rank in (0, 1)]
    assert all(gate.waits for gate in gates)
    if how == "lost":
        run.lose(2)
    elif how == "leaves":
        run.ask(2, "leave")
    else:
        run.now = 10.5
        run.ask(0, "alive")
        run.ask(1, "alive")
        assert all(gate.waits for gate in gates)
        run.coordinator.tick(run.now)
    assert not any(gate.waits for gate in gates)


def test_nobody_waits_for_a_leader_that_waits_for_data() -> None:
    run = ScriptedRun(2, options={"max_staleness": 0}).begin(1, 1, 1, 1)
    step(run, 0)
    theirs = [run.lease(1)["ticket"] for _ in range(3)]
    leader = run.lease(0, last=True)
    assert leader.waits
    for count, ticket in enumerate(theirs):
        assert not run.ask(1, "gate").waits, count
        run.commit(1, 0, ticket)
    assert leader["end"] is True


def test_a_leader_that_gets_data_again_holds_nobody_up_for_the_time_it_had_none() -> None:
    run = ScriptedRun(3, options={"max_staleness": 1}).begin(*[1] * 12)
    step(run, 0)
    held = {rank: [run.lease(rank)["ticket"] for _ in range(n)] for rank, n in ((1, 9), (2, 2))}
    leader = run.lease(0, last=True)
    for count in range(6):
        if count < 2:
            assert not run.ask(2, "gate").waits
            run.commit(2, 0, held[2].pop())
        if count == 1:
            run.ask(2, "leave")
        assert not run.ask(1, "gate").waits
        run.commit(1, 0, held[1].pop())
    run.ask(1, "return", tickets=[held[1].pop()])
    assert "ticket" in leader
    assert not run.ask(1, "gate").waits


def test_who_comes_late_begins_where_the_slowest_is() -> None:
    run = ScriptedRun(2, options={"max_staleness": 1}).begin(*[1] * 30)
    for _ in range(5):
        step(run, 0)
        step(run, 1)
    run.hello(2)
    run.join(2)
    assert not run.ask(0, "gate").waits
    step(run, 2)
    step(run, 2)
    assert run.ask(2, "gate").waits


class Racer:
    """A worker in a bounded run: through the gate, weights, commit, and again."""

    def __init__(self, run: ScriptedRun, rank: int, fetches: bool) -> None:
        self.run, self.rank, self.fetches = run, rank, fetches
        self.base = run.coordinator.version
        self.gate: Asked | None = None

    @property
    def waits(self) -> bool:
        return self.gate is not None and self.gate.waits

    def go_on(self) -> int | None:
        """The next thing it does; the staleness of a commit."""
        if self.gate is None:
            self.gate = self.run.ask(self.rank, "gate")
            return None
        if self.gate.waits:
            return None
        if self.fetches and "fetched" not in self.gate:
            self.base = self.run.fetch(self.rank)["version"]
            assert self.gate.reply is not None
            self.gate.reply["fetched"] = True
            return None
        push = self.run.commit(self.rank, self.base, self.run.lease(self.rank)["ticket"])
        self.gate, self.base = None, push["version"]  # the weights that come back with a push
        return int(push["staleness"])


@pytest.mark.parametrize("fetches", [True, False], ids=["weights after the gate", "weights with the last push"])
@given(
    bound=st.integers(0, 3),
    num_workers=st.integers(2, 4),
    order=st.lists(st.integers(0, 5), max_size=120),
)
@settings(max_examples=80, deadline=None)
def test_staleness_is_bounded_in_any_interleaving(
    fetches: bool, bound: int, num_workers: int, order: list[int]
) -> None:
    run = ScriptedRun(num_workers, options={"max_staleness": bound}).begin(*[1] * 1000)
    racers = {rank: Racer(run, rank, fetches) for rank in range(num_workers)}
    most = ((2 * bound + 1) if fetches else 2 * (bound + 1)) * (num_workers - 1)
    for choice in order:
        if choice == 5 and len(racers) > 2:  # the last one dies, and holds nobody up from then on
            rank = max(racers)
            del racers[rank]
            run.lose(rank)
        elif choice in racers:
            assert (racers[choice].go_on() or 0) <= most
        assert not all(racer.waits for racer in racers.values()), "everybody waits"


@pytest.mark.parametrize(("fetches", "most"), [(True, 3), (False, 4)])
def test_the_bounds_are_met(fetches: bool, most: int) -> None:
    """Two workers, one step apart at most: no smaller number would be true."""
    run = ScriptedRun(2, options={"max_staleness": 1}).begin(*[1] * 100)
    racers = [Racer(run, rank, fetches) for rank in (0, 1)]

    def commit(rank: int) -> int:
        for _ in range(9):
            if (staleness := racers[rank].go_on()) is not None:
                return staleness
        raise AssertionError("it waits")

    commit(0), commit(0)  # two ahead: it waits at the gate
    racers[0].go_on()
    assert racers[0].waits
    commit(1)
    assert not racers[0].waits
    if fetches:
        racers[0].go_on()
    for _ in range(3):
        commit(1)
    racers[1].go_on()
    assert racers[1].waits
    assert commit(0) == most


# ---------------------------------------------------------------------- the warm start


def test_the_leader_makes_the_first_updates_alone() -> None:
    run = ScriptedRun(3, options={"warm_start_steps": 3, "max_staleness": 0}).begin(*[1] * 20)
    waiting = [run.lease(rank) for rank in (1, 2)]
    for version in (1, 2, 3):
        assert all(lease.waits for lease in waiting)
        assert not run.ask(0, "gate").waits  # though it is further ahead than the bound
        assert step(run, 0, version - 1) == version
    assert not any(lease.waits for lease in waiting)
    assert not run.ask(0, "gate").waits  # nobody has to catch up with what was made alone
    step(run, 0, 3)
    assert run.ask(0, "gate").waits


def test_a_warm_start_ends_with_its_leader() -> None:
    run = ScriptedRun(2, options={"warm_start_steps": 3}).begin(1, 1)
    waiting = run.lease(1)
    run.lose(0)
    assert waiting["leader_lost"] is True


@pytest.mark.parametrize("ends", ["warm", "lost", "leaves", "stop"])
def test_without_leases_the_others_wait_for_the_warm_start_at_the_gate(ends: str) -> None:
    run = ScriptedRun(2, options={"warm_start_steps": 2}).begin(*[1] * 9)
    gate = run.ask(1, "gate")
    step(run, 0)
    assert gate.waits
    if ends == "warm":
        step(run, 0, 1)
    elif ends == "lost":
        run.lose(0)
    elif ends == "leaves":  # with fewer batches than it should have warmed up with
        run.ask(0, "leave", stop=False)
    else:
        run.ask(0, "stop", why="test")
    assert not gate.waits


def test_a_warm_start_longer_than_the_run_ends_with_it() -> None:
    run = ScriptedRun(2, options={"warm_start_steps": 9, "max_steps": 2}).begin(*[1] * 9)
    waiting = run.lease(1)
    step(run, 0)
    step(run, 0, 1)
    assert waiting["stopped"] == "max_steps"


# ---------------------------------------------------------------------- the ends of epochs


def test_the_leader_waits_in_the_last_epoch_for_what_others_hold() -> None:
    run = ScriptedRun(3).begin(1, 1, 1)
    step(run, 0)
    first, second = run.lease(1)["ticket"], run.lease(2)["ticket"]
    leader = run.lease(0, last=True)
    assert leader.waits
    assert run.lease(1, last=True)["end"] is True  # a follower need not
    run.commit(1, 1, first)
    assert leader.waits
    run.lose(2)
    assert tuple(leader["ticket"]) == tuple(second)
    run.commit(0, 2, leader["ticket"])
    assert run.lease(0, last=True)["end"] is True
    assert run.coordinator.queue.coverage(0) == (3, 3)


def test_the_leader_does_not_wait_in_an_earlier_epoch() -> None:
    run = ScriptedRun(2).begin(1, 1)
    step(run, 0)
    held = run.lease(1)["ticket"]
    assert run.lease(0)["end"] is True
    run.open(1, 1)
    run.lose(1)
    assert tuple(run.lease(0, epoch=1)["ticket"]) == tuple(held)  # what was left behind comes first


def test_the_leader_does_not_wait_for_what_it_holds_itself() -> None:
    run = ScriptedRun(1).begin(1, 1)
    run.lease(0), run.lease(0)
    assert run.lease(0, last=True)["end"] is True


def test_the_last_batch_of_an_epoch_is_kept_for_a_leader_that_has_had_none() -> None:
    run = ScriptedRun(2).begin(1, 1, 1)
    assert [tuple(run.lease(1)["ticket"]) for _ in range(2)] == [(0, 0), (0, 1)]
    assert run.lease(1)["end"] is True
    assert tuple(run.lease(0)["ticket"]) == (0, 2)


def test_the_last_batch_is_anybodys_once_the_leader_has_had_one() -> None:
    run = ScriptedRun(2).begin(1, 1)
    run.lease(0)
    assert tuple(run.lease(1)["ticket"]) == (0, 1)


# ---------------------------------------------------------------------- meetings


def meet(run: ScriptedRun, rank: int, key: str, value: Any = None) -> Asked:
    return run.ask(rank, "meet", f"<{rank}>".encode(), key=key, kind="all", value=value)


def test_a_meeting_is_over_when_all_have_come_and_brings_everybodys_value() -> None:
    run = ScriptedRun(3)
    for rank in range(3):
        run.hello(rank)
    first, second = meet(run, 2, "a", 20), meet(run, 0, "a", 0)
    other = meet(run, 1, "b", 1)
    assert first.waits
    assert second.waits
    third = meet(run, 1, "a", 10)
    for asked in (first, second, third):
        assert asked["parts"] == [{"rank": rank, "value": 10 * rank} for rank in range(3)]
        assert (asked["sizes"], asked.payload) == ([3, 3, 3], b"<0><1><2>")
    assert other.waits


def test_the_first_meeting_waits_for_ranks_that_have_not_come_but_not_for_ever() -> None:
    run = ScriptedRun(3, options={"join_timeout": 60.0})
    run.hello(0)
    early = meet(run, 0, "a")
    assert early.waits
    run.hello(1)
    second = meet(run, 1, "a")
    for now in (30.0, 60.0):
        run.now = now
        run.coordinator.tick(now)
        run.ask(0, "alive"), run.ask(1, "alive")
    assert early.waits
    run.now = 60.5
    run.coordinator.tick(60.5)
    assert [part["rank"] for part in early["parts"]] == [part["rank"] for part in second["parts"]] == [0, 1]


def test_a_meeting_goes_on_without_the_dead() -> None:
    run = ScriptedRun(3)
    for rank in range(3):
        run.hello(rank)
    first, _ = meet(run, 0, "a"), meet(run, 1, "a")
    run.lose(1)  # had come
    assert first.waits
    run.lose(2)  # had not
    assert [part["rank"] for part in first["parts"]] == [0]
    assert first.payload == b"<0>"


def test_a_meeting_goes_on_without_who_is_in_the_loop_and_ends_with_who_has_left_it() -> None:
    run = ScriptedRun(2).begin(1)
    assert [part["rank"] for part in meet(run, 0, "in the loop")["parts"]] == [0]
    run.ask(0, "leave"), run.ask(1, "leave")
    after = meet(run, 0, "after it")
    assert after.waits
    meet(run, 1, "after it")
    assert [part["rank"] for part in after["parts"]] == [0, 1]


def test_the_leader_who_is_through_waits_for_who_has_only_just_come() -> None:
    run = ScriptedRun(2)
    run.hello(0), run.hello(1)
    run.coordinator.start(0)
    run.join(0)
    assert not run.ask(0, "leave").waits, "nobody else is in the loop"
    run.join(1)
    end = meet(run, 0, "end")
    assert end.waits, "or the run would be over while rank 1 is in it"
    assert run.lease(1)["stopped"]
    run.ask(1, "leave")
    assert [part["rank"] for part in meet(run, 1, "end")["parts"]] == [0, 1]
    assert not end.waits


def test_who_comes_late_gets_what_the_meetings_had_said() -> None:
    run = ScriptedRun(2)
    run.hello(0), run.hello(1)
    meet(run, 0, "a", "x"), meet(run, 1, "a", "y")
    run.lose(1)
    run.hello(1)
    late = meet(run, 1, "a", "z")
    assert late["late"] is True
    assert [part["value"] for part in late["parts"]] == ["x", "y"]
    assert late.payload == b"<0><1>"


def test_the_board_shows_the_latest_of_the_living_and_makes_nobody_wait() -> None:
    run = ScriptedRun(3)
    for rank in range(3):
        run.hello(rank)
    for rank, value in ((0, 1), (1, 2), (2, 3), (0, 4)):
        shown = run.ask(rank, "share", b"!", key="loss", value=value)
    assert [(part["rank"], part["value"]) for part in shown["parts"]] == [(0, 4), (1, 2), (2, 3)]
    run.lose(1)
    shown = run.ask(0, "share", key="loss", value=None, write=False)
    assert [(part["rank"], part["value"]) for part in shown["parts"]] == [(0, 4), (2, 3)]
    assert (shown["sizes"], shown.payload) == ([1, 1], b"!!")


# ---------------------------------------------------------------------- scripts


def test_waiting_for_a_version() -> None:
    run = ScriptedRun(2).begin(1, 1, 1)
    waiting = run.ask(1, "await", version=2)
    step(run, 0)
    assert waiting.waits
    step(run, 0, 1)
    assert waiting["version"] == 2
