"""Operators of torch as JSON: what they cost by FLOPs and bytes, and how to call them again with other values."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from .events import Kind, Operation

_CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward", "aten._convolution", "aten.cudnn_convolution")
_MOST_TURNS = 8
_DRAWN = 1 << 16  # values of a tensor that differ
_MAKES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_to_copy")
_TYPES = {"dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "memory_format": torch.memory_format}


def is_free(func: Any) -> bool:
    """Whether an operator makes a view, or memory without values: nothing that takes time by its size.

    Args:
        func: A ``torch._ops.OpOverload``.

    """
    if func._schema.name.rpartition("::")[2] in _MAKES_NOTHING[:-1]:
        return True
    returns = func._schema.returns
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def describe(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Operation:
    """Say what a call costs anywhere.

    Args:
        func: A ``torch._ops.OpOverload``.
        args: Its arguments; tensors may be without values.
        kwargs: Its arguments by name.
        result: What it returned.

    """
    key = json.dumps([str(func), [_encode(value) for value in args], {k: _encode(v) for k, v in kwargs.items()}])
    flops = _flops(func, args, kwargs, result)
    tensors = [leaf for leaf in tree_flatten((args, dict(kwargs), result))[0] if isinstance(leaf, Tensor)]
    storages = {leaf.untyped_storage()._cdata: leaf for leaf in tensors}  # what is written in place counts twice
    written = sum(_size(leaf) for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
    num_bytes = sum(map(_size, storages.values())) + (written if func._schema.is_mutable else 0)
    kind: Kind = "memory"
    if flops:
        kind = "conv" if str(func).rpartition(".")[0] in _CONVOLUTIONS else "gemm"
    return Operation(key, kind, flops, num_bytes)


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:  # torch's formula doesn't know of groups
        grad, image, weight, transposed, wanted = *args[:3], args[7], args[10]
        return 2 * int(weight[0].numel()) * int((image if transposed else grad).numel()) * sum(map(bool, wanted[:2]))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": [list(value.shape), list(value.stride()), str(value.dtype).rpartition(".")[2]]}
    if isinstance(value, torch.Generator):
        return None
    for name, kind in _TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).rpartition(".")[2] if name != "device" else "here"}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    return value


def _decode(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(entry, device) for entry in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "device":
        return device
    if name != "tensor":
        return getattr(torch, content)
    shape, stride, dtype = content[0], content[1], getattr(torch, content[2])
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if dtype.is_floating_point:
        base = torch.empty(size, device=device, dtype=dtype)
        some = torch.randn(min(size, _DRAWN), device=device).mul_(0.1)
        for part in base.split(_DRAWN):  # to draw them all takes longer than what is timed
            part.copy_(some[: len(part)])
    else:
        base = torch.zeros(size, device=device, dtype=dtype)  # an index that is good anywhere
    return base.as_strided(shape, stride)


class Call:
    """The call that a key describes, with values of its own.

    Args:
        key: Of an :class:`~squall.conf.planner.events.Operation`.
        device: Where it is to compute.
        num_bytes: So many, about, lie between one use of a value and the next: calls take turns with several values,
            and keep their results as long, since within a step weights and what was saved aren't at hand.

    Example:
        >>> key = json.dumps(["aten.relu.default", [{"tensor": [[2, 3], [3, 1], "float32"]}], {}])
        >>> Call(key, torch.device("cpu"))().shape
        torch.Size([2, 3])

    """

    def __init__(self, key: str, device: torch.device, num_bytes: int = 0) -> None:
        name, args, kwargs = json.loads(key)
        self._func: Any = torch.ops
        for part in name.split("."):
            self._func = getattr(self._func, part)
        self._turns: deque[tuple[list[Any], dict[str, Any], Any]] = deque()
        size = 1
        while not self._turns or (self.num_turns < _MOST_TURNS and self.num_turns * size < num_bytes):
            made, named = [_decode(value, device) for value in args], {k: _decode(v, device) for k, v in kwargs.items()}
            self._turns.append((made, named, None))
            if self.num_turns == 1:
                leaves = tree_flatten((made, named, self()))[0]
                size = max(sum(_size(leaf) for leaf in leaves if isinstance(leaf, Tensor)), 1)

    @property
    def num_turns(self) -> int:
        """After how many calls values are used again."""
        return len(self._turns)

    def prepare(self) -> None:
        """Have the next call's first tensor just written, as it is by the operation before it in a step."""
        for value in tree_flatten(self._turns[0][:2])[0]:
            if isinstance(value, Tensor) and value.is_floating_point():
                length = value.untyped_storage().nbytes() // value.element_size()
                value.as_strided((length,), (1,)).add_(0.0)
                return

    def __call__(self) -> Any:
        """Call it."""
        made, named, _ = self._turns.popleft()
        result = self._func(*made, **named)
        self._turns.append((made, named, result))
        return result
