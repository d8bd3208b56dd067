"""Decoding by compiled kernels: what the library constriction says and numpy sums up, of damaged codes as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.kernels import ans as kernel
from squall.kernels import native
from squall.sparsity.coding import ans, positions

pytestmark = pytest.mark.skipif(not native.serves(), reason="there are no compiled kernels")


def coded(num_symbols, num_kinds, skew, seed):
    generator = np.random.default_rng(seed)
    shares = generator.random(num_kinds) ** (20 * skew) + 1e-9
    symbols = generator.choice(num_kinds, num_symbols, p=shares / shares.sum()).astype(np.int32)
    symbols = np.concatenate(([0, num_kinds - 1], symbols)).astype(np.int32)
    reader = ans.Reader(np.frombuffer(ans.encode(symbols, np.bincount(symbols)), np.uint8))
    return symbols, ans.read(reader, len(symbols), num_kinds)


def same(decoded, codes):
    expected = [ans._decode(code) for code in codes]
    assert len(decoded) == len(codes)
    for (symbols, is_whole), (expected_symbols, expected_whole) in zip(decoded, expected, strict=True):
        assert np.array_equal(symbols, expected_symbols)
        assert is_whole == expected_whole


PARAMETERS = st.tuples(st.integers(0, 4000), st.integers(2, 400), st.floats(0, 1), st.integers(0, 1 << 32))


@given(st.lists(PARAMETERS, max_size=9), st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_any_number_of_codes_side_by_side(parameters, num_threads):
    both = [coded(*of_one) for of_one in parameters]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        decoded = kernel.decode([code for _, code in both])
    finally:
        torch.set_num_threads(before)
    same(decoded, [code for _, code in both])
    for (found, is_whole), (symbols, _) in zip(decoded, both, strict=True):
        assert np.array_equal(found, symbols)
        assert is_whole


@pytest.mark.parametrize("num_kinds", [2, 255, 256, 257, 1 << 14, 1 << 16])
def test_models_of_every_size(num_kinds):
    """With more kinds than steps a bucket has many of them, and is halved."""
    code = coded(20_000, num_kinds, 0.3, num_kinds)[1]
    same(kernel.decode([code]), [code])


@given(st.integers(2, 3000), st.binary(max_size=64), st.integers(0, 300), st.integers(0, 1 << 32))
@settings(max_examples=100, deadline=None)
def test_what_is_no_code_is_none_for_both(num_kinds, data, num_symbols, seed):
    words = np.frombuffer(data[: len(data) // 4 * 4], np.uint32)
    words = words[: np.flatnonzero(words)[-1] + 1] if words.any() else words[:0]
    shares = ans._SHARES[np.random.default_rng(seed).integers(0, 256, num_kinds)]
    shares[0] += 1
    code = kernel.Code(words, shares, num_symbols)
    same(kernel.decode([code]), [code])


@given(st.lists(st.integers(0, 7), max_size=300), st.integers(-3, 3), st.sampled_from([3000, 1 << 31, 1 << 40]))
@settings(max_examples=100, deadline=None)
def test_positions_are_sums_of_gaps(gaps, too_many, num_elements):
    gaps = np.array(gaps, np.uint16)
    num_positions = max(0, int(np.count_nonzero(gaps)) + too_many)
    found, num_found, last = kernel.positions(gaps, 7, num_positions, num_elements)
    expected, *ends = positions._sum_up(gaps, 7, num_positions, num_elements)
    assert [num_found, last] == ends
    assert found.dtype == expected.dtype
    both = min(num_found, num_positions)
    assert np.array_equal(found[:both], expected[:both])
