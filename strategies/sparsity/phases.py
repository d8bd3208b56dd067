"""When the phases of Deep Compression begin: training, rounds of pruning and retraining, shared weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .arguments import is_number, is_whole

NAMES = ("train", "prune", "share")


class Phase(NamedTuple):
    """A phase of a training.

    Args:
        name: "train", "prune" or "share".
        epoch: With which it begins.
        round: Of pruning, from 1 on; 0 in the other phases.

    """

    name: str
    epoch: int
    round: int = 0

    @property
    def number(self) -> int:
        """Its kind as a number, as it is logged: 0, 1 or 2."""
        return NAMES.index(self.name)


def check_length(argument: str, value: float | None, least: int) -> None:
    """See that a length is one.

    Args:
        argument: Its name, for the message.
        value: Whole epochs, or a part of the training below 1; None: what the others leave.
        least: Epochs that it has to have.

    Raises:
        ValueError: It is none, or too short.

    """
    if value is None:
        return
    if not (value >= least if is_whole(value) else is_number(value) and 0.0 < value < 1.0):
        raise ValueError(
            f"{argument}={value!r} must be a number of epochs, {least} or more, or a part of the training below 1."
        )


def plan_phases(
    num_epochs: int,
    train: float | None,
    retrain: float,
    share: float,
    num_rounds: int,
    trained: bool = False,
) -> list[Phase]:
    """Lay out the phases of a training. They begin with epochs, and follow each other without a gap.

    Args:
        num_epochs: Of the training.
        train: How long to train before anything is pruned: epochs, or a part of the training; None: what the others
            leave.
        retrain: How long the rounds of pruning take together; each is followed by as much retraining.
        share: How long centroids are trained; 0 for not at all.
        num_rounds: Of pruning.
        trained: Whether the weights are trained already: then there is no first phase.

    Returns:
        The phases. What is left of the training goes to the first one if that is to have it, and else to the last
        round of retraining.

    Raises:
        ValueError: The training is too short.

    Example:
        >>> [tuple(phase) for phase in plan_phases(10, None, 5, 0.2, 2)]
        [('train', 0, 0), ('prune', 3, 1), ('prune', 5, 2), ('share', 8, 0)]

    """
    length_train = 0 if trained or train is None else _epochs(train, num_epochs, 0)
    length_retrain = _epochs(retrain, num_epochs, num_rounds)
    length_share = _epochs(share, num_epochs, 1) if share else 0
    rest = num_epochs - length_train - length_retrain - length_share
    if rest < 0:
        raise ValueError(
            f"train={train}, retrain={retrain} and share={share} take {length_train}, {length_retrain} and"
            f" {length_share} epochs, and the training has {num_epochs}: give the Trainer"
            f" max_epochs={num_epochs - rest} or more, or make them shorter."
        )
    if train is None and not trained:
        length_train = rest
    phases = [Phase("train", 0)] if length_train else []
    phases += [
        Phase("prune", length_train + index * (length_retrain // num_rounds), index + 1) for index in range(num_rounds)
    ]
    return [*phases, Phase("share", num_epochs - length_share)] if length_share else phases


def all_at_once(phases: Sequence[Phase]) -> list[Phase]:
    """Let all phases begin with the first epoch, to see that each of them runs.

    Args:
        phases: As they were planned.

    """
    return [phase._replace(epoch=0) for phase in phases]


def _epochs(length: float, num_epochs: int, least: int) -> int:
    return int(length) if is_whole(length) else max(least, math.floor(length * num_epochs))
