"""Which examples go through the fully connected layers together: Krizhevsky 2014, section 4.

Each of K ranks has examples of its own. A layer's columns need all of them, and see them

* (a) at once, which makes one large pass, before which everybody waits for everybody;
* (b) a rank's at a time: while its examples are computed, the next rank's travel;
* (c) the k-th part of every rank's at a time, so that all links are busy in every pass.

All of them compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..partition import Partition, Range

Scheme = Literal["a", "b", "c"]
Pass = tuple[Range, ...]  # for each rank, which of its examples


def check_scheme(scheme: str) -> None:
    """Refuse what is no scheme of the paper.

    Raises:
        MisconfigurationException: If it is none.

    """
    if scheme not in get_args(Scheme):
        raise MisconfigurationException(
            f"scheme={scheme!r} must be 'a' (all examples at once), 'b' (a rank's at a time) or 'c' (a part of every "
            "rank's at a time)."
        )


def deal_passes(scheme: Scheme, num_examples: Sequence[int]) -> list[Pass]:
    """Deal the examples of one step out to passes.

    Args:
        scheme: As in the paper.
        num_examples: Of each rank.

    Returns:
        For each pass, the half-open range of each rank's examples that are in it. Passes of no examples are left out.

    Example:
        >>> deal_passes("b", [4, 4])
        [((0, 4), (0, 0)), ((0, 0), (0, 4))]
        >>> deal_passes("c", [4, 3])
        [((0, 2), (0, 2)), ((2, 4), (2, 3))]

    """
    num_ranks = len(num_examples)
    if scheme == "a":
        dealt = [tuple((0, number) for number in num_examples)]
    elif scheme == "b":
        dealt = [
            tuple((0, number if rank == owner else 0) for rank, number in enumerate(num_examples))
            for owner in range(num_ranks)
        ]
    else:
        parts = [Partition.even(number, num_ranks).ranges for number in num_examples]
        dealt = [tuple(part[index][0] if part[index] else (0, 0) for part in parts) for index in range(num_ranks)]
    return [ranges for ranges in dealt if any(stop > start for start, stop in ranges)]
