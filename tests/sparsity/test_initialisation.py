"""How many weights live at first, and where; how fast they move."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squall.sparsity import SparseMomentum
from squall.sparsity.initialisation import erk, magnitude_masks, random_masks, uniform
from squall.sparsity.rates import RATES


def test_erk_by_hand() -> None:
    # LeNet-300-100: sums of dimensions 1084, 400 and 110; 13,310 weights of 266,200 are to live, and fit.
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    densities = erk(shapes, 0.05)
    scale = 0.05 * 266_200 / (1084 + 400 + 110)
    assert densities["fc1"] == pytest.approx(scale * 1084 / 235_200)
    assert densities["fc2"] == pytest.approx(scale * 400 / 30_000)
    assert densities["fc3"] == pytest.approx(scale * 110 / 1_000)
    assert densities["fc3"] == pytest.approx(0.9185, abs=1e-4)


def test_erk_makes_full_layers_dense_and_others_sparser() -> None:
    # At 10 %, fc3 would have a density of 1.84: it is dense, and the other two share 26,620 - 1,000.
    densities = erk({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.1)
    scale = (26_620 - 1_000) / (1084 + 400)
    assert densities["fc3"] == 1.0
    assert densities["fc1"] == pytest.approx(scale * 1084 / 235_200)
    assert densities["fc2"] == pytest.approx(scale * 400 / 30_000)


def test_erk_counts_a_kernel_s_sides() -> None:
    densities = erk({"conv": (64, 32, 3, 5), "fc": (100, 100)}, 0.05)
    ratio = ((64 + 32 + 3 + 5) / (64 * 32 * 3 * 5)) / ((100 + 100) / (100 * 100))
    assert densities["conv"] / densities["fc"] == pytest.approx(ratio)


@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=6), st.floats(0.005, 1.0))
def test_erk_keeps_the_density_of_all_together(shapes: list[tuple[int, int]], density: float) -> None:
    named = {str(index): shape for index, shape in enumerate(shapes)}
    densities = erk(named, density)
    assert all(0 < value <= 1 for value in densities.values())
    total = sum(math.prod(shape) for shape in shapes)
    assert sum(densities[name] * math.prod(named[name]) for name in named) == pytest.approx(density * total)


def test_masks_have_exact_numbers_and_dense_layers_none() -> None:
    weights = {"a": torch.zeros(40, 25), "b": torch.zeros(3, 3), "c": torch.zeros(4, 4)}
    masks = random_masks(weights, {"a": 0.0333, "b": 0.01, "c": 1.0}, torch.Generator().manual_seed(0))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 33, "b": 1}  # never none at all
    again = random_masks(weights, {"a": 0.0333, "b": 0.01, "c": 1.0}, torch.Generator().manual_seed(0))
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert uniform({"a": (2, 3)}, 0.3) == {"a": 0.3}


def test_trained_weights_keep_the_largest() -> None:
    (mask,) = magnitude_masks({"a": torch.tensor([[0.1, -3.0], [2.0, 0.0]])}, {"a": 0.5}).values()
    assert mask.tolist() == [[False, True], [True, False]]


def test_the_cosine_is_that_of_the_authors() -> None:
    # Theirs is torch's scheduler, from 0.5 to 0.005, stepped once a step.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, 0.005)
    algorithm = SparseMomentum()
    for step in range(100):
        assert algorithm.rate(step, step / 100) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", RATES)
def test_rates_begin_where_they_are_told_to(name: str) -> None:
    assert RATES[name](0.4, 0.1, 0.0, 0) == pytest.approx(0.4)
    if name in ("cosine", "linear"):
        assert RATES[name](0.4, 0.1, 1.0, 10) == pytest.approx(0.1)
        assert RATES[name](0.4, 0.1, 0.5, 10) == pytest.approx(0.25)
