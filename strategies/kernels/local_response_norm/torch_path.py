"""Local response normalisation in Torch operations, forward and backward.

Torch's own goes through a padded copy and ``avg_pool3d`` and then ``pow``; each pass reads and writes the whole batch
in main memory. Here the window is a few shifted additions, the usual power is two square roots, and on a CPU the work
is done a few samples at a time, so that everything between the input and the output stays in the cache. The sums are
computed again in the backward pass: in the cache that costs less than to keep them, and only the input is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Values worked on at a time on a CPU: one MiB a buffer, of which four or five are live."""


class Window(NamedTuple):
    """The constants of a normalisation, as `torch.nn.functional.local_response_norm` names them.

    Args:
        size: Channels summed over.
        alpha: Factor of the *mean* over the window (Torch and cuda-convnet2 divide it by ``size``).
        beta: Exponent.
        k: What is added to the sum.
        groups: Contiguous groups of channels that are normalised apart.

    """

    size: int
    alpha: float
    beta: float
    k: float
    groups: int


def is_channels_last(x: Tensor) -> bool:
    """Whether channels, and not pixels, are neighbours in memory; a tensor that is both ways counts as neither."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return not x.is_contiguous() and x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _add_window(total: Tensor, values: Tensor, before: int, after: int, factor: float) -> Tensor:
    """Add ``factor`` times the neighbours' values to ``total``, in place; the own value is there already.

    Args:
        total: Shape (N, groups, channels a group, *).
        values: The same shape.
        before: Channels below one's own that count.
        after: Channels above one's own that count.
        factor: What the values are multiplied with.

    """
    num_channels = values.shape[2]
    for shift in range(1, min(before, num_channels - 1) + 1):
        total.narrow(2, shift, num_channels - shift).add_(values.narrow(2, 0, num_channels - shift), alpha=factor)
    for shift in range(1, min(after, num_channels - 1) + 1):
        total.narrow(2, 0, num_channels - shift).add_(values.narrow(2, shift, num_channels - shift), alpha=factor)
    return total


def _denominator(x: Tensor, window: Window) -> Tensor:
    """Compute k + alpha / size * (sum of squares over the window): shape of ``x``, (N, groups, channels, *)."""
    factor = window.alpha / window.size
    squares = x * x
    total = squares.mul(factor).add_(window.k)
    return _add_window(total, squares, window.size // 2, (window.size - 1) // 2, factor)


def _negative_power(x: Tensor, beta: float) -> Tensor:
    """Compute ``x ** -beta``; roots for the exponents in use, which are several times as fast as ``pow``."""
    if beta == 0.75:
        root = x.rsqrt()
        return root.sqrt().mul_(root) if not x.requires_grad else root.sqrt() * root
    if beta == 0.5:
        return x.rsqrt()
    return x.reciprocal() if beta == 1.0 else x.pow(-beta)


def _gradient(grad: Tensor, x: Tensor, window: Window) -> Tensor:
    """Compute the gradient by ``x``; tensors of shape (N, groups, channels a group, *)."""
    total = _denominator(x, window)
    direct = _negative_power(total, window.beta) * grad
    through = direct * x / total
    # A channel counts for those whose window it is in: the window turned round.
    through = _add_window(through.clone(), through, (window.size - 1) // 2, window.size // 2, 1.0)
    return direct.addcmul(through, x, value=-2.0 * window.alpha * window.beta / window.size)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Cut the batch into runs of samples that fit the cache; accelerators and compilers get all at once."""
    num_samples = x.shape[0]
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= CHUNK:
        yield slice(None)
        return
    step = max(1, CHUNK * num_samples // x.numel())
    for start in range(0, num_samples, step):
        yield slice(start, start + step)


def _accumulate(x: Tensor) -> Tensor:
    """Widen half precision: a sum of squares overflows float16 and loses its small terms in bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def torch_forward(x: Tensor, window: Window) -> Tensor:
    """Normalise.

    Args:
        x: Shape (N, C, *); ``window.groups`` divides C.
        window: The constants.

    Returns:
        The normalised tensor, shape, dtype and memory format of ``x``.

    """
    result = torch.empty_like(x)
    grouped, out = (torch.unflatten(t, 1, (window.groups, -1)) for t in (x, result))
    for chunk in _chunks(x):
        values = _accumulate(grouped[chunk])
        scale = _negative_power(_denominator(values, window), window.beta)
        if values.dtype == x.dtype:
            torch.mul(values, scale, out=out[chunk])
        else:
            out[chunk] = values * scale
    return result


def torch_backward(grad: Tensor, x: Tensor, window: Window) -> Tensor:
    """Compute the gradient of `torch_forward` by its input.

    Args:
        grad: Gradient by the result, shape (N, C, *).
        x: What was normalised, the same shape.
        window: The constants.

    Returns:
        The gradient by ``x``, its shape and dtype. It isn't part of a graph.

    """
    result = torch.empty_like(x)
    grouped_grad, grouped, out = (torch.unflatten(t, 1, (window.groups, -1)) for t in (grad, x, result))
    for chunk in _chunks(x):
        out[chunk] = _gradient(_accumulate(grouped_grad[chunk]), _accumulate(grouped[chunk]), window)
    return result


def differentiable_backward(grad: Tensor, x: Tensor, window: Window) -> Tensor:
    """As `torch_backward`, in operations that autograd can follow, for gradients of gradients."""
    groups = (window.groups, -1)
    result = _gradient(
        _accumulate(torch.unflatten(grad, 1, groups)), _accumulate(torch.unflatten(x, 1, groups)), window
    )
    return result.flatten(1, 2).to(x.dtype)
