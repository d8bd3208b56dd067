"""One tensor: every bit comes back, and it is stored in the way that takes the fewest bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.sparsity import CompressedFileError
from squall.sparsity.coding import streams, tensors, ways
from squall.sparsity.coding.fields import Reader, number
from tests.sparsity.tensors import KINDS, make, same
from tests.sparsity.tensors import tensors as any_tensor


def encode(tensor, coder="ans", **options):
    payload, figures, _ = tensors.encode("weight", tensor, coder, **options)
    return None if payload is None else np.frombuffer(payload, np.uint8), figures


def layout_of(data):
    reader = Reader(data)
    tensors.read_info(reader)
    return reader.number(7)


@pytest.mark.parametrize("coder", streams.CODERS)
@given(any_tensor(), st.sampled_from([None, 1, 4, 8]))
@settings(max_examples=150, deadline=None)
def test_round_trip(coder, tensor, gap_bits):
    data, figures = encode(tensor, coder, gap_bits=gap_bits)
    assert figures.num_weights == tensor.numel()
    if data is None:
        assert figures.num_bytes == tensor.nbytes
    else:
        assert same(tensors.read(data).dense(), tensor)
        assert figures.num_bytes == len(data)
        assert len(data) < tensor.nbytes or tensor.dtype in tensors._FOREIGN


@pytest.mark.parametrize("dtype", tensors.DTYPES, ids=str)
@pytest.mark.parametrize("coder", streams.CODERS)
def test_every_dtype_in_every_layout(dtype, coder):
    layouts = set()
    for kind, density in itertools.product(KINDS, (0.0, 0.02, 0.3, 1.0)):
        tensor = make(kind, dtype, (50, 40), density, seed=1)
        data, _ = encode(tensor, coder)
        if data is not None:
            layouts.add(layout_of(data) & ~ways.COLUMNS)
            assert layout_of(data) == 0 or dtype.itemsize < 16
            assert same(tensors.read(data).dense(), tensor), (kind, density)
    assert layouts


@pytest.mark.parametrize("layout", [1, 2, 3, 5, 7])
@given(any_tensor(), st.sampled_from(streams.CODERS))
@settings(max_examples=50, deadline=None)
def test_every_way_there_is_comes_back(layout, tensor, coder):
    """Not only the smallest way of each tensor."""
    words = tensors.to_words(tensor)
    places = np.flatnonzero(words)
    counted = ways.count_values(words[places])
    for way in ways.ways_of(words, places, counted, tuple(tensor.shape), coder, None):
        if words.itemsize < 16 and way.layout == layout and np.isfinite(way.num_bytes) and tensor.numel():
            head = number(tensors.DTYPES.index(tensor.dtype)) + number(tensor.dim())
            body = b"".join(map(number, tensor.shape)) + number(layout) + b"".join(way.encode())
            data = np.frombuffer(head + body, np.uint8)
            assert same(tensors.read(data).dense(), tensor)
            if tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                live = tensors.read(data).live()
                assert same(live.dense(), tensor)
                assert len(live.positions) == len(places)
                assert (live.positions.diff() > 0).all()
            assert abs(len(b"".join(way.encode())) - way.num_bytes) <= 17  # a word or two a stream


def test_a_shared_and_pruned_tensor_is_codes_and_gaps():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(1, 33, (300, 500), generator=generator).float()
    tensor[torch.rand(300, 500, generator=generator) > 0.09] = 0
    data, figures = encode(tensor)
    assert layout_of(data) & ~ways.COLUMNS == ways.SPARSE | ways.SHARED
    assert figures.num_nonzero == int(tensor.count_nonzero())
    assert (figures.weight_bits, figures.index_bits) == (5, 5)
    assert figures.coded_weight_bits == pytest.approx(5.0, abs=0.03)  # 32 values, as often each
    assert figures.coded_index_bits == pytest.approx(0.4365 / 0.09, abs=0.1)  # H(0.09) / 0.09
    assert figures.num_uncoded_bytes > figures.num_nonzero * 10 / 8 + 4 * 32 > figures.num_bytes


def test_what_isn_t_sparse_or_shared_is_stored_as_it_is():
    data, figures = encode(torch.randn(1000))
    assert data is None
    assert (figures.density, figures.weight_bits, figures.coded_weight_bits) == (1.0, 32, 32.0)


def test_unshared_weights_of_a_sparse_tensor_are_stored_as_they_are():
    tensor = torch.where(torch.rand(40_000) < 0.05, torch.randn(40_000), 0.0)
    data, figures = encode(tensor)
    assert layout_of(data) == ways.SPARSE
    assert figures.num_bytes < 1.01 * int(tensor.count_nonzero()) * (4 + 0.2864 / 0.05 / 8) + 50


def test_the_paper_s_first_layer_stores_its_zeros():
    """At 84 % a gap of Huffman takes a bit, and the entropy is three quarters of one."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(1, 200, (96, 363), generator=generator).float()
    tensor[torch.rand(96, 363, generator=generator) > 0.84] = 0
    data, figures = encode(tensor, "huffman")
    assert layout_of(data) == ways.SHARED
    bits = figures.coded_weight_bits + figures.coded_index_bits
    assert bits * figures.num_nonzero / 8 == pytest.approx(len(data) - 4 * 200, abs=12)
    assert figures.coded_index_bits == pytest.approx(0.6343 / 0.84, rel=0.03)  # the share of it that is positions


@pytest.mark.parametrize("axis", [0, 1])
def test_dead_inputs_and_dead_outputs_cost_next_to_nothing(axis):
    generator = torch.Generator().manual_seed(0)
    alive = torch.rand(400, generator=generator) < 0.25
    tensor = torch.randint(1, 17, (400, 400), generator=generator).float()
    tensor[torch.rand(400, 400, generator=generator) > 0.2] = 0
    dead = (~alive)[:, None] if axis == 0 else (~alive)[None, :]
    tensor = tensor.masked_fill(dead, 0)
    data, figures = encode(tensor)
    assert layout_of(data) & ways.COLUMNS == (ways.COLUMNS if axis else 0)
    assert same(tensors.read(data).dense(), tensor)
    assert figures.coded_index_bits < 0.85 * 0.2864 / 0.05  # of independent positions at 5 %


def test_sixteen_bit_floats_that_nothing_has_shared_are_coded_all_the_same():
    tensor = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    data, figures = encode(tensor)
    assert figures.num_bytes < 0.75 * tensor.nbytes
    assert same(tensors.read(data).dense(), tensor)


@pytest.mark.parametrize("turn", [lambda t: t.t(), lambda t: t[::2, 1::3], lambda t: t[3:, 5:]])
def test_views(turn):
    tensor = turn(make("shared", torch.float32, (60, 90), 0.1, 0))
    assert same(tensors.read(encode(tensor)[0]).dense(), tensor)


def test_conjugates():
    tensor = make("shared", torch.complex64, (600,), 0.1, 0).conj()
    assert same(tensors.read(encode(tensor)[0]).dense(), tensor.resolve_conj())
    negative = torch._neg_view(make("shared", torch.float32, (600,), 0.1, 0))
    assert negative.is_neg()
    assert same(tensors.read(encode(negative)[0]).dense(), negative.resolve_neg())


def head(*numbers):
    return b"".join(map(number, numbers))


FLOAT32, BOOL = tensors.DTYPES.index(torch.float32), tensors.DTYPES.index(torch.bool)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "more bytes"),
        (head(len(tensors.DTYPES)), "at most"),
        (head(FLOAT32, 65), "at most 64"),
        (head(FLOAT32, 1, 0, 2), "no elements"),
        (head(FLOAT32, 3, 0, 1 << 62, 4, 0), "strides overflow"),
        (head(tensors.DTYPES.index(torch.complex128), 1, 8, 2, 1) + bytes(16), "aren't coded"),
        (head(FLOAT32, 1, 8, 8), "at most 7"),
        (head(FLOAT32, 1, 8, 1, 9), "at most 8"),
        (head(FLOAT32, 1, 8, 2, 0), "codebook is empty"),
        (head(FLOAT32, 1, 8, 2, 1) + bytes(3), "more bytes"),
        (head(FLOAT32, 1, 8, 2, 1) + bytes(5), "left over"),
        (head(FLOAT32, 1, 8, 2, 2) + bytes(8) + head(0, 2), "at most 1"),  # a code that the codebook doesn't have
        (head(FLOAT32, 1, 2, 0) + bytes(4), "more bytes"),
        (head(BOOL, 1, 8, 2, 1, 2), "truth"),
        (head(BOOL, 1, 3, 0, 0, 1, 7), "truth"),
        (head(FLOAT32, 1, 8, 1, 2, 3, 0, 0, 5) + bytes(8), "past the end"),
    ],
)
def test_bytes_that_are_no_tensor(data, words):
    with pytest.raises(CompressedFileError, match=words):
        tensors.read(np.frombuffer(data, np.uint8)).dense()


def test_a_shape_is_read_without_being_allocated():
    info = tensors.read_info(Reader(np.frombuffer(head(FLOAT32, 3, *3 * [(1 << 63) - 1]), np.uint8)))
    assert info.num_bytes == 4 * ((1 << 63) - 1) ** 3
