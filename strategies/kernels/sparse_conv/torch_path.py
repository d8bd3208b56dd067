"""A sparse convolution and its gradients in Torch operations: dense, with zeros where no weight lives."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .sizes import Sizes


def dense_weight(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fill a weight.

    Args:
        values: Of the live weights.
        positions: Theirs in the flat weight.
        shape: Of the weight.

    """
    return values.new_zeros(shape).view(-1).index_put_((positions,), values).view(shape)


def convolve(x: Tensor, values: Tensor, positions: Tensor, sizes: Sizes, bias: Tensor | None, relu: bool) -> Tensor:
    """As the compiled kernel's; values in the order of positions."""
    weight = dense_weight(values, positions, sizes.weight)
    y = F.conv2d(x, weight, bias, sizes.stride, sizes.padding, sizes.dilation, sizes.groups)
    return y.relu_() if relu else y


def input_gradient(grad: Tensor, values: Tensor, positions: Tensor, sizes: Sizes) -> Tensor:
    """Compute the gradient by the input."""
    weight = dense_weight(values, positions, sizes.weight)
    shape = (sizes.samples, sizes.channels, sizes.height, sizes.width)
    result: Tensor = conv2d_input(shape, weight, grad, sizes.stride, sizes.padding, sizes.dilation, sizes.groups)
    return result


def weight_gradient(x: Tensor, grad: Tensor, positions: Tensor, sizes: Sizes) -> Tensor:
    """Compute the gradients of the live weights, in the order of positions."""
    dense: Tensor = conv2d_weight(x, sizes.weight, grad, sizes.stride, sizes.padding, sizes.dilation, sizes.groups)
    return dense.reshape(-1)[positions]
