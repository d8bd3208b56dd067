"""Maxima over windows against Torch's, for every instruction set."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from squall.kernels import max_pool2d, native
from squall.kernels.max_pool import function


def problem(seed: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    draw = random.Random(seed)
    kernel = draw.randint(1, 5), draw.randint(1, 5)
    return (draw.randint(1, 3), 2, draw.randint(9, 20), draw.randint(9, 40)), {
        "kernel_size": kernel, "stride": (draw.randint(1, 4), draw.randint(1, 4)), "dilation": (draw.randint(1, 2), 1),
        "padding": (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2)), "ceil_mode": draw.random() < 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("path", [*native.isas(), "torch"])
def test_equals_torchs(path: str) -> None:
    for seed in range(60):
        shape, arguments = problem(seed)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x[0, 0, seed % 9, seed % 7] = float("nan") if seed % 3 else float("-inf")
        with native.forced(path):
            assert torch.equal(max_pool2d(x, **arguments).nan_to_num(99), F.max_pool2d(x, **arguments).nan_to_num(99))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_layouts_are_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 7, 8)
    for given in (x.to(dtype), x.to(memory_format=torch.channels_last), x[..., ::2], x[0], x[:0]):
        assert torch.equal(max_pool2d(given, 3, 2, 1), F.max_pool2d(given, 3, 2, 1))


def test_its_gradient_is_torchs() -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: max_pool2d(x, 3, 2), (x,))
    torch.library.opcheck(function._max_pool2d, (torch.randn(1, 2, 6, 6), [3, 3], [2, 2], [0, 0], [1, 1], True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="x must be images"):
        max_pool2d(torch.ones(4), 2)
    with pytest.raises(ValueError, match="stride must be one number or two"):
        max_pool2d(torch.ones(1, 1, 4, 4), 2, [2])
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        max_pool2d(torch.ones(1, 1, 4, 4), 2, padding=2)
