"""The compiled sparse convolution and its gradients, on plain single-precision memory of the CPU."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from squall.kernels import native
from squall.kernels.native import memory

from .lanes import WIDTH
from .plan import Packing, Plan

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_pack_kernel = native.function(
    "squall_sparse_conv_pack", *[_POINTER] * 2, *[_LONG] * 10, _POINTER, *[_LONG] * 7, _INT
)  # fmt: skip
_conv_kernel = native.function("squall_sparse_conv", *[_POINTER] * 9, *[_LONG] * 19, *[_INT] * 2)
_grad_kernel = native.function("squall_sparse_conv_weight_grad", *[_POINTER] * 5, *[_LONG] * 18, _INT)

_PART = 1 << 21  # numbers that are packed or staged at a time


def pack(x: Tensor, packing: Packing, stride: tuple[int, int], name: str = "packed") -> Tensor:
    """Lay images out for the kernel.

    Args:
        x: Shape (N, C, H, W), contiguous.
        packing: How.
        stride: Distance of a phase's rows and columns in ``x``.
        name: Of the workspace that they are laid out in.

    Returns:
        Flat numbers.

    """
    samples, channels, height, width = x.shape
    num_blocks = -(-samples // packing.lanes.images)
    packed = memory.workspace(num_blocks * channels * packing.channel_size + packing.tail, name)
    packed[-packing.tail :].zero_()  # what is computed of it is thrown away, or times zero: it must be finite
    table = packing.phase_table
    _pack_kernel(
        x.data_ptr(), packed.data_ptr(), samples, channels, height, width, *packing.lanes, *stride, table.data_ptr(),
        len(packing.phases), packing.first_y, packing.rows, packing.columns, packing.pitch, packing.guard,
        packing.channel_size, torch.get_num_threads(),
    )  # fmt: skip
    return packed


def convolve(x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None, relu: bool) -> Tensor:
    """Convolve.

    Args:
        x: Shape (N, C, H, W), contiguous.
        values: Of the live weights, in the plan's order.
        plan: For these sizes.
        bias: Shape (outputs,), or None.
        relu: Whether to end with one.

    Returns:
        The output, contiguous.

    """
    sizes, packing, num_threads = plan.sizes, plan.packing, torch.get_num_threads()
    num_outputs, num_inputs = sizes.weight[:2]
    y = memory.result((sizes.samples, num_outputs, sizes.out_height, sizes.out_width))
    num_scratch = num_outputs // sizes.groups * math.prod(plan.tile) * WIDTH
    scratch = memory.workspace(num_threads * num_scratch, "sums")
    lanes, staged, places = packing.lanes, None, None
    for part, out in zip(_parts(x, plan), _parts(y, plan), strict=True):
        packed = pack(part, packing, sizes.stride)
        if plan.num_staged:
            staged = memory.workspace(-(-part.shape[0] // lanes.images) * plan.num_staged, "staged")
            places = memory.workspace(lanes.height * sizes.out_width, "places")
        _conv_kernel(
            packed.data_ptr(), values.data_ptr(), plan.offsets.data_ptr(), plan.starts.data_ptr(),
            native.pointer(bias), out.data_ptr(), scratch.data_ptr(), native.pointer(staged), native.pointer(places),
            num_scratch, part.shape[0], lanes.num, lanes.images, lanes.strips, sizes.groups, num_inputs,
            num_outputs // sizes.groups, plan.num_blocks, plan.block_size, sizes.out_height, lanes.height,
            sizes.out_width, packing.pitch, *plan.tile, plan.row_tiles, packing.guard, packing.channel_size, relu,
            num_threads,
        )  # fmt: skip
    return y


def _parts(images: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Cut a batch into parts of which what is packed or staged stays in the cache until it is read."""
    num_packed = plan.sizes.channels * plan.packing.channel_size
    num_images = max(1, _PART // max(num_packed, plan.num_staged)) * plan.packing.lanes.images
    parts: tuple[Tensor, ...] = images.split(num_images) if plan.sizes.samples > num_images else (images,)
    return parts


def weight_gradient(x: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """Compute the gradients of the live weights.

    Args:
        x: The input, contiguous.
        grad: By the output, contiguous.
        plan: For these sizes.

    Returns:
        A number a live weight, in the plan's order.

    """
    sizes, num_threads = plan.sizes, torch.get_num_threads()
    packed, packed_grad = pack(x, plan.packing, sizes.stride), pack(grad, plan.grad_packing, (1, 1), "grad")
    result = x.new_zeros(len(plan.offsets))
    outputs, lanes = sizes.weight[0] // sizes.groups, plan.packing.lanes
    _grad_kernel(
        packed.data_ptr(), packed_grad.data_ptr(), plan.offsets.data_ptr(), plan.starts.data_ptr(),
        result.data_ptr(),
        sizes.samples, lanes.num, lanes.images, sizes.groups, sizes.weight[1], outputs, plan.num_blocks,
        plan.block_size, lanes.height, sizes.out_width, plan.packing.pitch, *plan.tile, plan.row_tiles,
        plan.packing.guard, plan.packing.channel_size, plan.grad_packing.channel_size, min(outputs, 4 * num_threads),
        num_threads,
    )  # fmt: skip
    return result
