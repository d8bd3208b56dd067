"""Every Strategy times every feature of the Trainer: each cell works, equal to one device, or says clearly why not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run

from . import features  # noqa: F401  (fills the table)
from .cell import Dealt, Outcome, Unlike, execute
from .table import FEATURES, STRATEGIES, WORKS, Entry, Feature, features_table, first_words, seen

_CLEAR = {"ValueError", "MisconfigurationException", "RuntimeError", "TypeError"}
_references: dict[tuple[str, str], Mapping[str, Any]] = {}  # by column and feature


def _outcomes(feature: Feature, entry: Entry, path: Path) -> list[Outcome]:
    path.mkdir(exist_ok=True)
    return run(entry.num_ranks, execute, feature.name, entry.name, str(path), timeout=120, lightning=True)


def _reference(feature: Feature, entry: Entry, path: Path) -> Mapping[str, Any]:
    """What the column observes that this one is compared with."""
    key = entry.reference, feature.name
    if key not in _references:
        other = next(other for other in STRATEGIES if other.name == entry.reference)
        outcome = _outcomes(feature, other, path)[0]
        assert not outcome.kind, outcome.traceback
        _references[key] = outcome.observed
    return _references[key]


def _compare(actual: Any, expected: Any, tolerance: float, replica: int, num_replicas: int, what: str) -> None:
    if isinstance(actual, Unlike):
        return
    if isinstance(expected, Dealt):
        assert isinstance(actual, Dealt), what
        expected_rows = expected.rows[replica::num_replicas]
        _compare(actual.rows, expected_rows, tolerance, replica, num_replicas, what)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key, value in expected.items():
            _compare(actual[key], value, tolerance, replica, num_replicas, f"{what}.{key}")
    elif isinstance(expected, Tensor):
        assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, what
        if expected.numel():
            scale = max(expected.abs().max().item(), 1e-12)
            error = (actual.double() - expected.double()).abs().max().item() / scale
            assert error <= tolerance, f"{what}: relative error {error:.3g}"
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=tolerance, abs=1e-12), what
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), f"{what}: {actual} instead of {expected}"
        for index, value in enumerate(expected):
            _compare(actual[index], value, tolerance, replica, num_replicas, f"{what}[{index}]")
    else:
        assert actual == expected, what


def _judge(feature: Feature, entry: Entry, path: Path) -> str:
    outcomes = _outcomes(feature, entry, path / "cell")
    return _verdict(feature, entry, outcomes, path)


def _verdict(feature: Feature, entry: Entry, outcomes: list[Outcome], path: Path) -> str:
    pattern = feature.errors.get(entry.name)
    if pattern is not None:
        for outcome in outcomes:
            assert outcome.kind in _CLEAR, f"{outcome.kind or 'no error'} instead of a clear one: {outcome.message}"
            assert re.search(pattern, outcome.message), outcome.message
            assert entry.name in feature.late or outcome.num_batches == 0, "the error came after the first batch"
        found = re.search(pattern, outcomes[0].message)
        assert found is not None
        return f"clear error: {first_words(outcomes[0].message[found.start() :])}"
    for rank, outcome in enumerate(outcomes):
        assert not outcome.kind, f"rank {rank}: {outcome.traceback}"
    if entry.name == entry.reference:
        _references[entry.name, feature.name] = outcomes[0].observed
    expected = _reference(feature, entry, path / "reference")
    if entry.name in feature.wrong:
        with pytest.raises(AssertionError):
            _compare_ranks(feature, entry, outcomes, expected)
        return f"**differs**: {feature.wrong[entry.name]}"
    _compare_ranks(feature, entry, outcomes, expected)
    return WORKS


def _compare_ranks(feature: Feature, entry: Entry, outcomes: list[Outcome], expected: Mapping[str, Any]) -> None:
    if not entry.exact:
        for rank, outcome in enumerate(outcomes):
            assert set(outcome.observed) == set(expected)
            for key in ("weights", "steps", "epochs"):
                if key in expected:
                    _compare(outcome.observed[key], outcomes[0].observed[key], 0.0, 0, 1, f"rank {rank}.{key}")
        return
    for rank, outcome in enumerate(outcomes):
        replica = rank * entry.num_replicas // entry.num_ranks
        _compare(outcome.observed, expected, feature.tolerance, replica, entry.num_replicas, f"rank {rank}")


def _marked(entry: Entry) -> Any:
    return entry if entry.exact else pytest.param(entry, marks=pytest.mark.asynchronous)


@pytest.mark.parametrize(
    "entry", [_marked(entry) for entry in STRATEGIES], ids=lambda entry: entry.name.replace(" ", "_")
)
@pytest.mark.parametrize("name", FEATURES)
def test_cell(name: str, entry: Entry, tmp_path: Path) -> None:
    seen[name, entry.name] = "FAILS"
    seen[name, entry.name] = _judge(FEATURES[name], entry, tmp_path)


def test_the_comparison_notices_a_difference() -> None:
    expected = {"weights": torch.ones(3, dtype=torch.float64), "steps": 4, "rows": Dealt(torch.arange(4.0))}
    same = {"weights": torch.ones(3, dtype=torch.float64), "steps": 4, "rows": Dealt(torch.tensor([1.0, 3.0]))}
    _compare(same, expected, 1e-9, 1, 2, "")
    for wrong in (
        {**same, "weights": torch.tensor([1, 1, 1 + 1e-6], dtype=torch.float64)},
        {**same, "weights": torch.ones(2, dtype=torch.float64)},
        {**same, "steps": 5},
        {**same, "rows": Dealt(torch.tensor([0.0, 2.0]))},
        {"weights": same["weights"], "steps": 4},
    ):
        with pytest.raises(AssertionError):
            _compare(wrong, expected, 1e-9, 1, 2, "")


def test_the_page_shows_what_was_seen(request: pytest.FixtureRequest) -> None:
    """Comes last: the page's table is the one that this run saw (``--update-conformance`` writes it)."""
    features_table().check(seen, request.config.getoption("--update-conformance", default=False))
