"""Functions that treat every channel alone: pooling, resizing, reductions and scans over other dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exchange import gather
from ..partition import Partition
from ..tensor import Spec, rule, spec_of, wrap
from ..tiles import TileSpec


def wrap_all(result: Any, spec: Spec | TileSpec) -> Any:
    """Label a result, or each tensor of a (named) tuple of them; labelling is in place, so the tuple stays as it is."""
    if isinstance(result, Tensor):
        return wrap(result, spec)
    for value in result:
        wrap(value, spec)
    return result


def _spatial(num_dims: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for functions that touch the last ``num_dims`` dimensions only."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0] if args else kwargs["input"]
        spec = spec_of(tensor)
        if spec is None or spec.dim >= tensor.ndim - num_dims:
            return NotImplemented
        return wrap_all(func(*args, **kwargs), spec.moved(spec.dim))

    return handler


_space: Any
for _num_dims in (1, 2, 3):
    for _space in (torch, F, torch._C._nn):
        for _pattern in (
            "max_pool{}d max_pool{}d_with_indices avg_pool{}d adaptive_avg_pool{}d adaptive_max_pool{}d "
            "adaptive_max_pool{}d_with_indices lp_pool{}d"
        ).split():
            rule(getattr(_space, _pattern.format(_num_dims), None))(_spatial(_num_dims))


@rule(F.interpolate, F.upsample)
def _interpolate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = spec_of(args[0])
    if spec is None or spec.dim > 1:
        return NotImplemented
    return wrap(func(*args, **kwargs), spec.moved(spec.dim))


def reduced_dims(tensor: Tensor, dims: Any) -> set[int] | None:
    """The dimensions that a reduction names; ``None`` where it names none."""
    if dims is None or isinstance(dims, (str, bool, torch.dtype)):
        return None
    listed = [dims] if isinstance(dims, int) else list(dims)
    return {dim % tensor.ndim for dim in listed} or None


_IN_TWO_STAGES = {torch.sum, Tensor.sum, torch.norm, Tensor.norm, torch.linalg.vector_norm}


def _reduce(position: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for reductions whose ``dim`` is the argument at ``position``."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, spec = args[0], spec_of(args[0])
        dims = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("axis"))
        if spec is None or kwargs.get("out") is not None or isinstance(dims, Tensor):
            return NotImplemented
        reduced = reduced_dims(tensor, dims)
        if dims is None and func in _IN_TWO_STAGES and not kwargs.get("keepdim"):
            # Each column's own first, then theirs: one number a column is sent. Clipping by the norm lives on this.
            num_columns = spec.columns.num_columns
            own = func(*args, **kwargs).reshape(1)
            return func(gather(own, 0, Partition.even(num_columns, num_columns), spec.columns, ""), *args[1:], **kwargs)
        if reduced is None or spec.dim in reduced:
            return NotImplemented
        result = func(*args, **kwargs)
        first = result if isinstance(result, Tensor) else result[0]
        kept = first.ndim == tensor.ndim
        moved = spec.moved(spec.dim - (0 if kept else sum(dim < spec.dim for dim in reduced)))
        return wrap_all(result, moved)

    return handler


REDUCTIONS = (
    "sum mean prod amax amin max min argmax argmin all any var std logsumexp median nansum count_nonzero"
).split()
for _space in (torch, Tensor):
    for _name in REDUCTIONS:
        rule(getattr(_space, _name, None))(_reduce(1))
    rule(getattr(_space, "norm", None))(_reduce(2))
rule(torch.linalg.vector_norm)(_reduce(2))


def _along(position: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule for functions that keep the shape and work along one ``dim``."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, spec = args[0], spec_of(args[0])
        dim = args[position] if len(args) > position else kwargs.get("dim")
        if spec is None or not isinstance(dim, int) or dim % tensor.ndim == spec.dim or "out" in kwargs:
            return NotImplemented
        return wrap_all(func(*args, **kwargs), spec.moved(spec.dim))

    return handler


SCANS = ("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "cummax", "cummin", "sort")
for _space in (torch, Tensor, F):
    for _name in SCANS:
        _function = getattr(_space, _name, None)
        if _function is not None:
            rule(_function)(_along(1))


@rule(F.normalize)
def _normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, spec = args[0], spec_of(args[0])
    reduced = reduced_dims(tensor, kwargs.get("dim", 1))
    if spec is None or kwargs.get("out") is not None or reduced is None or spec.dim in reduced:
        return NotImplemented
    return wrap(func(*args, **kwargs), spec.moved(spec.dim))
