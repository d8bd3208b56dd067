"""Suite ``placement``: what it measures, and what it says falls short."""

from __future__ import annotations

import pytest

from squall.conf.suites.placement import _failures, measure

NET = {"num_classes": 5, "image_size": 32, "num_columns": 2, "width": 0.125}
CLAIMS = {"link": "1gbit", "batch_size": 32, "times_ddp": 2.5}


def test_placement_suite_measures_speed_and_bytes() -> None:
    alternatives = {
        "ddp": {"strategy": "ddp"},
        "ZeRO-1": {"strategy": "zero1"},
        "hybrid (c)": {"strategy": "hybrid_parallel", "options": {"scheme": "c", "zero_stage": None}},
        "spirals": {"strategy": "spiral_parallel"},
    }
    result = measure(NET, ["loopback"], [8], alternatives, CLAIMS, num_rounds=1, num_steps=2)
    assert [row["alternative"] for row in result.rows] == ["ddp", "ZeRO-1", "hybrid (c)"]
    assert "Left out, since they are not registered: spirals." in result.notes
    assert all(row["images/s"] > 0 for row in result.rows)
    sent = {row["alternative"]: row["MB sent a step"] for row in result.rows}
    assert 0 < sent["hybrid (c)"] < sent["ddp"]  # what the trick is for
    assert result.figure is not None
    assert not result.failures  # no claim about loopback


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        ({"ddp": 10.0, "columns": 20.0, "hybrid (c)": 26.0}, []),
        ({"ddp": 10.0, "columns": 20.0, "hybrid (c)": 24.0}, ["reached 2.40 x DDP"]),
        ({"ddp": 10.0, "columns": 30.0, "hybrid (c)": 26.0}, ["the fastest at no batch size"]),
    ],
)
def test_placement_suite_says_what_falls_short(speeds: dict[str, float], words: list[str]) -> None:
    rows = [
        {
            "link": "1gbit", "images a step": 32, "alternative": name, "images/s": speed,
            "against DDP": speed / speeds["ddp"],
        }
        for name, speed in speeds.items()
    ]  # fmt: skip
    failures = _failures(rows, CLAIMS)
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))
