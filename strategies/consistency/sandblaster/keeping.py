"""Where the optimizer has come to, kept where a coordinator that takes a lost one's place finds it."""

from __future__ import annotations

import json
import zlib

import torch

from ..memory import make_or_attach
from .lbfgs import Point

_BYTES, _BYTES_OF_PAIR = 4096, 64  # of a point, as text


class KeptPoint:
    """Two places in shared memory, of which one is whole at any time.

    Args:
        run: Name of the run.
        history_size: Pairs that a point may have.

    """

    def __init__(self, run: str, history_size: int) -> None:
        self._num_bytes = _BYTES + _BYTES_OF_PAIR * history_size
        self._memory = make_or_attach(f"{run}-point", 2 * self._num_bytes)
        self._next = 0

    def keep(self, point: Point) -> None:
        """Write a point; it is good before the vectors of the one before may be written over."""
        self._next += 1
        text = json.dumps({"number": self._next, "point": point.header()}).encode()
        assert len(text) <= self._num_bytes - 16, "a point is too long to be kept"
        place = self._place(self._next % 2)
        place[:8] = 0
        place[16 : 16 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        place[8:16].view(torch.int64)[0] = zlib.crc32(text)
        place[:8].view(torch.int64)[0] = len(text)

    def find(self) -> Point | None:
        """The newest point that is whole."""
        found: list[tuple[int, Point]] = []
        for place in map(self._place, (0, 1)):
            length, checksum = (int(value) for value in place[:16].view(torch.int64))
            text = bytes(place[16 : 16 + length].numpy())
            if length and zlib.crc32(text) == checksum:
                said = json.loads(text)
                found.append((said["number"], Point.of(said["point"])))
        if not found:
            return None
        self._next, point = max(found, key=lambda pair: pair[0])
        return point

    def _place(self, index: int) -> torch.Tensor:
        return self._memory.tensor(torch.uint8, index * self._num_bytes, self._num_bytes)
