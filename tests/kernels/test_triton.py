"""Kernels for CUDA devices in Triton. Where there is none, ``TRITON_INTERPRET=1`` has its interpreter run them."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from squall.consistency import get_codec
from squall.consistency.codecs.dynamic import _codes_on, float_values
from squall.kernels.local_response_norm.torch_path import Window, torch_backward, torch_forward
from squall.kernels.sparse_linear import pack_codes, pack_values

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no CUDA device, and not TRITON_INTERPRET=1"
)


def imported(name: str) -> ModuleType:
    """A kernel's module, which needs Triton."""
    return importlib.import_module(f"squall.kernels.{name}.triton_path")


@pytest.mark.parametrize("shape", [(2, 12), (3, 7, 5), (2, 12, 5, 3), (1, 6, 30, 41), (0, 4, 2, 2)], ids=str)
@pytest.mark.parametrize(("size", "beta"), [(1, 1.0), (2, 0.5), (5, 0.75), (4, 0.6)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "neither"])
def test_local_response_norm(shape: tuple[int, ...], size: int, beta: float, relu: bool, layout: str) -> None:
    triton_path = imported("local_response_norm").triton_path
    x, grad = torch.randn(shape), torch.randn(shape)
    for groups in (1, shape[1]) if shape[1] % 3 else (1, 3):
        window = Window(size, 0.7, beta, 1.5, groups)
        values = x.double().relu() if relu else x.double()
        expected, by_x = torch_forward(values, window), torch_backward(grad.double(), values, window)
        ours = x.to(DEVICE)
        if layout == "channels last":
            ours = ours.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "neither":
            ours = ours.repeat_interleave(2, 0)[::2]
        result = triton_path(ours, None, window, relu)
        torch.testing.assert_close(result.cpu(), expected.float(), rtol=2e-6, atol=2e-6)
        assert result.stride() == torch.empty_like(ours).stride()
        result = triton_path(ours, grad.to(DEVICE), window, relu)
        torch.testing.assert_close(
            result.cpu(), (by_x.masked_fill(x <= 0, 0) if relu else by_x).float(), rtol=2e-6, atol=3e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(2, 6, 4)).to(dtype)
    window = Window(5, 1.0, 0.75, 2.0, 1)
    result = imported("local_response_norm").triton_path(x.to(DEVICE), None, window, False).cpu()
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch_forward(x, window))


@pytest.mark.parametrize(("rows", "inputs"), [(5, 7), (130, 300), (64, 2100)])
@pytest.mark.parametrize("coded", [False, True])
def test_sparse_linear_of_one_sample(rows: int, inputs: int, coded: bool) -> None:
    positions = (torch.rand(rows, inputs) < 0.2).flatten().nonzero().squeeze(1)
    codebook, codes = torch.randn(16), torch.randint(16, positions.shape, dtype=torch.uint8)
    if coded:
        packed = pack_codes(positions, codes, codebook, (rows, inputs))
    else:
        packed = pack_values(positions, codebook[codes.long()], (rows, inputs))
    weight = packed.to_dense()
    x, bias = torch.randn(1, inputs), torch.randn(rows)
    packed = type(packed)(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in packed))
    result = imported("sparse_linear").triton_forward(x.to(DEVICE), packed, bias.to(DEVICE), True).cpu()
    torch.testing.assert_close(result, F.linear(x, weight, bias).relu(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "1bit"])
@pytest.mark.parametrize("num", [1, 7, 2048, 2049, 5000])
@pytest.mark.parametrize("fed_back", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1.0, 1e38, float("nan"), float("inf")])
def test_codes_of_blocks(name: str, num: int, fed_back: bool, scale: float) -> None:
    path, codec = imported("block_codes"), get_codec(name)
    numbers, residual = torch.randn(num), torch.randn(num) / 8 if fed_back else None
    numbers[num // 2] *= scale
    code, ours = (torch.zeros(codec.num_bytes(num) + 1, dtype=torch.uint8)[1:] for _ in range(2))
    kept = None if residual is None else residual.to(DEVICE, copy=True)
    tables = (_codes_on(torch.device(DEVICE)), float_values(torch.device(DEVICE))) if name == "int8" else None
    codec.encode(numbers, code, residual)
    ours = ours.to(DEVICE)
    path.encode(numbers.to(DEVICE), ours, kept, tables)
    expected, decoded = torch.empty(num), torch.empty(num, device=DEVICE)
    codec.decode(code, expected)
    path.decode(ours, decoded, tables and tables[1])
    torch.testing.assert_close(decoded.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)
    if residual is not None and kept is not None:
        torch.testing.assert_close(kept.cpu(), residual, rtol=1e-5, atol=1e-6)
