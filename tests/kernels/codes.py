"""Problems for the kernels of codecs, and what a codec makes of each on a path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from squall.consistency import Codec
from squall.kernels import native
from tests.consistency.codes import KINDS

LENGTHS = (7, 1, 2047, 2049, 40_003, 16_385, 31, 32, 2048, 16_384, 100_000)
"""Odd ones first: no block, group of lanes or piece of work ends where these do."""


class Coded(NamedTuple):
    data: Tensor
    residual: Tensor
    decoded: Tensor


def problem(length: int, kind: str) -> tuple[Tensor, Tensor]:
    """Numbers, and what is owed before them."""
    generator = torch.Generator().manual_seed(length)
    numbers = KINDS[kind](length, generator)
    return numbers, numbers.flip(0) * 0.3


def spoilt(numbers: Tensor) -> Tensor:
    """Some of what isn't finite."""
    numbers = numbers.clone()
    for place, bad in ((len(numbers) // 2, torch.nan), (len(numbers) - 1, -torch.inf), (len(numbers) // 3, torch.inf)):
        numbers[place] = bad
    return numbers


def problems(kind: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Numbers of all lengths, finite or not, and what is owed before them, if anything is."""
    for length in LENGTHS:
        numbers, owed = problem(length, kind)
        for given in (numbers, spoilt(numbers)):
            for before in (None, owed):
                yield given, before


def coded(codec: Codec, path: str, numbers: Tensor, owed: Tensor | None) -> Coded:
    data = torch.full((codec.num_bytes(len(numbers)),), 0xAA, dtype=torch.uint8)
    residual = torch.zeros(0) if owed is None else owed.clone()
    decoded = torch.full((len(numbers),), 7.0)
    with native.forced(path):
        codec.encode(numbers, data, None if owed is None else residual)
        codec.decode(data, decoded)
    return Coded(data, residual, decoded)
