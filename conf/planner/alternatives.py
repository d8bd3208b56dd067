"""Every Strategy and mesh that a number of ranks allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_MOST_TRACED = 32  # ranks whose passes are recorded one by one


@dataclass(frozen=True)
class Alternative:
    """A Strategy and its mesh.

    Args:
        strategy: "single", "ddp", "zero1", "columns", "spatial", "hybrid" or "downpour".
        num_ranks: In all.
        per_replica: Ranks that hold one replica between them, of columns and tiles.
        options: Of the Strategy: ``scheme`` of hybrid; ``push_every``, ``codec`` and ``overlap`` of Downpour.
        num_nodes: Machines that the ranks are on.

    """

    strategy: str
    num_ranks: int
    per_replica: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    num_nodes: int = 1

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.strategy == "hybrid":
            return f"hybrid ({self.options['scheme']})"
        if self.per_replica > 1 and self.num_ranks > self.per_replica:
            return f"{self.strategy} {self.per_replica} x {self.num_ranks // self.per_replica}"
        return self.strategy

    @property
    def overrides(self) -> list[str]:
        """What ``squall`` is to be told for it; nothing if it can't be."""
        words = {
            "single": ["strategy=single"],
            "ddp": ["strategy=ddp"],
            "columns": ["strategy=column_parallel", f"strategy.num_columns={self.per_replica}"],
            "spatial": ["strategy=spatial_parallel", f"strategy.num_tiles={self.per_replica}"],
            "hybrid": ["strategy=hybrid_parallel", f"strategy.scheme={self.options.get('scheme')}"],
            "downpour": ["strategy=downpour", *(f"strategy.{key}={value}" for key, value in self.options.items())],
        }.get(self.strategy, [])
        if words and self.num_ranks > 1:
            words += [f"trainer.devices={self.num_ranks // self.num_nodes}"]
        if words and self.num_nodes > 1:
            words += [f"trainer.num_nodes={self.num_nodes}"]
        if self.per_replica > 1 and self.num_ranks > self.per_replica:
            words += [f"strategy.data_parallel_size={self.num_ranks // self.per_replica}"]
        return words


@dataclass(frozen=True)
class Batch:
    """The images of a step.

    Args:
        num_examples: Of all ranks together.
        per_replica: Whether they are those of a replica instead, as with a DataLoader that has a batch size.

    Example:
        >>> Batch(64, per_replica=True).of(Alternative("ddp", 4)), Batch(64).of(Alternative("ddp", 4))
        (256, 64)

    """

    num_examples: int
    per_replica: bool = False

    def of(self, alternative: Alternative) -> int:
        """Of all ranks together under a Strategy."""
        replicas = alternative.num_ranks // alternative.per_replica
        return self.num_examples * replicas if self.per_replica else self.num_examples


def alternatives(ranks: int, per_node: int, batch: Batch, downpour: Mapping[str, Any]) -> list[Alternative]:
    """Every Strategy and mesh that ranks, and the images of a step, allow.

    Args:
        ranks: Their number.
        per_node: Ranks of a machine: those of a replica in columns or tiles are on one.
        batch: Images of a step.
        downpour: Options of Downpour.

    """
    batch_size = batch.num_examples * (ranks if batch.per_replica else 1)
    found = [Alternative("single", 1)]
    if ranks == 1:
        return found
    if batch_size >= ranks:
        found += [Alternative("ddp", ranks), Alternative("zero1", ranks)]
    for strategy in ("columns", "spatial"):
        for size in _divisors(ranks):
            if size <= max(per_node, 2) and batch_size * size >= ranks:
                found.append(Alternative(strategy, ranks, size))
    if batch_size >= ranks and ranks <= _MOST_TRACED:
        found += [Alternative("hybrid", ranks, options={"scheme": scheme}) for scheme in "abc"]
    if batch_size >= ranks:
        found.append(Alternative("downpour", ranks, options=dict(downpour)))
    nodes = max(ranks // max(per_node, 1), 1)
    return [found[0], *(replace(alternative, num_nodes=nodes) for alternative in found[1:])]


def _divisors(number: int) -> Iterator[int]:
    size = 2
    while size <= min(number, _MOST_TRACED):
        if number % size == 0:
            yield size
        size *= 2
