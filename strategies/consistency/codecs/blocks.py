"""Codes of blocks: a header of a few numbers for every 2048 elements, then some bits for each element."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import Codec, check_length, chunk_size, keep_loss

BLOCK = 2048
"""Elements that share a header, as in the block-wise 8-bit optimisers that came after Dettmers (2015)."""


class Piece(NamedTuple):
    """Blocks of equal length that are worked on together: whole ones, or the last one alone."""

    first: int
    num_blocks: int
    length: int

    @property
    def elements(self) -> slice:
        """Where its elements are."""
        start = self.first * BLOCK
        return slice(start, start + self.num_blocks * self.length)


def pieces(num_elements: int, size: int) -> Iterator[Piece]:
    """Cut ``num_elements`` into pieces of about ``size``."""
    whole, rest = divmod(num_elements, BLOCK)
    step = max(1, size // BLOCK)
    for first in range(0, whole, step):
        yield Piece(first, min(step, whole - first), BLOCK)
    if rest:
        yield Piece(whole, 1, rest)


class BlockCodec(Codec):
    """A codec that treats each block alone. The code is all the headers, then all the elements' bits.

    Attributes:
        header_bytes: Bytes of a block's header.
        num_bits: Bits of an element, a divisor of 8.

    """

    header_bytes: int
    num_bits: int

    def num_bytes(self, num_elements: int) -> int:
        """Say how many bytes the code takes: the headers, then the elements' bits up to a whole byte."""
        num_blocks = -(-check_length(num_elements) // BLOCK)
        return num_blocks * self.header_bytes + -(-num_elements * self.num_bits // 8)

    def _parts(self, data: Tensor, num_elements: int, piece: Piece) -> tuple[Tensor, Tensor]:
        """The bytes of a piece: its headers and its elements' bits."""
        headers_end = -(-num_elements // BLOCK) * self.header_bytes
        start = piece.first * self.header_bytes
        header = data[start : start + piece.num_blocks * self.header_bytes]
        start = headers_end + piece.first * BLOCK * self.num_bits // 8
        return header, data[start : start + -(-piece.num_blocks * piece.length * self.num_bits // 8)]

    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        num_elements, size = values.numel(), chunk_size(values)
        lost = None if residual is None else values.new_empty(min(size, num_elements), dtype=torch.float32)
        for piece in pieces(num_elements, size):
            shape = (piece.num_blocks, piece.length)
            header, bits = self._parts(out, num_elements, piece)
            wanted = values[piece.elements]
            if residual is None or lost is None:
                self._encode_blocks(wanted.float().reshape(shape), header, bits)
                continue
            # The residual is where the sum is made, coded from, and what was coded subtracted.
            wanted = residual[piece.elements].add_(wanted)
            self._encode_blocks(wanted.reshape(shape), header, bits)
            decoded = lost[: wanted.numel()]
            self._decode_blocks(header, bits, decoded.view(shape))
            keep_loss(wanted.sub_(decoded))

    def _decode(self, data: Tensor, out: Tensor) -> None:
        num_elements, size = out.numel(), chunk_size(out)
        direct = out.dtype == torch.float32 and out.is_contiguous()
        buffer = out if direct else out.new_empty(min(size, num_elements), dtype=torch.float32)
        for piece in pieces(num_elements, size):
            target = out[piece.elements]
            decoded = target if direct else buffer[: target.numel()]
            self._decode_blocks(*self._parts(data, num_elements, piece), decoded.view(piece.num_blocks, piece.length))
            if not direct:
                target.copy_(decoded)

    @abstractmethod
    def _encode_blocks(self, blocks: Tensor, header: Tensor, bits: Tensor) -> None:
        """Encode blocks of equal length.

        Args:
            blocks: Shape (blocks, length), float32; must not be modified.
            header: The headers' bytes, to be written.
            bits: The elements' bytes, to be written.

        """

    @abstractmethod
    def _decode_blocks(self, header: Tensor, bits: Tensor, out: Tensor) -> None:
        """Decode blocks of equal length.

        Args:
            header: The headers' bytes.
            bits: The elements' bytes.
            out: Shape (blocks, length), float32, contiguous.

        """
