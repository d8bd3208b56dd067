"""Random numbers: one stream, the same on every rank of a replica.

All ranks of a replica keep torch's default generator in step, and random numbers for a split tensor are drawn for all
of it and cut. So what is replicated stays the same on every rank, dropout masks differ between ranks, and a
seed gives the same masks on one device as on any number of columns or tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exchange import cut
from ..tensor import global_shape, spec_of, split_rule, wrap


@split_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Scale by the noise that one device would have drawn: dropout of ones is that noise."""
    value = args[0]
    spec = spec_of(value)
    if spec is None:
        return NotImplemented
    named = dict(zip(("p", "training"), args[1:], strict=False))
    named.update(kwargs)
    in_place = named.pop("inplace", False)
    p, training = named.get("p", 0.5), named.get("training", True)
    if not training or p == 0:
        return value
    with torch.no_grad():
        ones = torch.ones(global_shape(value), dtype=value.dtype, device=value.device)
        if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            ones = ones.contiguous(memory_format=torch.channels_last)
        noise = cut(func(ones, p, training), spec.axes, "dropout")
    return value.mul_(noise) if in_place else wrap(value * noise, spec.unnamed)


@split_rule(torch.rand_like, torch.randn_like, torch.randint_like)
def _random_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Fresh random numbers of the global shape, replicated."""
    value = args[0]
    result: Tensor = func(value.detach().as_subclass(Tensor).new_empty(global_shape(value)), *args[1:], **kwargs)
    return result
