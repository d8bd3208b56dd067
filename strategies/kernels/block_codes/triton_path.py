"""On a CUDA device, in Triton: a program a block, which reads its numbers once and writes code and residual.

To be imported only where there is Triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""As in :mod:`squall.consistency.codecs.blocks`."""


@triton.jit  # type: ignore[untyped-decorator]
def _wanted(numbers: Any, residual: Any, index: Any, inside: Any, FED_BACK: tl.constexpr) -> Any:
    wanted = tl.load(numbers + index, mask=inside, other=0.0).to(tl.float32)
    if FED_BACK:
        wanted += tl.load(residual + index, mask=inside, other=0.0)
    return wanted


@triton.jit  # type: ignore[untyped-decorator]
def _keep_loss(residual: Any, index: Any, inside: Any, lost: Any) -> None:
    """What isn't finite would come back in every code."""
    tl.store(residual + index, tl.where(lost - lost == 0.0, lost, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _store_float(out: Any, value: Any) -> None:
    """At any address."""
    byte = tl.arange(0, 4)
    tl.store(out + byte, (value.to(tl.int32, bitcast=True) >> (8 * byte) & 255).to(tl.uint8))


@triton.jit  # type: ignore[untyped-decorator]
def _load_float(data: Any) -> Any:
    byte = tl.arange(0, 4)
    return tl.sum(tl.load(data + byte).to(tl.int32) << (8 * byte)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _encode_int8(
    numbers: Any, out: Any, residual: Any, codes: Any, values: Any, num_numbers: Any, num_blocks: Any,
    FED_BACK: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    index = block * SIZE + tl.arange(0, SIZE)
    inside = index < num_numbers
    wanted = _wanted(numbers, residual, index, inside, FED_BACK)
    highest = tl.max(tl.where(inside, wanted, float("-inf")))
    lowest = tl.min(tl.where(inside, wanted, float("inf")))
    scale = tl.where(highest >= -lowest, highest, lowest)
    scale = tl.where(tl.sum((wanted - wanted != 0.0).to(tl.int32)) > 0, float("nan"), scale)
    half = (tl.math.div_rn(wanted, tl.zeros_like(wanted) + scale) * 32768.0).to(tl.float16)
    code = tl.load(codes + half.to(tl.uint16, bitcast=True).to(tl.int32))
    tl.store(out + num_blocks * 4 + index, code, mask=inside)
    _store_float(out + block * 4, scale)
    if FED_BACK:
        _keep_loss(residual, index, inside, wanted - tl.load(values + code.to(tl.int32)) * scale)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_int8(data: Any, out: Any, values: Any, num_numbers: Any, num_blocks: Any, SIZE: tl.constexpr) -> None:
    block = tl.program_id(0).to(tl.int64)
    index = block * SIZE + tl.arange(0, SIZE)
    inside = index < num_numbers
    code = tl.load(data + num_blocks * 4 + index, mask=inside, other=0)
    tl.store(out + index, tl.load(values + code.to(tl.int32)) * _load_float(data + block * 4), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _encode_signs(
    numbers: Any, out: Any, residual: Any, num_numbers: Any, num_blocks: Any, FED_BACK: tl.constexpr, SIZE: tl.constexpr
) -> None:
    block = tl.program_id(0).to(tl.int64)
    index = block * SIZE + tl.arange(0, SIZE)
    inside = index < num_numbers
    wanted = _wanted(numbers, residual, index, inside, FED_BACK)
    positive = inside & (wanted >= 0.0)
    num_positive = tl.sum(positive.to(tl.int32))
    num_negative = tl.minimum(num_numbers - block * SIZE, SIZE) - num_positive
    # In float64, or large numbers' sum is infinite where their mean isn't.
    above = tl.sum(tl.where(positive, wanted, 0.0).to(tl.float64)) / tl.maximum(num_positive, 1)
    below = tl.sum(tl.where(positive, 0.0, wanted).to(tl.float64)) / tl.maximum(num_negative, 1)
    above, below = above.to(tl.float32), below.to(tl.float32)
    invalid = (above - above) + (below - below)  # infinity less itself is NaN
    above, below = above + invalid, below + invalid
    bits = tl.reshape(positive.to(tl.int32), (SIZE // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = block * (SIZE // 8) + tl.arange(0, SIZE // 8)
    tl.store(out + num_blocks * 8 + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < num_numbers)
    _store_float(out + block * 8, above)
    _store_float(out + block * 8 + 4, below)
    if FED_BACK:
        _keep_loss(residual, index, inside, wanted - tl.where(positive, above, below))


@triton.jit  # type: ignore[untyped-decorator]
def _decode_signs(data: Any, out: Any, num_numbers: Any, num_blocks: Any, SIZE: tl.constexpr) -> None:
    block = tl.program_id(0).to(tl.int64)
    index = block * SIZE + tl.arange(0, SIZE)
    inside = index < num_numbers
    bits = tl.load(data + num_blocks * 8 + index // 8, mask=inside, other=0).to(tl.int32)
    positive = (bits >> (index % 8).to(tl.int32) & 1) == 1
    above, below = _load_float(data + block * 8), _load_float(data + block * 8 + 4)
    tl.store(out + index, tl.where(positive, above, below), mask=inside)


def encode(numbers: Tensor, out: Tensor, residual: Tensor | None, tables: tuple[Tensor, Tensor] | None) -> None:
    """Write the code ``int8``, or ``1bit`` without tables.

    Args:
        numbers: Shape (n,), contiguous.
        out: The code's bytes, uint8, contiguous.
        residual: Shape (n,), float32, contiguous: added to the numbers; becomes, in place, what the code lost.
        tables: The code of each float16, and what the 256 codes stand for.

    """
    num_blocks = triton.cdiv(numbers.numel(), BLOCK)
    fed_back = residual is not None
    kernel, more = (_encode_signs, ()) if tables is None else (_encode_int8, tables)
    kernel[(num_blocks,)](
        numbers, out, residual if fed_back else numbers, *more, numbers.numel(), num_blocks,
        FED_BACK=fed_back, SIZE=BLOCK,
    )  # fmt: skip


def decode(data: Tensor, out: Tensor, values: Tensor | None) -> None:
    """Read the code ``int8``, or ``1bit`` without values.

    Args:
        data: The code's bytes, uint8, contiguous.
        out: Shape (n,), contiguous.
        values: What the 256 codes stand for.

    """
    num_blocks = triton.cdiv(out.numel(), BLOCK)
    if values is None:
        _decode_signs[(num_blocks,)](data, out, out.numel(), num_blocks, SIZE=BLOCK)
    else:
        _decode_int8[(num_blocks,)](data, out, values, out.numel(), num_blocks, SIZE=BLOCK)
