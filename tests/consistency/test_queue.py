"""The queue of data: every batch counts exactly once, whatever happens to those it was dealt to."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from squall.consistency.order import Order, pack_orders, unpack_orders
from squall.consistency.queue import Ticket, WorkQueue

WORKERS = st.sampled_from("abc")


def sizes_to_batches(sizes: list[int]) -> list[list[int]]:
    """Batches of these sizes, no sample twice."""
    batches, at = [], 0
    for size in sizes:
        batches.append(list(range(at, at + size)))
        at += size
    return batches


class QueueMachine(RuleBasedStateMachine):
    """Workers lease, train, are lost, give back and come again; a plain model keeps the books."""

    @initialize(
        sizes=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=1, max_size=2), data=st.data()
    )
    def open(self, sizes: list[list[int]], data: st.DataObject) -> None:
        self.queue = WorkQueue()
        self.sizes = sizes
        self.free: set[Ticket] = set()
        self.leased: dict[Ticket, str] = {}
        self.done: list[Ticket] = []
        self.num_before = 0
        for epoch, of_epoch in enumerate(sizes):
            before = data.draw(st.sets(st.integers(0, len(of_epoch) - 1)))
            self.queue.open(epoch, Order.of(sizes_to_batches(of_epoch), before))
            self.done += [(epoch, position) for position in before]
            self.free |= {(epoch, position) for position in range(len(of_epoch)) if position not in before}
        self.num_before = len(self.done)

    @rule(worker=WORKERS, epoch=st.integers(0, 1))
    def lease(self, worker: str, epoch: int) -> None:
        ticket = self.queue.lease(worker, epoch)
        if ticket is None:
            # A batch that was never dealt waits for those who train its own epoch; nothing else may be held back.
            assert not {free for free in self.free if free[0] == epoch}
            return
        assert ticket in self.free, "dealt twice"
        assert ticket[0] <= epoch
        assert len(self.queue.samples(ticket)) == self.sizes[ticket[0]][ticket[1]]
        self.free.discard(ticket)
        self.leased[ticket] = worker

    def held_by(self, worker: str) -> list[Ticket]:
        return sorted(ticket for ticket, holder in self.leased.items() if holder == worker)

    @rule(worker=WORKERS, data=st.data())
    def complete(self, worker: str, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.held_by(worker) or [None]), unique=True))
        tickets = [ticket for ticket in some if ticket is not None]
        assert self.queue.holds(worker, tickets)
        self.queue.complete(worker, tickets)
        for ticket in tickets:
            del self.leased[ticket]
        self.done += tickets

    @rule(worker=WORKERS)
    def revoke(self, worker: str) -> None:
        mine = self.held_by(worker)
        reissued = self.queue.num_reissued
        assert self.queue.revoke(worker) == mine
        assert self.queue.num_reissued == reissued + len(mine)
        assert not mine or not self.queue.holds(worker, mine)
        self.put_back(mine)

    @rule(worker=WORKERS, data=st.data())
    def give_back(self, worker: str, data: st.DataObject) -> None:
        everything = sorted({*self.free, *self.leased, *self.done})
        tickets = data.draw(st.lists(st.sampled_from(everything), unique=True))
        self.queue.give_back(worker, tickets)  # what isn't its own it can't give back
        self.put_back([ticket for ticket in tickets if self.leased.get(ticket) == worker])

    def put_back(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            del self.leased[ticket]
            self.free.add(ticket)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def complete_anothers(self, data: st.DataObject) -> None:
        ticket, holder = data.draw(st.sampled_from(sorted(self.leased.items())))
        other = "abc".replace(holder, "")[0]
        assert not self.queue.holds(other, [ticket])
        with pytest.raises(AssertionError, match="not leased"):
            self.queue.complete(other, [ticket])

    @rule()
    def resume(self) -> None:
        """A later run, from what this one's state says."""
        state = unpack_orders(*pack_orders(self.queue.state()))
        self.queue, reissued = WorkQueue(), self.queue.num_reissued
        self.queue.num_reissued = reissued
        for epoch, of_epoch in enumerate(self.sizes):
            known = state.get(epoch, Order.of(sizes_to_batches(of_epoch), range(len(of_epoch))))
            self.queue.open(epoch, Order.from_state(known.state()))
        self.num_before = len(self.done)
        self.free |= set(self.leased)
        self.leased.clear()

    @invariant()
    def books_agree(self) -> None:
        assert len(set(self.done)) == len(self.done)
        trained = sum(self.sizes[epoch][position] for epoch, position in self.done[self.num_before :])
        assert self.queue.num_samples == trained
        for epoch, of_epoch in enumerate(self.sizes):
            done = {position for number, position in self.done if number == epoch}
            assert self.queue.num_left(epoch) == sum(1 for number, _ in self.free if number == epoch)
            assert self.queue.coverage(epoch) == (sum(of_epoch[position] for position in done), sum(of_epoch))
        for but in (None, *"abc"):
            for epoch in range(len(self.sizes)):
                open_ = {ticket for ticket in self.free if ticket[0] <= epoch}
                open_ |= {ticket for ticket, holder in self.leased.items() if ticket[0] <= epoch and holder != but}
                assert self.queue.is_covered(epoch, but) == (not open_)

    def teardown(self) -> None:
        """In the end somebody trains on everything that is left, exactly once."""
        if not hasattr(self, "queue"):
            return
        for worker in "abc":
            self.revoke(worker)
        last = len(self.sizes) - 1
        for epoch in range(last + 1):
            while (ticket := self.queue.lease("a", epoch)) is not None:
                self.queue.complete("a", [ticket])
                self.done.append(ticket)
        everything = [
            (epoch, position) for epoch, of_epoch in enumerate(self.sizes) for position in range(len(of_epoch))
        ]
        assert sorted(self.done) == everything
        assert self.queue.is_covered(last)
        assert self.queue.state() == {}


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_lost_workers_batches_come_first_and_in_their_order() -> None:
    queue = WorkQueue()
    queue.open(0, Order.of([[0], [1], [2], [3]]))
    for worker in "aba":
        queue.lease(worker, 0)
    assert queue.revoke("a") == [(0, 0), (0, 2)]
    assert [queue.lease("b", 0) for _ in range(4)] == [(0, 0), (0, 2), (0, 3), None]


def test_what_an_earlier_epoch_has_left_is_dealt_first_unless_it_is_kept() -> None:
    queue = WorkQueue()
    queue.open(0, Order.of([[0], [1]]))
    queue.open(1, Order.of([[2]]))
    queue.lease("a", 0)
    queue.revoke("a")
    assert queue.lease("b", 1) == (0, 0)
    assert queue.lease("b", 1, kept={0}) == (1, 0)
    assert queue.lease("b", 1, kept={0}) is None
    assert queue.lease("b", 1) == (0, 1)


def test_the_first_order_of_an_epoch_is_believed() -> None:
    queue = WorkQueue()
    queue.open(0, Order.of([[7]]))
    queue.open(0, Order.of([[8], [9]]))
    assert queue.num_left(0) == 1
    assert queue.samples((0, 0)).tolist() == [7]
    assert queue.num_left(5) == 0
    assert queue.last_epoch == 0
