"""Convolutions and pooling over tiles: what a window reads of other tiles is fetched while the interior computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exchange import add_up, exchange, share
from ..fringes import over_windows
from ..partition import Partition, Range
from ..reach import Window
from ..tensor import layer_of, spec_of, tile_rule, wrap
from ..tiles import TileSpec
from .layers import autocast


def _each(value: Any, num_dims: int) -> tuple[int, ...]:
    """A setting for each dimension, given as one number, one in a list, or a list."""
    listed = (value,) if isinstance(value, int) else tuple(value)
    return listed * num_dims if len(listed) == 1 else listed


def fits(value: Tensor, spec: TileSpec | None, num_dims: int) -> bool:
    """Whether the split dimensions are the first of the last ``num_dims``."""
    first = value.ndim - num_dims
    return spec is not None and spec.dims == tuple(range(first, first + len(spec.dims))) and len(spec.dims) <= num_dims


def paddings(padding: Any, extents: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Padding before and behind each dimension, ``"same"`` and ``"valid"`` included."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        return tuple(((extent - 1) // 2, extent - 1 - (extent - 1) // 2) for extent in extents)
    return tuple((each, each) for each in _each(padding, len(extents)))


@tile_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
    named.update(kwargs)
    value, weight, bias = named["input"], named["weight"], named.get("bias")
    spec, num_dims = spec_of(value), weight.ndim - 2
    if spec_of(weight) is not None or not fits(value, spec, num_dims):
        return NotImplemented
    stride, dilation = (_each(named.get(key, 1), num_dims) for key in ("stride", "dilation"))
    extents = [each * (size - 1) + 1 for each, size in zip(dilation, weight.shape[2:], strict=True)]
    padding = paddings(named.get("padding", 0), extents)
    windows = tuple(
        Window(axis.partition.size, (axis.partition.size + sum(pad) - extent) // step + 1, extent, step, pad[0])
        for axis, extent, step, pad in zip(spec.axes, extents, stride, padding, strict=False)
    )
    if any(window.num_outputs < 1 for window in windows):
        return NotImplemented  # torch says what is too small
    name = layer_of([weight]) or func.__name__
    weight = share(weight, spec.columns, name)
    bias = None if bias is None else share(bias, spec.columns, name)
    rest = ((0, 0),) * len(windows) + padding[len(windows) :]
    uneven = any(before != behind for before, behind in rest)
    native = (0,) * num_dims if uneven else tuple(before for before, _ in rest)
    pad = [side for sides in reversed(rest) for side in sides]

    def compute(block: Tensor, outputs: tuple[Range, ...]) -> Tensor:
        block = F.pad(block, pad) if uneven else block
        result: Tensor = func(block, weight, bias, stride, native, dilation, named.get("groups", 1))
        return result

    return wrap(*over_windows(autocast(value), spec, windows, compute, 0.0, name))


def _pooled(size: int, extent: int, step: int, pad: int, ceil_mode: bool) -> int:
    """Outputs of a pooling, by torch's rule: with ``ceil_mode``, no window starts in the padding behind."""
    num = (size + 2 * pad - extent + (step - 1 if ceil_mode else 0)) // step + 1
    return num - 1 if ceil_mode and (num - 1) * step >= size + pad else num


def _pool_windows(spec: TileSpec, named: dict[str, Any], num_dims: int) -> tuple[tuple[Window, ...], dict[str, Any]]:
    kernel = _each(named["kernel_size"], num_dims)
    dilation = _each(named.get("dilation", 1), num_dims)
    stride = _each(named.get("stride") or kernel, num_dims)
    padding = _each(named.get("padding", 0), num_dims)
    ceil_mode = named.get("ceil_mode", False)
    windows = []
    for axis, size, gap, step, pad in zip(spec.axes, kernel, dilation, stride, padding, strict=False):
        if pad > size // 2:
            return (), named  # torch says so
        extent = gap * (size - 1) + 1
        outputs = _pooled(axis.partition.size, extent, step, pad, ceil_mode)
        windows.append(Window(axis.partition.size, outputs, extent, step, pad))
    rest = (0,) * len(windows) + padding[len(windows) :]
    return tuple(windows), {**named, "kernel_size": kernel, "stride": stride, "padding": rest}


def _pool(num_dims: int, keys: tuple[str, ...], fill: float) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for max and average pooling over ``num_dims`` dimensions."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(("input", *keys), args, strict=False))
        named.update(kwargs)
        value = named.pop("input")
        spec = spec_of(value)
        if not fits(value, spec, num_dims) or not value.is_floating_point():
            return NotImplemented
        windows, options = _pool_windows(spec, named, num_dims)
        if not windows or any(window.num_outputs < 1 for window in windows):
            return NotImplemented

        def compute(block: Tensor, outputs: tuple[Range, ...]) -> Tensor:
            result: Tensor = func(block, **options)
            return result

        result, made = over_windows(value, spec, windows, compute, fill, spec.grid.layer or func.__name__)
        if fill == 0.0 and named.get("divisor_override") is None:
            for axis, window in zip(made.axes, windows, strict=True):
                result = _recounted(result, axis.dim, axis.partition.ranges[axis.columns.rank], window, named)
        return wrap(result, made)

    return handler


def _recounted(result: Tensor, dim: int, held: tuple[Range, ...], window: Window, named: dict[str, Any]) -> Tensor:
    """Averages over as many places as torch counts, rather than over whole windows."""
    inside = named.get("count_include_pad", True)
    counts = []
    for output in range(*held[0]) if held else ():
        start = window.start(output)
        stop = min(start + window.extent, window.num_inputs + (window.padding if inside else 0))
        counts.append(stop - (start if inside else max(start, 0)))
    if all(count == window.extent for count in counts):
        return result
    factors = window.extent / torch.tensor(counts, dtype=result.dtype, device=result.device)
    return result * factors.reshape([-1] + [1] * (result.ndim - 1 - dim))


_MAX_KEYS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE_KEYS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_space: Any
for _num_dims in (1, 2, 3):
    for _space in (torch, F, torch._C._nn):
        _max = _pool(_num_dims, _MAX_KEYS, -math.inf)
        tile_rule(getattr(_space, f"max_pool{_num_dims}d", None))(_max)
        tile_rule(getattr(_space, f"avg_pool{_num_dims}d", None))(_pool(_num_dims, _AVERAGE_KEYS, 0.0))


def _adaptive(num_dims: int, averages: bool) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for adaptive pooling: windows of unlike lengths, one split dimension after the other."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(("input", "output_size"), args, strict=False))
        named.update(kwargs)
        value = named["input"]
        spec = spec_of(value)
        if not fits(value, spec, num_dims):
            return NotImplemented
        first = value.ndim - num_dims
        shape = list(value.shape[first:])
        for position, axis in enumerate(spec.axes):
            shape[position] = axis.partition.size
        sizes = [
            size if asked is None else asked
            for asked, size in zip(_each_or_none(named["output_size"], num_dims), shape, strict=True)
        ]
        if 0 in sizes:
            return NotImplemented
        num_axes, name = len(spec.axes), spec.grid.layer or func.__name__
        if averages and sizes[:num_axes] == [1] * num_axes:  # of all places: what one rank has of it is one number
            count = math.prod(shape[:num_axes])
            total = add_up(value.sum(spec.dims, keepdim=True), spec.columns, name)
            return func(total / count, sizes)
        made = []
        for position, axis in enumerate(spec.axes):
            last = position == num_axes - 1
            wanted: list[int | None] = [None] * num_axes + sizes[num_axes:] if last else [None] * num_dims
            value = _pool_axis(func, value, axis, sizes[position], wanted, position, name)
            made.append(Partition.even(sizes[position], axis.columns.num_columns))
        return wrap(value, spec.resized(tuple(made)))

    return handler


def _each_or_none(value: Any, num_dims: int) -> tuple[int | None, ...]:
    return (value,) * num_dims if value is None else _each(value, num_dims)


def _pool_axis(
    func: Any, value: Tensor, axis: Any, size: int, wanted: list[int | None], position: int, name: str
) -> Tensor:
    """Adaptive pooling along one split dimension, window by window."""
    outputs = Partition.even(size, axis.columns.num_columns)
    length = axis.partition.size

    def window(output: int) -> Range:
        return output * length // size, -(-(output + 1) * length // size)

    need = Partition(
        length,
        tuple(tuple((window(held[0][0])[0], window(held[0][1] - 1)[1]) for _ in held) for held in outputs.ranges),
    )
    fetched = exchange(value, axis.dim, axis.partition, need, axis.columns, name)
    sizes = [1 if place == position else asked for place, asked in enumerate(wanted)]
    for place, asked in enumerate(sizes):
        if asked is None:
            sizes[place] = fetched.shape[fetched.ndim - len(sizes) + place]
    held = outputs.ranges[axis.columns.rank]
    if not held or 0 in sizes:
        shape = list(fetched.shape)
        shape[-len(sizes) :] = [each or 0 for each in sizes]
        shape[axis.dim] = held[0][1] - held[0][0] if held else 0
        return fetched.new_zeros(shape) + fetched.sum() * 0
    start = need.ranges[axis.columns.rank][0][0]
    parts = []
    for output in range(*held[0]):
        low, high = window(output)
        parts.append(func(fetched.narrow(axis.dim, low - start, high - low), sizes))
    return torch.cat(parts, axis.dim)


for _num_dims in (1, 2, 3):
    for _space in (torch, F, torch._C._nn):
        for _kind in ("avg", "max"):
            _function = getattr(_space, f"adaptive_{_kind}_pool{_num_dims}d", None)
            tile_rule(_function)(_adaptive(_num_dims, _kind == "avg"))
