"""Streams of symbols: near to their entropy with either coder, and never more symbols than their bytes pay for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.kernels import native
from squall.sparsity import CompressedFileError
from squall.sparsity.coding import ans, positions, streams
from squall.sparsity.coding.fields import Reader, number


def decoded(data, num_symbols, num_kinds):
    reader = Reader(np.frombuffer(data, np.uint8))
    symbols = streams.read(reader, num_symbols, num_kinds).symbols()
    reader.end()
    return symbols


def entropy_bytes(counts):
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) / 8


@pytest.mark.parametrize("coder", streams.CODERS)
@given(st.integers(0, 3000), st.integers(1, 300), st.floats(0.0, 1.0), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_round_trip(coder, num_symbols, num_kinds, skew, seed):
    generator = np.random.default_rng(seed)
    shares = generator.random(num_kinds) ** (20 * skew) + 1e-9
    symbols = generator.choice(num_kinds, num_symbols, p=shares / shares.sum()).astype(np.int32)
    stream = streams.plan(np.bincount(symbols, minlength=num_kinds), coder)
    data = stream.encode(symbols)
    assert np.array_equal(decoded(data, num_symbols, num_kinds), symbols)
    assert abs(len(data) - stream.num_bytes) <= 2 * ans.WORD_BYTES


@pytest.mark.parametrize(
    ("coder", "within", "isa"), [("ans", 1.001, "torch"), ("ans", 1.005, native.isa()), ("huffman", 1.015, "torch")]
)
def test_near_to_the_entropy(coder, within, isa):
    """Sooner decoded where there are compiled kernels, which costs a little."""
    generator = np.random.default_rng(0)
    symbols = np.minimum(generator.geometric(0.09, 500_000) - 1, 127).astype(np.int32)
    counts = np.bincount(symbols)
    with native.forced(isa):
        data = streams.plan(counts, coder).encode(symbols)
    assert entropy_bytes(counts) < len(data) < within * entropy_bytes(counts)
    assert np.array_equal(decoded(data, len(symbols), 128), symbols)


def test_ans_takes_what_huffman_cant():
    symbols = (np.random.default_rng(0).random(100_000) < 0.05).astype(np.int32)
    counts = np.bincount(symbols)
    sizes = {coder: len(streams.plan(counts, coder).encode(symbols)) for coder in streams.CODERS}
    assert sizes["ans"] < 1.01 * entropy_bytes(counts)
    assert sizes["huffman"] > 100_000 / 8  # no code has less than a bit


def test_frequencies_of_every_size():
    """The rarest symbol of 2^30 has its share, and the commonest isn't overrun by those that there are few of."""
    counts = np.full(1000, 1)
    counts[500] = 1 << 30
    best = (counts * np.log2(counts.sum() / counts)).sum() / 8
    assert ans.size(counts) - 1000 < 1.1 * best + 16
    assert ans.table_of(np.array([1, 1 << 40])).all()


def test_one_kind_of_symbol_takes_a_number():
    stream = streams.plan(np.array([0, 0, 0, 900]), "ans")
    assert stream.encode(np.full(900, 3, np.int32)) == bytes([0, 3])
    assert decoded(bytes([0, 3]), 900, 4).tolist() == [3] * 900
    with pytest.raises(CompressedFileError, match="at most 3"):
        decoded(bytes([0, 4]), 900, 4)


@pytest.mark.parametrize("coder", streams.CODERS)
def test_nothing_that_a_reader_would_refuse_is_written(coder):
    counts = np.array([1, 1_000_000])
    assert (streams.plan(counts, coder).num_bytes == np.inf) == (coder == "ans")  # Huffman takes a bit for each
    assert streams.plan(np.array([0, 1_000_000]), coder).num_bytes == np.inf
    assert streams.plan(np.ones(1 << 17, np.int64), coder).num_bytes == np.inf


@pytest.mark.skipif(not native.serves(), reason="nothing is there to write them")
@pytest.mark.parametrize(("num_kinds", "num_symbols"), [(2, 1_000_000), (24, 400_000), (64, 300_001), (256, 400_000)])
def test_long_streams_are_coded_for_speed(num_kinds, num_symbols):
    """And take hardly more for it; what is written there is read where there are no compiled kernels."""
    generator = np.random.default_rng(num_kinds)
    symbols = np.minimum(generator.geometric(min(0.5, 3.0 / num_kinds), num_symbols) - 1, num_kinds - 1).astype(
        np.int32
    )
    symbols = symbols if num_kinds > 2 else (symbols * 0 + (generator.random(num_symbols) < 0.3)).astype(np.int32)
    counts = np.bincount(symbols)
    stream = streams.plan(counts, "ans")
    data = stream.encode(symbols)
    assert data[0] == 3
    assert abs(len(data) - stream.num_bytes) <= 64
    assert entropy_bytes(counts) < len(data) < 1.005 * entropy_bytes(counts)
    for isa in ("torch", *native.isas()):
        with native.forced(isa):
            assert np.array_equal(decoded(data, num_symbols, num_kinds), symbols)
    with native.forced("torch"):
        assert streams.plan(counts, "ans").encode(symbols)[0] == 1


@pytest.mark.skipif(not native.serves(), reason="nothing is there to write them")
def test_of_equally_small_ways_the_soonest_decoded():
    """Gaps of seven bits and eight have no fillers, but more symbols than can be looked up as fast."""
    places = np.flatnonzero(np.random.default_rng(0).random(4_000_000) < 0.09)
    how = positions.plan(places, "ans")
    assert (how.gap_bits, how.stream.effort) == (6, 1)
    assert how.num_bytes < 1.002 * positions.plan(places, "ans", 8).num_bytes
    assert positions.plan(places, "huffman").gap_bits == 8


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_a_thousand_million_symbols_of_no_bytes(kind):
    with pytest.raises(CompressedFileError, match="1,000,000,000 symbols are announced"):
        decoded(bytes([kind, 2, 9, 9, 1, 1, 0, 0, 0]), 1_000_000_000, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "more bytes"),
        (bytes([4]), "at most 3"),
        (bytes([1, 5]), "at most 4"),
        (bytes([1, 2, 0, 9, 0]), "fewer than two symbols"),
        (bytes([1, 2, 9, 9, 2, 1, 0, 0, 0]), "at most 1"),
        (bytes([1, 2, 9, 9, 1, 0, 0, 0, 0]), "empty word"),
        (bytes([1, 2, 9, 9, 1, 1, 0, 0, 9]), "doesn't end where"),
        (bytes([3, 2, 0, 9, 0]), "fewer than two symbols"),
        (bytes([3, 2, 9, 9]) + bytes(255), "256 more bytes"),
        (bytes([3, 2, 9, 9]) + bytes(256) + bytes([2, 0]), "at most 1"),
        (bytes([3, 2, 9, 9]) + bytes(256) + bytes([0]), "doesn't end where"),
    ],
)
def test_bytes_that_are_no_stream(data, words):
    with pytest.raises(CompressedFileError, match=words):
        decoded(data, 3, 4)


def test_what_was_written_once_is_read_for_ever():
    """A library that rounded models otherwise would break files; these bytes stand for all of them."""
    symbols = np.array([0, 1, 2, 2, 2, 5, 2, 1, 2, 2, 0, 2, 2, 2, 1, 2], np.int32)
    ans_bytes = bytes.fromhex(ANS)
    huffman_bytes = bytes.fromhex(HUFFMAN)
    for coder, data in (("ans", ans_bytes), ("huffman", huffman_bytes)):
        assert streams.plan(np.bincount(symbols), coder).encode(symbols) == data
        assert np.array_equal(decoded(data, 16, 6), symbols)
    assert np.array_equal(decoded(bytes.fromhex(INTERLEAVED), 70, 6), np.tile(symbols, 5)[:70])


ANS = "0106ecf1ff0000e402516e16e1d72e0000"
INTERLEAVED = "03"  # and what codes 70 symbols
INTERLEAVED += "06edf1ff0000e6e19138004ea41d0022b6020022b6020022b60200f4bec30057a601008f72050057a6010057a60100788107"
INTERLEAVED += "0057a6010057a6010057a601008f72050057a60100788107008f72050057a6010057a6010057a60100a0ff0d0057a601008f"
INTERLEAVED += "72050057a6010057a601007881070057a6010057a6010057a601008f72050057a60100788107008f72050057a6010057a601"
INTERLEAVED += "0057a60100a0ff0d0057a601008f72050057a6010057a601007881070057a6010057a6010057a601008f72050057a6010078"
INTERLEAVED += "8107008f72050057a6010057a6010057a60100a0ff0d0057a601008f72050057a6010057a601007881070057a6010057a601"
INTERLEAVED += "0057a601008f72050057a6010000"
HUFFMAN = "02062301301900d0e8c200"


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 63) - 1])
def test_numbers(value):
    reader = Reader(np.frombuffer(number(value), np.uint8))
    assert reader.number(value) == value
    reader.end()
    if value:
        with pytest.raises(CompressedFileError, match="at most"):
            Reader(np.frombuffer(number(value), np.uint8)).number(value - 1)


def test_a_number_without_end():
    with pytest.raises(CompressedFileError, match="doesn't end"):
        Reader(np.full(20, 255, np.uint8)).number(1 << 63)
