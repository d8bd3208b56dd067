"""Codecs: each against its definition, what error feedback keeps, and what isn't finite."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from squall.consistency import get_codec
from squall.consistency.codecs.blocks import BLOCK
from squall.consistency.codecs.codec import CHUNK
from squall.consistency.codecs.dynamic import dynamic_values
from squall.consistency.codecs.sign import SignCodec
from squall.consistency.codecs.top_k import STRIDE, TopKCodec, largest

from .codes import FLOAT_MAX, KINDS, SPECS, TINY, decoded, encoded, normal, numbers, round_trip, same_bits

# What each code is.


def test_number_of_bytes() -> None:
    figures = {spec: [get_codec(spec).num_bytes(n) for n in (1, 2048, 2049, 5000)] for spec in SPECS}
    assert figures == {
        "fp32": [4, 8192, 8196, 20000],
        "fp64": [8, 16384, 16392, 40000],
        "bf16": [2, 4096, 4098, 10000],
        "int8": [5, 2052, 2057, 5012],
        "1bit": [9, 264, 273, 649],
        "topk": [8, 168, 168, 400],
        "topk:0.25": [8, 4096, 4104, 10000],
        "topk:1": [8, 16384, 16392, 40000],
    }


def test_a_density_that_divides_evenly_isn_t_rounded_up() -> None:
    assert 0.07 * 100 > 7  # by rounding
    assert TopKCodec(0.07).num_kept(100) == 7
    assert TopKCodec(0.0701).num_kept(100) == 8


@given(numbers())
@settings(max_examples=30, deadline=None)
def test_float_codecs_round_as_torch_does(values: Tensor) -> None:
    assert same_bits(round_trip(get_codec("fp32"), values), values)
    assert same_bits(round_trip(get_codec("fp64"), values), values)
    assert same_bits(round_trip(get_codec("bf16"), values), values.bfloat16().float())
    doubles = values.double() / 3
    assert same_bits(
        decoded(get_codec("fp64"), encoded(get_codec("fp64"), doubles), len(doubles), doubles.dtype), doubles
    )
    assert same_bits(round_trip(get_codec("fp32"), doubles), doubles.float())


def test_the_dynamic_type_is_that_of_the_paper() -> None:
    values = []
    for decade in range(7):  # bitsandbytes' create_dynamic_map, for 8 bits with a sign
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        middles = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    expected = torch.tensor(sorted([*values, 0.0, 1.0]), dtype=torch.float64)
    assert len(expected) == 256
    torch.testing.assert_close(dynamic_values(), expected, rtol=1e-12, atol=0)


@given(numbers())
@settings(max_examples=60, deadline=None)
def test_int8_finds_the_nearest_code(values: Tensor) -> None:
    result = round_trip(get_codec("int8"), values)
    for block, coded in zip(values.double().split(BLOCK), result.double().split(BLOCK), strict=True):
        scale = max(block.max(), block.min(), key=abs)
        best = (block[:, None] - dynamic_values() * scale).abs().amin(1)
        error = (block - coded).abs()
        # Rounding to float16 can choose the other one of two that are about as near.
        assert (error <= best + block.abs() * (2.0**-10 + 2.0**-22) + TINY).all()
        assert (error <= 0.0073 * scale.abs() + TINY).all()
        assert scale in coded
        assert (coded[block == 0] == 0).all()


@given(numbers())
@settings(max_examples=60, deadline=None)
def test_1bit_sends_the_means_of_either_side(values: Tensor) -> None:
    result = round_trip(get_codec("1bit"), values)
    for block, coded in zip(values.split(BLOCK), result.split(BLOCK), strict=True):
        for side in (block >= 0, block < 0):
            if side.any():
                mean = block[side].double().mean()
                torch.testing.assert_close(
                    coded[side].double(), mean.expand(int(side.sum())), rtol=1e-6, atol=TINY, msg=str(mean)
                )


def test_1bit_packs_the_first_sign_into_the_lowest_bit() -> None:
    signs = torch.tensor([1.0, -1, -1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 1])
    assert encoded(get_codec("1bit"), signs)[8:].tolist() == [0b1001, 0b10000000, 1]


@given(numbers(), st.sampled_from([0.001, 0.01, 0.25, 1.0]))
@settings(max_examples=60, deadline=None)
def test_topk_sends_the_largest(values: Tensor, density: float) -> None:
    codec = TopKCodec(density)
    k = max(1, math.ceil(density * len(values)))
    data = encoded(codec, values)
    index = data[: 4 * k].clone().view(torch.int32).long()
    assert len(data) == 8 * k
    assert (index[1:] > index[:-1]).all()
    assert torch.equal(values[index].abs().sort().values, values.abs().sort().values[-k:])
    expected = torch.zeros_like(values)
    expected[index] = values[index]
    assert torch.equal(decoded(codec, data, len(values)), expected)


@pytest.mark.parametrize("k", [1, 5, 300, 3000, 20000])
@pytest.mark.parametrize("kind", ["normal", "sparse", "constant", "in step", "none in step"])
def test_the_sampled_threshold_finds_exactly_the_largest(kind: str, k: int) -> None:
    length = 50_000
    if kind in KINDS:
        values = KINDS[kind](length, torch.Generator().manual_seed(k)).abs()
    else:  # the sample sees only large numbers, or only small ones
        values = torch.rand(length, generator=torch.Generator().manual_seed(k))
        values[::STRIDE] += 1.0 if kind == "in step" else -1.0
        values.abs_()
    index = largest(values, k)
    assert len(index) == k
    assert (index[1:] > index[:-1]).all()
    assert torch.equal(values[index].sort().values, values.topk(k).values.sort().values)


def test_the_sampled_threshold_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50_000)
    searched = []
    topk = Tensor.topk
    monkeypatch.setattr(
        Tensor, "topk", lambda self, *args, **kwargs: searched.append(len(self)) or topk(self, *args, **kwargs)
    )
    largest(values, 500)
    assert 500 <= searched[0] < 2000
    assert len(searched) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_longer_than_what_is_worked_on_at_a_time(spec: str) -> None:
    codec, length = get_codec(spec), 2 * CHUNK + BLOCK + 77
    values = normal(length, torch.Generator().manual_seed(1))
    residual = torch.zeros(length)
    result = round_trip(codec, values)
    assert torch.equal(round_trip(codec, values, residual), result)
    assert torch.equal(values - result, residual)
    if not spec.startswith("topk"):
        parts = [round_trip(codec, part) for part in values.split(BLOCK)]
        assert torch.equal(torch.cat(parts), result)


# Error feedback.


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_a_code_loses_is_in_the_residual(spec: str, data: st.DataObject) -> None:
    codec = get_codec(spec)
    values = data.draw(numbers(tuple(kind for kind in KINDS if kind != "largest"))) / 4
    before = values.flip(0) * 0.3
    residual = before.clone()
    result = round_trip(codec, values, residual)
    wanted = values.double() + before
    got = result.double() + residual
    rounding = 2.0**-23 * (wanted.abs() + result.double().abs()) + TINY
    assert ((got - wanted).abs() <= rounding).all()
    if codec.has_residual or spec in ("int8", "bf16"):
        torch.testing.assert_close(result, round_trip(codec, values + before), rtol=2e-7, atol=0)


@pytest.mark.parametrize("spec", ["bf16", "int8", "1bit", "topk:0.25"])
def test_over_many_steps_nothing_is_lost(spec: str) -> None:
    codec = get_codec(spec)
    generator = torch.Generator().manual_seed(2)
    residual, sent, owed = torch.zeros(3000), torch.zeros(3000).double(), torch.zeros(3000).double()
    for _ in range(50):
        values = normal(3000, generator)
        sent += round_trip(codec, values, residual)
        owed += values
    torch.testing.assert_close(sent + residual, owed, rtol=0, atol=1e-4)
    assert residual.abs().max() < 25


def test_which_codecs_want_error_feedback() -> None:
    assert {spec for spec in SPECS if get_codec(spec).has_residual} == {"1bit", "topk", "topk:0.25", "topk:1"}


# Numbers that aren't finite.


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK + 5, 4999])
def test_what_isn_t_finite_stays_so(spec: str, bad: float, place: int) -> None:
    codec = get_codec(spec)
    values = normal(5000, torch.Generator().manual_seed(3))
    good = round_trip(codec, values)
    values[place] = bad
    residual = torch.zeros(5000)
    for result in (round_trip(codec, values), round_trip(codec, values, residual)):
        if spec in ("int8", "1bit"):
            block = slice(place // BLOCK * BLOCK, (place // BLOCK + 1) * BLOCK)
            assert result[block].isnan().all()
            result[block] = good[block]
        else:
            torch.testing.assert_close(result[place], torch.tensor(bad), equal_nan=True)
            result[place] = good[place]
        if not spec.startswith("topk"):
            assert torch.equal(result, good)
    assert residual.isfinite().all()  # so the next code is finite again
    assert residual[place] == 0
    assert round_trip(codec, torch.zeros(5000), residual).isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_but_nan(spec: str) -> None:
    residual = torch.ones(3000)
    result = round_trip(get_codec(spec), torch.full((3000,), math.nan), residual)
    sent = slice(get_codec(spec).num_kept(3000)) if isinstance(get_codec(spec), TopKCodec) else slice(None)
    assert result[result.isnan()].numel() == len(range(3000)[sent])
    assert torch.equal(residual, torch.zeros(3000))


@pytest.mark.parametrize("spec", ["int8", "1bit"])
def test_a_sum_that_overflows_is_no_finite_number(spec: str) -> None:
    values, residual = torch.full((10,), FLOAT_MAX), torch.full((10,), FLOAT_MAX)
    assert round_trip(get_codec(spec), values, residual).isnan().all()
    assert torch.equal(residual, torch.zeros(10))


# Names.


def test_codecs_by_name() -> None:
    for spec in SPECS:
        codec = get_codec(spec)
        assert codec.name == spec.partition(":")[0]
        assert get_codec(codec) is codec
        assert get_codec(codec.spec) == codec == pickle.loads(pickle.dumps(codec))
    assert get_codec("topk:0.001") == TopKCodec(0.001)
    assert get_codec("topk") == TopKCodec(0.01)
    assert get_codec("1bit") == SignCodec()


NO_CODECS = (
    "fp16",
    "",
    ":",
    "FP32",
    "int8:4",
    None,
    8,
    *(f"topk:{density}" for density in ("", 0, -1, 1.5, "nan", "a")),
)


@pytest.mark.parametrize("spec", NO_CODECS)
def test_other_names_are_refused(spec: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"codec=.*'topk:0\.001'"):
        get_codec(spec)
