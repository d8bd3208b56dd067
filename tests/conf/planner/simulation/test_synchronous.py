"""A barrier a step against what can be computed by hand: the slowest of many, and Young and Daly's checkpoints."""

from __future__ import annotations

import math

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.simulation import Constant, Crew, Faults, Synchronous


def test_a_step_is_the_slowest_of_exponential_workers() -> None:
    workers, mean = 50, 0.2
    crew = Crew.of(workers, {"kind": "exponential", "mean": mean})
    outcome = Synchronous(crew, Constant(0.0), Faults()).run(steps=4000)
    harmonic = sum(1 / k for k in range(1, workers + 1))
    assert outcome.seconds / outcome.updates == pytest.approx(mean * harmonic, rel=0.02)
    assert outcome.goodput == pytest.approx(1 / harmonic, rel=0.02)
    assert outcome.samples == 4000 * workers
    assert not outcome.staleness
    assert outcome.mean_staleness is outcome.staleness_quantile(0.5) is None


def test_one_slow_worker_and_the_exchange_hold_all_up() -> None:
    crew = Crew.of(8, 1.0, {"number": 1, "slowdown": 4.0})
    outcome = Synchronous(crew, Constant(0.5), Faults(), batch_size=10).run(steps=100)
    assert outcome.seconds == pytest.approx(450.0)
    assert outcome.throughput == pytest.approx(8 * 10 / 4.5)
    assert outcome.goodput == pytest.approx((8 / 4.5) / (7 + 0.25))


def test_more_barriers_wait_for_the_slowest_more_often() -> None:
    crew = Crew.of(16, {"kind": "exponential", "mean": 1.0})
    one = Synchronous(crew, Constant(0.0), Faults()).run(2000)
    many = Synchronous(crew, Constant(0.0), Faults(), barriers=4).run(2000)
    assert many.seconds == pytest.approx(one.seconds, rel=0.03)  # four quarters of four independent draws
    exchanged = Synchronous(Crew.of(2, 1.0), Constant(0.25), Faults(), barriers=4).run(10)
    assert exchanged.seconds == pytest.approx(20.0)


@pytest.mark.parametrize("every", [20, 63, 200])
def test_checkpoints_cost_what_daly_says(every: int) -> None:
    """A segment of work tau and a checkpoint delta takes ``(mtbf + restart) (exp((tau + delta) / mtbf) - 1)``."""
    workers, mtbf, restart, delta = 10, 20_000.0, 100.0, 10.0
    faults = Faults(mtbf=mtbf, restart=Constant(restart))
    training = Synchronous(
        Crew.of(workers, 1.0), Constant(0.0), faults, checkpoint_every=every, checkpoint=delta, batch_size=3
    )
    outcome = training.run(steps=200_000)
    of_all = mtbf / workers
    daly = every / ((of_all + restart) * math.expm1((every + delta) / of_all))
    assert outcome.goodput == pytest.approx(daly, rel=0.02)
    assert outcome.restarts == pytest.approx(outcome.seconds / (of_all + restart), rel=0.2)
    assert outcome.lost_samples % (workers * 3) == 0


def test_youngs_interval_is_the_best() -> None:
    def goodput(every: int) -> float:
        faults = Faults(mtbf=20_000.0, restart=Constant(100.0))
        training = Synchronous(Crew.of(10, 1.0), Constant(0.0), faults, checkpoint_every=every, checkpoint=10.0)
        return training.run(steps=200_000, seed=1).goodput

    young = round(math.sqrt(2 * 10.0 * 2000.0))
    assert goodput(young) > max(goodput(young // 4), goodput(4 * young))


def test_a_checkpoint_that_is_written_is_kept_and_one_under_way_is_not() -> None:
    """Without any, everything is lost; with one after every step, at most a step."""
    faults = Faults(mtbf=300.0, restart=Constant(0.0))
    kept = Synchronous(Crew.of(1, 1.0), Constant(0.0), faults, checkpoint_every=1).run(steps=2000)
    assert kept.lost_samples == kept.restarts
    assert kept.seconds - 2000 < kept.restarts
    none = Synchronous(Crew.of(1, 1.0), Constant(0.0), faults).run(steps=1500)
    assert none.lost_samples > 10 * none.restarts > 0
    assert none.seconds > 3000


def test_a_run_that_goes_nowhere_is_said() -> None:
    faults = Faults(mtbf=1.0, restart=Constant(0.0))
    training = Synchronous(Crew.of(64, 1.0), Constant(0.0), faults, checkpoint_every=10)
    with pytest.raises(MisconfigurationException, match=r"faults\.mtbf=1 s of each of 64 workers"):
        training.run(steps=100)


def test_seeds() -> None:
    crew = Crew.of(5, {"kind": "lognormal", "mean": 1.0, "cv": 0.5})
    training = Synchronous(crew, Constant(0.0), Faults(mtbf=500.0, restart=Constant(3.0)), checkpoint_every=10)
    assert training.run(500, seed=7) == training.run(500, seed=7) != training.run(500, seed=8)


def test_progress_is_told() -> None:
    told: list[float] = []
    Synchronous(Crew.of(2, 1.0), Constant(0.0), Faults()).run(4096, report=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_crews() -> None:
    crew = Crew.of(10, 2.0, {"share": 0.3, "slowdown": 2.0})
    assert [crew.of_rank(rank).mean for rank in range(10)] == [2.0] * 7 + [4.0] * 3
    with pytest.raises(ValueError, match="either a number or a share"):
        Crew.of(10, 1.0, {"slowdown": 2.0})
    with pytest.raises(ValueError, match="from none to all of the 10 workers"):
        Crew.of(10, 1.0, {"number": 11, "slowdown": 2.0})
    with pytest.raises(ValueError, match=r"slowdown=0\.5 must be"):
        Crew.of(10, 1.0, {"number": 1, "slowdown": 0.5})
    with pytest.raises(ValueError, match="must take time"):
        Crew.of(10, 0.0)
    with pytest.raises(MisconfigurationException, match="workers=0"):
        Crew.of(0, 1.0)
    with pytest.raises(ValueError, match="1 distributions for 2 workers"):
        Crew(2, Constant(1.0), own=(Constant(1.0),))


def test_faults() -> None:
    assert Faults.of(None).mtbf == math.inf
    assert Faults.of({"mtbf": 5.0, "restart": {"kind": "exponential", "mean": 2.0}, "notice": 30}).notice == 30.0
    with pytest.raises(ValueError, match="there is no mttr"):
        Faults.of({"mttr": 5.0})
    with pytest.raises(ValueError, match=r"faults\.mtbf=0 must be seconds above 0"):
        Faults.of({"mtbf": 0})
