"""Running statistics of several workers: sent along with pushes, averaged where they are looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BufferAverage:
    """The buffers of a module, as bytes and back.

    Numbers are averaged; counters and flags, which have no average, are the largest of all.

    Args:
        module: Whose buffers.

    """

    def __init__(self, module: nn.Module) -> None:
        buffers = [buffer for buffer in module.buffers() if buffer.numel()]
        self.floating = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.counting = [buffer for buffer in buffers if not buffer.is_floating_point() and not buffer.is_complex()]
        self._seen = self._stamp()
        self._lent: list[Tensor] | None = None

    def _stamp(self) -> tuple[int, ...]:
        return tuple(buffer._version for buffer in (*self.floating, *self.counting))

    @torch.no_grad()
    def pack(self, always: bool = False) -> bytes | None:
        """All buffers, or None if none has changed since the last time.

        Args:
            always: Pack them even so.

        """
        stamp = self._stamp()
        if (stamp == self._seen and not always) or not (self.floating or self.counting):
            return None
        self._seen = stamp
        numbers = _cat([buffer.detach().reshape(-1).double().cpu() for buffer in self.floating], torch.float64)
        counts = _cat([buffer.detach().reshape(-1).long().cpu() for buffer in self.counting], torch.int64)
        return bytes(numbers.numpy().tobytes() + counts.numpy().tobytes())

    @torch.no_grad()
    def lend(self, packed: Sequence[bytes]) -> None:
        """Show the average of several workers' buffers, until :meth:`take_back`.

        Args:
            packed: What :meth:`pack` gave on each worker.

        """
        if not packed:
            return
        if self._lent is None:
            self._lent = [buffer.detach().clone() for buffer in (*self.floating, *self.counting)]
        num_floating = sum(buffer.numel() for buffer in self.floating)
        rows = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in packed]
        numbers = torch.stack([row[: 8 * num_floating].view(torch.float64) for row in rows]).mean(0)
        counts = torch.stack([row[8 * num_floating :].view(torch.int64) for row in rows]).amax(0)
        for buffers, flat in ((self.floating, numbers), (self.counting, counts)):
            at = 0
            for buffer in buffers:
                buffer.data.copy_(flat[at : at + buffer.numel()].view(buffer.shape))
                at += buffer.numel()

    def keep(self) -> None:
        """Let the average stand."""
        self._lent = None

    @torch.no_grad()
    def take_back(self) -> None:
        """Put this worker's own buffers back."""
        if self._lent is not None:
            for buffer, own in zip((*self.floating, *self.counting), self._lent, strict=True):
                buffer.data.copy_(own)
            self._lent = None


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
