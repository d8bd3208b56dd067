"""What a split tensor says of itself: global shapes, local storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from ..partition import Partition
from ..tensor import COLUMN_HANDLERS, TILE_HANDLERS, Spec, global_shape, spec_of, split_rule, to_partition, whole, wrap
from ..tiles import TileSpec

# Questions whose answer is the same for the local part as for the whole, and settings that concern only storage.
_SAME_EVERYWHERE = (
    "dim ndimension is_floating_point is_complex is_signed element_size is_contiguous get_device "
    "requires_grad_ retain_grad register_post_accumulate_grad_hook __hash__ is_inference is_conj is_neg "
    "_is_view _has_compatible_shallow_copy_type untyped_storage data_ptr is_pinned is_shared "
    "share_memory_ __dir__"
).split()

for _space in (torch, Tensor):
    for _name in _SAME_EVERYWHERE:
        _function = getattr(_space, _name, None)
        if _function is not None:
            split_rule(_function)(lambda func, args, kwargs: func(*args, **kwargs))

# Every property reads from the local part, except the ones below.
for _name in dir(Tensor):
    _descriptor = getattr(Tensor, _name, None)
    if type(_descriptor).__name__ in ("getset_descriptor", "property"):
        for _access in ("__get__", "__set__", "__delete__"):
            split_rule(getattr(_descriptor, _access, None))(lambda func, args, kwargs: func(*args, **kwargs))
for _name in ("T", "mT", "H", "mH", "real", "imag"):  # views: by rule where there is one, else gathered
    for _handlers in (COLUMN_HANDLERS, TILE_HANDLERS):
        _handlers.pop(getattr(Tensor, _name).__get__, None)


@split_rule(Tensor.shape.__get__)  # type: ignore[attr-defined]
def _shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    return global_shape(args[0])


@split_rule(Tensor.size)
def _size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = global_shape(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if dim is None else shape[dim]


@split_rule(Tensor.numel, Tensor.nelement, torch.numel)
def _numel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return global_shape(args[0]).numel()


@split_rule(Tensor.__len__)
def _len(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return global_shape(args[0])[0]


@split_rule(Tensor.data.__get__, Tensor.grad.__get__)  # type: ignore[union-attr, attr-defined]
def _alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = func(*args, **kwargs)
    return None if value is None else _view_as_split(value, args[0]._spec)


def _view_as_split(value: Tensor, spec: Spec | TileSpec) -> Any:
    # A gradient is one object that torch hands out again and again: label an alias, not the object itself.
    return wrap(value.detach(), spec)


@split_rule(Tensor.data.__set__, Tensor.grad.__set__)  # type: ignore[union-attr, attr-defined]
def _set_alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    target, value = args
    own = spec_of(target)
    if own is None:  # the target is an ordinary tensor that is given a split one
        value = whole(value, "assignment")
    elif isinstance(value, Tensor):
        value = (
            to_partition(value.detach(), own, own.name)
            if spec_of(value) is None
            else to_partition(value, own, own.name)
        )
        value = value.detach().as_subclass(Tensor)
    func(target, value)


@split_rule(Tensor.register_hook)
def _register_hook(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, hook = args
    spec = tensor._spec

    def on_split(grad: Tensor) -> Tensor | None:
        result = hook(_view_as_split(grad, spec))
        return None if result is None else to_partition(result, spec, spec.name).as_subclass(Tensor)

    return func(tensor, on_split)


@split_rule(torch.autograd.grad)
def _autograd_grad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gradients with respect to split tensors are split as they are."""
    outputs, inputs = args[0], args[1] if len(args) > 1 else kwargs["inputs"]
    single = isinstance(outputs, Tensor)
    outputs = [whole(output, "grad") for output in ([outputs] if single else outputs)]
    input_list = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    rest, kwargs = tree_map(lambda value: whole(value, "grad"), (args[2:], {**kwargs, "inputs": None}))
    del kwargs["inputs"]
    # By their place in the graph, so that dispatch can be on: backward runs hooks and recomputes checkpoints.
    places = [get_gradient_edge(value) if value.requires_grad else value for value in input_list]
    materialize = kwargs.pop("materialize_grads", False)
    if materialize:
        kwargs["allow_unused"] = True
    with torch._C._EnableTorchFunction():
        grads = func(outputs, places, *rest, **kwargs)
    if materialize:
        grads = [
            torch.zeros_like(value) if grad is None else grad for grad, value in zip(grads, input_list, strict=True)
        ]
    return tuple(
        grad if grad is None or (spec := spec_of(value)) is None else wrap(grad, spec)
        for grad, value in zip(grads, input_list, strict=True)
    )


@split_rule(
    Tensor.detach, torch.detach, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.cpu, Tensor.cuda, Tensor.to
)
def _same_split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies and casts of the local part; ``x.to(other)`` may name a split tensor as the pattern."""
    if spec_of(args[0]) is None:
        return func(*args, **kwargs)
    result = func(*args, **kwargs)
    return result if result is args[0] else wrap(result, args[0]._spec.unnamed)


for _name in ("double float half bfloat16 type_as to_dense pin_memory int long bool short").split():
    split_rule(getattr(Tensor, _name))(_same_split)


@split_rule(Tensor.type)
def _type(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asks = len(args) == 1 and not kwargs
    return func(*args, **kwargs) if asks else _same_split(func, args, kwargs)


@split_rule(Tensor.detach_)
def _detach_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


@split_rule(Tensor.copy_)
def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    spec = spec_of(target)
    if spec is None:
        return func(target, whole(source, "copy_"), *args[2:], **kwargs)
    if global_shape(source) != global_shape(target):
        return NotImplemented
    return func(target, to_partition(source, spec, spec.name), *args[2:], **kwargs)


def even_like(size: int, spec: Spec) -> Partition:
    """The default partition of ``size`` elements over the columns of ``spec``."""
    return Partition.even(size, spec.partition.num_ranks)
