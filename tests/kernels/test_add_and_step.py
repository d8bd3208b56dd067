"""The sum of gradients and the local step in one pass, against both apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from squall.consistency.packing import Sums
from squall.kernels import add_and_step, native
from tests.consistency.codes import same_bits

from .codes import LENGTHS

PATHS = (*native.isas(), "torch")


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def apart(sums: Tensor, gradient: Tensor, weights: Tensor, rate: float, begins: bool) -> tuple[Tensor, Tensor]:
    """In float64."""
    sums, gradient, weights = sums.double(), gradient.double(), weights.double()
    return (gradient if begins else sums + gradient), weights - rate * gradient


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_equals_both_apart(path: str, begins: bool, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for length in (*LENGTHS, 0):
            sums, gradient, weights = tensors((length,))
            expected = apart(sums, gradient, weights, 0.3, begins)
            kept, copy = gradient.clone(), torch.full((length,), torch.nan)
            with native.forced(path):
                add_and_step(sums, gradient, weights, 0.3, begins, copy)
            assert same_bits(gradient, kept)
            assert same_bits(copy, weights)
            torch.testing.assert_close(sums.double(), expected[0], rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(weights.double(), expected[1], rtol=2e-7, atol=2e-7)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_other_dtypes_and_layouts(path: str) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        plain = tensors((4, 3, 5, 6), dtype)
        for change in (
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: t[..., ::2],
            lambda t: t.transpose(0, 1),
        ):
            for changed in ((0, 1, 2), (1,), (0, 2)):
                given = [change(t.clone()) if i in changed else change(t).contiguous() for i, t in enumerate(plain)]
                expected = apart(*given, 0.3, False)
                copy = torch.empty(given[2].numel(), dtype=dtype)
                with native.forced(path):
                    add_and_step(*given, 0.3, copy=copy)
                assert torch.equal(copy, given[2].reshape(-1))
                tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
                for mine, theirs in zip((given[0], given[2]), expected, strict=True):
                    torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sums", "weights"])
@pytest.mark.parametrize(
    "change", [lambda t: t.double(), lambda t: t[:-1], lambda t: t.to("meta")], ids=["dtype", "shape", "device"]
)
def test_refusals(name: str, change: Any) -> None:
    sums, gradient, weights = tensors((5,))
    given = (change(sums), gradient, weights) if name == "sums" else (sums, gradient, change(weights))
    with pytest.raises(ValueError, match=f"{name} must be as gradient is"):
        add_and_step(*given, 0.1)


def test_a_copy_is_flat() -> None:
    with pytest.raises(ValueError, match="copy must be 6 contiguous"):
        add_and_step(*tensors((2, 3)), 0.1, copy=torch.empty(2, 3))


def test_sums_take_any_gradient() -> None:
    rates, dense = [0.5, 0.5], torch.tensor([1.0, 2.0])
    sums, weights = Sums(2), [torch.ones(2), torch.ones(2, dtype=torch.float64)]
    copies = [torch.empty_like(weight) for weight in weights]
    for gradient in (None, dense, dense, dense.to_sparse(), dense.double()):
        sums.add_and_step([gradient, gradient], weights, rates, copies)
    assert [weight.tolist() for weight in weights] == [[-1.0, -3.0]] * 2
    assert [copy.tolist() for copy in copies] == [[-1.0, -3.0]] * 2
    for sum_ in sums.take():
        assert sum_ is not None
        assert sum_.tolist() == [4.0, 8.0]
    sums.add_and_step([dense, None], weights, rates, copies)
    first, second = sums.take()
    assert second is None
    assert first is not None
    assert torch.equal(first.float(), dense)
