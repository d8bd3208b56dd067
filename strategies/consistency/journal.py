"""How far a shard has come, noted so that whoever finds its memory after a ``kill -9`` goes on from there.

A command is carried out batch after batch. The bytes of a batch are noted down first, so that an interrupted batch is
put back. Which batch of which command that is, is a single number, written in one store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import Segment, aligned

if TYPE_CHECKING:
    from .updates import SliceMemory

_PROGRESS, _NOTED, _TAG = 0, 1, 2
_CURSOR_BITS = 24


class Journal:
    """The notes of one shard, in its memory.

    Args:
        memory: Of its slice.

    """

    def __init__(self, memory: SliceMemory) -> None:
        slice_ = memory.slice
        self.control = memory.control
        self._flags = memory.flags
        self._batches = slice_.batches
        longest = max((batch.num_bytes for batch in slice_.batches), default=0)
        self._bytes = memory.segment.tensor(torch.uint8, slice_.journal_offset, longest)
        num_flags = max((len(batch.units) for batch in slice_.batches), default=0)
        offset = slice_.journal_offset + aligned(longest)
        self._noted_flags = memory.segment.tensor(torch.uint8, offset, num_flags).numpy()

    @property
    def last_command(self) -> int:
        """The last command that was carried out from end to end."""
        return int(self.control[_PROGRESS]) >> _CURSOR_BITS

    @property
    def next_batch(self) -> int:
        """The first batch that the command after it has not seen."""
        return int(self.control[_PROGRESS]) & ((1 << _CURSOR_BITS) - 1)

    def advance(self, command: int, index: int) -> None:
        """A command has seen a batch."""
        self.control[_PROGRESS] = ((command - 1) << _CURSOR_BITS) + index + 1

    def finish(self, command: int) -> None:
        """A command has been carried out."""
        self.control[_PROGRESS] = command << _CURSOR_BITS

    def note_down(self, index: int, pieces: Sequence[Tensor], tag: int = 0) -> None:
        """Note what a command is about to change in a batch.

        Args:
            index: Number of the batch.
            pieces: The bytes.
            tag: Tells :meth:`recover` which bytes these are.

        """
        at = 0
        for piece in pieces:
            self._bytes[at : at + len(piece)].copy_(piece)
            at += len(piece)
        for position, unit in enumerate(self._batches[index].units):
            self._noted_flags[position] = self._flags[unit.index]
        self.control[_TAG] = tag
        # Progress and notes agree from here until progress is made.
        self.control[_NOTED] = self.control[_PROGRESS] + 1

    def recover(self, pieces: Callable[[int, int], Sequence[Tensor]]) -> None:
        """Put back the batch that an earlier process was killed in.

        Args:
            pieces: Finds the bytes that were noted down of a batch under a tag.

        """
        if int(self.control[_NOTED]) != int(self.control[_PROGRESS]) + 1:
            return
        at, index = 0, self.next_batch
        for piece in pieces(index, int(self.control[_TAG])):
            piece.copy_(self._bytes[at : at + len(piece)])
            at += len(piece)
        for position, unit in enumerate(self._batches[index].units):
            self._flags[unit.index] = self._noted_flags[position]


def set_progress(segment: Segment, command: int) -> None:
    """Note that the memory of a slice has seen all commands up to one."""
    control = segment.tensor(torch.int64, 0, 8)
    control[_PROGRESS] = command << _CURSOR_BITS
    control[_NOTED] = 0
