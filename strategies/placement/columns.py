"""The ranks among which channels are split, and the ledger of what crosses between them.

A :class:`Columns` is one row of the (data x column) mesh: the ranks that together hold one replica of the model. It
moves plain tensors between pairs of them; everything with gradients is built on top, in ``exchange``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass
class Crossing:
    """What one layer makes this rank send to the other columns, for one image.

    Args:
        name: The layer that needs what other columns hold, or the operation, where no layer is behind it.
        floats_per_image_forward: Elements sent per image in the forward pass.
        floats_per_image_backward: Elements sent per image in the backward pass.
        bytes_per_image_forward: Bytes sent per image in the forward pass.
        bytes_per_image_backward: Bytes sent per image in the backward pass.

    """

    name: str
    floats_per_image_forward: float = 0.0
    floats_per_image_backward: float = 0.0
    bytes_per_image_forward: float = 0.0
    bytes_per_image_backward: float = 0.0

    @property
    def bytes_per_image(self) -> float:
        """Bytes sent per image in both passes."""
        return self.bytes_per_image_forward + self.bytes_per_image_backward


class Ledger:
    """Counts the elements that this rank sends, by the layer that asked for them."""

    def __init__(self) -> None:
        self._crossings: dict[str, Crossing] = {}
        self.num_images = 1

    def start_step(self, num_images: int) -> None:
        """Forget the last step; what follows belongs to ``num_images`` images."""
        self._crossings = {}
        self.num_images = max(num_images, 1)

    def record(self, name: str, num_elements: int, element_size: int, backward: bool) -> None:
        """Add ``num_elements`` sent for ``name``; what has no name is no part of a step and not counted.

        A rank that only receives says so with 0: all ranks must list the same crossings, since they log them together.
        """
        if not name:
            return
        crossing = self._crossings.setdefault(name, Crossing(name))
        floats = num_elements / self.num_images
        if backward:
            crossing.floats_per_image_backward += floats
            crossing.bytes_per_image_backward += floats * element_size
        else:
            crossing.floats_per_image_forward += floats
            crossing.bytes_per_image_forward += floats * element_size

    @property
    def crossings(self) -> list[Crossing]:
        """The crossings of the step so far, in the order in which they first happened."""
        return list(self._crossings.values())


class Columns:
    """The ranks that hold one replica of the model between them.

    Args:
        group: Process group of the column axis; ``None`` for one column.
        rank: This process's place among the columns.
        num_columns: Number of columns.

    The constructor does not communicate. Equality is identity, and a deep copy is the same object: tensors carry a
    reference to it wherever they are copied.

    """

    losses_differ = False
    """Whether each rank has examples and a loss of its own, and what is trained is the mean of these."""

    def __init__(self, group: dist.ProcessGroup | None = None, rank: int = 0, num_columns: int = 1) -> None:
        self.group = group
        self.rank = rank
        self.num_columns = num_columns
        self.ledger = Ledger()
        self._peers = dist.get_process_group_ranks(group) if group is not None else list(range(num_columns))
        self._closed = ""

    @property
    def first(self) -> int:
        """Global rank of the first column."""
        return self._peers[0]

    @property
    def closed(self) -> bool:
        """Whether the run has broken off."""
        return bool(self._closed)

    def close(self, reason: str) -> None:
        """Refuse further communication, for ``reason``: a run that broke off leaves no one to talk to."""
        self._closed = reason
        self.group = None  # the last reference hangs up, and peers who wait get an error

    def __deepcopy__(self, memo: dict[int, object]) -> Columns:
        return self

    def start_swap(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> list[dist.Work]:
        """Begin to send contiguous tensors to columns, and to fill ``receives`` from others, all at once.

        Returns:
            What to wait for, before which none of the tensors may be touched.

        Raises:
            RuntimeError: If the columns have been closed.

        """
        if self._closed:
            raise RuntimeError(self._closed)
        operations = [
            dist.P2POp(operation, tensor, self._peers[peer], self.group)
            for operation, tensors in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in tensors.items()
            if tensor.numel()
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
        return works

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` up over the columns, in place."""
        if self.num_columns > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum of ``tensor`` over the columns, in place."""
        if self.num_columns > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite ``tensor`` with the first column's."""
        if self.num_columns > 1:
            dist.broadcast(tensor, src=self._peers[0], group=self.group)
        return tensor


class DryColumns(Columns):
    """Columns that exist in name only: what would be received is left empty.

    Shapes come out as on real columns and the ledger counts the same, so one process can derive a layout for any
    number.
    """

    def __init__(self, num_columns: int, rank: int = 0) -> None:
        super().__init__(None, rank, num_columns)

    def start_swap(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> list[dist.Work]:
        """Move nothing."""
        for tensor in receives.values():
            tensor.zero_()
        return []

    def sum_(self, tensor: Tensor) -> Tensor:
        """Leave ``tensor`` as it is."""
        return tensor

    max_ = sum_
    broadcast_ = sum_


__all__ = ["Columns", "Crossing", "DryColumns", "Ledger"]
