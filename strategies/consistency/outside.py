"""What an optimizer keeps elsewhere than in its state of each parameter, where shards would not find it.

A shard steps the user's optimizer on a few parameters at a time, several times an update, and hands it their state.
What it counts or remembers of all of them together would be another thing on every shard, and nothing would say so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

_DEPTH = 5  # of containers and objects, as far as they are looked into
# What torch's optimizers note down about themselves, not about what they step.
_TORCHS_OWN = ("_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured")
_REMEDY = "Let it keep all that steps change in state[p] of each parameter p, or use another strategy."


def outside(attributes: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """All that an optimizer is besides its state, by where it is found.

    Args:
        attributes: Those that a shard is given.
        group: One of its groups.

    """
    return {f"its attribute {key!r}": value for key, value in attributes.items() if key not in _TORCHS_OWN} | {
        f"{key!r} of its param_groups": value for key, value in group.items() if key not in ("params", "fused")
    }


def copied(value: Any) -> Any:
    """A value that may be changed without changing the original, if there can be one."""
    try:
        return copy.deepcopy(value)
    except Exception:  # locks, files: nothing that can be carried to a shard, either
        return value


def refuse_parameters(name: str, before: Mapping[str, Any]) -> None:
    """Refuse an optimizer that holds parameters, or another optimizer, besides its groups' ``params``.

    Args:
        name: The optimizer's.
        before: What it is :func:`outside`.

    Raises:
        MisconfigurationException: If it does.

    """
    for place, value in before.items():
        held = _held(value, _DEPTH)
        if held:
            raise MisconfigurationException(
                f"{name} holds {held} in {place}. Shards step it on slices of the parameters, and what it holds would"
                f" be copies there that nobody trains. {_REMEDY}"
            )


def refuse_changes(name: str, before: Mapping[str, Any], after: Mapping[str, Any], other_state: Iterable[Any]) -> None:
    """Refuse an optimizer whose steps have changed it elsewhere than in its state of the parameter.

    Args:
        name: The optimizer's.
        before: What it was :func:`outside`.
        after: What it is.
        other_state: Keys of its state that are no parameter.

    Raises:
        MisconfigurationException: If they have.

    """
    changed = [place for place in {**before, **after} if not _same(before.get(place), after.get(place), _DEPTH)]
    changed += [f"its state[{key!r:.40}], which is no parameter's" for key in other_state]
    if changed:
        raise MisconfigurationException(
            f"{name}.step() changes {changed[0]}. Each shard steps it on some of the parameters, several times an"
            f" update, and would come to another value. {_REMEDY}"
        )


def _held(value: Any, depth: int) -> str:
    if isinstance(value, nn.Parameter):
        return "a Parameter"
    if isinstance(value, Optimizer):
        return f"an optimizer ({type(value).__name__})"
    if isinstance(value, nn.Module):
        return f"a module's parameters ({type(value).__name__})" if any(True for _ in value.parameters()) else ""
    return next(filter(None, (_held(part, depth - 1) for part in _parts(value) if depth)), "")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    return () if isinstance(value, (type, Tensor)) else getattr(value, "__dict__", {}).values()


def _same(one: Any, other: Any, depth: int) -> bool:
    """Whether a value and a copy of it, which may have been changed, are alike, as far as that can be said."""
    if one is other or not depth:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key], depth - 1) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b, depth - 1) for a, b in zip(one, other, strict=True))
    kind: Any = type(one)
    if kind.__eq__ is object.__eq__:
        return _same(getattr(one, "__dict__", None), getattr(other, "__dict__", None), depth - 1)
    return bool(one == other)
