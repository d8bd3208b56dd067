"""Distributions: means, quantiles that belong to what is drawn, and the largest of many without drawing them all."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.conf.planner.simulation import make_distribution
from squall.conf.planner.simulation.distributions import Scaled

KINDS: list[Any] = [
    2.5,
    {"kind": "exponential", "mean": 2.5},
    {"kind": "lognormal", "mean": 2.5, "cv": 0.4},
    {"kind": "gamma", "mean": 2.5, "cv": 0.4},
    {"kind": "gamma", "mean": 2.5, "cv": 2.0},
    {"kind": "empirical", "values": [0.5, 1.5, 2.0, 6.0]},
]


@pytest.mark.parametrize("said", KINDS)
def test_what_is_drawn_has_the_mean_and_the_quantiles(said: Any) -> None:
    made = make_distribution("x", said)
    drawn = made.sample(np.random.default_rng(0), 100_000)
    assert made.mean == 2.5
    assert drawn.mean() == pytest.approx(2.5, rel=0.03)
    shares = np.array([0.1, 0.4, 0.6, 0.9])
    if not isinstance(said, dict) or said["kind"] != "empirical":  # whose quantiles are steps
        assert made.quantile(shares) == pytest.approx(np.quantile(drawn, shares), rel=0.05, abs=1e-3)
    stream = list(islice(made.stream(np.random.default_rng(0)), 3000))
    assert np.mean(stream) == pytest.approx(2.5, rel=0.15)
    assert Scaled(made, 3.0).sample(np.random.default_rng(0), 5) == pytest.approx(3 * drawn[:5], rel=1.0)
    assert Scaled(made, 3.0).mean == 7.5


@pytest.mark.parametrize("said", KINDS)
def test_the_largest_of_some_is_as_if_all_were_drawn(said: Any) -> None:
    made = make_distribution("x", said)
    short = made.largest(np.random.default_rng(0), 20_000, 7)
    long = made.sample(np.random.default_rng(1), 20_000 * 7).reshape(-1, 7).max(axis=1)
    assert short.mean() == pytest.approx(long.mean(), rel=0.03)
    assert short.std() == pytest.approx(long.std(), rel=0.1, abs=1e-12)


def test_the_largest_of_a_million_exponential_ones() -> None:
    """Its mean is that of one times the harmonic number."""
    made = make_distribution("x", {"kind": "exponential", "mean": 2.0})
    largest = made.largest(np.random.default_rng(0), 4000, 10**6)
    assert largest.mean() == pytest.approx(2.0 * (np.log(1e6) + 0.5772), rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["lognormal", "gamma"]), st.floats(1e-3, 1e3), st.floats(0.01, 3.0), st.integers(1, 10**6))
def test_quantiles_rise_and_more_workers_are_slower(kind: str, mean: float, cv: float, among: int) -> None:
    made = make_distribution("x", {"kind": kind, "mean": mean, "cv": cv})
    values = made.quantile(np.linspace(0.0, 0.999, 50))
    assert (np.diff(values) >= 0).all()
    assert np.isfinite(values).all()
    one, many = (made.largest(np.random.default_rng(3), 50, number) for number in (1, among))
    assert (many >= one * (1 - 1e-9)).all()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("fast", "compute='fast' must be seconds, or a mapping with kind: one of constant"),
        (True, "must be seconds"),
        ({"kind": "normal"}, "one of constant, exponential"),
        ({"kind": "gamma", "mean": 1.0}, "compute: gamma doesn't go with mean"),
        ({"kind": "gamma", "mean": 1.0, "cv": 0.0}, "compute.cv=0.0 must be a finite number, 0.001 or more"),
        ({"kind": "lognormal", "mean": -1.0, "cv": 1.0}, "compute.mean=-1.0 must be a finite number, 0 or more"),
        ({"kind": "empirical", "values": []}, "compute.values: an empirical distribution needs one or more"),
        (float("inf"), "compute.value=inf must be a finite number"),
    ],
)
def test_what_is_none_is_refused_by_its_name(said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_distribution("compute", said)
