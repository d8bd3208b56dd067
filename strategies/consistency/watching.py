"""Who may have edited parameters: what torch counts, and who has taken ``parameter.data``, whose edits it doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_stock: Any = torch.Tensor.data
_watches: list[EditWatch] = []


class EditWatch:
    """Tells cheaply that nobody can have edited some parameters, so that they need not be compared each step.

    Overlooked are edits through an alias of ``parameter.data``, or a NumPy array, that is older than the last
    :meth:`reset`.

    Args:
        parameters: What to watch, from :meth:`begin` to :meth:`end`.
        owners: Whose ``data`` somebody would take to edit them, if not their own.

    """

    def __init__(self, parameters: Sequence[Tensor], owners: Sequence[Tensor] | None = None) -> None:
        self._parameters = parameters
        self._ids = {id(parameter) for parameter in (parameters if owners is None else owners)}
        self._count = -1
        self._was_taken = True

    def begin(self) -> None:
        """Have every access to the ``data`` of a parameter noticed. May be called again."""
        if self not in _watches:
            _watches.append(self)
            nn.Parameter.data = property(_get, _set)  # type: ignore[assignment, method-assign]

    def end(self) -> None:
        """Give ``nn.Parameter`` back as it was, once nobody watches. May be called again."""
        if self in _watches:
            _watches.remove(self)
            if not _watches:
                del nn.Parameter.data

    def taken(self, parameter: Tensor) -> None:
        """Somebody has taken a parameter's ``data``."""
        self._was_taken = self._was_taken or id(parameter) in self._ids

    def reset(self) -> None:
        """The parameters are what they have to be."""
        self._count = self._edits()
        self._was_taken = False

    def may_be_edited(self) -> bool:
        """Whether anybody can have edited the parameters since the last :meth:`reset`."""
        return self not in _watches or self._was_taken or self._count != self._edits()

    def _edits(self) -> int:
        return sum(parameter._version for parameter in self._parameters)


def _get(parameter: nn.Parameter) -> Tensor:
    for watch in _watches:
        watch.taken(parameter)
    found: Tensor = _stock.__get__(parameter)
    return found


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    for watch in _watches:
        watch.taken(parameter)
    _stock.__set__(parameter, value)
