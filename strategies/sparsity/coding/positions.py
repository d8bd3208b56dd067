"""Where the weights are that aren't zero: relative indices with fillers, as in Deep Compression (Han et al. 2016).

A symbol of b bits is the distance to the next weight, from 1 to 2^b - 1, or 0, a filler, which goes on by 2^b - 1
without a weight. So a filler stores no zero weight, as the paper's does; and as distances between independent positions
have no memory, an entropy coder makes fillers free. With one bit this is a bitmap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from squall.kernels import ans as kernel
from squall.kernels import native

from . import streams
from .errors import CompressedFileError
from .fields import Reader, number

MAX_GAP_BITS = 12
GAP_BITS = range(1, MAX_GAP_BITS + 1)

Positions = npt.NDArray[Any]
"""In ascending order; int32 where all of a tensor's fit, which halves the memory that a reader takes."""


class PositionPlan(NamedTuple):
    """How positions are best coded.

    Args:
        num_bytes: What that takes, to within a word or two.
        num_symbols: Distances, those of fillers included.
        gap_bits: Bits of a distance before it is coded.
        num_fillers: Distances that lead to no weight.
        stream: Codes the distances.

    """

    num_bytes: float
    num_symbols: int
    gap_bits: int
    num_fillers: int
    stream: streams.Stream

    @property
    def effort(self) -> float:
        """What they take to decode."""
        return self.num_symbols * self.stream.effort


def uncoded(
    positions: Positions, num_elements: int, weight_bits: int, dense_bits: int, gap_bits: int | None
) -> tuple[int, int]:
    """Choose the width of an index as Deep Compression stores it before coding, a filler with the code of a zero.

    Args:
        positions: In ascending order.
        num_elements: All of them are below this.
        weight_bits: Of a weight's code.
        dense_bits: Of a code where zeros have one, too.
        gap_bits: Bits of a distance; None: those that take the fewest.

    Returns:
        Bits of an index, 0 if it takes fewer to store the zeros, too; and bits of all indices and codes.

    """
    gaps = np.diff(positions, prepend=-1) - 1
    widths = GAP_BITS if gap_bits is None else (gap_bits,)
    bits = {width: (len(gaps) + int((gaps // ((1 << width) - 1)).sum())) * (width + weight_bits) for width in widths}
    bits[0] = num_elements * dense_bits
    return min(bits.items(), key=lambda item: item[1])


def plan(positions: Positions, coder: streams.Coder, gap_bits: int | None = None) -> PositionPlan:
    """Choose how to code positions.

    Args:
        positions: In ascending order.
        coder: "ans" or "huffman".
        gap_bits: Bits of a distance before it is coded, from 1 to 12; None: those that take the fewest bytes.

    Returns:
        What it takes, and how.

    """
    distances, counts = np.unique(np.diff(positions, prepend=-1), return_counts=True)
    plans = []
    for bits in GAP_BITS if gap_bits is None else (gap_bits,):
        longest = (1 << bits) - 1
        of_symbols = np.bincount((distances - 1) % longest + 1, counts, minlength=2).astype(np.int64)
        of_symbols[0] = num_fillers = int((counts * ((distances - 1) // longest)).sum())
        stream = streams.plan(of_symbols, coder)
        num_bytes = 1 + len(number(num_fillers)) + stream.num_bytes
        plans.append(PositionPlan(num_bytes, len(positions) + num_fillers, bits, num_fillers, stream))
    return streams.smallest(plans)


def encode(positions: Positions, how: PositionPlan) -> bytes:
    """Code positions.

    Args:
        positions: In ascending order.
        how: What :func:`plan` made of them.

    Returns:
        The bytes.

    """
    longest = (1 << how.gap_bits) - 1
    distances = np.diff(positions, prepend=-1)
    ends = np.cumsum((distances - 1) // longest + 1)  # where in the stream each weight's own symbol is
    symbols = np.zeros(len(positions) + how.num_fillers, np.int32)
    symbols[ends - 1] = (distances - 1) % longest + 1
    return number(how.gap_bits) + number(how.num_fillers) + how.stream.encode(symbols)


class Coded(NamedTuple):
    """Positions that have been read, and are still to be decoded.

    Args:
        stream: Their distances.
        longest: What a filler goes on by.
        num_positions: How many there are.
        num_elements: All of them have to be below this.

    """

    stream: streams.Coded
    longest: int
    num_positions: int
    num_elements: int

    def positions(self) -> Positions:
        """Decode them; once.

        Raises:
            CompressedFileError: If the bytes are none that :func:`encode` writes.

        """
        gaps = self.stream.symbols()
        sum_up = kernel.positions if native.serves() else _sum_up
        found, num_found, last = sum_up(gaps, self.longest, self.num_positions, self.num_elements)
        if num_found != self.num_positions:
            raise CompressedFileError(f"its gaps don't lead to {self.num_positions:,} weights")
        if last >= self.num_elements:
            raise CompressedFileError(f"its gaps run past the end, {self.num_elements:,} weights")
        return found


def _sum_up(gaps: streams.Decoded, longest: int, num_positions: int, num_elements: int) -> tuple[Positions, int, int]:
    """As :func:`squall.kernels.ans.positions`."""
    num_found, num_fillers = int(np.count_nonzero(gaps)), int(np.count_nonzero(gaps == 0))
    last = int(gaps.sum(dtype=np.int64)) + num_fillers * longest - 1
    wide = gaps.astype(np.int32 if num_elements < 1 << 31 else np.int64)
    is_weight = gaps > 0 if num_fillers else None
    if is_weight is not None:
        wide[~is_weight] = longest
    found = np.cumsum(wide, out=wide)
    found -= 1
    return found if is_weight is None else found[is_weight], num_found, last


def read(reader: Reader, num_positions: int, num_elements: int) -> Coded:
    """Read positions, and don't decode them.

    Args:
        reader: Stands where :func:`encode`'s bytes begin.
        num_positions: How many there are.
        num_elements: All of them have to be below this.

    Raises:
        CompressedFileError: If the bytes are none that :func:`encode` writes.

    """
    gap_bits = reader.number(MAX_GAP_BITS)
    longest = (1 << gap_bits) - 1
    if not longest:
        raise CompressedFileError("its gaps have no bits")
    num_fillers = reader.number(num_elements // longest)
    stream = streams.read(reader, num_positions + num_fillers, longest + 1)
    return Coded(stream, longest, num_positions, num_elements)
