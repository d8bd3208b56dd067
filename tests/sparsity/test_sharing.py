"""Shared weights: Lloyd's algorithm from linear centroids, against the plainest way to write it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.sparsity import share_weights


def lloyd(values: Tensor, num_centroids: int, max_iterations: int) -> Tensor:
    """The centroids, by a table of all distances."""
    centroids = torch.linspace(values.min(), values.max(), num_centroids, dtype=torch.float64)
    for _ in range(max_iterations):
        nearest = (values[:, None] - centroids).abs().argmin(1)
        for k in range(num_centroids):
            if (nearest == k).any():
                centroids[k] = values[nearest == k].mean()
    return centroids


@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 1 << 32))
@settings(max_examples=50, deadline=None)
def test_lloyds_algorithm(bits, max_iterations, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    weight[torch.rand(40, 5, generator=generator) < 0.5] = 0
    shared = share_weights(weight, bits, max_iterations=max_iterations)
    torch.testing.assert_close(shared.centroids, lloyd(weight[weight != 0], 1 << bits, max_iterations))
    nearest = (weight[weight != 0][:, None] - shared.centroids).abs().argmin(1)
    assert torch.equal(shared.assignments, nearest)
    dense = shared.dense()
    assert torch.equal(dense != 0, weight != 0)
    assert torch.equal(dense[shared.mask], shared.centroids[nearest])


def test_linear_centroids():
    weight = torch.tensor([-1.0, 0.1, 0.2, 5.0, 7.0])
    shared = share_weights(weight, 2, max_iterations=0)
    torch.testing.assert_close(shared.centroids, torch.tensor([-1.0, 5 / 3, 13 / 3, 7.0]))
    assert shared.assignments.tolist() == [0, 0, 0, 2, 3]


def test_a_weight_between_two_centroids_goes_to_the_lower():
    shared = share_weights(torch.tensor([1.0, 2.0, 3.0]), 1)
    assert shared.centroids.tolist() == [1.5, 3.0]
    assert shared.assignments.tolist() == [0, 0, 1]


def test_a_centroid_that_nothing_is_near_to_stays():
    weight = torch.tensor([-1.0, -0.9, 0.9, 1.0])
    shared = share_weights(weight, 2)
    torch.testing.assert_close(shared.centroids, torch.tensor([-0.95, -1 / 3, 1 / 3, 0.95]))


def test_it_never_gets_worse_and_comes_to_an_end():
    weight = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    errors = [
        float((share_weights(weight, 5, max_iterations=n).dense() - weight).square().mean())
        for n in (0, 1, 5, 50, 5000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.0035
    ended = share_weights(weight, 5, max_iterations=5000)
    assert torch.equal(ended.centroids, share_weights(weight, 5, max_iterations=10_000).centroids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_and_a_data_type(dtype):
    weight = torch.randn(8, 8).to(dtype)
    mask = torch.rand(8, 8) < 0.5
    shared = share_weights(torch.nn.Parameter(weight), 2, mask)
    assert shared.centroids.dtype == shared.dense().dtype == dtype
    assert len(shared.dense()[mask].unique()) <= 4
    assert not shared.dense()[~mask].any()


def test_weights_that_are_shared_already_stay():
    weight = torch.tensor([0.25, -3.0, 7.5, 11.0])[torch.randint(0, 4, (1000,))]
    assert torch.equal(share_weights(weight, 8).dense(), weight)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_no_number_of_bits(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be from 1 to 16"):
        share_weights(torch.randn(10), bits)


def test_more_centroids_than_weights():
    assert len(share_weights(torch.randn(4), 2).centroids) == 4
    with pytest.raises(ValueError, match="bits=2 makes 4 centroids of 3 weights: take fewer bits"):
        share_weights(torch.tensor([1.0, 0.0, 2.0, 3.0]), 2)


def test_complex_weights():
    with pytest.raises(ValueError, match="Complex weights can't be shared"):
        share_weights(torch.randn(10, dtype=torch.complex64), 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_aren_t_finite(value):
    with pytest.raises(ValueError, match="isn't finite"):
        share_weights(torch.tensor([1.0, value, 2.0]), 1)
