"""Functions over lists of tensors, as optimizers, gradient clipping and weight averaging call them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..tensor import SplitTensor, global_shape, spec_of, split_rule, to_partition, wrap

# A private family whose members treat one list position at a time, elementwise, but for reductions and products.
_OTHERS = {"_foreach_norm", "_foreach_max", "_foreach_min", "_foreach_powsum", "_foreach_mm"}
_FOREACH = [name for name in dir(torch) if name.startswith("_foreach_") and name not in _OTHERS]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)


def _elementwise_list(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Position by position: split like the first list's tensor, which may be written to."""
    in_place = func.__name__.endswith("_")
    lists = [value for value in args if _is_list(value)]
    length = len(lists[0])
    specs = []
    for position in range(length):
        found = [spec for values in lists if len(values) == length and (spec := spec_of(values[position])) is not None]
        specs.append(found[0] if found else None)
        if found and any(
            global_shape(v[position]) != global_shape(lists[0][position]) for v in lists if len(v) == length
        ):
            return NotImplemented
        if in_place and found and spec_of(lists[0][position]) is None:
            return NotImplemented  # a replicated target takes the gathered value
    if any(isinstance(value, SplitTensor) for value in args):
        return NotImplemented

    def local(value: Any) -> Any:
        if not _is_list(value) or len(value) != length:
            return value
        return [
            tensor if spec is None or not isinstance(tensor, Tensor) else to_partition(tensor, spec, spec.name)
            for tensor, spec in zip(value, specs, strict=True)
        ]

    result = func(*[local(value) for value in args], **{key: local(value) for key, value in kwargs.items()})
    if in_place or result is None:
        return result
    return tuple(
        tensor if spec is None else wrap(tensor, spec.unnamed) for tensor, spec in zip(result, specs, strict=True)
    )


for _name in _FOREACH:
    split_rule(getattr(torch, _name))(_elementwise_list)


@split_rule(torch._foreach_norm)
def _foreach_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Global norms, one message for the whole list; this is what clips gradients by their true norm."""
    tensors = args[0]
    order = float(args[1] if len(args) > 1 else kwargs.get("ord", 2))
    specs = [spec_of(tensor) for tensor in tensors]
    lead = next(spec for spec in specs if spec is not None)
    norms = list(func(*args, **kwargs))
    if order not in (1.0, 2.0, math.inf):
        return NotImplemented
    positions = [position for position, spec in enumerate(specs) if spec is not None]
    stacked = torch.stack([norms[position].double() for position in positions])
    total = lead.columns.max_(stacked) if order == math.inf else lead.columns.sum_(stacked**order) ** (1.0 / order)
    for position, norm in zip(positions, total, strict=True):
        norms[position] = norm.to(norms[position].dtype)
    return tuple(norms)


@split_rule(torch._amp_foreach_non_finite_check_and_unscale_)
def _unscale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Loss scaling: an overflow in one column's gradients must make all columns skip the step."""
    grads, found_inf = args[0], args[1]
    func(*args, **kwargs)
    lead = next(spec for grad in grads if (spec := spec_of(grad)) is not None)
    lead.columns.max_(found_inf)
