"""Which part of a dimension each rank holds: interval arithmetic, no tensors.

A dimension of ``size`` elements (the channels of a layer, usually) is dealt out to ranks as lists of half-open ranges.
Ranges stand in the order in which the rank stores them, so a concatenation of two split tensors is again a split
tensor, with two ranges a rank, and nothing has to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Range = tuple[int, int]


@dataclass(frozen=True)
class Partition:
    """The ranges of one dimension that each rank holds.

    Args:
        size: Number of elements of the whole dimension.
        ranges: For each rank, half-open ``(start, stop)`` ranges in the order of storage. They may overlap between
            ranks where the partition says what each rank *needs* rather than what it owns.

    Example:
        >>> Partition.even(10, 3).sizes
        (4, 3, 3)

    """

    size: int
    ranges: tuple[tuple[Range, ...], ...]

    @staticmethod
    def even(size: int, num_ranks: int, granule: int = 1) -> Partition:
        """Deal out ``size`` elements in contiguous blocks whose lengths differ by one granule at the most.

        Args:
            size: Number of elements.
            num_ranks: Number of ranks.
            granule: Elements that stay together, for example the outputs of one group of a convolution.

        """
        num_granules, rest = divmod(size, granule)
        if rest:
            raise ValueError(f"granule={granule} does not divide size={size}")
        quotient, remainder = divmod(num_granules, num_ranks)
        ranges: list[tuple[Range, ...]] = []
        start = 0
        for rank in range(num_ranks):
            stop = start + (quotient + (rank < remainder)) * granule
            ranges.append(((start, stop),) if stop > start else ())
            start = stop
        return Partition(size, tuple(ranges))

    @staticmethod
    def whole(size: int, num_ranks: int) -> Partition:
        """Every rank needs all of it."""
        return Partition(size, (((0, size),) if size else (),) * num_ranks)

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.ranges)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each rank."""
        return tuple(sum(stop - start for start, stop in held) for held in self.ranges)

    def scale(self, factor: int) -> Partition:
        """The partition after the dimension is merged with ``factor`` elements behind it (``flatten``)."""
        return Partition(
            self.size * factor,
            tuple(tuple((start * factor, stop * factor) for start, stop in held) for held in self.ranges),
        )

    def divide(self, factor: int) -> Partition | None:
        """The partition of the leading part after the dimension is split in ``(size / factor, factor)``.

        Returns:
            ``None`` where a range would cut through one of the new rows.

        """
        if factor == 0 or any(edge % factor for held in self.ranges for piece in held for edge in piece):
            return None
        return Partition(
            self.size // factor,
            tuple(tuple((start // factor, stop // factor) for start, stop in held) for held in self.ranges),
        )

    @staticmethod
    def concatenate(parts: Sequence[Partition]) -> Partition:
        """The partition of a concatenation along the split dimension: each rank concatenates what it holds."""
        offset = 0
        held: list[list[Range]] = [[] for _ in parts[0].ranges]
        for part in parts:
            for rank, ranges in enumerate(part.ranges):
                held[rank].extend((start + offset, stop + offset) for start, stop in ranges)
            offset += part.size
        return Partition(offset, tuple(tuple(merge(ranges)) for ranges in held))


def merge(ranges: Sequence[Range]) -> list[Range]:
    """Join ranges that follow one another, keeping their order.

    >>> merge([(0, 2), (2, 5), (7, 8)])
    [(0, 5), (7, 8)]
    """
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def union(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The ascending, disjoint ranges that cover the same elements.

    >>> union([(4, 6), (0, 2), (1, 4)])
    ((0, 6),)
    """
    covered: list[Range] = []
    for start, stop in sorted(piece for piece in ranges if piece[1] > piece[0]):
        if covered and start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(covered[-1][1], stop))
        else:
            covered.append((start, stop))
    return tuple(covered)


@lru_cache(maxsize=4096)
def crosses(have: Partition, need: Partition) -> bool:
    """Whether any rank needs what another one holds; the same on all of them."""
    return any(
        overlaps(held, wanted)
        for source, held in enumerate(have.ranges)
        for target, wanted in enumerate(need.ranges)
        if source != target
    )


@lru_cache(maxsize=4096)
def overlaps(source: tuple[Range, ...], target: tuple[Range, ...]) -> tuple[tuple[int, int, int], ...]:
    """Where elements that ``source`` stores land in ``target``'s storage.

    Args:
        source: Ranges in the order in which the sender stores them.
        target: Ranges in the order in which the receiver stores them.

    Returns:
        ``(source offset, target offset, length)`` pieces, ascending in the target, so that both sides enumerate the
        same elements in the same order.

    """
    pieces = []
    target_offset = 0
    for target_start, target_stop in target:
        source_offset = 0
        for source_start, source_stop in source:
            start, stop = max(source_start, target_start), min(source_stop, target_stop)
            if start < stop:
                pieces.append(
                    (source_offset + start - source_start, target_offset + start - target_start, stop - start)
                )
            source_offset += source_stop - source_start
        target_offset += target_stop - target_start
    return tuple(sorted(pieces, key=lambda piece: piece[1]))
