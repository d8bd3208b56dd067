"""What an argument is, whoever made it: numpy's numbers are numbers, and a truth value is none."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a real number.

    Args:
        value: Anything.

    Example:
        >>> is_number(0.5), is_number(True), is_number("0.5")
        (True, False, False)

    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer.

    Args:
        value: Anything.

    Example:
        >>> is_whole(5), is_whole(5.0)
        (True, False)

    """
    return isinstance(value, Integral) and not isinstance(value, bool)
