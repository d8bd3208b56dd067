"""Downpour in simulated time: staleness that can be told beforehand, lines, faults and leases, and seeds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.simulation import Constant, Crew, Downpour, Exponential, Faults, Link, Outcome, Rules
from squall.conf.planner.simulation.distributions import Distribution

ZERO = Constant(0.0)
QUICK = Link(ZERO, ZERO, ZERO)


def _downpour(
    crew: Crew,
    rules: Rules | None = None,
    link: Link = QUICK,
    num_shards: int = 1,
    service: Distribution = ZERO,
    faults: Faults | None = None,
    **options: Any,
) -> Downpour:
    return Downpour(crew, link, num_shards, service, rules or Rules(), faults or Faults(), **options)


@pytest.mark.parametrize("workers", [1, 2, 5, 16])
@pytest.mark.parametrize("service", [0.0, 0.01])
def test_equal_workers_are_as_late_as_there_are_others(workers: int, service: float) -> None:
    outcome = _downpour(Crew.of(workers, 1.0), service=Constant(service)).run(20 * workers, settle=workers)
    assert outcome.staleness == {workers - 1: 19 * workers}
    whole = _downpour(Crew.of(workers, 1.0), service=Constant(service)).run(20 * workers)
    first = dict.fromkeys(range(workers), 1)  # the first of each has missed those that came before it
    first[workers - 1] += 19 * workers
    assert whole.staleness == first


def test_overlap_makes_every_update_a_round_staler() -> None:
    outcome = _downpour(Crew.of(4, 1.0), Rules(overlap=True), service=Constant(0.1)).run(100, settle=20)
    assert outcome.staleness == {7: 80}
    assert outcome.seconds == pytest.approx(25.0)  # nobody waits for the shard
    waiting = _downpour(Crew.of(1, 1.0), service=Constant(0.1)).run(10)
    assert waiting.seconds == pytest.approx(10 + 9 * 0.1)


def test_a_slow_worker_is_late_and_holds_nobody_up() -> None:
    crew = Crew.of(3, 1.0, {"number": 1, "slowdown": 4.5})
    outcome = _downpour(crew, batch_size=8).run(900)
    assert outcome.goodput == pytest.approx(1.0, rel=0.01)
    assert outcome.staleness_quantile(1.0) == 10  # four or five steps of each of the others
    assert outcome.throughput == pytest.approx(8 * (2 + 1 / 4.5), rel=0.01)


def test_more_workers_than_a_shard_can_serve_are_as_fast_as_the_shard() -> None:
    outcome = _downpour(Crew.of(64, 1.0), service=Constant(0.05)).run(6000, settle=500)
    assert outcome.throughput == pytest.approx(1 / 0.05, rel=0.02)
    assert outcome.goodput == pytest.approx(20 / 64, rel=0.03)
    assert outcome.mean_staleness == pytest.approx(63, abs=0.01)


def test_links_and_questions_take_their_time() -> None:
    link = Link(push=Constant(0.3), fetch=Constant(0.2), call=Constant(0.1))
    outcome = _downpour(Crew.of(1, 1.0), link=link).run(11)
    assert outcome.seconds == pytest.approx(11 * (1.0 + 0.1 + 0.3) + 10 * 0.2 + 0.1)  # one question is ahead


def test_pushes_of_several_steps_and_fetches_of_their_own() -> None:
    """Each worker steps alone for four steps; a push is of two of them."""
    outcome = _downpour(Crew.of(2, 1.0), Rules(push_every=2, fetch_every=4), batch_size=3).run(40)
    assert outcome.samples == 40 * 2 * 3
    assert outcome.seconds == pytest.approx(40.0)
    # Weights of every other push; a worker's own pushes are among those that the second has missed.
    assert set(outcome.staleness) == {0, 1, 2, 3}
    seldom = _downpour(Crew.of(2, 1.0), Rules(fetch_every=2)).run(40, settle=4)
    assert set(seldom.staleness) == {1, 3}


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_bounded_staleness_waits_for_the_slowest(bound: int) -> None:
    crew = Crew.of(4, {"kind": "exponential", "mean": 1.0}, {"number": 1, "slowdown": 3.0})
    free = _downpour(crew).run(1500)
    bounded = _downpour(crew, Rules(max_staleness=bound)).run(1500)
    assert (bounded.staleness_quantile(1.0) or 0) <= 2 * (bound + 1) * 3  # as the Strategy promises
    assert (free.staleness_quantile(1.0) or 0) > 2 * (0 + 1) * 3
    assert bounded.goodput < free.goodput


def test_the_first_worker_warms_up_alone() -> None:
    outcome = _downpour(Crew.of(4, 1.0), Rules(warm_start_steps=10)).run(50)
    assert outcome.staleness[0] >= 10
    assert outcome.seconds == pytest.approx(10 + 40 / 4, abs=1.01)


def test_updates_of_others_between_ones_own_add_up() -> None:
    """Whoever is how fast: staleness is what others have done meanwhile, so its mean comes to the number of others."""
    crew = Crew.of(6, {"kind": "lognormal", "mean": 1.0, "cv": 1.0}, {"number": 2, "slowdown": 3.0})
    outcome = _downpour(crew).run(6000)
    assert outcome.mean_staleness == pytest.approx(5, rel=0.01)
    assert sum(outcome.staleness.values()) == outcome.updates == 6000


# ---------------------------------------------------------------------- faults


def test_what_the_lost_held_is_dealt_out_again_and_counts_once() -> None:
    faults = Faults(mtbf=30.0, restart=Constant(20.0))
    outcome = _downpour(Crew.of(8, {"kind": "gamma", "mean": 1.0, "cv": 0.3}), faults=faults, batch_size=5).run(4000)
    assert outcome.updates == 4000
    assert outcome.samples == 4000 * 5
    assert outcome.restarts > 50
    assert outcome.restarts <= outcome.lost_samples / 5 <= 2 * outcome.restarts  # it computes one, and has one ahead
    # The first worker never fails; the others compute 30 s of 50.
    expected = (1 + 7 * 30 / 50) / 8
    assert outcome.goodput == pytest.approx(expected, rel=0.05)


def test_nobody_waits_for_a_host_that_has_vanished() -> None:
    """Its leases are held until it is missed; everything is trained on all the same."""
    vanished = Faults(mtbf=50.0, restart=Constant(60.0), notice=30.0)
    outcome = _downpour(Crew.of(4, 1.0), faults=vanished).run(1000)
    assert outcome.samples == 1000
    assert outcome.lost_samples > 0
    back_first = Faults(mtbf=50.0, restart=Constant(1.0), notice=1e9)  # it comes again before anybody misses it
    assert _downpour(Crew.of(4, 1.0), faults=back_first).run(1000).lost_samples > 0


def test_a_worker_that_comes_back_is_not_late() -> None:
    """It fetches: its staleness is of its own step, not of the time that it was away."""
    faults = Faults(mtbf=20.0, restart=Constant(500.0))
    outcome = _downpour(Crew.of(2, 1.0), faults=faults).run(2000)
    assert outcome.restarts >= 1
    assert (outcome.staleness_quantile(1.0) or 0) <= 2


# ---------------------------------------------------------------------- cores, seeds, refusals


def test_workers_on_too_few_cores_are_as_fast_as_the_cores() -> None:
    outcome = _downpour(Crew.of(6, 0.1), cores=2, turn=0.01).run(600, settle=20)
    assert outcome.throughput == pytest.approx(2 / 0.1, rel=0.02)
    assert outcome.goodput == pytest.approx(1.0, rel=0.02)
    assert outcome.mean_staleness == pytest.approx(5, abs=0.05)
    one_each = _downpour(Crew.of(6, 0.1), cores=6, turn=0.01).run(600)
    assert one_each.throughput == pytest.approx(6 / 0.1, rel=0.02)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.one_of(st.none(), st.integers(0, 2)), st.booleans(),
    st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_any_rules_come_to_their_end_and_repeat(
    workers: int, push_every: int, fetch_every: int, bound: int | None, overlap: bool, fails: bool, seed: int
) -> None:
    def run() -> Outcome:
        rules = Rules(push_every, fetch_every, bound, 0, overlap)
        faults = Faults(mtbf=15.0, restart=Constant(2.0), notice=1.0) if fails else None
        crew = Crew.of(workers, {"kind": "exponential", "mean": 1.0})
        return _downpour(crew, rules, num_shards=2, service=Exponential(0.05), faults=faults).run(60, seed)

    outcome = run()
    assert outcome == run()
    assert outcome.updates == sum(outcome.staleness.values()) == 60
    assert outcome.samples == 60 * push_every
    assert 0 < outcome.goodput < 3


def test_another_seed_is_another_run() -> None:
    downpour = _downpour(Crew.of(3, {"kind": "exponential", "mean": 1.0}))
    assert downpour.run(50, seed=0) != downpour.run(50, seed=1)


def test_progress_is_told() -> None:
    told: list[float] = []
    _downpour(Crew.of(2, 1.0)).run(2000, report=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"downpour\.push_every=0"):
        Rules(push_every=0)
    with pytest.raises(MisconfigurationException, match=r"downpour\.max_staleness=-1"):
        Rules(max_staleness=-1)
    with pytest.raises(MisconfigurationException, match=r"downpour\.overlap='no'"):
        Rules(overlap="no")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="cores=0"):
        _downpour(Crew.of(2, 1.0), cores=0)
    with pytest.raises(ValueError, match=r"turn=0\.0"):
        _downpour(Crew.of(2, 1.0), cores=1, turn=0.0)
    with pytest.raises(MisconfigurationException, match=r"shards\.number=0"):
        _downpour(Crew.of(2, 1.0), num_shards=0).run(1)
    with pytest.raises(MisconfigurationException, match="updates=0"):
        _downpour(Crew.of(2, 1.0)).run(0)
