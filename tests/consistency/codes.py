"""Numbers to encode, how tests encode them, and what ranks have."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from squall.consistency import Codec
from squall.consistency.codecs.blocks import BLOCK

SPECS = ("fp32", "fp64", "bf16", "int8", "1bit", "topk", "topk:0.25", "topk:1")
TINY = 2.0**-149  # the smallest float32; one rounding of a denormal number is off by half of it
FLOAT_MAX = torch.finfo(torch.float32).max


def normal(length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(length, generator=generator)


def _wide(length: int, generator: torch.Generator) -> Tensor:
    """Magnitudes from the smallest number to the largest."""
    return normal(length, generator).sign() * 2 ** (torch.rand(length, generator=generator) * 276 - 149)


def _sparse(length: int, generator: torch.Generator) -> Tensor:
    return normal(length, generator) * (torch.rand(length, generator=generator) < 0.02)


KINDS = {
    "normal": normal,
    "wide": _wide,
    "sparse": _sparse,
    "heavy tails": lambda length, generator: normal(length, generator) ** 7,
    "all positive": lambda length, generator: normal(length, generator).abs(),
    "all negative": lambda length, generator: -normal(length, generator).abs(),
    "zeros": lambda length, generator: torch.zeros(length),
    "minus zeros": lambda length, generator: -torch.zeros(length),
    "constant": lambda length, generator: torch.full((length,), 0.3),
    "negative constant": lambda length, generator: torch.full((length,), -7.1e-5),
    "denormals": lambda length, generator: normal(length, generator) * 1e-41,
    "smallest": lambda length, generator: torch.randint(-1, 2, (length,), generator=generator) * TINY,
    "largest": lambda length, generator: normal(length, generator).sign() * FLOAT_MAX,
}

lengths = st.one_of(
    st.integers(1, 5000),
    st.sampled_from([1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5000]),
)


@st.composite
def numbers(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS)) -> Tensor:
    """A flat float32 tensor of one of the kinds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return KINDS[draw(st.sampled_from(kinds))](draw(lengths), generator)


def encoded(codec: Codec, values: Tensor, residual: Tensor | None = None) -> Tensor:
    data = torch.empty(codec.num_bytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, data, residual)
    return data


def decoded(codec: Codec, data: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((length,), 123.0, dtype=dtype)
    codec.decode(data, out)
    return out


def round_trip(codec: Codec, values: Tensor, residual: Tensor | None = None) -> Tensor:
    return decoded(codec, encoded(codec, values, residual), values.numel())


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def all_of(tensor: Tensor) -> list[Tensor]:
    """Each rank's tensor."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered
