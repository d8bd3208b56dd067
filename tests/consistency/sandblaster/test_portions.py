"""Portions: each counted once, though computed twice."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from squall.consistency.order import Order
from squall.consistency.sandblaster.pace import Pace
from squall.consistency.sandblaster.portions import Portions

NUM = 5
WORKERS = st.sampled_from("abc")


def portions() -> Portions:
    made = Portions()
    made.open(0, Order.of([[2 * n, 2 * n + 1] for n in range(NUM)]))
    made.begin(3, 3)
    return made


class Dealing(RuleBasedStateMachine):
    """Workers take, hand in, lose and are lost in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.portions = portions()
        self.held: dict[str, set[tuple[int, int]]] = {name: set() for name in "abc"}
        self.counted: list[int] = []

    @rule(worker=WORKERS)
    def take(self, worker: str) -> None:
        ticket = self.portions.lease(worker) or self.portions.lease_again(worker)
        if ticket is not None:
            assert ticket not in self.held[worker]
            self.held[worker].add(ticket)
        else:  # all that is not counted it has already
            assert {position for _, position in self.held[worker]} | set(self.counted) == set(range(NUM))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), worker=WORKERS)
    def hand_in(self, data: st.DataObject, worker: str) -> None:
        if not self.held[worker]:
            return
        tickets = data.draw(st.lists(st.sampled_from(sorted(self.held[worker])), min_size=1, unique=True))
        self.held[worker] -= set(tickets)
        if self.portions.holds(worker, tickets):
            self.portions.complete(worker, tickets, [2.0**position for _, position in tickets])
            self.counted += [position for _, position in tickets]
        else:
            assert any(position in self.counted for _, position in tickets)
            self.portions.give_back(worker, tickets)

    @rule(worker=WORKERS)
    def lose(self, worker: str) -> None:
        self.portions.revoke(worker)
        self.held[worker].clear()

    @invariant()
    def each_counts_once(self) -> None:
        assert len(self.counted) == len(set(self.counted)) == self.portions.num_done
        assert self.portions.is_done == (len(self.counted) == NUM)
        assert self.portions.loss == sum(2.0**position for position in self.counted)
        assert self.portions.num_samples == 2 * len(self.counted)

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {position for tickets in self.held.values() for _, position in tickets}
        missing = NUM - len(self.counted) - len(held - set(self.counted))
        assert self.portions.num_left == missing


TestDealing = Dealing.TestCase
TestDealing.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_tickets_of_an_evaluation_that_is_over_are_worth_nothing() -> None:
    made = portions()
    old = made.lease("a")
    assert old is not None
    made.begin(4, 4)
    assert made.lease("a") == (4, 0)
    assert not made.holds("a", [old])
    made.give_back("a", [old])
    assert made.holds("a", [(4, 0)])


def test_what_fewest_have_is_dealt_out_again_first() -> None:
    made = portions()
    for _ in range(NUM):
        made.lease("slow")
    assert [made.lease_again("a"), made.lease_again("b"), made.lease_again("a")] == [(3, 0), (3, 1), (3, 2)]
    assert made.lease_again("b", lambda holders: len(holders) > 1) == (3, 0)
    assert made.num_again == 4


@given(st.lists(st.floats(-1e6, 1e6), min_size=NUM, max_size=NUM), st.permutations(range(NUM)))
def test_the_loss_is_the_same_in_any_order(losses: list[float], order: list[int]) -> None:
    one, other = portions(), portions()
    for made, positions in ((one, range(NUM)), (other, order)):
        for _ in range(NUM):
            made.lease("a")
        for position in positions:
            made.complete("a", [(3, position)], [losses[position]])
    assert one.loss == other.loss


def test_an_idle_worker_takes_only_what_it_would_have_sooner() -> None:
    pace = Pace()
    for worker, seconds in (("fast", 1.0), ("slow", 10.0)):
        pace.is_answered(worker)
        pace.now += seconds
        pace.asks(worker)
    pace.is_answered("slow")
    assert pace.are_late(["slow"], "fast")
    pace.now += 9.5
    assert not pace.are_late(["slow"], "fast")  # which has it in half a second
    pace.now += 11.0
    assert pace.are_late(["slow"], "fast")  # it should have had it long ago
    pace.is_answered("fast")
    assert not pace.are_late(["slow", "fast"], "other") or pace.are_late(["slow"], "other")
    assert pace.are_late(["nobody knows"], "fast")
