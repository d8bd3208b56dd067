"""How large a part of the live weights is pruned, as training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

Rate = Callable[[float, float, float, int], float]


def constant(start: float, end: float, progress: float, num_steps: int) -> float:
    """Always the same rate.

    Args:
        start: The rate.
        end: Not used.
        progress: Part of the training that is done, 0 to 1.
        num_steps: Optimizer steps that are done.

    """
    return start


def cosine(start: float, end: float, progress: float, num_steps: int) -> float:
    """Half a cosine from one rate to the other. Arguments as of :func:`constant`.

    Example:
        >>> [round(cosine(0.5, 0.0, progress, 0), 3) for progress in (0.0, 0.5, 1.0)]
        [0.5, 0.25, 0.0]

    """
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def linear(start: float, end: float, progress: float, num_steps: int) -> float:
    """A straight line from one rate to the other. Arguments as of :func:`constant`.

    Example:
        >>> linear(0.5, 0.1, 0.5, 0)
        0.3

    """
    return start + (end - start) * min(progress, 1.0)


def exponential(start: float, end: float, progress: float, num_steps: int) -> float:
    """One per cent less every 600 steps: what the code of Dettmers and Zettlemoyer (2019) calls linear.

    Arguments as of :func:`constant`; ``end`` is not used.

    Example:
        >>> exponential(0.5, 0.0, 0.0, 599), exponential(0.5, 0.0, 0.0, 600)
        (0.5, 0.495)

    """
    return float(start * 0.99 ** (num_steps // 600))


RATES: dict[str, Rate] = {"constant": constant, "cosine": cosine, "linear": linear, "exponential": exponential}
"""The schedules by name. Only some look at ``progress``, which takes a Trainer that knows when it will end."""
NEED_PROGRESS = frozenset({"cosine", "linear"})
