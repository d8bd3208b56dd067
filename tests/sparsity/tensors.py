"""Tensors that compressed files are tried with."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from squall.sparsity.coding.tensors import DTYPES

FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)
KINDS = ("shared", "random", "ones", "special")
SPECIAL = (-0.0, math.nan, -math.nan, math.inf, -math.inf, 5e-324, 1.0)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors agree in everything, bit for bit."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def make(kind: str, dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    """A tensor of a kind, of which about a share isn't zero."""
    generator = torch.Generator().manual_seed(seed)
    num_elements = math.prod(shape)
    if kind == "random":  # any bits: NaNs of every payload
        words = torch.randint(0, 256, (num_elements * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        values = words.fmod_(2).bool() if dtype == torch.bool else words.view(dtype)
    elif kind == "special" and dtype.is_floating_point:
        choice = torch.randint(0, len(SPECIAL), (num_elements,), generator=generator)
        values = torch.tensor(SPECIAL, dtype=torch.float64)[choice].to(dtype)
    else:
        high = 2 if kind == "ones" or dtype == torch.bool else 9
        values = torch.randint(1, high, (num_elements,), generator=generator).to(dtype)
    here = torch.rand(num_elements, generator=generator) < density
    if dtype.itemsize == 1:
        return torch.where(here, values.view(torch.uint8), 0).view(dtype).reshape(shape)
    if dtype.itemsize == 16:
        return torch.where(here[:, None], values.view(torch.int64).view(-1, 2), 0).view(dtype).reshape(shape)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.where(here, values.view(ints), 0).view(dtype).reshape(shape)


def tensors() -> st.SearchStrategy[Tensor]:
    """Tensors of every data type, kind and density, of none to four dimensions, empty ones too."""
    shapes = st.one_of(
        st.lists(st.integers(0, 12), max_size=4).map(tuple), st.tuples(st.integers(1, 60), st.integers(1, 60))
    )
    densities = st.one_of(st.sampled_from([0.0, 1.0, 0.01]), st.floats(0.0, 1.0))
    seeds = st.integers(0, 1 << 32)
    return st.builds(make, st.sampled_from(KINDS), st.sampled_from(DTYPES), shapes, densities, seeds)
