"""Arguments as torch takes them: whole numbers, and of two dimensions one for both, or two."""

from __future__ import annotations

import operator
from collections.abc import Sequence


def whole(name: str, value: int) -> int:
    """Make an ``int`` of a whole number of any type.

    Args:
        name: Of the argument, for the message.
        value: The number.

    Raises:
        TypeError: It isn't one.

    Example:
        >>> whole("groups", True)
        1

    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    """Make two numbers of one.

    Args:
        name: Of the argument, for the message.
        value: One number, or vertical and horizontal.

    Raises:
        ValueError: There are more, or fewer.

    Example:
        >>> pair("stride", 2), pair("padding", (0, 1))
        ([2, 2], [0, 1])

    """
    numbers = [int(value)] * 2 if isinstance(value, int) else [int(number) for number in value]
    if len(numbers) != 2:
        raise ValueError(f"{name} must be one number or two, got {value!r}")
    return numbers
