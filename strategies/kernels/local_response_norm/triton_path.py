"""On a CUDA device, in Triton: one pass over memory each way, a program for each run of values.

A value's neighbours lie a fixed distance away, in either memory format, and come from the cache: others have just read
them. The backward pass computes each neighbour's sum again from there, which costs less than to write it out and read
it. To be imported only where there is Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_path import Window, is_channels_last

_SIZE = 1024
"""Values of a program."""


@triton.jit  # type: ignore[untyped-decorator]
def _load(x: Any, index: Any, inside: Any, RELU: tl.constexpr) -> Any:
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _denominator(
    x: Any, index: Any, inside: Any, channel: Any, num_channels: Any, stride: Any, factor: Any, k: Any,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr,
) -> Any:  # fmt: skip
    total = tl.zeros_like(channel).to(tl.float32)
    for shift in range(-BEFORE, AFTER + 1):
        other = channel + shift
        value = _load(x, index + shift * stride, inside & (other >= 0) & (other < num_channels), RELU)
        total += value * value
    return k + factor * total


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    x: Any, y: Any, num_values: Any, num_channels: Any, stride: Any, factor: Any, beta: Any, k: Any,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < num_values
    channel = index // stride % num_channels
    total = _denominator(x, index, inside, channel, num_channels, stride, factor, k, BEFORE, AFTER, RELU)
    value = _load(x, index, inside, RELU)
    tl.store(y + index, value * tl.exp2(-beta * tl.log2(total)), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    grad: Any, x: Any, result: Any, num_values: Any, num_channels: Any, stride: Any, factor: Any, beta: Any, k: Any,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < num_values
    channel = index // stride % num_channels
    through = tl.zeros_like(channel).to(tl.float32)
    # A channel counts for those whose window it is in: the window turned round.
    for shift in range(-AFTER, BEFORE + 1):
        other = channel + shift
        there = inside & (other >= 0) & (other < num_channels)
        place = index + shift * stride
        total = _denominator(x, place, there, other, num_channels, stride, factor, k, BEFORE, AFTER, RELU)
        product = _load(grad, place, there, False) * _load(x, place, there, RELU)
        through += product * tl.exp2(-beta * tl.log2(total)) / total
    total = _denominator(x, index, inside, channel, num_channels, stride, factor, k, BEFORE, AFTER, RELU)
    value = _load(x, index, inside, False)
    gradient = _load(grad, index, inside, False) * tl.exp2(-beta * tl.log2(total)) - 2 * factor * beta * value * through
    if RELU:
        gradient = tl.where(value > 0, gradient, 0.0)
    tl.store(result + index, gradient, mask=inside)


def triton_path(x: Tensor, grad: Tensor | None, window: Window, relu: bool) -> Tensor:
    """Normalise, or compute the gradient by ``x``.

    Args:
        x: Shape (N, C, *); ``window.groups`` divides C.
        grad: Gradient by the result, to compute that by ``x``; None to normalise.
        window: The constants.
        relu: Normalise ``relu(x)``.

    Returns:
        A tensor like ``x``.

    """
    result = torch.empty_like(x)
    last = is_channels_last(x)
    if not last and not x.is_contiguous():
        return result.copy_(triton_path(x.contiguous(), grad, window, relu))
    if not x.numel():
        return result
    if grad is not None and grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    operands = (x, result) if grad is None else (grad, x, result)
    kernel = _forward if grad is None else _backward
    kernel[(triton.cdiv(x.numel(), _SIZE),)](
        *operands, x.numel(), x.shape[1] // window.groups, 1 if last else x[0, 0].numel(),
        window.alpha / window.size, window.beta, window.k,
        BEFORE=window.size // 2, AFTER=(window.size - 1) // 2, RELU=relu, SIZE=_SIZE,
    )  # fmt: skip
    return result
