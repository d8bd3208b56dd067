"""The largest numbers, compiled, against the Torch operations that serve elsewhere: bit for bit, ties included."""

from __future__ import annotations

import pytest
import torch

from squall.consistency.codecs.top_k import STRIDE, TopKCodec
from squall.kernels import encode_top_k, native
from tests.consistency.codes import KINDS, same_bits

from .codes import coded, problem, problems

PATHS = native.isas()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_operations(kind: str, density: float, path: str) -> None:
    codec = TopKCodec(density)
    for given, before in problems(kind):
        for mine, theirs in zip(coded(codec, path, given, before), coded(codec, "torch", given, before), strict=True):
            assert same_bits(mine, theirs), (len(given), before is None)


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_that_is_none_of_the_whole(path: str) -> None:
    codec = TopKCodec(0.01)
    for shift in (1.0, -1.0):
        numbers = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
        numbers[::STRIDE] += shift
        for mine, theirs in zip(
            coded(codec, path, numbers, numbers), coded(codec, "torch", numbers, numbers), strict=True
        ):
            assert same_bits(mine, theirs)


def test_of_equal_ones_the_first_are_sent() -> None:
    for path in (*PATHS, "torch"):
        data = coded(TopKCodec(0.25), path, torch.tensor([1.0, 2, -2, 2, -2, 2, 0, 0]), None).data
        assert data[:8].view(torch.int32).tolist() == [1, 2]


def test_threads_agree() -> None:
    numbers, owed = problem(100_000, "normal")
    one = coded(TopKCodec(), "torch", numbers, owed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for path in PATHS:
            for mine, theirs in zip(coded(TopKCodec(), path, numbers, owed), one, strict=True):
                assert same_bits(mine, theirs)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_plain_single_precision_is_left_to_torch() -> None:
    numbers, out = torch.ones(10), torch.full((8,), 7, dtype=torch.uint8)
    for given in (numbers.double(), numbers.half(), torch.ones(10, 2)[:, 0], torch.ones(10, device="meta")):
        assert not encode_top_k(given, out, None, 1, STRIDE, 0)
    assert not encode_top_k(numbers, out, torch.zeros(10, 2)[:, 0], 1, STRIDE, 0)
    assert (out == 7).all()
