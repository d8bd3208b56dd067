"""Measure this machine: its operations, its link, and what each Strategy costs beside them.

Each operation that a plan is made of is timed by itself, with values of its shape, as OptCNN does (Jia et al. 2018);
on all ranks at once, since cores share memory. The roofline serves for what nobody has timed. What is left
between that and a Strategy's step, such as Lightning's loop and the placement's own Python, is measured on a toy.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import squall.models

from . import steps
from .alternatives import Alternative
from .clusters import HERE, Cluster
from .devices import Device
from .events import Compute, Kind, Operation, Trace
from .links import Link, Network
from .predictions import BUILT_ON, num_overheads, overhead, trace_of
from .ranks import TimingRanks
from .recorder import Recorder
from .timeline import play

VERSION = 2
# What each Strategy is called by Squall, and what the planner's own programs fit with.
REGISTERED = {
    "single": "single", "ddp": "ddp", "zero1": "zero1", "columns": "column_parallel", "spatial": "spatial_parallel",
    "hybrid": "hybrid_parallel", "downpour": "downpour",
}  # fmt: skip
_TOY = {"name": "AlexNet", "num_classes": 10, "image_size": 28, "in_channels": 1, "num_columns": 2, "width": 0.1}
_WIDE = {"name": "LeNet300", "width": 8.0}  # 4 million weights, and nearly no arithmetic
_TOY_BATCH, _TOY_STEPS, _WIDE_STEPS = 8, 16, 10


@dataclass
class Calibration:
    """What was measured on a machine, to be kept in a file.

    Args:
        flops: A second, of a large matrix product, on one core.
        bandwidth: Bytes a second that a core reads and writes.
        efficiency: Shares of these by kind of operation.
        operations: Seconds of single operations by key, all ranks computing.
        alone: The same while one rank computes.
        links: What was measured between ranks, by name.
        overheads: By strategy, what an operation (a message of hybrid, a push of Downpour) takes more than alone.
        shard_seconds: That pushing, applying and fetching a byte takes.

    """

    flops: float = 0.0
    bandwidth: float = 0.0
    efficiency: dict[str, float] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    overheads: dict[str, float] = field(default_factory=dict)
    shard_seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION, "torch": torch.__version__, **asdict(self)}) + "\n")

    @staticmethod
    def load(path: Path) -> Calibration:
        """Read what :meth:`save` has written.

        Raises:
            MisconfigurationException: If it is no such file, or of another version of torch.

        """
        try:
            entries = json.loads(path.read_text())
            version, made_with = entries.pop("version"), entries.pop("torch")
            calibration = Calibration(**entries)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MisconfigurationException(
                f"calibration={path} can't be read ({error}). Leave it out to measure anew."
            ) from None
        if version != VERSION or made_with != torch.__version__:
            raise MisconfigurationException(
                f"calibration={path} was made with torch {made_with}, here is {torch.__version__}. Measure anew: leave"
                " it out, or delete the file."
            )
        return calibration

    # ------------------------------------------------------------------ use

    def device(self, alone: bool = False) -> Device:
        """A core of this machine.

        Args:
            alone: Whether the other cores rest.

        """
        measured = {**self.operations, **self.alone} if alone else {**self.alone, **self.operations}
        return Device(HERE, self.flops, self.bandwidth, efficiency=self.efficiency, measured=measured)

    def roofline(self) -> Device:
        """The same without what was measured of single operations."""
        return Device(HERE, self.flops, self.bandwidth, efficiency=self.efficiency)

    def cluster(self, link: str, num_ranks: int, alone: bool = False) -> Cluster:
        """This machine's ranks.

        Args:
            link: Whose measurement is taken: "loopback", or that of hosts of one rank each.
            num_ranks: How many.
            alone: Whether one rank computes while the others rest.

        """
        measured = Link(**self.links[link])
        nodes = 1 if link == "loopback" else num_ranks
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Cluster(
            HERE,
            self.device(alone),
            Network(nodes, num_ranks // nodes, measured, measured),
            cores_per_node=max(cores // nodes, 1),  # hosts that are namespaces of one machine share its cores
            overheads=self.overheads,
            shard_seconds=self.shard_seconds,
        )

    # ------------------------------------------------------------------ measuring

    def measure_roofline(self, ranks: TimingRanks) -> None:
        """Time a product, convolutions, a copy and an update."""
        rates: dict[Kind, list[float]] = {"gemm": [], "conv": [], "memory": []}
        probes = _probes()
        seconds = ranks.operations([operation.key for operation in probes], together=True)
        for operation in probes:
            work = operation.flops or operation.num_bytes
            rates[operation.kind].append(work / seconds[operation.key])
        self.flops, self.bandwidth = max(rates["gemm"]), max(rates["memory"])
        self.efficiency = {
            "gemm": statistics.mean(rates["gemm"]) / self.flops,
            "conv": statistics.mean(rates["conv"]) / self.flops,
            "memory": statistics.mean(rates["memory"]) / self.bandwidth,
        }

    def measure_operations(self, ranks: TimingRanks, traces: Iterable[Trace], together: bool = True) -> None:
        """Time those operations of traces that haven't been.

        Args:
            ranks: Which do it.
            traces: Of ranks.
            together: Whether all ranks compute at once.

        """
        known = self.operations if together else self.alone
        keys = dict.fromkeys(o.key for trace in traces for o in trace.operations if o.key not in known)
        if keys:
            known.update(ranks.operations(list(keys), together))

    def measure_link(self, ranks: TimingRanks) -> None:
        """Time messages."""
        self.links[ranks.link.name] = asdict(ranks.measure_link())

    def measure_overheads(self, ranks: TimingRanks, strategies: Sequence[str]) -> None:
        """Fit a toy under each Strategy, and see what it takes beyond what is predicted.

        Args:
            ranks: Which do it.
            strategies: Names as of :class:`Alternative`.

        """
        num_ranks = len(ranks.link.prefixes)
        wanted = {*strategies, *(BUILT_ON[strategy] for strategy in strategies if strategy in BUILT_ON)}
        strategies = sorted(wanted, key=list(REGISTERED).index)  # what others are built on comes first
        for strategy in strategies:
            if strategy in self.overheads:
                continue
            alternative = alternative_of(strategy, num_ranks)
            more, trace = self._unexplained(ranks, _TOY, alternative, _TOY_BATCH, _TOY_STEPS)
            self.overheads[strategy] = more / max(num_overheads(alternative, trace), 1)
        if "downpour" in strategies and not self.shard_seconds:
            alternative = alternative_of("downpour", num_ranks)
            more, trace = self._unexplained(ranks, _WIDE, alternative, 2 * num_ranks, _WIDE_STEPS)
            self.shard_seconds = more / trace.memory.weights

    def _unexplained(
        self, ranks: TimingRanks, net: Mapping[str, Any], alternative: Alternative, batch_size: int, num_steps: int
    ) -> tuple[float, Trace]:
        """Seconds that a step takes beyond what is known of it so far, and the step."""
        is_alone = alternative.num_ranks == 1
        trace = trace_of(task_of(net), alternative, batch_size)
        self.measure_operations(ranks, [trace], together=not is_alone)
        cluster = self.cluster(ranks.link.name, len(ranks.link.prefixes), alone=is_alone)
        known = play(trace, cluster.device, cluster.network).seconds + overhead(alternative, trace, cluster)
        taken = ranks.fit(net, REGISTERED[alternative.strategy], batch_size, num_steps, options_of(alternative))[0]
        return max(statistics.median(taken) - known, 0.0), trace


def alternative_of(strategy: str, num_ranks: int, **options: Any) -> Alternative:
    """The Strategy on all ranks, which hold one replica where they can."""
    if strategy == "single":
        return Alternative(strategy, 1)
    if strategy == "hybrid":
        options = {"scheme": "c"} | options
    return Alternative(strategy, num_ranks, num_ranks if strategy in ("columns", "spatial") else 1, options)


def options_of(alternative: Alternative) -> dict[str, Any]:
    """Arguments of the Strategy's class."""
    if alternative.strategy == "spatial":
        return {"num_tiles": alternative.per_replica}
    if alternative.strategy == "hybrid":
        return {"zero_stage": None, **alternative.options}
    return dict(alternative.options)


def task_of(net: Mapping[str, Any]) -> steps.Task:
    """What a suite's entry ``net`` names, to be trained.

    Args:
        net: ``name`` of a class of ``squall.models``, and its arguments.

    """
    arguments = dict(net)
    with torch.device("meta"):
        made = getattr(squall.models, arguments.pop("name", "AlexNet"))(**arguments)
    side = made.image_size
    return steps.Task(made, torch.empty(1, made.in_channels, side, side, device="meta"))


def _probes() -> list[Operation]:
    """Operations by which a roofline is known: forward and backward, and both sides of an update."""
    with Recorder() as recorder:
        for rows, inner, outer in ((64, 1024, 1024), (512, 512, 512)):
            first, second = torch.empty(rows, inner, device="meta"), torch.empty(inner, outer, device="meta")
            torch.mm(first, second)
        for channels, side, kernel in ((64, 32, 3), (192, 13, 3), (48, 27, 5)):
            image = torch.empty(8, channels, side, side, device="meta", requires_grad=True)
            weight = torch.empty(channels, channels, kernel, kernel, device="meta", requires_grad=True)
            torch.conv2d(image, weight, padding=kernel // 2).sum().backward()
        values = torch.empty(1 << 22, device="meta")
        values.add_(torch.empty(1 << 22, device="meta"), alpha=0.5)
        values.clone()
        torch.relu(values)
    found = [event.operation for event in recorder.events if isinstance(event, Compute)]
    least = 1 << 22  # sums and what fills gradients say nothing of the machine
    return [operation for operation in found if operation.flops or operation.num_bytes > least]
