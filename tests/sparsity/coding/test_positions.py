"""Positions: gaps and fillers as in the paper, any width, and nothing past the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.kernels import native
from squall.sparsity import CompressedFileError
from squall.sparsity.coding import positions, streams
from squall.sparsity.coding.fields import Reader, number


def decoded(data, num_positions, num_elements):
    reader = Reader(np.frombuffer(data, np.uint8))
    found = positions.read(reader, num_positions, num_elements).positions()
    reader.end()
    return found


@pytest.mark.parametrize("coder", streams.CODERS)
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([None, *positions.GAP_BITS]), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_round_trip(coder, num_elements, density, gap_bits, seed):
    places = np.flatnonzero(np.random.default_rng(seed).random(num_elements) < density)
    how = positions.plan(places, coder, gap_bits)
    if np.isinf(how.num_bytes):
        assert gap_bits is not None  # a width asked for may be one that no reader would take
        return
    assert how.gap_bits == gap_bits or gap_bits is None
    data = positions.encode(places, how)
    assert abs(len(data) - how.num_bytes) <= 8
    assert np.array_equal(decoded(data, len(places), num_elements), places)


def test_gaps_and_fillers_by_hand():
    """Of two bits a gap is at most 3: weights 0, 2 and 9 are 1, 2, and 7 = 3 + 3 + 1."""
    places = np.array([0, 2, 9])
    how = positions.plan(places, "huffman", gap_bits=2)
    assert how.num_fillers == 2
    assert how.num_symbols == 5
    symbols = streams.read(Reader(np.frombuffer(positions.encode(places, how)[2:], np.uint8)), 5, 4).symbols()
    assert symbols.tolist() == [1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("coder", "within", "isa"), [("ans", 1.003, "torch"), ("ans", 1.01, native.isa()), ("huffman", 1.06, "torch")]
)
@pytest.mark.parametrize("density", [0.04, 0.09, 0.25, 0.38])
def test_near_to_the_entropy_of_positions(coder, within, isa, density):
    """So few of them lie in a file where compiled kernels will look for speed that 64 states are felt."""
    num_elements = 1_000_000
    places = np.flatnonzero(np.random.default_rng(0).random(num_elements) < density)
    p = len(places) / num_elements
    bound = -num_elements * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8
    with native.forced(isa):
        assert bound < len(positions.encode(places, positions.plan(places, coder))) < within * bound


@pytest.mark.parametrize("gap_bits", [3, 5, 8])
def test_fillers_cost_next_to_nothing(gap_bits):
    """Distances of independent positions have no memory: any width takes what the best one takes."""
    places = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < 0.09)
    best = positions.plan(places, "ans").num_bytes
    assert positions.plan(places, "ans", gap_bits).num_bytes < 1.003 * best


def test_the_paper_s_width_before_coding():
    places = np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.09)
    gaps = np.diff(places, prepend=-1) - 1
    for width in (4, 5):
        entries = len(places) + int((gaps // (2**width - 1)).sum())
        assert positions.uncoded(places, 100_000, 5, 6, width) == (width, entries * (width + 5))
    assert positions.uncoded(places, 100_000, 5, 6, None)[0] == 5
    assert positions.uncoded(np.arange(100), 100, 5, 5, None) == (0, 500)


def stream_of(*symbols):
    symbols = np.array(symbols, np.int32)
    return streams.plan(np.bincount(symbols), "huffman").encode(symbols)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (number(0) + number(0) + stream_of(1, 2, 1), "no bits"),
        (number(13) + number(0) + stream_of(1, 2, 1), "at most 12"),
        (number(2) + number(4) + stream_of(1, 2, 1), "at most 3"),
        (number(2) + number(0) + stream_of(1, 2, 0), "don't lead to 3"),
        (number(2) + number(1) + stream_of(1, 2, 1, 1), "don't lead to 3"),
        (number(2) + number(2) + stream_of(0, 0, 3, 2, 1), "past the end"),
        (number(2) + number(1) + stream_of(3, 3, 2, 0), "past the end"),
        (number(1) + number(0) + stream_of(1, 2, 1), "at most 2"),
    ],
)
def test_gaps_that_are_none(data, words):
    with pytest.raises(CompressedFileError, match=words):
        decoded(data, 3, 10)


def test_the_last_weight_may_be_the_last_element():
    assert decoded(number(2) + number(2) + stream_of(0, 0, 2, 1, 1), 3, 10).tolist() == [7, 8, 9]
