"""The custom ops ``squall::local_response_norm`` and its backward: the compiled kernel, Triton, or Torch operations."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.devices import triton_serves
from squall.kernels.native import memory

from .torch_path import Window, differentiable_backward, is_channels_last, torch_backward, torch_forward

_POINTER, _LONG, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_kernel = native.function(
    "squall_local_response_norm", *[_POINTER] * 4, *[_LONG] * 7, *[_DOUBLE] * 3, *[_INT] * 4
)  # fmt: skip
_BLOCK = 256  # as in kernel.c


def _native(x: Tensor, grad: Tensor | None, window: Window, relu: bool) -> Tensor:
    last = is_channels_last(x)
    if not last:
        x = x.contiguous()
    result = memory.result_like(x)
    if not x.numel():
        return result
    if grad is not None:
        grad = memory.result_like(x).copy_(grad) if grad.stride() != x.stride() else grad
    samples, channels = x.shape[0], x.shape[1] // window.groups
    num_threads = torch.get_num_threads()
    num_scratch = 2 * (channels + window.size) * _BLOCK
    scratch = x.new_empty(num_threads * num_scratch if grad is not None or last else 0)
    _kernel(
        x.data_ptr(), native.pointer(grad), result.data_ptr(), scratch.data_ptr(), num_scratch,
        samples, window.groups, channels, x[0, 0].numel(), window.size // 2, (window.size - 1) // 2,
        window.alpha / window.size, window.beta, window.k, relu, last, x.dtype == torch.float64, num_threads,
    )  # fmt: skip
    return result


def normalise(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int, relu: bool) -> Tensor:
    """Normalise; arguments as of :func:`squall.kernels.local_response_norm`. The op's function."""
    window = Window(size, alpha, beta, k, groups)
    if native.serves(x):
        return _native(x, None, window, relu)
    if triton_serves(x):
        from .triton_path import triton_path

        return triton_path(x, None, window, relu)
    return torch_forward(x.relu() if relu else x, window)


local_response_norm = torch.library.custom_op("squall::local_response_norm", normalise, mutates_args=())


@torch.library.custom_op("squall::local_response_norm_backward", mutates_args=())
def local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int, relu: bool
) -> Tensor:
    """Compute the gradient by ``x``."""
    window = Window(size, alpha, beta, k, groups)
    if native.serves(grad, x):
        return _native(x, grad, window, relu)
    if triton_serves(grad, x):
        from .triton_path import triton_path

        return triton_path(x, grad, window, relu)
    if relu:
        return torch_backward(grad, x.relu(), window).masked_fill_(x <= 0, 0)
    return torch_backward(grad, x, window)


@local_response_norm.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return _like(x)


@local_response_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return _like(x)


def _like(x: Tensor) -> Tensor:
    """What both return: in the memory format of ``x`` if it has one, else contiguous or as ``empty_like`` has it."""
    if not native.serves(x) or is_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)  # alone: in AlexNet the ReLU before it keeps that very tensor too


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return local_response_norm_backward(grad, x, *ctx.arguments), *[None] * 6


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *ctx.arguments = inputs
    ctx.save_for_backward(grad, x)


def _backward_twice(ctx: Any, grad_of_result: Tensor) -> tuple[Any, ...]:
    """Gradients of the gradient, of any order: autograd follows the formula written in Torch operations."""
    *window, relu = ctx.arguments
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, x = (
            saved if higher else saved.detach().requires_grad_(needed)
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        result = differentiable_backward(grad, x.relu() if relu else x, Window(*window))
        if relu:
            result = result.masked_fill(x <= 0, 0)
        wanted = [tensor for tensor, needed in zip((grad, x), ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(result, wanted, grad_of_result, create_graph=higher, allow_unused=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), *[None] * 6


local_response_norm.register_autograd(_backward, setup_context=_save)
local_response_norm_backward.register_autograd(_backward_twice, setup_context=_save_both)
