"""What every Strategy would make of a step on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.placement.speeds import Speeds

from . import steps
from .alternatives import Alternative, Batch, alternatives
from .clusters import Cluster
from .events import Compute, Memory, Send, Trace
from .timeline import Timeline, play

# Most operations of a strategy are as under another; what it adds is with its messages or pushes.
BUILT_ON = {"hybrid": "ddp", "downpour": "single"}
_LOCAL = 6  # times that a step between two fetches reads or writes a weight: its own step, and what it owes the shards


@dataclass(frozen=True)
class Prediction:
    """What a Strategy makes of a step.

    Args:
        alternative: Which.
        seconds: Of a step.
        num_examples: Of a step, all ranks together.
        num_bytes: That a rank sends in a step.
        memory: Of a rank.
        timeline: Where the time goes; ``None`` if ranks don't wait for each other.
        euros_per_hour: Of what it runs on; 0 if nobody says.
        fits: Whether a rank's memory suffices.

    """

    alternative: Alternative
    seconds: float
    num_examples: int
    num_bytes: float
    memory: Memory
    timeline: Timeline | None = None
    euros_per_hour: float = 0.0
    fits: bool = True

    @property
    def images_per_second(self) -> float:
        """All ranks together."""
        return self.num_examples / self.seconds

    @property
    def samples_per_euro(self) -> float | None:
        """Nothing if nobody says what an hour costs."""
        return 3600 * self.images_per_second / self.euros_per_hour if self.euros_per_hour else None


def trace_of(task: steps.Task, alternative: Alternative, batch_size: int, cluster: Cluster | None = None) -> Trace:
    """The step of one rank.

    Args:
        task: What is trained.
        alternative: Under which Strategy.
        batch_size: Images of a step, all ranks together.
        cluster: Whose speeds hybrid's layout goes by.

    Raises:
        MisconfigurationException: If the Strategy can't do it.

    """
    ranks, size = alternative.num_ranks, alternative.per_replica
    each, of_replica = max(batch_size // ranks, 1), max(batch_size * size // ranks, 1)
    kind = alternative.strategy
    if kind == "single":
        return steps.single(task, batch_size)
    if kind == "ddp":
        return steps.ddp(task, each, ranks)
    if kind == "zero1":
        return steps.zero1(task, each, ranks)
    if kind == "columns":
        return steps.columns(task, of_replica, size, ranks // size)
    if kind == "spatial":
        return steps.spatial(task, of_replica, (size, 1), ranks // size)
    if kind == "hybrid":
        measure = None if cluster is None else lambda: speeds_of(cluster)
        return steps.hybrid(task, each, ranks, alternative.options["scheme"], measure)
    return steps.gradient(task, each)


def speeds_of(cluster: Cluster) -> Speeds:
    """A cluster's figures as Strategies measure them when they choose a layout."""
    device, link = cluster.device, cluster.network.link_of(cluster.num_ranks)
    return Speeds(
        flops=device.flops * device.efficiency.get("gemm", 1.0) / device.factor,
        bytes=device.bandwidth * device.efficiency.get("memory", 1.0) / device.factor,
        link=link.bandwidth,
        latency=link.latency,
    )


def overhead(alternative: Alternative, trace: Trace, cluster: Cluster) -> float:
    """Seconds that a step takes more than its operations and messages do.

    Args:
        alternative: Under which Strategy.
        trace: The step.
        cluster: Whose overheads are known.

    """
    own = cluster.overheads.get(alternative.strategy, 0.0) * num_overheads(alternative, trace)
    base = BUILT_ON.get(alternative.strategy, "")
    return own + cluster.overheads.get(base, 0.0) * trace.num_computed


def num_overheads(alternative: Alternative, trace: Trace) -> float:
    """How often a step does what costs more than operations and messages: operations, messages or pushes.

    Args:
        alternative: Under which Strategy.
        trace: The step.

    """
    if alternative.strategy == "hybrid":
        return trace.num_messages
    if alternative.strategy == "downpour":
        return 1 / int(alternative.options.get("push_every", 1))
    return trace.num_computed


def predict(task: steps.Task, alternative: Alternative, batch_size: int, cluster: Cluster) -> Prediction:
    """Say what a step takes, sends and holds.

    Args:
        task: What is trained.
        alternative: Under which Strategy.
        batch_size: Images of a step, all ranks together.
        cluster: On which machines.

    Raises:
        MisconfigurationException: If the Strategy can't do it.

    """
    trace = trace_of(task, alternative, batch_size, cluster)
    price = cluster.euros_per_hour
    if alternative.num_ranks == 1:
        price /= max(cluster.num_ranks, 1)
    line = play(trace, cluster.device, cluster.network)
    line.seconds += overhead(alternative, trace, cluster)
    seconds, num_bytes, memory = line.seconds, float(trace.sent()), trace.memory
    if alternative.strategy == "downpour":
        seconds, num_bytes = _asynchronous(task, seconds, alternative, cluster)
    fits = not cluster.device.memory or memory.total <= cluster.device.memory
    done = max(batch_size // alternative.num_ranks, 1) * alternative.num_ranks
    return Prediction(alternative, seconds, done, num_bytes, memory, line, price, fits)


def _asynchronous(
    task: steps.Task, computing: float, alternative: Alternative, cluster: Cluster
) -> tuple[float, float]:
    """Seconds of a worker's step, and the bytes that a machine of its sends for it.

    A worker pushes and fetches every few steps, and steps by itself in between. Shards need a core, too: where all are
    taken, what they do takes the workers' time. Between machines, each of which has an equal part of the shards, the
    other parts travel.
    """
    options, device, network = alternative.options, cluster.device, cluster.network
    every = int(options.get("push_every", 1))
    num_bytes = 4.0 * task.num_parameters
    local = (every - 1) / every * device.copy_seconds(_LOCAL * num_bytes)
    shard = (
        (cluster.shard_seconds or 11 / (device.bandwidth * device.efficiency.get("memory", 1.0))) * num_bytes / every
    )
    own = computing + local
    cores = cluster.cores_per_node or 2 * network.devices_per_node
    per_core = network.devices_per_node / cores
    overlaps = bool(options.get("overlap"))
    seconds = max(own + (0.0 if overlaps else shard), (own + shard) * min(per_core, 1.0) if per_core <= 1 else 0.0)
    if per_core >= 1:
        seconds = (own + shard) * per_core
    if network.num_nodes == 1:
        return seconds, 0.0
    shares = {"fp32": 1.0, "bf16": 0.5, "int8": 0.25, "1bit": 1 / 32, "topk": 0.02}
    coded = shares.get(str(options.get("codec", "fp32")), 1.0) * num_bytes
    away = (network.num_nodes - 1) / network.num_nodes
    travels = 2 * coded * away * network.devices_per_node / every  # there, and as much back to others
    link = network.between
    wire = travels / link.bandwidth + 4 * link.latency / every
    if overlaps:
        kept = link.cpu_share * wire  # from the workers' cores
        return max(seconds + kept, wire * link.slowdown), travels
    return seconds + wire, travels


def predict_all(
    task: steps.Task, batch: Batch, cluster: Cluster, downpour: Mapping[str, Any], only: Sequence[str] | None = None
) -> tuple[list[Prediction], dict[str, str]]:
    """Predict every alternative that there is.

    Args:
        task: What is trained.
        batch: Images of a step.
        cluster: On which machines.
        downpour: Options of Downpour.
        only: Names of strategies to look at; ``None`` for all.

    Returns:
        The predictions, the fastest first, and why others are left out, by label.

    """
    found, left_out = [], {}
    for alternative in alternatives(cluster.num_ranks, cluster.network.devices_per_node, batch, downpour):
        if only is not None and alternative.strategy not in only:
            continue
        try:
            found.append(predict(task, alternative, batch.of(alternative), cluster))
        except MisconfigurationException as error:
            left_out[alternative.label] = str(error).partition(". ")[0]
    return sorted(found, key=lambda prediction: prediction.seconds / prediction.num_examples), left_out


def layers_of(trace: Trace) -> list[dict[str, Any]]:
    """FLOPs and bytes of each layer in a step, by phase.

    Args:
        trace: Of a rank.

    """
    rows: dict[str, dict[str, Any]] = {}
    for event in trace:
        if not isinstance(event, Compute | Send):
            continue
        row = rows.setdefault(event.layer, {"layer": event.layer, "sent": 0})
        if isinstance(event, Send):
            row["sent"] += event.num_bytes
        else:
            for name, value in (("FLOPs", event.operation.flops), ("bytes", event.operation.num_bytes)):
                row[f"{name} {event.phase}"] = row.get(f"{name} {event.phase}", 0) + value
    return list(rows.values())
