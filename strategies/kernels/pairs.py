"""Arguments of two dimensions, as torch takes them: one number for both, or two."""

from __future__ import annotations

from collections.abc import Sequence


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
    numbers = [value, value] if isinstance(value, int) else [int(number) for number in value]
    if len(numbers) != 2:
        raise ValueError(f"{name} must be one number or two, got {value!r}")
    return numbers
