"""The public function and its op: several times as fast as Torch's, which keeps where each maximum came from."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squall.kernels import native
from squall.kernels.native import memory
from squall.kernels.native.direct import is_direct
from squall.kernels.pairs import pair

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_kernel = native.function("squall_max_pool", *[_POINTER] * 3, *[_LONG] * 14, ctypes.c_int)


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Take maxima over windows, as :func:`torch.nn.functional.max_pool2d` does.

    Its gradient is Torch's, and costs a pass of it: this is for inference.

    Args:
        x: Shape (N, C, H, W) or (C, H, W); the compiled kernel takes single precision on a CPU, channels first.
        kernel_size: One number, or vertical and horizontal.
        stride: Likewise; None for the kernel's size.
        padding: Likewise, at most half the kernel.
        dilation: Likewise.
        ceil_mode: Whether windows may begin inside the image and end outside of it.

    Returns:
        The maxima.

    Raises:
        ValueError: There is no image in ``x``, or an argument is more than two numbers.
        RuntimeError: What Torch says to arguments that don't fit.

    Example:
        >>> max_pool2d(torch.arange(9.0).view(1, 1, 3, 3), 2, 1)
        tensor([[[[4., 5.],
                  [7., 8.]]]])

    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be images, (N, C, H, W) or (C, H, W), got shape {tuple(x.shape)}")
    given = {
        "kernel_size": kernel_size, "stride": kernel_size if stride is None else stride, "padding": padding,
        "dilation": dilation,
    }  # fmt: skip
    pairs = [pair(name, value) for name, value in given.items()]
    maxima: Any = _maxima if is_direct(x) else _max_pool2d
    result: Tensor = maxima(x, *pairs, bool(ceil_mode))
    return result


# Written out, since older versions of torch don't read list[int].
_SCHEMA = (
    "(Tensor x, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode) -> Tensor"
)


def _maxima(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    if not native.serves(x, dtypes=native.SINGLE) or not x.is_contiguous() or not x.numel():
        return _torch(x, kernel_size, stride, padding, dilation, ceil_mode)
    y = memory.result(_shape(x.shape, *map(tuple, (kernel_size, stride, padding, dilation)), ceil_mode))
    height, width = x.shape[-2:]
    num_scratch = padding[1] + max(width, (y.shape[-1] - 1) * stride[1] + dilation[1] * (kernel_size[1] - 1) + 1) + 48
    num_threads = torch.get_num_threads()
    scratch = memory.workspace(num_threads * num_scratch, "row")
    _kernel(
        x.data_ptr(), y.data_ptr(), scratch.data_ptr(), num_scratch, x.shape[:-2].numel(), height, width,
        *y.shape[-2:], *kernel_size, *stride, *padding, *dilation, num_threads,
    )  # fmt: skip
    return y


_max_pool2d = torch.library.custom_op("squall::max_pool2d", _maxima, mutates_args=(), schema=_SCHEMA)


@functools.lru_cache(maxsize=256)
def _shape(shape: torch.Size, *arguments: Any) -> torch.Size:
    """Torch's own word on the output's shape, and on arguments that don't fit."""
    return _torch(torch.empty(shape, device="meta"), *arguments).shape


def _torch(x: Tensor, *arguments: Any) -> Tensor:
    *pairs, ceil_mode = arguments
    function: Any = F.max_pool2d  # whose overloads a list of arguments fits none of
    result: Tensor = function(x, *pairs, ceil_mode)
    return result


@_max_pool2d.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(_torch(x, *arguments))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    with torch.enable_grad():
        again = x.detach().requires_grad_()
        y = _torch(again, *ctx.arguments)
    return torch.autograd.grad(y, again, grad)[0], *[None] * 5


_max_pool2d.register_autograd(_backward, setup_context=_save)
