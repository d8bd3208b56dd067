"""Layers that hold and compute with live weights alone, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from squall.kernels import max_pool2d, sparse_conv2d, sparse_linear
from squall.kernels.sparse_linear import PackedWeight, pack_codes, pack_values

MOST_CODES = 256


class SparseConv2d(nn.Module):
    """A convolution of live weights.

    Args:
        values: The live weights.
        positions: Theirs in the flat weight, ascending.
        weight_shape: (outputs, inputs of a group, kernel height, kernel width).
        bias: Shape (outputs,).
        stride: As of :class:`torch.nn.Conv2d`.
        padding: Likewise, zeros.
        dilation: Likewise.
        groups: Likewise.
        relu: Whether to end with a ReLU.

    Example:
        >>> conv = nn.Conv2d(3, 4, 3, padding=1)
        >>> conv.weight.data[torch.rand(conv.weight.shape) > 0.1] = 0
        >>> SparseConv2d.from_dense(conv)(torch.ones(1, 3, 5, 5)).shape
        torch.Size([1, 4, 5, 5])

    """

    values: Tensor
    positions: Tensor
    bias: Tensor | None

    def __init__(
        self,
        values: Tensor,
        positions: Tensor,
        weight_shape: Sequence[int],
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.groups, self.relu = groups, relu
        self.register_buffer("values", values)
        self.register_buffer("positions", positions)
        self.register_buffer("bias", bias)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, relu: bool = False) -> SparseConv2d:
        """Take the weights of a dense layer that aren't zero."""
        weight = layer.weight.detach().flatten()
        positions = weight.nonzero().squeeze(1)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(
            weight[positions], positions, layer.weight.shape, bias, layer.stride, padding_of(layer), layer.dilation,
            layer.groups, relu,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, shape (N, C, H, W)."""
        result: Tensor = sparse_conv2d(
            x, self.values, self.positions, self.weight_shape, self.bias, self.stride, self.padding, self.dilation,
            self.groups, self.relu,
        )  # fmt: skip
        return result

    @property
    def num_bytes(self) -> int:
        """Bytes that a pass reads of the weights: a value and an offset each."""
        return 8 * len(self.values)

    def extra_repr(self) -> str:
        """Show sizes and how many weights live."""
        return f"{self.weight_shape}, live={len(self.values)}, stride={self.stride}, padding={self.padding}"


def padding_of(layer: nn.Conv2d) -> tuple[int, int]:
    """Say by how much a convolution pads on either side.

    Raises:
        ValueError: It isn't with zeros, or not by as much on both sides.

    """
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r} isn't 'zeros'")
    if isinstance(layer.padding, tuple):
        return layer.padding[0], layer.padding[1]
    if layer.padding == "valid":
        return 0, 0
    whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(pad % 2 for pad in whole):
        raise ValueError("padding='same' is more on one side than on the other")
    return whole[0] // 2, whole[1] // 2


class SparseLinear(nn.Module):
    """A linear layer of live weights, with a codebook if they have few values.

    Args:
        packed: The weights.
        bias: Shape (outputs,).
        relu: Whether to end with a ReLU.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> layer.weight.data[:, 2:] = 0
        >>> SparseLinear.from_dense(layer)(torch.ones(2, 8)).shape
        torch.Size([2, 4])

    """

    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self._numbers = {name: part for name, part in packed._asdict().items() if not isinstance(part, Tensor)}
        for name, part in packed._asdict().items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
        self.register_buffer("bias", bias)

    @classmethod
    def from_dense(cls, layer: nn.Linear, relu: bool = False) -> SparseLinear:
        """Take the weights of a dense layer that aren't zero."""
        weight = layer.weight.detach()
        positions = weight.flatten().nonzero().squeeze(1)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(pack(positions, weight.flatten()[positions], (weight.shape[0], weight.shape[1])), bias, relu)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self._numbers["num_rows"], self._numbers["num_columns"]

    @property
    def packed(self) -> PackedWeight:
        """The weights."""
        # As attributes they'd be looked for elsewhere first. Whoever assigns a parameter has it among these.
        there: dict[str, Any] = {**self._parameters, **self._buffers, **self._numbers}
        return PackedWeight(*[there[name] for name in PackedWeight._fields])

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x``, shape (..., inputs)."""
        return sparse_linear(x, self.packed, self.bias, self.relu)

    @property
    def num_bytes(self) -> int:
        """Bytes that a pass reads of the weights."""
        return self.packed.num_bytes

    def extra_repr(self) -> str:
        """Show sizes and how many weights live."""
        shared = "" if self._numbers.get("codes", 0) is None else f", codebook={len(self.values)}"  # type: ignore[arg-type]
        return f"in_features={self.packed.num_columns}, out_features={self.packed.num_rows}{shared}"


def pack(positions: Tensor, values: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """Pack a matrix with a codebook if its values are few.

    Args:
        positions: Of the live weights in the flat matrix, ascending.
        values: Theirs.
        shape: Outputs and inputs.

    """
    # A look at some of them is enough for most that aren't shared.
    if len(torch.unique(values[: 16 * MOST_CODES])) <= MOST_CODES:
        codebook, codes = torch.unique(values, return_inverse=True)
        if len(codebook) <= MOST_CODES:
            return pack_codes(positions, codes.to(torch.uint8), codebook, shape)
    return pack_values(positions, values, shape)


class MaxPool2d(nn.Module):
    """Maxima over windows, without keeping where they came from.

    Args:
        layer: What to do.

    Example:
        >>> MaxPool2d(nn.MaxPool2d(2))(torch.ones(1, 1, 4, 4)).shape
        torch.Size([1, 1, 2, 2])

    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.arguments = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """Take the maxima of ``x``, shape (N, C, H, W)."""
        return max_pool2d(x, *self.arguments)
