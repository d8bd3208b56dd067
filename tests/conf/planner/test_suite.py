"""Suite ``planner``: what it measures, and what it says falls short."""

from __future__ import annotations

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
