"""The order of an epoch: which samples make up which batch, and which batches are done, as numbers side by side.

A million samples take 8 MB like this, in memory, on the wire and in a checkpoint.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Order:
    """All batches of an epoch.

    Args:
        sizes: Number of samples of each batch, as 64-bit integers.
        samples: Indices of the samples of all batches, one after the other, as 64-bit integers.
        done: Of each batch, 1 if it has been trained on, and 0 otherwise.

    Raises:
        ValueError: These don't belong together.

    Example:
        >>> order = Order.of([[2, 0], [1]], done=[1])
        >>> len(order), order.batch(0).tolist(), list(order.done)
        (2, [2, 0], [0, 1])

    """

    def __init__(self, sizes: array[int], samples: array[int], done: bytearray) -> None:
        if len(done) != len(sizes) or min(sizes, default=0) < 0 or sum(sizes) != len(samples):
            raise ValueError(f"no order: {len(sizes)} batches, {len(samples)} samples, {len(done)} marks")
        if max(done, default=0) > 1:
            raise ValueError("no order: a batch is done or it isn't")
        self.sizes = sizes
        self.samples = samples
        self.done = done
        self._starts = array("q", accumulate(sizes, initial=0))

    @classmethod
    def of(cls, batches: Sequence[Sequence[int]], done: Iterable[int] = ()) -> Order:
        """The order of batches.

        Args:
            batches: Indices of the samples of each batch.
            done: Numbers of the batches that have been trained on.

        """
        marks = bytearray(len(batches))
        for position in done:
            marks[position] = 1
        return cls(array("q", map(len, batches)), array("q", chain.from_iterable(batches)), marks)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, position: int) -> array[int]:
        """The samples of a batch."""
        return self.samples[self._starts[position] : self._starts[position + 1]]

    # ------------------------------------------------------------------ as bytes

    def pack(self) -> bytes:
        """All of it in a row; its length tells how many samples there are, if one knows the number of batches."""
        return self.sizes.tobytes() + self.samples.tobytes() + bytes(self.done)

    @classmethod
    def unpack(cls, num_batches: int, data: bytes | bytearray | memoryview) -> Order:
        """What :meth:`pack` has said.

        Raises:
            ValueError: If it was not :meth:`pack`.

        """
        num_samples, odd = divmod(len(data) - 9 * num_batches, 8)
        if odd or num_samples < 0:
            raise ValueError(f"no order: {num_batches} batches in {len(data)} bytes")
        view, end = memoryview(data), 8 * (num_batches + num_samples)
        return cls(_array(view[: 8 * num_batches]), _array(view[8 * num_batches : end]), bytearray(view[end:]))

    # ------------------------------------------------------------------ in a checkpoint

    def state(self) -> dict[str, Tensor]:
        """As tensors, for a checkpoint."""
        parts = {"sizes": self.sizes, "samples": self.samples, "done": self.done}
        return {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Order:
        """What :meth:`state` has said; or an early version, whose checkpoints hold lists."""
        if "batches" in state:
            return cls.of(state["batches"], state["done"])
        sizes, samples, done = (state[name].numpy().tobytes() for name in ("sizes", "samples", "done"))
        return cls(_array(sizes), _array(samples), bytearray(done))


def _array(data: bytes | memoryview) -> array[int]:
    made = array("q")
    made.frombytes(data)
    return made


def pack_orders(orders: Mapping[int, Order]) -> tuple[list[list[int]], bytes]:
    """Several epochs' orders as what a header says of them, and one payload."""
    packed = {epoch: order.pack() for epoch, order in orders.items()}
    return [[epoch, len(orders[epoch]), len(data)] for epoch, data in packed.items()], b"".join(packed.values())


def unpack_orders(said: Iterable[Sequence[int]], payload: bytes | bytearray) -> dict[int, Order]:
    """What :func:`pack_orders` has said."""
    orders, at = {}, 0
    for epoch, num_batches, num_bytes in said:
        orders[epoch] = Order.unpack(num_batches, memoryview(payload)[at : at + num_bytes])
        at += num_bytes
    return orders
