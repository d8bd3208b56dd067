"""Learning-rate schedules as pure functions of progress, and the table that names them."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES = ("plateau", "exponential_steps", "steps", "cosine", "one_cycle", "none")


def exponential_steps(progress: float, target_factor: float = 250.0, num_steps: int = 4) -> float:
    """cuda-convnet2's ``dexp[tgtFactor;numSteps]`` (Krizhevsky 2014, section 5): equal drops at equal distances.

    With the defaults the rate is divided by 250 ** (1/3), about 6.3, after 25, 50 and 75 % of training.

    Args:
        progress: Fraction of training done, 0 to 1.
        target_factor: What the rate is divided by in the end.
        num_steps: Stretches of constant rate, at least 2.

    Returns:
        What the base rate is multiplied with.

    Example:
        >>> [round(1 / exponential_steps(p), 2) for p in (0.0, 0.24, 0.25, 0.5, 0.99)]
        [1.0, 1.0, 6.3, 39.69, 250.0]

    """
    step = min(math.floor(progress * num_steps), num_steps - 1)
    return float(target_factor ** (-step / (num_steps - 1)))


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017).

    Args:
        progress: Fraction of training done, 0 to 1.

    Returns:
        What the base rate is multiplied with.

    Example:
        >>> round(cosine(0.5), 6)
        0.5

    """
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def one_cycle(progress: float, warmup_fraction: float = 0.3) -> float:
    """Half a cosine up from 1/25 to 1, then one down to nearly nothing (Smith and Topin 2018, with cosines).

    Torch's ``OneCycleLR`` does the same but keeps the length of the first training in its state, so a training that is
    resumed and made longer breaks off; this one follows the new length.

    Args:
        progress: Fraction of training done, 0 to 1.
        warmup_fraction: Part of the training in which the rate rises.

    Returns:
        What the base rate is multiplied with.

    Example:
        >>> [round(one_cycle(p), 4) for p in (0.0, 0.15, 0.3, 0.65, 1.0)]
        [0.04, 0.52, 1.0, 0.5, 0.0]

    """
    if progress < warmup_fraction:
        return 1.0 - (1.0 - 1 / 25) * cosine(progress / warmup_fraction)
    lowest = 1 / 250_000
    return lowest + (1.0 - lowest) * cosine((progress - warmup_fraction) / max(1.0 - warmup_fraction, 1e-9))


def by_step(factor: Callable[[float], float], total_steps: int) -> Callable[[int], float]:
    """Make a function of progress one of the optimizer step, as `torch.optim.lr_scheduler.LambdaLR` wants it.

    Args:
        factor: Function of the fraction done.
        total_steps: Optimizer steps of the whole training.

    """

    def of_step(step: int) -> float:
        return factor(step / total_steps)

    return of_step
