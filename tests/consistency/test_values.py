"""Values without pickle: they come back as they were, and what nobody said is a ValueError and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.consistency.values import decode, encode
from squall.consistency.wire import parse_header

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(
        lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
        st.sampled_from(DTYPES), shapes, st.integers(0, 99),
    )  # fmt: skip


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5) | st.binary(max_size=9)
    | st.builds(Path, st.sampled_from(["a/b.ckpt", "/", "ü x"]))
)  # fmt: skip
KEYS = st.integers() | st.text(max_size=3) | st.booleans() | st.tuples(st.integers(), st.text(max_size=2))
VALUES = st.recursive(
    SCALARS | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        as_bytes = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (math.copysign(1, a) == math.copysign(1, b) and a == b)
    return bool(a == b)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_is_said_comes_back(value: Any) -> None:
    said, blob = encode(value)
    assert same(decode(json.loads(json.dumps(said)), blob), value)


def test_what_lies_elsewhere_or_is_no_plain_number_comes_back_plain() -> None:
    scattered = torch.arange(6.0).view(2, 3).t()
    assert same(decode(*encode(scattered)), scattered.contiguous())
    assert same(decode(*encode(torch.nn.Parameter(torch.ones(2)))), torch.ones(2))
    assert decode(*encode([np.float32(0.5), np.int64(3), np.bool_(True)])) == [0.5, 3, True]


@pytest.mark.parametrize("value", [object(), lambda: 0, torch.ones(1, dtype=torch.complex64), [{"a": {1: object}}]])
def test_what_would_have_to_be_pickled_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match="can't be sent to other ranks"):
        encode(value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["float", "path", "bytes", "tensor", "shape", "list", "tuple", "set", "dict", "x"])
        | st.text(max_size=2),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
SHAPES = st.lists(st.integers(-2, 3) | st.integers() | st.sampled_from([2**31, 2**40, 2**62]), max_size=3) | JUNK
TENSORS = st.fixed_dictionaries({"tensor": st.sampled_from([str(d)[6:] for d in DTYPES]) | JUNK, "shape": SHAPES})


def reads_or_says_no(said: Any, blob: bytes) -> None:
    try:
        decode(said, blob)
    except ValueError:
        return


@given(JUNK | TENSORS | st.fixed_dictionaries({"bytes": JUNK}), st.binary(max_size=40))
@settings(max_examples=400, deadline=None)
def test_what_nobody_said_is_a_value_error(said: Any, blob: bytes) -> None:
    reads_or_says_no(said, blob)


@given(VALUES, st.data())
@settings(max_examples=200, deadline=None)
def test_what_was_said_and_then_spoiled_is_a_value_error(value: Any, data: st.DataObject) -> None:
    said, blob = encode(value)
    cut = data.draw(st.integers(0, len(blob)))
    if cut < len(blob):
        with pytest.raises(ValueError, match="no value"):
            decode(said, blob[:cut])
    with pytest.raises(ValueError, match="no value"):
        decode(said, blob + b"!")
    text = bytearray(json.dumps(said).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        spoiled = json.loads(bytes(text))
    except ValueError:
        return
    reads_or_says_no(spoiled, blob)


@pytest.mark.parametrize(
    "said",
    [
        {"float": "0x1p99999"},
        {"float": "one"},
        {"float": 1},
        {"bytes": -1},
        {"bytes": 1 << 70},
        {"bytes": "1"},
        {"tensor": "float32", "shape": [1 << 40, 1 << 40]},
        {"tensor": "float32", "shape": [-1]},
        {"tensor": "float32", "shape": [1 << 70]},
        {"tensor": "float32"},
        {"tensor": "object", "shape": []},
        {"dict": [[{"list": []}, 1]]},
        {"dict": [[1]]},
        {"set": [{"list": []}]},
        {"path": 1},
        {"pickle": "x"},
        {},
        [],
        1.5,
    ],
)
def test_forms_that_nothing_has_are_value_errors(said: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(said, b"")


def test_depth_is_a_value_error() -> None:
    said: Any = None
    for _ in range(5000):
        said = {"list": [said]}
    with pytest.raises(ValueError, match="no value"):
        decode(said, b"")


@pytest.mark.parametrize("nest", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_what_is_nested_as_deep_as_it_may_be_fits_a_header(nest: Any) -> None:
    value: Any = 0
    for _ in range(60):
        value = nest(value)
    said, blob = encode(value)
    assert parse_header(json.dumps({"parts": [{"value": said}]}).encode())
    assert decode(said, blob) == value
    with pytest.raises(ValueError, match="more than 60 lists or dicts in each other"):
        encode(nest(value))


def test_what_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="contains itself"):
        encode(value)
