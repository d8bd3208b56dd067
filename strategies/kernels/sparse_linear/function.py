"""The public functions: checks, shapes, and the link to the custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from squall.kernels.native.direct import is_direct

from . import op
from .packed import LivePositions, PackedWeight


def sparse_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Multiply by a sparse matrix: ``x @ weight.T + bias``, and ReLU if wanted.

    Gradients by ``x`` and ``bias`` of any order work; weights that are trained go to :func:`sparse_linear_live`.

    Args:
        x: Shape ``(..., inputs)``, of the dtype and on the device of the weights.
        packed: The matrix, from :func:`pack_dense`, :func:`pack_values` or :func:`pack_codes`.
        bias: Shape ``(outputs,)``.
        relu: Replace what is negative by 0.

    Returns:
        Shape ``(..., outputs)``.

    Raises:
        ValueError: Shapes, dtypes or devices don't agree, or the packed values require a gradient.

    Example:
        >>> packed = pack_dense(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]))
        >>> sparse_linear(torch.tensor([3.0, 5.0]), packed, relu=True)
        tensor([10.,  0.])

    """
    _check(x, bias, packed, packed.values)
    if packed.values.requires_grad:
        raise ValueError("packed.values requires a gradient, which sparse_linear has none for; use sparse_linear_live")
    rows = x if x.ndim == 2 else _flat(x)
    if is_direct(rows, *packed[:6], bias):
        y = op.multiply(rows, packed, bias, bool(relu))
    else:
        y = op.sparse_linear(rows, *packed, bias, relu)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], packed.num_rows)


def sparse_linear_live(
    x: Tensor,
    live: Tensor,
    packed: PackedWeight,
    positions: LivePositions,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Multiply by a sparse matrix whose weights are trained; each gets its gradient, and those that are 0 cost nothing.

    Args:
        x: Shape ``(..., inputs)``, of the dtype and on the device of the weights.
        live: The weights in the order of their positions; those in ``packed`` don't matter.
        packed: The matrix, from :func:`pack_live`.
        positions: Where its weights are, from the same call.
        bias: Shape ``(outputs,)``.
        relu: Replace what is negative by 0.

    Returns:
        Shape ``(..., outputs)``.

    Raises:
        ValueError: Shapes, dtypes or devices don't agree.

    Example:
        >>> live = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> packed, positions = pack_live(torch.tensor([1, 2]), live, (2, 2))
        >>> sparse_linear_live(torch.tensor([3.0, 5.0]), live, packed, positions).sum().backward()
        >>> live.grad
        tensor([5., 3.])

    """
    _check(x, bias, packed, live)
    if live.shape != positions.columns.shape:
        raise ValueError(f"live must be {len(positions.columns)} weights, got shape {tuple(live.shape)}")
    columns, _, _, rows, starts, tiles = packed[:6]
    y: Tensor = op.sparse_linear_live(
        _flat(x), live, columns, rows, starts, tiles, *packed.shape, packed.row_block, bias, relu, *positions
    )
    return y.view(*x.shape[:-1], packed.num_rows)


def sparse_weight_grad(x: Tensor, grad: Tensor, row_starts: Tensor, columns: Tensor) -> Tensor:
    """Compute the gradient of a linear layer by some of its weights: ``(grad.T @ x)[row, column]`` for each.

    Args:
        x: What the layer was given, ``(..., inputs)``.
        grad: Gradient by what it returned, ``(..., outputs)``, of the same dtype.
        row_starts: int64, outputs and one more: where each row's weights start; from 0, never falling.
        columns: int32: a column a weight, ascending in each row.

    Returns:
        A number a weight, in their order.

    Raises:
        ValueError: Shapes or dtypes don't agree, or a place is outside the matrix.

    Example:
        >>> x, grad = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 2.0]])
        >>> sparse_weight_grad(x, grad, torch.tensor([0, 1, 2]), torch.tensor([1, 0], dtype=torch.int32))
        tensor([5., 6.])

    """
    if x.ndim < 1 or grad.shape[:-1] != x.shape[:-1] or grad.ndim < 1:
        raise ValueError(
            f"grad must have the batch of x, {tuple(x.shape[:-1])}, and outputs, got shape {tuple(grad.shape)}"
        )
    if grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(f"grad must be {x.dtype} on {x.device} as x, got {grad.dtype} on {grad.device}")
    if row_starts.dtype != torch.int64 or row_starts.shape != (grad.shape[-1] + 1,):
        raise ValueError(
            f"row_starts must be {grad.shape[-1] + 1} numbers of int64,"
            f" got {row_starts.dtype} of shape {tuple(row_starts.shape)}"
        )
    if columns.dtype != torch.int32 or columns.ndim != 1:
        raise ValueError(f"columns must be one row of int32, got {columns.dtype} of shape {tuple(columns.shape)}")
    result: Tensor = op.sparse_weight_grad(_flat(x), _flat(grad), row_starts.contiguous(), columns.contiguous())
    return result


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(x: Tensor, bias: Tensor | None, packed: PackedWeight, values: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] != packed.num_columns:
        raise ValueError(f"x must have {packed.num_columns} inputs as its last dimension, got shape {tuple(x.shape)}")
    _check_like("x", x, values)
    if bias is not None:
        if bias.shape != (packed.num_rows,):
            raise ValueError(f"bias must have shape ({packed.num_rows},), got {tuple(bias.shape)}")
        _check_like("bias", bias, values)


def _check_like(name: str, given: Tensor, values: Tensor) -> None:
    if given.dtype != values.dtype or given.device != values.device:
        raise ValueError(
            f"{name} must be {values.dtype} on {values.device} as the weights, got {given.dtype} on {given.device}"
        )
