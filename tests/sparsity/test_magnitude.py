"""Magnitude pruning keeps exactly the largest, however they are spread."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.sparsity import magnitude_mask


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    st.floats(0.001, 1.0),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_are_kept_and_of_equals_the_first(values, density, dtype):
    mask = magnitude_mask(torch.tensor(values, dtype=dtype), density)
    num_kept = max(1, round(density * len(values)))
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
    assert mask.nonzero().squeeze(1).tolist() == sorted(order[:num_kept])


def test_shapes_and_all_of_them():
    weight = torch.randn(3, 4, 5)
    assert magnitude_mask(weight, 1.0).all()
    assert magnitude_mask(weight, 0.5).shape == weight.shape
    assert magnitude_mask(weight.permute(2, 0, 1), 0.5).equal(magnitude_mask(weight.permute(2, 0, 1).contiguous(), 0.5))
    assert magnitude_mask(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert magnitude_mask(torch.tensor([1.0, math.inf, -math.inf]), 0.6).tolist() == [False, True, True]


def test_a_parameter_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(10))
    before = weight.detach().clone()
    assert not magnitude_mask(weight, 0.5).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_no_density(density):
    with pytest.raises(ValueError, match="density="):
        magnitude_mask(torch.randn(4), density)


def test_nan_has_no_magnitude():
    with pytest.raises(ValueError, match="NaN"):
        magnitude_mask(torch.tensor([1.0, math.nan]), 0.5)
