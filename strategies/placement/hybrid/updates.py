"""Steps of parts of an optimizer, and with learning rates of their own: variable batch sizes need both.

Krizhevsky 2014, section 5: where the fully connected layers are updated after every pass, their batch is that of one
rank and their learning rate what suits it, while the convolutions' batch is that of all ranks, and their rate grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..partition import Partition

LearningRateRule = Literal["none", "linear", "sqrt"]

_NUM_BUCKETS = 8  # of gradients that are averaged
_MB = 1 << 20


def bucket_size(num_bytes: float) -> float:
    """How many bytes of replicated gradients leave together: some of few already, of many as under torch's DDP.

    Args:
        num_bytes: Of all that are averaged.

    Example:
        >>> bucket_size(8 << 20) / (1 << 20)
        1.0

    """
    return min(max(num_bytes / _NUM_BUCKETS, 0.1 * _MB), 25 * _MB)


def learning_rate_factor(rule: LearningRateRule, num_batches: int) -> float:
    """By how much the learning rate of one rank's batch grows for a batch of ``num_batches`` such.

    Args:
        rule: ``"linear"`` (what the paper does), ``"sqrt"`` (what its theory says), or ``"none"``.
        num_batches: How many times as large the batch is.

    Example:
        >>> learning_rate_factor("linear", 4), learning_rate_factor("sqrt", 4), learning_rate_factor("none", 4)
        (4.0, 2.0, 1.0)

    """
    return {"linear": float(num_batches), "sqrt": math.sqrt(num_batches), "none": 1.0}[rule]


def check_learning_rate_rule(rule: str) -> None:
    """Refuse what is no rule.

    Raises:
        MisconfigurationException: If it is none.

    """
    if rule not in get_args(LearningRateRule):
        raise MisconfigurationException(
            f"lr_rule={rule!r} must be 'none', 'linear' (the rate grows with the batch) or 'sqrt' (with its root)."
        )


def hyperparameters_of(group: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """What an optimizer's group says beside its parameters, with ``factor`` times its learning rate."""
    return {**{name: value for name, value in group.items() if name != "params"}, "lr": group["lr"] * factor}


@contextmanager
def regrouped(optimizer: Optimizer, factor_of: Callable[[Tensor], float | None]) -> Iterator[None]:
    """Within, ``optimizer`` has some of its parameters only, at multiples of their learning rates.

    Schedules and checkpoints never see it: groups are what they were afterwards, and state belongs to parameters.

    Args:
        optimizer: An optimizer that treats every element alone.
        factor_of: For a parameter, the factor of its learning rate, or ``None`` to leave it out.

    """
    groups = optimizer.param_groups
    parts: list[dict[str, Any]] = []
    for group in groups:
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            factor = factor_of(parameter)
            if factor is not None:
                by_factor.setdefault(factor, []).append(parameter)
        parts += [
            {**hyperparameters_of(group, factor), "params": parameters} for factor, parameters in by_factor.items()
        ]
    optimizer.param_groups = parts
    try:
        yield
    finally:
        optimizer.param_groups = groups


def take_examples(batch: Any, num_examples: int, number: int, num_passes: int) -> Any:
    """The part of a batch that a pass is made of.

    Args:
        batch: Tensors with an example a row, in any containers.
        num_examples: Of the batch.
        number: Which pass.
        num_passes: How many there are.

    Returns:
        The same with fewer rows.

    Raises:
        MisconfigurationException: If the batch can't be cut.

    """
    ranges = Partition.even(num_examples, num_passes).ranges[number]
    if not ranges:
        raise MisconfigurationException(
            f"fc_update='pass' makes {num_passes} passes of a rank's batch, which has {num_examples} examples only. "
            "Use a larger batch (or drop_last=True), or fc_update='step'."
        )
    start, stop = ranges[0]

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim == 0 or len(leaf) != num_examples:
            raise MisconfigurationException(
                f"fc_update='pass' has to cut the batch, but a tensor of shape {tuple(leaf.shape)} in it does not have "
                f"the {num_examples} examples of the others in its rows. Use fc_update='step'."
            )
        return leaf[start:stop]

    return tree_map(cut, batch)


def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply what gradients there are."""
    if factor != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
