"""Less dropout where fewer weights are left: ``D_r = D_o sqrt(C_r / C_o)`` (Han et al. 2015, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


class DropoutCorrection:
    """The dropout modules of a network, and the layer that each one feeds.

    That is the next layer, in the order in which the network has its modules; a dropout after the last layer goes with
    that one. ``torch.nn.functional.dropout`` is no module and stays as it is.

    Args:
        module: The network.
        parameters: Its weights that can be pruned, by name.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
        >>> correction = DropoutCorrection(net, {"1.weight": net[1].weight})
        >>> correction.apply({"1.weight": torch.eye(4, dtype=torch.bool)})
        >>> net[0].p
        0.25

    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._feeds: list[tuple[_DropoutNd, str, float]] = []
        waiting: list[_DropoutNd] = []
        last = ""
        for child in module.modules():
            if isinstance(child, _DropoutNd):
                waiting.append(child)
            for parameter in child.parameters(recurse=False):
                if id(parameter) in names:
                    last = names[id(parameter)]
                    self._feeds += [(dropout, last, dropout.p) for dropout in waiting]
                    waiting = []
        self._feeds += [(dropout, last, dropout.p) for dropout in waiting if last]

    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """Set the probabilities that belong to masks.

        Args:
            masks: By the name of the weight.

        """
        for dropout, name, original in self._feeds:
            mask = masks.get(name)
            dropout.p = original * math.sqrt(int(mask.sum()) / mask.numel()) if mask is not None else original

    def undo(self) -> None:
        """Set the probabilities that were there at first."""
        for dropout, _, original in self._feeds:
            dropout.p = original
