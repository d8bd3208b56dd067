"""Add a gradient to a sum, and step weights with it.

A plain function on tensors, no custom op: a worker calls it between its steps, where neither autograd nor a compiler
meets it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from squall.kernels import native

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_kernel = native.function("squall_add_and_step", *[_POINTER] * 4, _LONG, ctypes.c_double, *[_INT] * 2)


@torch.no_grad()
def add_and_step(
    sums: Tensor, gradient: Tensor, weights: Tensor, rate: float, begins: bool = False, copy: Tensor | None = None
) -> None:
    """Do ``sums += gradient`` and ``weights -= rate * gradient``, in place and, where it is compiled, in one pass.

    Args:
        sums: Any shape.
        gradient: Of the same shape, dtype and device. The compiled kernel takes single precision on a CPU, in one and
            the same order in memory.
        weights: Likewise.
        rate: The learning rate.
        begins: The sum has no value yet, and becomes the gradient.
        copy: As many numbers, flat, contiguous and of the same dtype: become what the weights have become.

    Raises:
        ValueError: Shapes, dtypes or devices don't agree.

    Example:
        >>> sums, weights = torch.ones(2), torch.ones(2)
        >>> add_and_step(sums, torch.tensor([1.0, 2.0]), weights, 0.5)
        >>> sums, weights
        (tensor([2., 3.]), tensor([0.5000, 0.0000]))

    """
    for name, tensor in (("sums", sums), ("weights", weights)):
        if (tensor.shape, tensor.dtype, tensor.device) != (gradient.shape, gradient.dtype, gradient.device):
            raise ValueError(
                f"{name} must be as gradient is, {tuple(gradient.shape)} {gradient.dtype} on {gradient.device}; got "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    num = gradient.numel()
    if copy is not None and (copy.shape != (num,) or copy.dtype != gradient.dtype or not copy.is_contiguous()):
        raise ValueError(f"copy must be {num} contiguous {gradient.dtype}, flat; got {tuple(copy.shape)} {copy.dtype}")
    tensors = (sums, gradient, weights)
    if native.serves(*tensors, dtypes=native.SINGLE) and _are_alike(tensors):
        # Memory of another order than the shape's is copied in the shape's, as ``reshape`` does.
        copied = copy if copy is not None and weights.is_contiguous() else None
        pointers = [native.pointer(tensor) for tensor in (*tensors, copied)]
        _kernel(*pointers, num, rate, begins, torch.get_num_threads())
        if copied is copy:
            return
    else:
        if begins:
            sums.copy_(gradient)
        else:
            sums.add_(gradient)
        weights.add_(gradient, alpha=-rate)
    if copy is not None:
        copy.copy_(weights.reshape(-1))


def _are_alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether numbers of one place have one place in memory, and there are no gaps."""
    if any(tensor.layout != torch.strided for tensor in tensors):
        return False
    formats = [torch.contiguous_format] + [torch.channels_last] * (tensors[0].ndim == 4)
    return any(all(tensor.is_contiguous(memory_format=order) for tensor in tensors) for order in formats)
