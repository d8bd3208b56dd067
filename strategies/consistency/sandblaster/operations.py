"""What L-BFGS asks for: vectors made of vectors, their products, and evaluations. Only scalars come back.

Vectors are known by the numbers of their slots. A vector is never made in place of one that it is made of: so whoever
is killed while making it makes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

WEIGHTS = 0  # the slot of the point that workers fetch

DOT, LARGEST, SUM = "dot", "largest", "sum"


@dataclass(frozen=True)
class Reduction:
    """A number that is made of vectors.

    Args:
        kind: ``"dot"`` of two vectors; ``"largest"`` or ``"sum"`` of one's absolute elements.
        first: Slot of the vector.
        second: Slot of the other.

    """

    kind: str
    first: int
    second: int = WEIGHTS

    def header(self) -> list[Any]:
        """As it is sent."""
        return [self.kind, self.first, self.second]


def dot(first: int, second: int) -> Reduction:
    """The product of two vectors."""
    return Reduction(DOT, first, second)


def largest(vector: int) -> Reduction:
    """The largest absolute element of a vector."""
    return Reduction(LARGEST, vector)


def absolute_sum(vector: int) -> Reduction:
    """The sum of a vector's absolute elements."""
    return Reduction(SUM, vector)


@dataclass(frozen=True)
class Combine:
    """Make a vector of others, and numbers of what there is then. It is answered by the numbers.

    Args:
        out: Slot of the vector, or None to make none.
        terms: Factors and slots whose sum it is; none for zeros.
        reductions: The numbers.

    """

    out: int | None = None
    terms: tuple[tuple[float, int], ...] = ()
    reductions: tuple[Reduction, ...] = ()

    def header(self) -> dict[str, Any]:
        """As the shards are told."""
        return {
            "op": "combine",
            "out": self.out,
            "terms": [list(term) for term in self.terms],
            "reductions": [reduction.header() for reduction in self.reductions],
        }


@dataclass(frozen=True)
class Evaluate:
    """Compute loss and gradient at the weights, over all portions. It is answered by the loss.

    Args:
        gradient: The slot where the gradient is summed.

    """

    gradient: int


def join_parts(reductions: Sequence[Sequence[Any]], parts: Sequence[Sequence[float]]) -> list[float]:
    """Make the numbers of all shards one.

    Args:
        reductions: As they were sent.
        parts: Of each shard, a number a reduction.

    Example:
        >>> join_parts([["dot", 1, 2], ["largest", 1, 0]], [[1.0, 5.0], [2.0, 3.0]])
        [3.0, 5.0]

    """
    joined = []
    for position, (kind, *_) in enumerate(reductions):
        values = [part[position] for part in parts]
        joined.append(reduce(larger, values, 0.0) if kind == LARGEST else float(sum(values)))
    return joined


def larger(first: float, second: float) -> float:
    """The larger of two numbers; NaN, if one is."""
    return second if second > first or second != second else first
