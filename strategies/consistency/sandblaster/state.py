"""Where an optimization has come to, outside its shards: to begin from, and for a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..client import Client
from ..plan import ParameterInfo, Plan
from ..updates import SliceMemory
from .lbfgs import LbfgsOptions, Point
from .vectors import vectors_of


@dataclass(frozen=True)
class OptimizerState:
    """A point with its vectors.

    Args:
        point: Where the optimizer is; its slots are the first ones.
        vectors: Of each parameter, the vectors of all slots from the gradient's on, of shape
            (``2 * pairs + 1``, elements).

    """

    point: Point
    vectors: tuple[Tensor, ...]

    def dump(self, function: str) -> dict[str, Any]:
        """As a checkpoint has it.

        Args:
            function: Tells the loss that is minimised from others.

        """
        return {"lbfgs": {"point": self.point.header(), "vectors": list(self.vectors), "function": function}}

    @classmethod
    def of(
        cls, checkpoint: Mapping[str, Any], function: str, parameters: Sequence[nn.Parameter], options: LbfgsOptions
    ) -> OptimizerState | None:
        """What :meth:`dump` has said, as far as a history of this length goes.

        Returns:
            None if there is none, or of another loss, or not of such parameters.

        """
        said = checkpoint.get("lbfgs")
        if not said:
            return None
        point, vectors = Point.of(said["point"]), tuple(said["vectors"])
        if said["function"] != function:
            warnings.warn(
                "The checkpoint's history of L-BFGS is of other data, or of another weight_decay: the optimizer begins"
                " anew, with the weights alone.",
                stacklevel=2,
            )
            return None
        shapes = [(2 * len(point.pairs) + 1, parameter.numel()) for parameter in parameters]
        if [tuple(rows.shape) for rows in vectors] != shapes:
            warnings.warn(
                "The checkpoint's history of L-BFGS is not of this module's parameters: the optimizer begins anew, with"
                " the weights alone.",
                stacklevel=2,
            )
            return None
        num_gone = max(len(point.pairs) - options.history_size, 0)
        point = replace(point, pairs=point.pairs[num_gone:]).moved()
        return cls(point, tuple(torch.cat((rows[:1], rows[1 + 2 * num_gone :])) for rows in vectors))


def fill(memories: Sequence[SliceMemory], parameters: Sequence[nn.Parameter], state: OptimizerState | None) -> None:
    """Give the shards their first vectors.

    Args:
        memories: Of all slices.
        parameters: The weights.
        state: What else a checkpoint has.

    """
    with torch.no_grad():
        for memory in memories:
            for unit in memory.slice.units:
                part = slice(unit.start, unit.stop)
                vectors = vectors_of(memory, unit)
                for slot in (0, 1):
                    vectors[slot].copy_(parameters[unit.parameter].detach().reshape(-1)[part])
                if state is not None:
                    for slot, row in enumerate(state.vectors[unit.parameter], start=2):
                        vectors[slot].copy_(row[part])


def read(
    client: Client, attach: Callable[[int], SliceMemory], plan: Plan, with_state: bool, after: Mapping[str, int]
) -> tuple[dict[str, Any], tuple[Tensor, ...], OptimizerState | None]:
    """Read where the optimizer has come to.

    Args:
        client: The worker's line to the coordinator, which has the shards do nothing meanwhile.
        attach: Finds a shard's memory.
        plan: Of all shards.
        with_state: Read the history, too.
        after: ``{"after": epoch}`` to wait until the evaluation of an epoch has led to something.

    Returns:
        The coordinator's numbers; the weights of each parameter; the state, if there is any yet.

    """
    report, _ = client.call({"op": "snapshot", **after})
    try:
        memories = [attach(shard) for shard in range(len(plan.slices))]
        point = None if report["point"] is None else Point.of(report["point"])
        weights = _gather(memories, [1 if point is None else point.weights], plan.parameters)
        state = None
        if with_state and point is not None:
            state = OptimizerState(point.moved(), _gather(memories, point.slots[1:], plan.parameters))
    finally:
        client.call({"op": "release"})
    return report, tuple(rows[0] for rows in weights), state


def _gather(
    memories: Sequence[SliceMemory], slots: Sequence[int], parameters: Sequence[ParameterInfo]
) -> tuple[Tensor, ...]:
    """Vectors of each parameter, a row a slot."""
    rows = tuple(torch.empty(len(slots), info.num_elements, dtype=info.dtype) for info in parameters)
    for memory in memories:
        for unit in memory.slice.units:
            vectors = vectors_of(memory, unit)
            for row, slot in zip(rows[unit.parameter], slots, strict=True):
                row[unit.start : unit.stop].copy_(vectors[slot])
    return rows
