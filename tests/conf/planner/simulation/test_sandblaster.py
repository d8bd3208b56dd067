"""A batch in portions: as fast as the workers together, and what backups are for."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.simulation import Constant, Crew, Sandblaster

ZERO = Constant(0.0)


def test_equal_workers_share_a_batch_out_evenly() -> None:
    outcome = Sandblaster(Crew.of(4, 1.0), 8, ZERO, Constant(0.5), batch_size=10).run(batches=3)
    assert outcome.seconds == pytest.approx(3 * 2.0 + 2 * 0.5)  # after the last one nobody looks for a direction
    assert (outcome.updates, outcome.samples, outcome.lost_samples) == (3, 240, 0)
    assert outcome.ideal == 40.0


def test_whoever_is_fast_gets_more() -> None:
    """The ideal of the speeds, and the rounding of a portion."""
    crew = Crew.of(2, 1.0, {"number": 1, "slowdown": 3.0})
    outcome = Sandblaster(crew, 40, ZERO, ZERO).run(batches=20)
    assert outcome.seconds / 20 == pytest.approx(40 / (1 + 1 / 3), rel=0.07)


def test_a_backup_ends_a_batch_that_a_slow_worker_would_hold_up() -> None:
    crew = Crew.of(4, 1.0, {"number": 1, "slowdown": 20.0})
    with_backups = Sandblaster(crew, 12, ZERO, ZERO).run(batches=10)
    without = Sandblaster(crew, 12, ZERO, ZERO, backups=False).run(batches=10)
    assert without.seconds == pytest.approx(200.0)
    # The slow one takes one in twenty seconds, and the others do its portion over, once they know how slow it is.
    assert with_backups.seconds < 90
    assert with_backups.lost_samples > 0
    assert without.lost_samples == 0


def test_seeds() -> None:
    training = Sandblaster(Crew.of(5, {"kind": "gamma", "mean": 1.0, "cv": 0.5}), 30, Constant(0.1), ZERO)
    assert training.run(4, seed=1) == training.run(4, seed=1) != training.run(4, seed=2)
    told: list[float] = []
    training.run(2, report=told.append)
    assert told == [0.5, 1.0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"sandblaster\.portions=0"):
        Sandblaster(Crew.of(2, 1.0), 0, ZERO, ZERO)
    with pytest.raises(MisconfigurationException, match=r"sandblaster\.backups='no'"):
        Sandblaster(Crew.of(2, 1.0), 1, ZERO, ZERO, backups="no")  # type: ignore[arg-type]
