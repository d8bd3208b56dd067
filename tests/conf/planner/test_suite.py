"""Suite ``planner``: what it measures, and what it says falls short."""

from __future__ import annotations

import pytest

from squall.conf.suites import planner

NETS = {"small": {"name": "AlexNet", "num_classes": 5, "image_size": 32, "width": 0.25, "batch_size": 16}}
CLAIMS = {
    "median_error": 9.0, "worst_error": 9.0, "recommended": 0.0, "within": 0.1, "calibration_seconds": 600,
    "configurations": 3,
}  # fmt: skip


def test_planner_suite_sets_predicted_steps_beside_measured_ones() -> None:
    strategies = ["single", "ddp", "columns", "downpour"]
    result = planner.measure(
        NETS, strategies, ["loopback"], {"push_every": 2, "fetch_every": 2}, CLAIMS, num_rounds=1, seconds_a_turn=0.1
    )
    assert [row["strategy"] for row in result.rows] == strategies
    assert all(row["ms predicted"] > 0 and row["ms measured"] > 0 for row in result.rows)
    assert sum("recommended" in row[""] for row in result.rows) == 1
    assert result.extra["summary"]["calibration seconds"] > 0
    assert result.figure is not None
    assert not result.failures


def test_planner_suite_says_what_falls_short() -> None:
    claims = CLAIMS | {"median_error": 0.0, "worst_error": 0.0, "recommended": 1.1, "calibration_seconds": 0.0}
    result = planner._result([], claims, 1.0, [], 1)
    assert len(result.failures) == 3  # no error of nothing


def test_a_step_that_pushes_now_and_then_is_timed_by_whole_periods() -> None:
    assert planner._typical([9.0, 3.0, 1.0, 2.0], 1) == 2.0
    # Pushes take 5 more; the first period's step that isn't timed makes its pushes the third, the seventh, ...
    period = [1.0, 1.0, 1.0, 6.0]
    seconds = [9.0, 9.0, 9.0, *period, *period, 50.0, 1.0, 1.0, 99.0]
    assert planner._typical(seconds, 4) == pytest.approx(9.0 / 4)
    assert planner._typical(seconds[:6], 4) > 1.0  # too few for a period: all there is
