"""The suite that sets simulated staleness beside a real run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from squall.conf.planner.simulation import total_variation
from squall.conf.suites import simulation
from tests.conf.conftest import Left

TINY = {"num_classes": 10, "image_size": 28, "in_channels": 1, "num_columns": 2, "width": 0.1}
COMMITTED = Path(__file__).parents[4] / "benchmarks" / "simulation.json"


@pytest.mark.asynchronous
def test_simulated_staleness_is_near_a_real_runs(left: Left) -> None:
    result = simulation.measure(TINY, batch_size=8, updates=300, workers=[2], turn=0.003, seed=0)
    (row,) = result.rows
    assert (row["workers"], row["updates"]) == (2, 300)
    assert row["mean staleness"] == pytest.approx(1.0, abs=0.1)
    assert row["simulated"] == pytest.approx(1.0, abs=0.1)
    assert row["total variation"] < 0.3  # of few updates, on whatever machine this is; the claim is the benchmark's
    assert row["simulated updates/s"] == pytest.approx(row["updates/s"], rel=0.35)
    assert result.figure is not None
    assert not left("squall.conf.suites.simulation", "squall.consistency.host")


def _run(staleness: dict[int, int], compute: list[float]) -> simulation.Run:
    times = {"compute": compute, "cpu": compute, "push": [0.0] * len(compute), "land": [0.0] * len(compute)}
    return {"staleness": sorted(staleness.items()), "seconds": 10.0, "times": [times]}


def test_what_is_far_apart_is_said() -> None:
    alone = _run({0: 40}, [0.1] * 40)
    two = _run({0: 1, 1: 39}, [0.1] * 20)
    two["times"] = two["times"] * 2
    good = simulation.compare({1: alone, 2: two}, cores=2, turn=0.003, seed=0)
    assert not good.failures
    assert good.rows[0]["total variation"] == pytest.approx(0.0)
    assert good.rows[0]["of one worker's times"] == pytest.approx(0.0)
    bad = simulation.compare({1: alone, 2: two | {"staleness": [(0, 30), (1, 10)]}}, cores=2, turn=0.003, seed=0)
    assert bad.failures == ["2 workers: simulated and real staleness are 0.725 apart, not below 0.15."]


def test_too_few_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="ten times as many"):
        simulation.measure(TINY, batch_size=8, updates=30, workers=[2, 4], turn=0.003, seed=0)


def test_total_variation() -> None:
    assert total_variation({0: 5}, {1: 3}) == 1.0
    assert total_variation({0: 5, 2: 5}, {0: 1, 2: 1}) == 0.0
    with pytest.raises(ValueError, match="a histogram is empty"):
        total_variation({}, {0: 1})


def test_the_committed_runs_are_as_near_as_they_say() -> None:
    record = json.loads(COMMITTED.read_text())
    assert [row["workers"] for row in record["rows"]] == [2, 4, 8]
    for row in record["rows"]:
        histograms = {name: {int(k): c for k, c in pairs} for name, pairs in record["runs"][str(row["workers"])].items()
                      if name != "ms"}  # fmt: skip
        assert total_variation(histograms["real"], histograms["simulated"]) == pytest.approx(row["total variation"])
    # What falls short is on record: two and four workers are within 0.15, eight on two busy cores were not quite.
    assert all(row["total variation"] < 0.15 for row in record["rows"][:2])
    short = [row["workers"] for row in record["rows"] if row["total variation"] >= 0.15]
    assert [failure.split(" ")[0] for failure in record["failures"]] == [str(number) for number in short]
