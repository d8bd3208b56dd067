"""The custom ops ``squall::sparse_conv2d`` and its backward: the compiled kernel, or Torch operations."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from squall.kernels import native

from . import native_path, torch_path
from .plan import Plan, make_plan
from .sizes import Sizes

_ascends_kernel = native.function("squall_ascends", ctypes.c_void_p, ctypes.c_int64, returns=ctypes.c_int)
_MOST_PLANS = 8  # of one layer: sizes of images and batches that it is used with


class _Turned(NamedTuple):
    """The weight that turns the output's gradient into the input's.

    Args:
        positions: Of its live weights.
        order: Which of the weight's each is.

    """

    positions: Tensor
    order: Tensor


def _version(tensor: Tensor) -> int:
    """Count changes; tensors of inference mode don't, and aren't expected to change."""
    return -1 if tensor.is_inference() else tensor._version


def _ascends(positions: Tensor) -> bool:
    """Tell whether positions ascend, from 0 or more."""
    if native.serves(positions, dtypes=(torch.int64,)) and positions.is_contiguous():
        return bool(_ascends_kernel(positions.data_ptr(), len(positions)))
    return bool((positions[1:] > positions[:-1]).all() and (positions[:1] >= 0).all())


class _Kept:
    """What has been worked out about one tensor of positions."""

    def __init__(self, positions: Tensor) -> None:
        self.end = int(positions[-1]) + 1 if len(positions) else 0
        self.ascends = _ascends(positions)
        self.version = _version(positions)
        self.plans: dict[Any, Plan] = {}
        self.ordered: tuple[Any, int, Plan, Tensor] | None = None
        self.turned: dict[Any, _Turned] = {}


_kept = WeakIdKeyDictionary()  # by the tensor of positions itself: another at the same address is another layer's


def _of(positions: Tensor) -> _Kept:
    kept = _kept.get(positions)
    if kept is None or kept.version != _version(positions):
        kept = _kept[positions] = _Kept(positions)
    result: _Kept = kept
    return result


def check_positions(positions: Tensor, num_weights: int) -> None:
    """Refuse positions that don't ascend, or lie outside; kernels read memory by them.

    Args:
        positions: To look at; once for each tensor.
        num_weights: They must be below this.

    Raises:
        ValueError: They aren't as they should be.

    """
    _check(_of(positions), num_weights)


def _check(kept: _Kept, num_weights: int) -> None:
    if not kept.ascends or kept.end > num_weights:
        raise ValueError(f"positions must ascend from 0 or more to {num_weights - 1} or less, without repetition")


def _plan(kept: _Kept, positions: Tensor, sizes: Sizes, is_turned: bool = False) -> Plan:
    name = (sizes, native.isa(), is_turned)
    plan = kept.plans.get(name)
    if plan is None:
        if len(kept.plans) >= _MOST_PLANS:
            del kept.plans[next(iter(kept.plans))]
        plan = kept.plans[name] = make_plan(positions, sizes)
    return plan


def _ordered(values: Tensor, kept: _Kept, plan: Plan) -> Tensor:
    """Bring values into a plan's order; once, as long as they stay the same."""
    if kept.ordered is not None:
        of, version, for_plan, ordered = kept.ordered
        if of() is values and version == _version(values) and for_plan is plan:
            return ordered
    ordered = plan.ordered(values)
    kept.ordered = (weakref.ref(values), _version(values), plan, ordered)
    return ordered


def sizes_of(
    x_shape: tuple[int, ...],
    weight: list[int] | tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Sizes:
    """Work the sizes of a convolution out."""
    outs = [
        (x_shape[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    samples, channels, height, width = x_shape
    return Sizes(
        samples, channels, height, width, (weight[0], weight[1], weight[2], weight[3]), (stride[0], stride[1]),
        (padding[0], padding[1]), (dilation[0], dilation[1]), groups, outs[0], outs[1],
    )  # fmt: skip


def _serves(sizes: Sizes, *tensors: Tensor) -> bool:
    return native.serves(*tensors, dtypes=native.SINGLE) and sizes.samples > 0 and min(sizes.weight) > 0


# Written out, since older versions of torch don't read list[int].
_GEOMETRY = "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_FORWARD = f"(Tensor x, Tensor values, Tensor positions, Tensor? bias, {_GEOMETRY}, bool relu) -> Tensor"
_BACKWARD = (
    f"(Tensor grad, Tensor x, Tensor values, Tensor positions, {_GEOMETRY}, bool wants_x, bool wants_values)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("squall::sparse_conv2d", mutates_args=(), schema=_FORWARD)
def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """Convolve; arguments as of :func:`squall.kernels.sparse_conv2d`."""
    sizes = sizes_of(tuple(x.shape), weight_shape, stride, padding, dilation, groups)
    return convolve(x, values, positions, bias, sizes, relu)


def convolve(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, sizes: Sizes, relu: bool) -> Tensor:
    """Do what the op does."""
    kept = _of(positions)
    _check(kept, math.prod(sizes.weight))
    if not _serves(sizes, x, values):
        return torch_path.convolve(x, values, positions, sizes, bias, relu).contiguous()
    plan = _plan(kept, positions, sizes)
    bias = None if bias is None else bias.contiguous()
    return native_path.convolve(x.contiguous(), _ordered(values, kept, plan), plan, bias, relu)


@torch.library.custom_op("squall::sparse_conv2d_backward", mutates_args=(), schema=_BACKWARD)
def sparse_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants_x: bool,
    wants_values: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients by ``x`` and ``values``; one that isn't wanted is empty."""
    sizes = sizes_of(tuple(x.shape), weight_shape, stride, padding, dilation, groups)
    grad, serves = grad.contiguous(), _serves(sizes, grad, x, values)
    by_x, by_values = grad.new_empty(0), grad.new_empty(0)
    if wants_x:
        by_x = _input_gradient(grad, values, positions, sizes, serves).contiguous()
    if wants_values and serves:
        plan = _plan(_of(positions), positions, sizes)
        by_values = plan.in_positions(native_path.weight_gradient(x.contiguous(), grad, plan))
    elif wants_values:
        by_values = torch_path.weight_gradient(x, grad, positions, sizes)
    return by_x, by_values


def _input_gradient(grad: Tensor, values: Tensor, positions: Tensor, sizes: Sizes, serves: bool) -> Tensor:
    if not serves or sizes.stride != (1, 1):  # strided ones are few, and would be a scatter
        return torch_path.input_gradient(grad, values, positions, sizes)
    kept = _of(positions)
    turned = _turn(kept, positions, sizes)
    outputs, inputs, *kernel = sizes.weight
    shape = [inputs * sizes.groups, outputs // sizes.groups, *kernel]
    padding = [d * (k - 1) - p for d, k, p in zip(sizes.dilation, kernel, sizes.padding, strict=True)]
    turned_sizes = sizes_of(tuple(grad.shape), shape, [1, 1], padding, list(sizes.dilation), sizes.groups)
    plan = _plan(kept, turned.positions, turned_sizes, is_turned=True)
    return native_path.convolve(grad, plan.ordered(values.index_select(0, turned.order)), plan, None, relu=False)


def _turn(kept: _Kept, positions: Tensor, sizes: Sizes) -> _Turned:
    """Exchange a weight's inputs and outputs within each group, and turn its kernels by half a circle."""
    turned, name = kept.turned, (sizes.weight, sizes.groups)
    if name not in turned:
        outputs, inputs, height, width = sizes.weight
        per_group, area = outputs // sizes.groups, height * width
        place, channel, output = positions % area, positions // area % inputs, positions // (area * inputs)
        group = output // per_group
        moved = ((group * inputs + channel) * per_group + output % per_group) * area + area - 1 - place
        ordered, order = moved.sort()
        turned[name] = _Turned(ordered, order)
    return turned[name]


@sparse_conv2d.register_fake
def _(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, weight_shape: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    sizes = sizes_of(tuple(x.shape), weight_shape, stride, padding, dilation, groups)
    return x.new_empty(sizes.samples, weight_shape[0], sizes.out_height, sizes.out_width)


@sparse_conv2d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, positions: Tensor, weight_shape: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int, wants_x: bool, wants_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if wants_x else (0,)), values.new_empty(values.shape if wants_values else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, bias, *ctx.sizes, ctx.relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, positions, *([output] if ctx.relu else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, positions, *rest = ctx.saved_tensors
    if ctx.relu:
        grad = grad.masked_fill(rest[0] <= 0, 0)
    wants_x, wants_values = ctx.needs_input_grad[:2]
    by_x, by_values = sparse_conv2d_backward(grad, x, values, positions, *ctx.sizes, wants_x, wants_values)
    by_bias = grad.sum((0, 2, 3)) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return by_x if wants_x else None, by_values if wants_values else None, None, by_bias, *[None] * 6


sparse_conv2d.register_autograd(_backward, setup_context=_save)
