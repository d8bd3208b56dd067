"""Coded changes of weights, for workers on other hosts.

A worker far away is not sent weights but what has changed in them since, coded. Both ends add up the decoded changes,
so the sender knows exactly what the receiver has, and what one code loses is part of the next change: error feedback
without a residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .codecs import get_codec
from .plan import Slice, Unit


class Deltas:
    """One end.

    Args:
        slices: Of the shards.
        codec: How changes are coded.
        known: For each shard, the weights that the receiver has, as bytes; changed in place.

    """

    def __init__(self, slices: Sequence[Slice], codec: str, known: Sequence[Tensor]) -> None:
        self._slices = list(slices)
        self._codec = get_codec(codec)
        self.known = list(known)
        self.num_bytes = sum(slice_.num_code_bytes for slice_ in slices)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def encode(self, weights: Sequence[Tensor], out: Tensor) -> None:
        """Code what has changed, and know it to be there.

        Args:
            weights: For each shard its present weights, as bytes.
            out: Shape (``num_bytes``,), uint8.

        """
        for shard, unit, code in self._units(out):
            known = unit.weights_in(self.known[shard])
            scratch = self._like(known)
            torch.sub(unit.weights_in(weights[shard]), known, out=scratch)
            self._codec.encode(scratch, code)
            self._codec.decode(code, scratch)
            known.add_(scratch)

    def add(self, code: Tensor) -> None:
        """Add what has changed to what is known.

        Args:
            code: What :meth:`encode` has written.

        """
        for shard, unit, mine in self._units(code):
            known = unit.weights_in(self.known[shard])
            scratch = self._like(known)
            self._codec.decode(mine, scratch)
            known.add_(scratch)

    def _units(self, code: Tensor) -> Iterator[tuple[int, Unit, Tensor]]:
        begin = 0
        for shard, slice_ in enumerate(self._slices):
            mine = code[begin : begin + slice_.num_code_bytes]
            for unit in slice_.units:
                if unit.num_elements:
                    yield shard, unit, unit.code_in(mine)
            begin += slice_.num_code_bytes

    def _like(self, known: Tensor) -> Tensor:
        scratch = self._scratch.get(known.dtype)
        if scratch is None or scratch.numel() < known.numel():
            scratch = self._scratch[known.dtype] = torch.empty_like(known)
        return scratch[: known.numel()]
