"""Huffman codes: as short as can be, as canonical as they are said to be, and refused when they are neither."""

from __future__ import annotations

import heapq
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.sparsity import CompressedFileError
from squall.sparsity.coding import huffman
from squall.sparsity.coding.fields import Reader, number


def tree_bits(counts):
    """All bits of the best code, by Huffman's own algorithm."""
    heap, bits = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        bits += both
        heapq.heappush(heap, both)
    return bits


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda counts: sum(map(bool, counts)) > 1))
@settings(max_examples=100, deadline=None)
def test_lengths_are_huffmans(counts):
    lengths = huffman.code_lengths(np.array(counts))
    assert [length > 0 for length in lengths] == [count > 0 for count in counts]
    assert sum(Fraction(1, 1 << int(length)) for length in lengths if length) == 1
    assert int((lengths * counts).sum()) == tree_bits(counts)


def test_lengths_are_limited_at_the_least_cost():
    fibonacci = [1, 1]
    while len(fibonacci) < 25:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() == huffman.MAX_LENGTH == 15
    assert sum(Fraction(1, 1 << int(length)) for length in lengths) == 1
    bits = int((lengths * np.array(fibonacci)).sum())
    assert tree_bits(fibonacci) < bits < 1.01 * tree_bits(fibonacci)
    assert (np.diff(lengths) <= 0).all()


@pytest.mark.parametrize("num_kinds", [2, 3, 1000, huffman.MAX_KINDS])
def test_equal_counts_have_equal_lengths(num_kinds):
    lengths = huffman.code_lengths(np.ones(num_kinds, np.int64))
    assert set(lengths) <= {int(np.log2(num_kinds)), int(np.ceil(np.log2(num_kinds)))}


def test_the_code_is_canonical():
    """Written out by hand: a is 0, c is 10, b and d are 110 and 111."""
    symbols = np.array([0, 1, 2, 3, 0, 0, 2, 0], np.int32)
    data = huffman.encode(symbols, np.bincount(symbols))
    assert data[:3] == bytes([4, 1 | 3 << 4, 2 | 3 << 4])  # lengths 1, 3, 2, 3
    assert data[3:5] == (14).to_bytes(2, "little")  # one lane
    assert data[5:] == bytes([0b01101011, 0b10010000])


@given(st.integers(1, 5000), st.integers(2, 300), st.floats(0.0, 1.0), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_round_trip(num_symbols, num_kinds, skew, seed):
    generator = np.random.default_rng(seed)
    shares = generator.random(num_kinds) ** (20 * skew) + 1e-9
    symbols = generator.choice(num_kinds, num_symbols, p=shares / shares.sum()).astype(np.int32)
    symbols = np.concatenate((symbols, [0, 1])).astype(np.int32)
    counts = np.bincount(symbols)
    data = huffman.encode(symbols, counts)
    assert len(data) == huffman.size(counts)
    reader = Reader(np.frombuffer(data, np.uint8))
    assert np.array_equal(huffman.read(reader, len(symbols), num_kinds)(), symbols)
    reader.end()


def decode(data, num_symbols=8, num_kinds=4):
    reader = Reader(np.frombuffer(data, np.uint8))
    symbols = huffman.read(reader, num_symbols, num_kinds)()
    reader.end()
    return symbols


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([1, 3, 2], "complete"),  # bits that lead nowhere
        ([1, 1, 1], "complete"),  # bits that lead to two symbols
        ([0, 0, 0], "complete"),
        ([1], "complete"),
        ([15, 15], "complete"),
        ([1, 1, 0, 0, 0], "at most 4"),  # symbols that there aren't
    ],
)
def test_tables_that_are_no_code(lengths, words):
    pairs = [*lengths, 0]
    packed = bytes(pairs[i] | pairs[i + 1] << 4 for i in range(0, len(lengths), 2))
    with pytest.raises(CompressedFileError, match=words):
        decode(number(len(lengths)) + packed + bytes([8, 0, 0b10101010]))


@pytest.mark.parametrize("num_bits", [13, 15, 0])
def test_a_lane_that_ends_elsewhere(num_bits):
    with pytest.raises(CompressedFileError, match="doesn't end"):
        decode(bytes([4, 1 | 3 << 4, 2 | 3 << 4, num_bits, 0]) + bytes([0b01101011, 0b10010000])[: (num_bits + 7) // 8])


def test_lanes_longer_than_the_file():
    with pytest.raises(CompressedFileError, match="more bytes are announced"):
        decode(bytes([4, 1 | 3 << 4, 2 | 3 << 4, 255, 255, 0, 0]))
