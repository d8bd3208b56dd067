"""Where the weights of a masked training lie: whole here, or in parts on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Parts:
    """What this rank holds of each weight: all of it. A Strategy that splits weights has another answer.

    Masks are whole on every rank, and decided on by whole weights, so they are the same however weights are split.
    What happens in every step, a rank does to its own part.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> Parts().gather(weight, weight) is weight
        True

    """

    def take(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that has the whole parameter's shape.

        Args:
            parameter: Which is split so.
            whole: Of its shape on one device.

        """
        return whole

    def gather(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """The whole tensor of which each rank has a part. All ranks must call it, for the same parameters in order.

        Args:
            parameter: Which is split so.
            part: This rank's.

        """
        return part

    def norms(self, norms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The norms of whole tensors. All ranks must call it, with as many.

        Args:
            norms: Those of this rank's parts; None where it has none.

        """
        return norms

    def locally(self) -> AbstractContextManager[None]:
        """Within, a parameter, its gradient and its state are this rank's part, as plain tensors."""
        return nullcontext()
