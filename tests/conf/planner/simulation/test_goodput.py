"""The study of goodput: committed figures are what the simulator gives, and what is published stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.planner.simulation import goodput

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "goodput.json").read_text())


@pytest.fixture(scope="module")
def scenario() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / "scenario" / "goodput.yaml").read_text())


@pytest.mark.parametrize("case", ["synchronous", "synchronous, elastic", "Downpour, 8 elastic learners"])
@pytest.mark.parametrize("chips", [10_000, 1_200_000])
def test_the_committed_figures_are_what_the_simulator_gives(
    record: dict[str, Any], scenario: dict[str, Any], case: str, chips: int
) -> None:
    arguments = {**scenario["common"], **scenario["cases"][case], "chips": chips}
    share = goodput.simulate(arguments, scenario["failures"], scenario["seed"])
    (row,) = (row for row in record["rows"] if row["chips"] == chips)
    assert row[f"{case}, %"] == pytest.approx(100 * share, rel=1e-9)


def test_what_is_published_stands_beside(record: dict[str, Any], scenario: dict[str, Any]) -> None:
    beside = record["published"]
    assert len(beside) == len(scenario["published"])
    announced = {(point["training"], point["published, %"]) for point in beside if point["source"] == "announcement"}
    assert announced == {("synchronous", 27.0), ("Downpour, 8 elastic learners", 88.0)}
    assert all(point["chips"] == 1_200_000 for point in beside if point["source"] == "announcement")
    for point in beside:
        assert point["points apart"] == pytest.approx(point["simulated, %"] - point["published, %"])


def test_what_the_text_says_of_the_comparison(record: dict[str, Any]) -> None:
    """The words in the scenario hold: who is where, and that the gap is not for want of a better choice."""
    at = {row["chips"]: row for row in record["rows"]}
    assert at[1]["synchronous, %"] > 99.99
    for chips in (100_000, 1_000_000, 2_400_000):
        row = at[chips]
        assert row["synchronous, %"] < row["Downpour, 8 learners, %"] < 100
        assert row["synchronous, elastic, %"] < row["Downpour, 8 elastic learners, %"] < 100
    assert max(abs(point["points apart"]) for point in record["published"]) < 8


def test_a_study_in_small() -> None:
    result = goodput.study(
        common={"mtbf": 1e6}, cases={"one": {"restart": 10.0}, "four": {"learners": 4, "restart": 10.0}},
        chips=[1, 100, 10_000], published=[{"case": "one", "chips": 10_000, "goodput": 0.9, "source": "here"}],
        sensitivity={"restart": [{"restart": 100.0}, {"restart": 1.0}]}, at={"chips": 10_000, "cases": ["one"]},
        failures=500, comment="As it should be.", seed=0,
    )  # fmt: skip
    assert [row["chips"] for row in result.rows] == [1, 100, 10_000]
    assert result.rows[0]["four, %"] is None  # four learners of one chip
    assert result.rows[2]["one, %"] == pytest.approx(100 / 1.1, rel=0.02)
    assert result.rows[2]["four, %"] == pytest.approx(100 / 1.025, rel=0.02)
    assert result.rows[2]["failures an hour"] == pytest.approx(36.0)
    assert result.extra["sensitivity"]["one"]["restart"] == pytest.approx([0.5, 1 / 1.01], rel=0.05)
    assert "As it should be." in result.notes
    assert result.figure is not None


def test_what_is_not_there_is_said() -> None:
    small: dict[str, Any] = {
        "common": {}, "cases": {"one": {}}, "chips": [1], "published": [], "sensitivity": {},
        "at": {"chips": 1, "cases": ["one"]}, "failures": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"there is no case 'two'\. Name one of one"):
        goodput.study(**(small | {"at": {"chips": 1, "cases": ["two"]}}))
    with pytest.raises(MisconfigurationException, match="unexpected keyword argument 'chip'"):
        goodput.study(**(small | {"common": {"chip": 3}}))
    with pytest.raises(MisconfigurationException, match="failures=0"):
        goodput.study(**(small | {"failures": 0}))
