"""One run on several hosts, without processes: who is told what when a worker or a host goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from squall.consistency.coordinator import RunOptions
from squall.consistency.mailbox import part_name
from squall.consistency.memory import Segment
from squall.consistency.run import Run

NUM_NODES = 2


class Line:
    """A connection that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self.told.append(header)


class Scene:
    """A run of two workers, with a host of its own for the second, and shards that only listen."""

    def __init__(self) -> None:
        loop = SimpleNamespace(watch=lambda *_: None, forget=lambda *_: None)
        self.run = Run(loop, 1, RunOptions(2, lease_timeout=1e6), NUM_NODES)  # type: ignore[arg-type]
        self.forgotten: list[str] = []
        self.adopted: list[int] = []
        self.run.shards = SimpleNamespace(  # type: ignore[assignment]
            processes=[object()], command=lambda command: None, forget=self.forgotten.append,
            adopt=lambda shards, last: self.adopted.append(last), look_after=lambda: None, end=lambda: None,
        )  # fmt: skip
        plan = SimpleNamespace(slices=[0, 1], group=lambda node: range(node, node + 1))
        self.run.spec = SimpleNamespace(plan=plan, num_buffers=2)  # type: ignore[assignment]
        self.post = Line()
        self.run.enlist(self.post, {"node": 1, "host": "127.0.0.1", "port": 1}, 0.0)  # type: ignore[arg-type]
        self.workers = [Line(), Line()]
        for rank in range(2):
            self.ask(rank, "hello", rank=rank, run=1)
        self.run.coordinator.start(0, 2)

    def ask(self, rank: int, operation: str, /, **fields: Any) -> dict[str, Any]:
        self.run.worker_said(self.workers[rank], {"op": operation, "id": 1, **fields}, b"", 0.0)  # type: ignore[arg-type]
        return self.workers[rank].told[-1] if self.workers[rank].told else {}

    def mailbox(self, rank: int, groups: int = 1) -> str:
        """Make one, with parts for the groups of shards that are on the first host."""
        name = f"{self.run.name}-w{rank}.{os.urandom(2).hex()}"
        for group in range(groups):
            Segment(part_name(name, self.run.name, 0, group), 64)
        return name

    def commit(self, rank: int) -> None:
        self.ask(rank, "commit", slot=0, base=0, base_buffer=0, absent=[], fetch=1, tickets=[], hyper_version=0)

    def done(self, command: int) -> None:
        for shard in range(2):
            self.run.coordinator.commands.done(shard, command)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    for name in os.listdir("/dev/shm"):
        if name.startswith(made.run.name):
            Segment.unlink(name)


def test_the_mailbox_of_a_push_that_waits_outlives_its_worker(scene: Scene) -> None:
    mailboxes = [scene.mailbox(rank) for rank in range(2)]
    for rank in range(2):
        scene.ask(rank, "join", mailbox=mailboxes[rank])
    scene.ask(0, "snapshot")
    scene.commit(1)  # held until the snapshot is read
    scene.run.worker_gone(scene.workers[1], 0.0)  # type: ignore[arg-type]
    scene.run.look_after(0.0)
    assert scene.forgotten == []
    scene.ask(0, "release")
    scene.run.look_after(0.0)
    assert scene.forgotten == [mailboxes[1]]
    assert {"op": "forget", "mailbox": mailboxes[1]} in scene.post.told


def test_a_run_that_rests_gives_the_memory_back_and_misses_no_host(scene: Scene) -> None:
    ended: list[bool] = []
    scene.run.shards.end = lambda: ended.append(True)  # type: ignore[method-assign]
    scene.run.rest()
    assert ended == [True]
    assert scene.post.told[-1] == {"op": "rest"}
    scene.run.post_gone(scene.run.posts[1])
    assert scene.adopted == []


def test_a_run_that_all_have_left_rests(scene: Scene) -> None:
    ended: list[bool] = []
    scene.run.shards.end = lambda: ended.append(True)  # type: ignore[method-assign]
    scene.run.worker_gone(scene.workers[0], 0.0)  # type: ignore[arg-type]
    assert not scene.run.rests
    scene.run.worker_gone(scene.workers[1], 0.0)  # type: ignore[arg-type]
    assert ended == [True]


def test_a_host_lost_during_a_snapshot_takes_the_pushes_that_waited_with_it(scene: Scene) -> None:
    for rank in range(2):
        scene.ask(rank, "join", mailbox=scene.mailbox(rank))
    scene.commit(1)
    scene.ask(0, "snapshot")
    scene.commit(1)
    scene.run.post_gone(scene.run.posts[1])
    assert scene.adopted == [3], "its shards don't look for what lay in mailboxes that went with it"
    scene.run.coordinator.commands.done(0, 3)
    assert scene.run.coordinator.commands.num_done == 3


def test_a_worker_that_joins_when_a_host_has_just_been_lost_is_told_to_look_again(scene: Scene) -> None:
    early = scene.mailbox(1)
    scene.run.post_gone(scene.run.posts[1])
    assert scene.ask(1, "join", mailbox=early) == {"re": 1, "moved": True}
    joined = scene.ask(1, "join", mailbox=scene.mailbox(1, groups=2))
    assert joined["num_shards"] == 2
    scene.run.look_after(0.0)
    assert scene.forgotten == [early]


@pytest.mark.parametrize("name", ["nowhere", "squall-1-1-abcdef-w0.0", "a\0b", "\ud800", "{run}-w1.none"])
def test_a_mailbox_that_is_not_of_this_run_is_never_let_go(scene: Scene, name: str) -> None:
    with pytest.raises(ValueError, match=r"mailbox|no name"):
        scene.ask(1, "join", mailbox=name.format(run=scene.run.name))
    scene.run.look_after(0.0)
    assert scene.forgotten == []


def test_another_host_may_be_ready_first() -> None:
    scene = Scene()
    scene.run.spec, scene.run.coordinator.started = None, False
    scene.run.post_said(scene.run.posts[1], {"op": "done", "shard": 1, "command": 0}, 0.0)
    scene.run.post_said(scene.run.posts[1], {"op": "ready"}, 0.0)
    assert scene.run.posts[1].ready


@pytest.mark.parametrize(
    "said",
    [
        {"op": "done"}, {"op": "done", "shard": 0, "command": 1}, {"op": "done", "shard": 2, "command": 1},
        {"op": "done", "shard": 1.0, "command": 1}, {"op": "done", "shard": 1, "command": "1"},
        {"op": "done", "shard": [1], "command": 1}, {"op": "commit"},
    ],
    ids=str,
)  # fmt: skip
def test_a_host_speaks_for_its_own_shards_only(scene: Scene, said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a host says"):
        scene.run.post_said(scene.run.posts[1], said, 0.0)
    scene.run.post_said(scene.run.posts[1], {"op": "done", "shard": 1, "command": 0}, 0.0)
