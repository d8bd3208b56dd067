"""Layers small enough to work out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from squall.sparsity import Layer


def layer(weight: list[float], live: list[int], **signals: list[float]) -> Layer:
    """A layer with these weights, of which these live."""
    mask = torch.tensor(live, dtype=torch.bool)
    return Layer("fc.weight", torch.tensor(weight), mask, {key: torch.tensor(v) for key, v in signals.items()})


def places(mask: Tensor) -> list[int]:
    """Where a mask lets live."""
    return mask.flatten().nonzero().flatten().tolist()
