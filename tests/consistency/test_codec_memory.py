"""Codecs in any memory, of any type, on any device, and from any bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.consistency import get_codec
from squall.consistency.codecs.blocks import BLOCK
from squall.consistency.codecs.top_k import TopKCodec

from .codes import SPECS, decoded, encoded, lengths, normal, numbers, round_trip, same_bits

# Memory and types.


@pytest.mark.parametrize("spec", SPECS)
@given(
    values=numbers(), offset=st.integers(0, 9), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
@settings(max_examples=15, deadline=None)
def test_any_memory_will_do(spec: str, values: Tensor, offset: int, dtype: torch.dtype) -> None:
    codec, length = get_codec(spec), len(values)
    values = values.to(dtype)
    num_bytes = codec.num_bytes(length)
    plain = encoded(codec, values)

    memory = bytearray(b"\xaa" * (offset + num_bytes + 3))  # an address that Torch doesn't see in the offset
    out = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=num_bytes)
    before = values.clone()
    spread = torch.zeros(length, 3, dtype=dtype)
    spread[:, 1] = values
    codec.encode(spread[:, 1], out)
    assert torch.equal(out, plain)
    residual = torch.full((length, 2), -0.0)  # to which -0.0 can be added
    codec.encode(spread[:, 1], out, residual[:, 1])
    assert torch.equal(out, encoded(codec, values, torch.full((length,), -0.0)))
    codec.encode(values, out)
    assert same_bits(values, before)
    assert same_bits(spread[:, 1].clone(memory_format=torch.contiguous_format), before)
    assert not residual[:, 0].any()
    assert memory[:offset] + memory[offset + num_bytes :] == b"\xaa" * (offset + 3)

    shifted = torch.empty(offset + num_bytes, dtype=torch.uint8)[offset:]  # an offset that Torch sees
    codec.encode(values, shifted)
    assert torch.equal(shifted, plain)

    result = decoded(codec, plain, length)
    for data in (out, shifted):
        for target_dtype in (torch.float32, torch.float64, torch.bfloat16):
            target = torch.full((length, 2), 5.0, dtype=target_dtype)
            codec.decode(data, target[:, 0])
            exact = decoded(codec, plain, length, target_dtype)
            torch.testing.assert_close(target[:, 0], exact, rtol=0, atol=0, equal_nan=True)
            if spec != "fp64":
                torch.testing.assert_close(exact, result.to(target_dtype), rtol=0, atol=0, equal_nan=True)
            assert (target[:, 1] == 5.0).all()


def test_gradients_are_not_followed() -> None:
    values = torch.ones(10, requires_grad=True)
    residual = torch.zeros(10)
    out = torch.empty(10, requires_grad=True)
    get_codec("int8").decode(encoded(get_codec("int8"), values, residual), out)
    assert not residual.requires_grad


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_tensors_are_refused(spec: str) -> None:
    codec = get_codec(spec)
    values, data = torch.ones(10), torch.empty(codec.num_bytes(10), dtype=torch.uint8)
    wrong: list[tuple[Any, ...]] = [
        ("values", values.view(2, 5), data),
        ("values", values.long(), data),
        ("values", values[:0], data),
        ("out", values, torch.empty(codec.num_bytes(10) + 1, dtype=torch.uint8)),
        ("out", values, torch.empty(codec.num_bytes(10) - 1, dtype=torch.uint8)),
        ("out", values, data.view(torch.int8)),
        ("out", values, torch.empty(codec.num_bytes(10), 2, dtype=torch.uint8)[:, 0]),
        ("residual", values, data, torch.zeros(9)),
        ("residual", values, data, torch.zeros(10).double()),
        ("residual", values, data, torch.zeros(10, 1)),
    ]
    for name, *arguments in wrong:
        with pytest.raises(ValueError, match=name):
            codec.encode(*arguments)
    with pytest.raises(ValueError, match="data"):
        codec.decode(torch.empty(codec.num_bytes(10) + 1, dtype=torch.uint8), values)
    with pytest.raises(ValueError, match="out"):
        codec.decode(data, values.long())
    with pytest.raises(ValueError, match="num_elements"):
        codec.num_bytes(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", SPECS)
def test_gpus_agree(spec: str) -> None:
    codec = get_codec(spec)
    for length in (1, 5, BLOCK, 300_001):
        values = normal(length, torch.Generator().manual_seed(4))
        residual, residual_there = torch.zeros(length), torch.zeros(length, device="cuda")
        data = torch.empty(codec.num_bytes(length), dtype=torch.uint8, device="cuda")
        result = torch.empty(length, device="cuda")
        codec.encode(values.cuda(), data, residual_there)
        codec.decode(data, result)
        torch.testing.assert_close(result.cpu(), round_trip(codec, values, residual))
        torch.testing.assert_close(residual_there.cpu(), residual)
        torch.testing.assert_close(decoded(codec, data.cpu(), length), result.cpu())


# Bytes from anywhere.


@pytest.mark.parametrize("spec", ["fp32", "fp64", "bf16", "int8", "1bit"])
@given(length=lengths, seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_any_bytes_decode_to_something(spec: str, length: int, seed: int, dtype: torch.dtype) -> None:
    codec = get_codec(spec)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (codec.num_bytes(length),), generator=generator, dtype=torch.uint8)
    memory = torch.full((length + 20,), 7.0, dtype=dtype)
    codec.decode(data, memory[10:-10])
    assert (memory[:10] == 7.0).all()
    assert (memory[-10:] == 7.0).all()


@given(length=lengths, seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.001, 0.25, 1.0]), near=st.booleans())
@settings(max_examples=40, deadline=None)
def test_topk_writes_nothing_or_what_it_is_told(length: int, seed: int, density: float, near: bool) -> None:
    codec = TopKCodec(density)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (codec.num_bytes(length),), generator=generator, dtype=torch.uint8)
    k = codec.num_kept(length)
    if near:  # mostly valid places
        data[: 4 * k] = torch.randint(-1, length + 1, (k,), generator=generator, dtype=torch.int32).view(torch.uint8)
    index = data[: 4 * k].clone().view(torch.int32).tolist()
    memory = torch.full((length + 20,), 7.0)
    if sorted(set(index)) == index and index[0] >= 0 and index[-1] < length:
        codec.decode(data, memory[10:-10])
        memory[10:-10] = 7.0
    else:
        with pytest.raises(ValueError, match="places"):
            codec.decode(data, memory[10:-10])
    assert (memory == 7.0).all()


PLACES = {
    "below": [-1, 3],
    "above": [0, 20],
    "twice": [3, 3],
    "back": [5, 3],
    "far": [0, 2**31 - 1],
    "far below": [-(2**31), 0],
}


@pytest.mark.parametrize("index", PLACES.values(), ids=PLACES)
def test_topk_refuses_a_place_that_can_t_be(index: list[int]) -> None:
    data = torch.cat([torch.tensor(index, dtype=torch.int32).view(torch.uint8), torch.ones(2).view(torch.uint8)])
    out = torch.arange(20.0)
    with pytest.raises(ValueError, match=r"topk:0\.1 code of 20 numbers"):
        get_codec("topk:0.1").decode(data, out)
    assert torch.equal(out, torch.arange(20.0))
