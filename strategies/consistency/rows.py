"""Parameters as shards have them: each a row of numbers, of all of its elements or of those that live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .packing import flat

if TYPE_CHECKING:
    from .snapshot import Snapshot


class Rows:
    """What of each parameter is pushed, fetched and stepped.

    Args:
        parameters: A worker's own, in the plan's order.
        live: By number of a parameter, where its mask lets live: a bool tensor of its shape. What isn't in it lives as
            a whole; dead elements are 0, and shards don't know of them.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rows = Rows([weight], {0: weight > 2})
        >>> rows.of(0, weight), rows.whole(0, torch.tensor([5.0, 6.0]))
        (tensor([3., 4.]), tensor([[0., 0.],
                [5., 6.]]))

    """

    def __init__(self, parameters: Sequence[Tensor], live: Mapping[int, Tensor] | None = None) -> None:
        self.parameters = list(parameters)
        self._places = {index: mask.reshape(-1).nonzero().squeeze(1) for index, mask in (live or {}).items()}

    @property
    def are_whole(self) -> bool:
        """Whether all elements live."""
        return not self._places

    def is_whole(self, index: int) -> bool:
        """Whether all elements of a parameter live."""
        return index not in self._places

    def num_elements(self, index: int) -> int:
        """Length of a parameter's row."""
        return self.parameters[index].numel() if self.is_whole(index) else len(self._places[index])

    def shape(self, index: int) -> tuple[int, ...]:
        """What shards take for a parameter's shape."""
        return tuple(self.parameters[index].shape) if self.is_whole(index) else (self.num_elements(index),)

    def of(self, index: int, tensor: Tensor) -> Tensor:
        """The row of a parameter, or of its gradient or state.

        Args:
            index: The parameter's number.
            tensor: Of its shape.

        """
        row = flat(tensor)
        return row if self.is_whole(index) else row[self._places[index].to(row.device)]

    def whole(self, index: int, row: Tensor) -> Tensor:
        """The tensor of a parameter's shape that has this row, and zeros elsewhere."""
        parameter = self.parameters[index]
        if not self.is_whole(index):
            places = self._places[index].to(row.device)
            row = torch.zeros(parameter.numel(), dtype=row.dtype, device=row.device).index_copy_(0, places, row)
        return row.view(parameter.shape)

    def expand(self, shot: Snapshot) -> Snapshot:
        """A snapshot of rows as one of whole parameters."""
        if self.are_whole:
            return shot
        weights = tuple(self.whole(index, weight.reshape(-1)) for index, weight in enumerate(shot.weights))
        state = tuple(self._expand_state(index, entries) for index, entries in enumerate(shot.state))
        owed = tuple(self.whole(index, row).reshape(-1) for index, row in enumerate(shot.owed))
        return replace(shot, weights=weights, state=state, owed=owed)

    def _expand_state(self, index: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        if self.is_whole(index):
            return dict(entries)
        shape = self.shape(index)
        return {
            name: self.whole(index, value) if isinstance(value, Tensor) and tuple(value.shape) == shape else value
            for name, value in entries.items()
        }
