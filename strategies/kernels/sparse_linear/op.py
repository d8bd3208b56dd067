"""The custom ops ``squall::sparse_linear`` and its gradients: the compiled kernels, or Torch operations."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.devices import triton_serves

from .packed import PackedWeight
from .packing import TILE_COLUMNS
from .torch_path import torch_forward, torch_input_grad, torch_weight_grad

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_forward = native.function("squall_sparse_linear", *[_POINTER] * 11, *[_LONG] * 7, *[_INT] * 4)
_input_grad = native.function("squall_sparse_linear_input_grad", *[_POINTER] * 10, *[_LONG] * 5, *[_INT] * 2)
_weight_grad = native.function("squall_sparse_weight_grad", *[_POINTER] * 6, *[_LONG] * 3, *[_INT] * 2)
_TILE, _LANES = 128, 32  # as in kernel.c
ONE_AT_A_TIME = 3
"""Up to so many samples are faster one after the other than in the lanes of a vector."""
_PART_SLOTS, _MOST_PARTS = 1 << 18, 8  # what is worth a task at batch 1; threads have no say, or they'd change sums


def _in_lanes(batch: int) -> int:
    return -(-batch // 16) * 16


def _parts(packed: PackedWeight) -> tuple[int | None, ...]:
    columns, codes, values, rows, starts, tiles = packed[:6]
    return (
        columns.data_ptr(), native.pointer(codes), values.data_ptr(), rows.data_ptr(), starts.data_ptr(),
        tiles.data_ptr(),
    )  # fmt: skip


def _is_native(packed: PackedWeight, *tensors: Tensor) -> bool:
    return native.serves(packed.values, *tensors) and packed.columns.is_cpu


@torch.library.custom_op("squall::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    columns: Tensor,
    codes: Tensor | None,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    tiles: Tensor,
    num_rows: int,
    num_columns: int,
    row_block: int,
    num_live: int,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Compute ``x @ weight.T + bias`` of a packed matrix; ``x`` is ``(batch, inputs)``."""
    packed = PackedWeight(columns, codes, values, rows, starts, tiles, num_rows, num_columns, row_block, num_live)
    return multiply(x, packed, bias, relu)


def multiply(x: Tensor, packed: PackedWeight, bias: Tensor | None, relu: bool) -> Tensor:
    """Do what the op does."""
    if not _is_native(packed, x):
        if len(x) == 1 and x.dtype == torch.float32 and triton_serves(x):
            from .triton_path import triton_forward

            return triton_forward(x, packed, bias, relu)
        return torch_forward(x, packed, bias, relu)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_rows, num_columns, row_block, _ = packed[6:]
    batch, num_threads = x.shape[0], torch.get_num_threads()
    y = x.new_empty(batch, num_rows)
    if not batch or not num_rows:
        return y
    num_tiles, num_blocks = -(-num_columns // TILE_COLUMNS), -(-num_rows // row_block)
    one = batch <= ONE_AT_A_TIME
    if one:
        num_parts = max(1, min(num_tiles, _MOST_PARTS, packed.columns.shape[0] // (num_blocks * _PART_SLOTS)))
        num_shared, num_own, num_owners = batch, _in_lanes(row_block + 1), num_blocks * batch * num_parts
    else:
        num_parts, num_shared, num_own, num_owners = 1, _in_lanes(batch), (row_block + 1) * _LANES, num_threads
    shared, own = x.new_empty(max(1, num_shared * num_tiles * _TILE)), x.new_empty(num_owners * num_own)
    _forward(
        *_parts(packed), x.data_ptr(), native.pointer(bias), y.data_ptr(), shared.data_ptr(), own.data_ptr(), num_own,
        packed.values.shape[0], num_rows, num_columns, row_block, batch, num_parts, relu, one, x.dtype == torch.float64,
        num_threads,
    )  # fmt: skip
    return y


@torch.library.custom_op("squall::sparse_linear_input_grad", mutates_args=())
def sparse_linear_input_grad(
    grad: Tensor,
    columns: Tensor,
    codes: Tensor | None,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    tiles: Tensor,
    num_rows: int,
    num_columns: int,
    row_block: int,
    num_live: int,
) -> Tensor:
    """Compute ``grad @ weight`` of a packed matrix; ``grad`` is ``(batch, outputs)``."""
    packed = PackedWeight(columns, codes, values, rows, starts, tiles, num_rows, num_columns, row_block, num_live)
    if not _is_native(packed, grad):
        return torch_input_grad(grad, packed)
    grad = grad.contiguous()
    batch, num_threads = len(grad), torch.get_num_threads()
    y = grad.new_empty(batch, num_columns)
    if not y.numel():
        return y
    num_blocks, num_own = -(-num_rows // row_block), _TILE * _LANES
    shared = grad.new_empty(max(1, _in_lanes(batch) * num_blocks * (row_block + 1)))
    own = grad.new_empty(num_threads * num_own)
    _input_grad(
        *_parts(packed), grad.data_ptr(), y.data_ptr(), shared.data_ptr(), own.data_ptr(), num_own, num_rows,
        num_columns, row_block, batch, grad.dtype == torch.float64, num_threads,
    )  # fmt: skip
    return y


@torch.library.custom_op("squall::sparse_weight_grad", mutates_args=())
def sparse_weight_grad(x: Tensor, grad: Tensor, row_starts: Tensor, columns: Tensor) -> Tensor:
    """Compute ``grad.T @ x`` at some places, given as compressed rows: one number each."""
    if not (native.serves(x, grad) and x.dtype == grad.dtype and columns.device.type == "cpu"):
        return torch_weight_grad(x, grad, row_starts, columns)
    x, grad = x.contiguous(), grad.contiguous()
    y = x.new_empty(len(columns))
    batch, num_rows, num_columns = len(x), grad.shape[1], x.shape[1]
    if not y.numel():
        return y
    shared = x.new_empty(max(1, _in_lanes(batch) * (num_rows + num_columns)))
    _weight_grad(
        x.data_ptr(), grad.data_ptr(), row_starts.data_ptr(), columns.data_ptr(), y.data_ptr(), shared.data_ptr(),
        num_rows, num_columns, batch, x.dtype == torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return y


@torch.library.custom_op("squall::sparse_linear_live", mutates_args=())
def sparse_linear_live(
    x: Tensor,
    live: Tensor,
    columns: Tensor,
    rows: Tensor,
    starts: Tensor,
    tiles: Tensor,
    num_rows: int,
    num_columns: int,
    row_block: int,
    bias: Tensor | None,
    relu: bool,
    row_starts: Tensor,
    live_columns: Tensor,
    slots: Tensor,
) -> Tensor:
    """As ``squall::sparse_linear``, of weights in the order of their positions, which get gradients."""
    values = _in_slots(live, slots, columns)
    y: Tensor = sparse_linear(
        x, columns, None, values, rows, starts, tiles, num_rows, num_columns, row_block, len(live), bias, relu
    )
    return y


def _in_slots(live: Tensor, slots: Tensor, columns: Tensor) -> Tensor:
    return live.new_zeros(len(columns)).index_copy_(0, slots, live)


@sparse_linear.register_fake
def _(x: Tensor, columns: Tensor, codes: Any, values: Any, rows: Any, starts: Any, tiles: Any, num_rows: int,
      *rest: Any) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], num_rows)


@sparse_linear_input_grad.register_fake
def _(grad: Tensor, columns: Tensor, codes: Any, values: Any, rows: Any, starts: Any, tiles: Any, num_rows: int,
      num_columns: int, *rest: Any) -> Tensor:  # fmt: skip
    return grad.new_empty(grad.shape[0], num_columns)


@sparse_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, row_starts: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(columns.shape[0])


@sparse_linear_live.register_fake
def _(x: Tensor, live: Tensor, columns: Any, rows: Any, starts: Any, tiles: Any, num_rows: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], num_rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts = inputs[:7]
    *ctx.numbers, bias, ctx.relu = inputs[7:]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*parts, output if ctx.relu else None)


def _before_relu(ctx: Any, grad: Tensor, y: Tensor | None) -> Tensor:
    return grad if y is None else grad * (y > 0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *parts, y = ctx.saved_tensors
    grad = _before_relu(ctx, grad, y)
    by_x = sparse_linear_input_grad(grad, *parts, *ctx.numbers) if ctx.needs_input_grad[0] else None
    by_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[11] else None
    return by_x, *[None] * 10, by_bias, None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts = inputs[:7]
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(*parts)


def _backward_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return sparse_linear(grad, *ctx.saved_tensors, *ctx.numbers, None, False), *[None] * 10


def _save_live(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_rows, ctx.num_columns, ctx.row_block, bias, ctx.relu = inputs[:11]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*tensors, *inputs[11:], output if ctx.relu else None)


def _backward_live(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, live, columns, rows, starts, tiles, row_starts, live_columns, slots, y = ctx.saved_tensors
    grad = _before_relu(ctx, grad, y)
    by_x = by_live = by_bias = None
    if ctx.needs_input_grad[0]:
        values = _in_slots(live, slots, columns)
        sizes = ctx.num_rows, ctx.num_columns, ctx.row_block, live.shape[0]
        by_x = sparse_linear_input_grad(grad, columns, None, values, rows, starts, tiles, *sizes)
    if ctx.needs_input_grad[1]:
        by_live = sparse_weight_grad(x, grad, row_starts, live_columns)
    if ctx.has_bias and ctx.needs_input_grad[9]:
        by_bias = grad.sum(0)
    return by_x, by_live, *[None] * 7, by_bias, *[None] * 4


sparse_linear.register_autograd(_backward, setup_context=_save)
sparse_linear_input_grad.register_autograd(_backward_grad, setup_context=_save_grad)
sparse_linear_live.register_autograd(_backward_live, setup_context=_save_live)
