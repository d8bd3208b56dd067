"""Calibrate this machine for what is to be planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall.conf.suites.links import loopback, shaped_hosts, why_not

from . import steps
from .alternatives import Batch, alternatives
from .calibration import REGISTERED, Calibration
from .clusters import Cluster
from .events import Trace
from .predictions import trace_of
from .ranks import TimingRanks, timing_ranks


@contextmanager
def ranks_over(link: str, num_ranks: int) -> Iterator[TimingRanks]:
    """Ranks of this machine.

    Args:
        link: "loopback", or a rate as ``tc`` writes it, which makes a host of each.
        num_ranks: How many.

    Raises:
        MisconfigurationException: If hosts can't be made.

    """
    if link == "loopback":
        with timing_ranks(loopback(num_ranks)) as ranks:
            yield ranks
        return
    reason = why_not()
    if reason:
        raise MisconfigurationException(f"cluster.link={link} can't be made here: {reason}. Use cluster.link=loopback.")
    with shaped_hosts(link, num_ranks) as hosts, timing_ranks(hosts) as ranks:
        yield ranks


def calibrate(
    task: steps.Task,
    batch: Batch,
    link: str,
    num_ranks: int,
    downpour: Mapping[str, Any],
    path: Path | None = None,
    only: Sequence[str] | None = None,
) -> Cluster:
    """Measure what the plan of a task needs, as far as a file doesn't have it.

    Args:
        task: What is to be trained.
        batch: Images of a step.
        link: As of :func:`ranks_over`.
        num_ranks: How many.
        downpour: Options of Downpour.
        path: A file that is read if it is there, and written.
        only: Names of strategies that are looked at; ``None`` for all.

    Returns:
        This machine.

    Raises:
        MisconfigurationException: If the file is of another machine, or hosts can't be made.

    """
    calibration = Calibration.load(path) if path is not None and path.exists() else Calibration()
    wanted = [s for s in REGISTERED if only is None or s in only]
    together, alone = list[Trace](), list[Trace]()
    for alternative in alternatives(num_ranks, num_ranks, batch, downpour):
        if alternative.strategy not in wanted:
            continue
        try:
            (together if alternative.num_ranks > 1 else alone).append(
                trace_of(task, alternative, batch.of(alternative))
            )
        except MisconfigurationException:
            continue  # left out of the plan, with the reason
    missing = {o.key for trace in together for o in trace.operations} - set(calibration.operations)
    missing |= {o.key for trace in alone for o in trace.operations} - set(calibration.alone)
    left = [s for s in wanted if s not in calibration.overheads and (num_ranks > 1 or s == "single")]
    if not calibration.flops or link not in calibration.links or missing or left:
        with ranks_over(link, num_ranks) as ranks:
            if not calibration.flops:
                calibration.measure_roofline(ranks)
            if link not in calibration.links:
                calibration.measure_link(ranks)
            calibration.measure_operations(ranks, together)
            calibration.measure_operations(ranks, alone, together=False)
            calibration.measure_overheads(ranks, left)
        if path is not None:
            calibration.save(path)
    return calibration.cluster(link, num_ranks)
