"""Functions that treat every element alone, of one tensor or of several that broadcast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..exchange import cut, share
from ..tensor import Spec, global_shape, layer_of, spec_of, split_rule, to_partition, whole, wrap
from ..tiles import TileSpec

_UNARY = (
    "abs absolute neg negative positive sign sgn exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square "
    "reciprocal sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid erf erfc erfinv logit "
    "floor ceil round trunc frac relu relu6 elu selu celu gelu silu mish softplus softsign hardsigmoid "
    "hardswish hardtanh leaky_relu logsigmoid threshold tanhshrink softshrink hardshrink isnan isinf "
    "isfinite logical_not nan_to_num sinc lgamma digamma clip clamp clamp_min clamp_max bitwise_not "
    "invert zero fill masked_fill xlogy"
).split()
_BINARY = (
    "add sub subtract rsub mul multiply div divide true_divide floor_divide pow float_power fmod "
    "remainder maximum minimum fmax fmin atan2 hypot logaddexp lerp addcmul addcdiv where eq ne lt le gt "
    "ge greater less greater_equal less_equal not_equal logical_and logical_or logical_xor bitwise_and "
    "bitwise_or bitwise_xor copysign heaviside"
).split()
_DUNDERS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv div rdiv idiv pow rpow ipow neg "
    "pos abs eq ne lt le gt ge and or xor invert iand ior ixor mod floordiv rfloordiv rmod"
).split()


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an elementwise function on local parts.

    All split arguments are brought to the partition of the first one that spans its dimensions in the result. A
    replicated argument that has the split dimension is cut; one without it (a scalar, a map per pixel of columns, a
    bias of tiles) is shared, so that its gradient is the sum over the ranks.
    """
    if len(args) + len(kwargs) == 1 and func in (torch.where, Tensor.where):
        return NotImplemented  # the indices of what is true, not a choice
    if kwargs.get("out") is not None:
        return NotImplemented  # a part of it would be filled, and forgotten
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    try:
        shape = torch.broadcast_shapes(*(global_shape(tensor) for tensor in tensors))
    except RuntimeError:
        return NotImplemented  # let torch say what is wrong, in global shapes
    lead: Spec | TileSpec | None = None
    for tensor in tensors:
        spec = spec_of(tensor)
        if spec is not None:
            shift = len(shape) - tensor.ndim
            if all(axis.partition.size == shape[axis.dim + shift] for axis in spec.axes):
                lead = spec.along(_shifted(spec.axes, shift))
                break
    if lead is None:
        return NotImplemented
    name = layer_of(leaves) or func.__name__
    local = [_localize(leaf, lead, len(shape), name) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    local_args, local_kwargs = tree_unflatten(local, structure)
    result = func(*local_args, **local_kwargs)
    if result is NotImplemented or (args and result is args[0]):
        return result  # ``x == None`` is Python's to answer
    return wrap(result, lead)


def _shifted(axes: tuple[Spec, ...], shift: int) -> tuple[Spec, ...]:
    return tuple(axis.moved(axis.dim + shift) for axis in axes)


def _localize(value: Tensor, lead: Spec | TileSpec, num_dims: int, name: str) -> Tensor:
    """The part of ``value`` that meets this rank's part of the result."""
    axes, shape, own = _shifted(lead.axes, value.ndim - num_dims), global_shape(value), spec_of(value)
    spanned = tuple(axis for axis in axes if axis.dim >= 0 and shape[axis.dim] == axis.partition.size)
    if own is not None and [axis.dim for axis in own.axes] == [axis.dim for axis in spanned] and spanned == axes:
        return to_partition(value, lead.along(axes), name)
    full = whole(value, name)
    if not spanned:
        return share(full, lead.columns, name)
    for axis in axes:
        if axis not in spanned:
            full = share(full, axis.columns, name)
    return cut(full, spanned, name)


def operate_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same, where the result must land in the first argument."""
    own = spec_of(args[0])
    if own is None:
        return NotImplemented  # a replicated tensor takes what is gathered
    leaves, structure = tree_flatten((args[1:], kwargs))
    shape = global_shape(args[0])
    local = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            local.append(leaf)
            continue
        spec = spec_of(leaf)
        if leaf.ndim > len(shape):
            return NotImplemented
        shift = len(shape) - leaf.ndim
        if spec is not None and [axis.dim + shift for axis in spec.axes] != [axis.dim for axis in own.axes]:
            return NotImplemented
        local.append(_localize(leaf, own, len(shape), own.name or func.__name__))
    rest, local_kwargs = tree_unflatten(local, structure)
    return func(args[0], *rest, **local_kwargs)


for _space in (torch, Tensor, F, torch._C._nn, torch.special):
    for _name in _UNARY + _BINARY:
        split_rule(getattr(_space, _name, None))(operate)
        split_rule(getattr(_space, _name + "_", None))(operate_in_place)
for _name in _DUNDERS:
    split_rule(getattr(Tensor, f"__{_name}__", None))(
        operate_in_place if _name[0] == "i" and _name != "invert" else operate
    )


def _with_inplace_flag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.relu(x, inplace=True)`` and its kin."""
    local = func(*args, **kwargs)
    return args[0] if local is args[0] else wrap(local, args[0]._spec.unnamed)


for _name in "relu relu6 elu selu celu silu mish hardsigmoid hardswish hardtanh leaky_relu threshold".split():
    split_rule(getattr(F, _name))(_with_inplace_flag)


@split_rule(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
def _constant_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = spec_of(args[0])
    return NotImplemented if spec is None else wrap(func(*args, **kwargs), spec.unnamed)


@split_rule(F.prelu, torch.prelu)
def _prelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A slope for each channel of dimension 1, or one for all."""
    value, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    spec = spec_of(value)
    if spec is None:
        return NotImplemented
    if global_shape(weight).numel() == 1:
        return wrap(func(value, share(whole(weight, "prelu"), spec.columns, "prelu")), spec.unnamed)
    dims = [axis.dim for axis in spec.axes]
    if dims == [1]:
        slope = _localize(weight, Spec(0, spec.axes[0].partition, spec.columns), 1, "prelu")
    elif min(dims) > 1:
        slope = share(whole(weight, "prelu"), spec.columns, "prelu")
    else:
        return NotImplemented
    return wrap(func(value, slope), spec.unnamed)
