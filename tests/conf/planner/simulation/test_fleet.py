"""Chips in learners, against what can be computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.simulation import Fleet
from squall.conf.planner.simulation.fleet import YEAR


def test_a_restart_costs_its_time_and_no_more_where_every_step_is_kept() -> None:
    fleet = Fleet(1_000_000, restart=60.0)
    outcome = fleet.run(4000 * YEAR / 1e6)
    assert outcome.goodput == pytest.approx(1 / (1 + 60 * 1e6 / YEAR), rel=0.03)
    assert outcome.uptime == pytest.approx(outcome.goodput)
    assert outcome.failures == pytest.approx(outcome.goodput * 4000, rel=0.05)


@pytest.mark.parametrize("every", [100.0, 630.0, 3000.0])
def test_checkpoints_cost_what_daly_says(every: float) -> None:
    fleet = Fleet(100, mtbf=1e6, restart=300.0, checkpoint_every=every, checkpoint=20.0)
    daly = every / ((1e4 + 300.0) * math.expm1((every + 20.0) / 1e4))
    assert fleet.run(4e7).goodput == pytest.approx(daly, rel=0.02)


def test_an_elastic_learner_stands_still_twice_and_lacks_what_is_away() -> None:
    """Rate of failures r while it computes: it stands still (down + up) r as long, and r repair chips are away."""
    fleet = Fleet(10_000, mtbf=YEAR, elastic=True, slice_chips=4, downscale=20.0, upscale=30.0, repair=3600.0)
    rate = 10_000 / YEAR
    share = 1 / (1 + rate * 50.0)
    away = 4 * rate * share * 3600.0 / 10_000
    assert fleet.run(2000 / rate).goodput == pytest.approx(share * (1 - away), rel=0.01)


def test_learners_are_as_so_many_smaller_fleets() -> None:
    whole = Fleet(1_200_000, learners=8, restart=60.0).run(3000 * YEAR / 1.2e6)
    part = Fleet(150_000, restart=60.0).run(3000 * YEAR / 150_000)
    assert whole.goodput == pytest.approx(part.goodput, rel=0.03)
    assert whole.uptime > 0.9999  # where one of them has to compute
    assert part.uptime < 0.8


def test_chips_that_are_all_away_are_waited_for() -> None:
    fleet = Fleet(2, mtbf=100.0, elastic=True, slice_chips=2, downscale=0.0, upscale=0.0, repair=50.0)
    outcome = fleet.run(200_000.0)
    assert outcome.goodput == pytest.approx(50 / (50 + 50), rel=0.03)  # two chips fail every 50 s, and both are away
    assert outcome.uptime == pytest.approx(outcome.goodput, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5000), st.integers(1, 6), st.booleans(), st.floats(1e3, 1e7), st.sampled_from([0.0, 7.0, 500.0]),
    st.integers(0, 9),
)  # fmt: skip
def test_shares_are_shares_and_seeds_repeat(
    chips: int, learners: int, elastic: bool, mtbf: float, every: float, seed: int
) -> None:
    fleet = Fleet(max(chips, learners), learners, mtbf, elastic, checkpoint_every=every)
    seconds = min(1e6, 300 * mtbf / chips)
    outcome = fleet.run(seconds, seed)
    assert 0 <= outcome.goodput <= outcome.uptime + 1e-9 <= 1 + 2e-9
    assert fleet.run(seconds, seed) == outcome


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="chips=0"):
        Fleet(0)
    with pytest.raises(ValueError, match="learners=3 must be as many as there are chips=2"):
        Fleet(2, learners=3)
    with pytest.raises(ValueError, match=r"mtbf=0\.0 must be seconds, above 0"):
        Fleet(2, mtbf=0.0)
    with pytest.raises(ValueError, match=r"checkpoint=5\.0 without checkpoint_every"):
        Fleet(2, checkpoint=5.0)
    with pytest.raises(ValueError, match="seconds=inf"):
        Fleet(2).run(math.inf)
    with pytest.raises(ValueError, match="repair='long' must be seconds"):
        Fleet(2, repair="long").run(1.0)  # type: ignore[arg-type]
