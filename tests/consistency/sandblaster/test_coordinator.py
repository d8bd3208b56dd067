"""The coordinator of whole batches, asked in any order."""

from __future__ import annotations

from typing import Any

import pytest

from squall.consistency.coordinator import RunOptions
from squall.consistency.order import Order
from squall.consistency.plan import Plan
from squall.consistency.sandblaster.coordinator import BatchCoordinator
from squall.consistency.sandblaster.lbfgs import LbfgsOptions, Point
from squall.consistency.sandblaster.operations import DOT
from squall.consistency.sandblaster.vectors import VectorSpec

from ..scripted import Asked, ScriptedRun

NUM_PORTIONS = 3


class Script(ScriptedRun):
    """A run of one shard, whose vectors have one element; what is minimised is half its square."""

    backs_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        options = RunOptions(self.world_size, sandblaster={"backup_portions": self.backs_up})
        self.coordinator = BatchCoordinator(options, self._send, self.commands.append)
        self.vectors: dict[int, float] = {0: 3.0, 1: 3.0}
        self.num_done = 0

    def begin(self, point: Point | None = None, evaluation: int = 0) -> Script:
        spec = VectorSpec(Plan((), ()), LbfgsOptions(history_size=2), evaluation=evaluation)
        self.coordinator.begin(spec, point)
        for rank in range(self.world_size):
            self.hello(rank)
        self.ask(0, "order", Order.of([[n] for n in range(NUM_PORTIONS)]).pack(), epoch=0, num_batches=NUM_PORTIONS)
        return self

    def start(self) -> Script:
        self.coordinator.start(0, 1)
        for rank in range(self.world_size):
            self.join(rank)
        self.work()
        return self

    def work(self) -> None:
        """Let the shard do all that it was told."""
        while self.num_done < len(self.commands):
            command = self.commands[self.num_done]
            self.num_done += 1
            numbers = None
            if command["op"] == "combine":
                if command["out"] is not None:
                    self.vectors[command["out"]] = sum(factor * self.vectors[slot] for factor, slot in command["terms"])
                numbers = [
                    self.vectors[a] * self.vectors[b] if kind == DOT else abs(self.vectors[a])
                    for kind, a, b in command["reductions"]
                ]
            elif command["op"] == "add":
                self.vectors[command["into"]] += self.vectors[0] / NUM_PORTIONS
            self.coordinator.commands.done(0, command["c"], numbers)

    def lease(self, rank: int, epoch: int = 0, **fields: Any) -> Asked:
        return self.ask(rank, "lease", epoch=epoch, **fields)

    def push(self, rank: int, ticket: Any) -> Asked:
        loss = 0.5 * self.vectors[0] ** 2 / NUM_PORTIONS
        asked = self.ask(rank, "commit", tickets=[list(ticket)], slot=0, base=0, losses=[loss])
        self.work()
        return asked


class ScriptWithoutBackups(Script):
    backs_up = False


def test_a_loader_that_asks_before_training_begins_gets_something_to_do() -> None:
    """Processes of a resumed run's loader are given batches before the shards are laid out."""
    run = Script(2).begin(evaluation=5)
    asked = run.lease(0, epoch=5)
    assert asked["spare"]
    assert run.lease(1, epoch=5)["spare"]
    run.start()
    assert "spare" not in run.lease(0, epoch=5)


def test_an_evaluation_leads_to_a_point_and_the_next() -> None:
    run = Script(1).begin().start()
    for _ in range(NUM_PORTIONS):
        run.push(0, run.lease(0)["ticket"])
    point = run.coordinator.point
    assert point is not None
    assert (point.loss, point.num_evaluations) == (pytest.approx(4.5), 1)
    assert run.lease(0, epoch=1)["ticket"] == (1, 0)
    assert run.lease(0, epoch=0, ahead=True)["end"]  # it is over


def test_backups_are_dealt_to_the_idle_and_the_first_counts() -> None:
    run = Script(2).begin().start()
    mine = [run.lease(0)["ticket"] for _ in range(2)]
    theirs = run.lease(1)["ticket"]
    run.push(0, mine[0])
    run.push(0, mine[1])
    again = run.lease(0, epoch=1)
    assert again["ticket"] == theirs
    assert "sequence" in run.push(0, theirs)
    assert run.push(1, theirs)["lost"]
    assert run.coordinator.point is not None
    assert run.coordinator.portions.num_samples == NUM_PORTIONS


def test_without_backups_the_idle_wait() -> None:
    run = ScriptWithoutBackups(2).begin().start()
    tickets = [run.lease(rank)["ticket"] for rank in (0, 1, 0)]
    for rank, ticket in zip((0, 0), (tickets[0], tickets[2]), strict=True):
        run.push(rank, ticket)
    asked = run.lease(0, epoch=1)
    assert asked.waits
    run.push(1, tickets[1])
    assert asked["ticket"] == (1, 0)


def test_who_holds_a_portion_does_not_wait_for_it() -> None:
    run = Script(2).begin().start()
    run.lease(0)
    run.lease(1)
    assert not run.ask(0, "snapshot", after=0).waits or run.commands[-1]["op"] == "mark"
    run.work()


def test_a_snapshot_waits_for_what_others_have() -> None:
    run = Script(2).begin().start()
    tickets = [run.lease(rank)["ticket"] for rank in (0, 1, 1)]
    run.push(0, tickets[0])
    asked = run.ask(0, "snapshot", after=0)
    assert asked.waits
    run.push(1, tickets[1])
    run.push(1, tickets[2])
    run.work()
    assert asked["point"]["num_evaluations"] == 1


def test_nobody_leaves_before_the_leader() -> None:
    """It may only not have come back yet, to a coordinator that has taken a lost one's place."""
    run = Script(2).begin()
    run.coordinator.start(0, 1)
    run.join(1)
    run.work()
    left = run.ask(1, "leave", stop=True)
    assert left.waits
    run.join(0)
    run.ask(0, "leave", stop=True)
    assert not left.waits


def test_who_takes_a_lost_ones_place_counts_from_the_point() -> None:
    run = Script(1).begin(Point(1, 2, 1.0, 1.0, iteration=10), evaluation=12)
    run.vectors[2] = 3.0
    run.start()
    assert run.coordinator.version == 10
    assert run.ask(0, "report")["num_iterations"] == 0


@pytest.mark.parametrize("losses", [[], [1.0, 2.0], ["x"]])
def test_a_push_without_its_losses_is_refused(losses: list[Any]) -> None:
    run = Script(1).begin().start()
    ticket = run.lease(0)["ticket"]
    with pytest.raises(ValueError, match=r"commit|push"):
        run.ask(0, "commit", tickets=[list(ticket)], slot=0, base=0, losses=losses)
