"""Decoding by compiled kernels: what constriction says, and numpy works out, of damaged codes as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.kernels import ans as kernel
from squall.kernels import native
from squall.kernels.ans import interleaved
from squall.sparsity.coding import ans, positions, ways

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
    shares = ans.SHARES[np.random.default_rng(seed).integers(0, 256, num_kinds)]
    shares[0] += 1
    code = kernel.Code(words, shares, num_symbols)
    same(kernel.decode([code]), [code])


@given(
    st.lists(st.integers(0, 7), max_size=300), st.integers(-3, 3), st.sampled_from([3000, 1 << 31, 1 << 40]),
    st.sampled_from([np.uint8, np.uint16]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_positions_are_sums_of_gaps(gaps, too_many, num_elements, of_gap):
    gaps = np.array(gaps, of_gap)
    num_positions = max(0, int(np.count_nonzero(gaps)) + too_many)
    found, num_found, last = kernel.positions(gaps, 7, num_positions, num_elements)
    expected, *ends = positions._sum_up(gaps, 7, num_positions, num_elements)
    assert [num_found, last] == ends
    assert found.dtype == expected.dtype
    both = min(num_found, num_positions)
    assert np.array_equal(found[:both], expected[:both])


@given(
    st.integers(1, 70), st.integers(1, 40), st.floats(0, 1), st.sampled_from([np.int32, np.int64]),
    st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]), st.integers(0, 1 << 32),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_order_of_columns_becomes_that_of_rows(num_rows, num_columns, density, of_place, of_value, seed):
    generator = np.random.default_rng(seed)
    places = np.flatnonzero(generator.random(num_rows * num_columns) < density).astype(of_place)
    values = generator.integers(0, 250, len(places)).astype(of_value)
    along_rows = ways.to_rows(places, (num_rows, num_columns))
    order = np.argsort(along_rows)
    turned, ordered = kernel.turn(places, values, num_rows, num_columns)
    assert turned.dtype == of_place
    assert ordered.dtype == of_value
    assert np.array_equal(turned, along_rows[order])
    assert np.array_equal(ordered, values[order])


def model(num_kinds, skew, generator):
    """Frequencies of every size that add up to the whole, some of them 0."""
    shares = generator.random(num_kinds) ** (20 * skew)
    frequencies = (shares / shares.sum() * (4096 - num_kinds)).astype(np.int64) + (generator.random(num_kinds) < 0.7)
    frequencies[:2] = np.maximum(frequencies[:2], 1)
    frequencies[frequencies.argmax()] += 4096 - frequencies.sum()
    return frequencies.astype(np.uint16)


def agree(code):
    """What every path makes of a code."""
    expected, is_whole = interleaved._decode_in_turns(code)
    for isa in native.isas():
        with native.forced(isa):
            symbols, whole = kernel.decode_interleaved(code)
        assert np.array_equal(symbols, expected), isa
        assert whole == is_whole
    return expected, is_whole


@given(
    st.sampled_from([1, 63, 65, 0, 64, 128, 1000, 4096, 20_001]) | st.integers(0, 3000), st.integers(2, 256),
    st.floats(0, 1), st.integers(0, 1 << 32),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_states_that_take_turns(num_symbols, num_kinds, skew, seed):
    generator = np.random.default_rng(seed)
    frequencies = model(num_kinds, skew, generator)
    symbols = generator.choice(num_kinds, num_symbols, p=frequencies / 4096).astype(np.int32)
    code = kernel.encode_interleaved(symbols, frequencies)
    found, is_whole = agree(code)
    assert is_whole
    assert np.array_equal(found, symbols)
    bits = -np.log2(frequencies[symbols] / 4096).sum()
    assert 16 * len(code.words) <= bits + 16 * 64 + 0.01 * num_symbols
    for fewer in (
        code._replace(words=code.words[:-1]),
        code._replace(words=np.append(code.words, 7).astype(np.uint16)),
    ):
        if len(code.words):
            assert not agree(fewer)[1]


@given(st.integers(2, 256), st.binary(max_size=900), st.integers(0, 900), st.integers(0, 1 << 32))
@settings(max_examples=100, deadline=None)
def test_what_no_states_have_written_is_none_for_all(num_kinds, data, num_symbols, seed):
    """States below 2^16, too, which no writer begins with."""
    generator = np.random.default_rng(seed)
    words = np.frombuffer(data[: len(data) // 2 * 2], np.uint16)
    states = generator.integers(0, 1 << generator.integers(1, 33), 64).astype(np.uint32)
    agree(kernel.Interleaved(words, states, model(num_kinds, 0.3, generator), num_symbols))
