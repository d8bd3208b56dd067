"""int8 and 1bit compiled, against the Torch operations that serve elsewhere: bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squall.consistency import get_codec
from squall.consistency.codecs.blocks import BLOCK
from squall.kernels import encode_int8, encode_signs, native
from tests.consistency.codes import KINDS, same_bits

from .codes import Coded, coded, problem, problems

PATHS = native.isas()


def assert_same(mine: Coded, theirs: Coded, spec: str) -> None:
    """Alike but for the sign of NaN and, in 1bit, the last bit of a mean: float64 are summed in another order."""
    if spec == "int8":
        headers = 4 * -(-len(mine.decoded) // BLOCK)
        assert torch.equal(mine.data[headers:], theirs.data[headers:])
        assert same_bits(
            mine.data[:headers].view(torch.float32).nan_to_num(7),
            theirs.data[:headers].view(torch.float32).nan_to_num(7),
        )
        assert same_bits(mine.residual, theirs.residual)
        assert same_bits(mine.decoded.nan_to_num(7), theirs.decoded.nan_to_num(7))
        return
    headers = 8 * -(-len(mine.decoded) // BLOCK)
    assert torch.equal(mine.data[headers:], theirs.data[headers:])
    tolerance = {"rtol": 1.2e-7, "atol": 1.5e-45, "equal_nan": True}
    torch.testing.assert_close(mine.decoded, theirs.decoded, **tolerance)
    lost = 2.4e-7 * float(theirs.decoded.nan_to_num(0).abs().max()) + 1.5e-45
    torch.testing.assert_close(mine.residual, theirs.residual, rtol=0, atol=lost)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spec", ["int8", "1bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_operations(spec: str, kind: str, path: str) -> None:
    codec = get_codec(spec)
    for given, before in problems(kind):
        assert_same(coded(codec, path, given, before), coded(codec, "torch", given, before), spec)


@pytest.mark.parametrize("path", PATHS)
def test_int8_rounds_every_number_that_float16_has(path: str) -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    numbers = halves[halves.abs() <= 2.0**15] / 2**15
    between = numbers.nextafter(torch.tensor(2.0)).clamp(-1, 1)
    for given in (numbers, between, (numbers + between.roll(1)) / 2):
        blocks = torch.cat([torch.ones(len(given) // (BLOCK - 1) + 1, 1), _rows(given)], 1).view(-1)  # scales are 1
        assert same_bits(
            coded(get_codec("int8"), path, blocks, None).data, coded(get_codec("int8"), "torch", blocks, None).data
        )


def _rows(numbers: Tensor) -> Tensor:
    return torch.cat([numbers, numbers[: -len(numbers) % (BLOCK - 1)]]).view(-1, BLOCK - 1)


@pytest.mark.parametrize("spec", ["int8", "1bit"])
def test_threads_and_instruction_sets_agree(spec: str) -> None:
    numbers, owed = problem(100_000, "normal")
    one = coded(get_codec(spec), "plain", numbers, owed) if PATHS else coded(get_codec(spec), "torch", numbers, owed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for path in PATHS:
            for mine, theirs in zip(coded(get_codec(spec), path, numbers, owed), one, strict=True):
                assert same_bits(mine, theirs)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_plain_single_precision_is_left_to_torch() -> None:
    numbers, out = torch.ones(10), torch.full((14,), 7, dtype=torch.uint8)
    codes, values = torch.zeros(1 << 16, dtype=torch.uint8), torch.zeros(256)
    for given in (numbers.double(), numbers.bfloat16(), torch.ones(10, 2)[:, 0], torch.ones(10, device="meta")):
        assert not encode_int8(given, out, None, codes, values)
        assert not encode_signs(given, out[:10], None)
    assert not encode_signs(numbers, out[:10], torch.zeros(10, 2)[:, 0])
    assert (out == 7).all()
    with native.forced("torch"):
        assert not encode_signs(numbers, out[:10], None)
