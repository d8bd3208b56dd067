"""One order of updates: its versions and staleness, who loses what, where a run stops. Scripted, without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.consistency.order import unpack_orders

from .scripted import ScriptedRun


def test_versions_and_staleness_of_a_scripted_order() -> None:
    run = ScriptedRun(3).begin(1, 1, 1, 1, 1, 1)
    tickets = [run.lease(rank)["ticket"] for rank in (0, 1, 2)]
    first = run.commit(1, 0, tickets[1])
    second = run.commit(0, 0, tickets[0])
    third = run.commit(2, 0, tickets[2])
    assert [(push["version"], push["staleness"]) for push in (first, second, third)] == [(1, 0), (2, 1), (3, 2)]
    again = run.commit(1, first["version"], run.lease(1)["ticket"])
    assert (again["version"], again["staleness"], again["sequence"]) == (4, 2, 2)
    fresh = run.commit(0, run.fetch(0)["version"], run.lease(0)["ticket"])
    assert (fresh["version"], fresh["staleness"]) == (5, 0)
    assert run.applied() == [("m1", 1), ("m0", 2), ("m2", 3), ("m1", 4), ("m0", 5)]
    assert [command["c"] for command in run.commands] == [1, 2, 3, 4, 5, 6]  # the fetch is one of them
    assert [command["staleness"] for command in run.commands if command["op"] == "apply"] == [0, 1, 2, 2, 0]
    assert run.report["staleness"] == [(0, 2), (1, 1), (2, 2)]
    assert run.report["num_samples"] == 5


def test_a_push_from_the_future_is_refused_and_changes_nothing() -> None:
    run = ScriptedRun(1).begin(1)
    ticket = run.lease(0)["ticket"]
    with pytest.raises(ValueError, match="ahead of version 0"):
        run.commit(0, 1, ticket)
    assert run.report["version"] == 0
    assert not run.applied()
    assert run.commit(0, 0, ticket)["version"] == 1


def test_a_worker_hears_of_its_push_when_every_shard_has_applied_it() -> None:
    run = ScriptedRun(2, num_shards=2).begin(1, 1)
    run.commit(1, 0, run.lease(1)["ticket"])
    fetch = run.fetch(0)
    run.carry_out(2, shard=0)
    assert not run.told
    assert fetch.waits
    run.carry_out(1, shard=1)
    assert run.told == [(run.peers[1], {"done": 1, "version": 1})]
    assert fetch.waits
    run.carry_out(2, shard=1)
    assert fetch["version"] == 1


# ---------------------------------------------------------------------- the revoked and the dead


def test_a_silent_workers_push_is_lost_and_its_batch_dealt_again() -> None:
    run = ScriptedRun(2, options={"lease_timeout": 10.0}).begin(2, 3)
    mine, theirs = run.lease(0)["ticket"], run.lease(1)["ticket"]
    run.now = 10.5
    run.ask(0, "alive")
    run.coordinator.tick(10.5)
    late = run.commit(1, 0, theirs)
    assert late["revoked"] is True
    assert run.report["num_lost"] == 1
    assert not run.applied()
    again = run.lease(0)
    assert tuple(again["ticket"]) == tuple(theirs)
    run.commit(0, 0, mine)
    run.commit(0, 1, again["ticket"])
    assert run.report["num_samples"] == 5
    assert run.report["num_reissued"] == 1
    assert run.applied() == [("m0", 1), ("m0", 2)]


def test_a_revoked_generation_may_come_again_over_the_same_connection() -> None:
    run = ScriptedRun(2, options={"lease_timeout": 10.0}).begin(1, 1)
    run.lease(1)
    run.now = 11.0
    run.ask(0, "alive")
    run.coordinator.tick(run.now)
    for operation in ("lease", "gate", "report", "leave", "epoch"):
        assert run.ask(1, operation, epoch=0)["revoked"] is True
    run.ask(1, "alive")  # which nobody waits for an answer to
    welcome = run.hello(1, same_connection=True)
    assert (welcome["generation"], welcome["started"], welcome["version"]) == (1, True, 0)
    assert run.join(1)["version"] == 0
    assert tuple(run.lease(1)["ticket"]) == (0, 0)
    assert run.report["num_joined"] == 3


def test_a_rank_that_comes_again_replaces_its_earlier_generation() -> None:
    run = ScriptedRun(2).begin(1, 1)
    ticket = run.lease(1)["ticket"]
    old = run.peers[1]
    assert run.hello(1)["generation"] == 1
    run.join(1)
    with pytest.raises(ValueError, match="before hello"):
        run.coordinator.handle(old, {"op": "gate", "id": 0})
    refused = run.commit(1, 0, ticket)  # it was its predecessor's
    assert "lost" in refused
    assert run.report["num_lost"] == 1
    assert tuple(run.lease(1)["ticket"]) == tuple(ticket)
    run.coordinator.lost(old)  # the old connection ends late, and takes nobody with it
    assert run.report["num_live"] == 2


def test_what_a_dead_worker_had_committed_is_applied_though_nobody_is_told() -> None:
    run = ScriptedRun(2, num_shards=1).begin(1, 1)
    run.commit(1, 0, run.lease(1)["ticket"])
    run.lose(1)
    run.carry_out(1)
    assert run.applied() == [("m1", 1)]
    assert not run.told
    assert run.report["version"] == run.report["num_samples"] == 1


def test_a_commit_of_what_was_given_back_is_lost() -> None:
    run = ScriptedRun(2).begin(1, 1)
    ticket = run.lease(1)["ticket"]
    run.ask(1, "return", tickets=[ticket])
    assert tuple(run.lease(0)["ticket"]) == tuple(ticket)
    assert "lost" in run.commit(1, 0, ticket)
    assert run.commit(0, 0, ticket)["version"] == 1


def test_batches_whose_step_was_skipped_count_as_trained_on_without_an_update() -> None:
    run = ScriptedRun(1).begin(2, 1)
    run.ask(0, "done", tickets=[run.lease(0)["ticket"]])
    assert run.report["num_samples"] == 2
    assert run.report["version"] == 0


# ---------------------------------------------------------------------- the end


def test_max_steps_stops_exactly() -> None:
    run = ScriptedRun(2, options={"max_steps": 3}).begin(*[1] * 8)
    held = [run.lease(rank)["ticket"] for rank in (0, 1, 0, 1)]
    pushes = [run.commit(rank, 0, ticket) for rank, ticket in zip((0, 1, 0), held, strict=False)]
    assert [push["version"] for push in pushes] == [1, 2, 3]
    beyond = run.commit(1, 2, held[3])
    assert (beyond["finished"], beyond["version"]) == ("max_steps", 3)
    assert len(run.applied()) == run.report["version"] == run.report["num_samples"] == 3
    for rank in (0, 1):
        end = run.lease(rank)
        assert (end["end"], end["stopped"], end["version"]) == (True, "max_steps", 3)
    assert run.report["num_lost"] == 0
    assert run.coordinator.queue.num_left(0) == 5


@given(st.integers(0, 6), st.lists(st.integers(0, 2), max_size=30))
@settings(max_examples=60, deadline=None)
def test_max_steps_is_never_passed(max_steps: int, order: list[int]) -> None:
    run = ScriptedRun(3, options={"max_steps": max_steps}).begin(*[1] * 40)
    held: dict[int, object] = {}
    num_pushes = 0
    for rank in order:
        if rank in held:
            run.commit(rank, 0, held.pop(rank))
            num_pushes += 1
        else:
            lease = run.lease(rank)
            if "ticket" in lease:
                held[rank] = lease["ticket"]
    assert run.report["version"] == len(run.applied()) == min(max_steps, num_pushes)


def test_a_run_that_is_stopped_ends_everybodys_data() -> None:
    run = ScriptedRun(2).begin(1, 1, 1)
    ticket = run.lease(1)["ticket"]
    run.ask(0, "stop", why="the loss is nan")
    assert run.lease(0)["stopped"] == "the loss is nan"
    refused = run.commit(1, 0, ticket)
    assert refused["finished"] == "the loss is nan"


def test_all_leave_together() -> None:
    run = ScriptedRun(3).begin(1, 1)
    ticket = run.lease(1)["ticket"]
    leader = run.ask(0, "leave")
    third = run.ask(2, "leave")
    assert leader.waits
    assert third.waits
    assert run.commit(1, 0, ticket)["finished"] == "the leader has finished"
    last = run.ask(1, "leave")
    assert [asked["leader_lost"] for asked in (leader, third, last)] == [False] * 3


def test_nobody_waits_at_the_end_for_the_dead() -> None:
    run = ScriptedRun(3).begin(1)
    leader, follower = run.ask(0, "leave"), run.ask(1, "leave")
    run.lose(2)
    assert leader["version"] == follower["version"] == 0


def test_the_leader_lost_ends_the_run_for_all() -> None:
    run = ScriptedRun(3, options={"max_staleness": 0}).begin(*[1] * 5)
    run.commit(2, 0, run.lease(2)["ticket"])
    gate = run.ask(2, "gate")
    leaving = run.ask(1, "leave")
    version = run.ask(2, "await", version=9)
    assert gate.waits
    assert leaving.waits
    run.lose(0)
    assert leaving["leader_lost"] is True
    assert not gate.waits
    assert not version.waits
    end = run.lease(2)
    assert (end["end"], end["leader_lost"], end["successor"]) == (True, True, 1)
    assert run.report["leader_lost"] is True


def test_a_leader_that_has_finished_may_go() -> None:
    run = ScriptedRun(2).begin(1, 1)
    run.ask(0, "leave")
    run.lose(0)
    assert run.report["leader_lost"] is False
    assert run.ask(1, "leave")["leader_lost"] is False


def test_a_failure_is_told_to_who_waits_and_to_who_asks() -> None:
    run = ScriptedRun(2, num_shards=1).begin(1, 1)
    run.commit(1, 0, run.lease(1)["ticket"])
    parked, fetch = run.ask(0, "await", version=5), run.fetch(0)
    run.coordinator.fail("Shard 0 has failed")
    run.coordinator.fail("so has shard 1")
    assert parked["failed"] == fetch["failed"] == "Shard 0 has failed"
    assert run.told == [(run.peers[1], {"done": 1, "version": 1, "failed": "Shard 0 has failed"})]
    assert run.lease(1)["failed"] == "Shard 0 has failed"


# ---------------------------------------------------------------------- snapshots


def test_a_snapshot_holds_later_commands_back_until_it_is_read() -> None:
    run = ScriptedRun(2, num_shards=1).begin(2, 1, 1)
    run.commit(1, 0, run.lease(1)["ticket"])
    held = run.lease(1)["ticket"]
    snapshot = run.ask(0, "snapshot", queue=True)
    run.carry_out(1)
    assert snapshot.waits  # until the shards have come to it
    assert [command["op"] for command in run.commands] == ["apply", "mark"]
    run.carry_out(2)
    assert snapshot["version"] == 1
    assert list(unpack_orders(snapshot["queue"], snapshot.payload)[0].done) == [1, 0, 0]
    push, fetch = run.commit(1, 1, held), run.fetch(0)
    assert push["version"] == 2  # the run goes on: only the shards wait
    assert len(run.commands) == 2
    assert fetch.waits
    run.ask(0, "release")
    assert [(command["op"], command["c"]) for command in run.commands[2:]] == [("apply", 3), ("fetch", 4)]
    run.carry_out(4)
    assert fetch["version"] == 2


@pytest.mark.parametrize("how", ["lost", "silent", "again"])
def test_a_snapshot_ends_with_its_reader(how: str) -> None:
    run = ScriptedRun(3, num_shards=1, options={"lease_timeout": 10.0}).begin(1, 1)
    run.ask(1, "snapshot")
    run.carry_out(1)
    run.commit(2, 0, run.lease(2)["ticket"])
    second = run.ask(0, "snapshot")
    assert len(run.commands) == 1
    if how == "lost":
        run.lose(1)
    elif how == "again":
        run.hello(1)
    else:
        run.now = 11.0
        run.ask(0, "alive")
        run.ask(2, "alive")
        run.coordinator.tick(run.now)
    assert [command["op"] for command in run.commands] == ["mark", "apply", "mark"]
    run.carry_out(3)
    assert second["version"] == 1


def test_a_stranger_releases_nothing() -> None:
    run = ScriptedRun(2).begin(1)
    run.ask(0, "snapshot")
    run.ask(1, "release")
    run.fetch(1)
    assert [command["op"] for command in run.commands] == ["mark"]


# ---------------------------------------------------------------------- what can be asked


def test_the_latest_buffers_are_those_of_the_living() -> None:
    run = ScriptedRun(3).begin(*[1] * 6)
    for rank, payload in ((1, b"old"), (1, b"new!"), (2, b"dead")):
        ticket = run.lease(rank)["ticket"]
        run.ask(rank, "commit", payload, tickets=[ticket], slot=0, base=0, buffers=True)
    run.lose(2)
    shown = run.ask(0, "buffers")
    assert (shown["sizes"], shown.payload) == ([4], b"new!")


def test_the_leaders_hyperparameters_reach_the_shards_and_the_others() -> None:
    run = ScriptedRun(2).begin(*[1] * 6)
    rate = [[{"lr": 0.5}]]
    run.commit(0, 0, run.lease(0)["ticket"], hyper=rate)
    ignored = run.commit(1, 0, run.lease(1)["ticket"], hyper=[[{"lr": 9.0}]])
    assert (ignored["hyper"], ignored["hyper_version"]) == (rate, 1)
    assert "hyper" not in run.commit(1, 2, run.lease(1)["ticket"], hyper_version=1)
    assert [command["hyper"] for command in run.commands] == [[1, rate]] * 3
