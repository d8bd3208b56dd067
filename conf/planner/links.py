"""What a message takes: latency and bandwidth of each collective, within a machine and between machines.

Figures of a link are those of one direction, while as much goes the other way. A collective is as fast as the better
of the algorithms that libraries have for it: a ring, which sends each byte twice but once per link, or a tree, which
needs few turns (Thakur et al. 2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .events import Send

_FURTHER = 0.5  # of a latency: what each message takes besides the first, while that is on its way; assumed
_PRESETS = Path(__file__).parent.parent / "link"


@dataclass(frozen=True)
class Link:
    """How one rank, or one machine, reaches others.

    Args:
        name: What tables call it.
        bandwidth: Bytes a second in each direction.
        latency: Seconds of a message of almost nothing.
        reduce_bandwidth: Bytes a second of an all-reduce's ring, in which ranks add up on the way; the same as
            ``bandwidth`` if left at 0.
        reduce_latency: Seconds of a turn of it, likewise.
        cpu_share: Of the time of a message, that the core which computes is kept from it.
        slowdown: How many times as long a message takes while ranks compute.
        is_shared: Whether the ranks of a machine send over one such link.

    """

    name: str
    bandwidth: float
    latency: float
    reduce_bandwidth: float = 0.0
    reduce_latency: float = 0.0
    cpu_share: float = 0.0
    slowdown: float = 1.0
    is_shared: bool = False

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0:
            raise MisconfigurationException(
                f"link {self.name}: bandwidth must be positive and latency no less than 0, not {self.bandwidth} and"
                f" {self.latency}."
            )

    def seconds(self, collective: str, num_bytes: float, num_ranks: int, num_messages: int = 1) -> float:
        """What a message takes.

        Args:
            collective: As of :class:`~squall.conf.planner.events.Send`.
            num_bytes: Likewise.
            num_ranks: That take part.
            num_messages: That a rank sends of a ``"pair"``.

        Example:
            >>> Link("1 GB/s", 1e9, 0.0).seconds("all_reduce", 1e9, 4)
            1.5

        """
        if num_ranks < 2 or not num_bytes:
            return 0.0
        share, rounds = (num_ranks - 1) / num_ranks, math.ceil(math.log2(num_ranks))
        whole = num_bytes / self.bandwidth
        if collective == "pair":
            return self.latency * (1 + _FURTHER * (num_messages - 1)) + whole
        if collective == "broadcast":
            return rounds * self.latency + whole  # in pieces, which follow each other down the tree
        if collective == "all_gather":
            return min((num_ranks - 1) * self.latency, 2 * rounds * self.latency) + share * whole
        added = num_bytes / (self.reduce_bandwidth or self.bandwidth)
        latency = self.reduce_latency or self.latency
        ring = 2 * (num_ranks - 1) * latency + 2 * share * added
        return min(ring, 2 * rounds * latency + 2 * added)


@dataclass(frozen=True)
class Network:
    """Machines, each with some devices.

    Args:
        num_nodes: Machines.
        devices_per_node: Devices of each.
        inside: Between devices of a machine; each of them has such a link.
        between: Of a machine to the others; its devices share it.

    """

    num_nodes: int
    devices_per_node: int
    inside: Link
    between: Link

    @property
    def num_ranks(self) -> int:
        """All devices."""
        return self.num_nodes * self.devices_per_node

    def link_of(self, num_ranks: int, spans: int = 1) -> Link:
        """The slowest link that a group of ranks needs."""
        return self.inside if (num_ranks - 1) * spans < self.devices_per_node else self.between

    def seconds(self, send: Send) -> float:
        """What a message takes.

        Args:
            send: Of a trace.

        """
        num_ranks, spans, size = send.num_ranks, send.spans, send.num_bytes
        if self.link_of(num_ranks, spans) is self.inside:
            link = self.inside
            shared = self.devices_per_node if link.is_shared else 1
            return link.seconds(send.collective, size * shared, num_ranks, send.num_messages)
        here = max(1, self.devices_per_node // spans)  # ranks of the group on a machine
        nodes = -(-num_ranks // here)
        if send.collective == "all_reduce":
            # Added up within each machine, a part on each device; then between machines; and all to all devices again.
            within = self.inside.seconds("all_reduce", size, here)
            return within + self.between.seconds("all_reduce", size * min(spans, self.devices_per_node), nodes)
        if send.collective == "pair":  # of what a rank sends to all others, the part that leaves the machine
            out = size * (num_ranks - here) / max(num_ranks - 1, 1)
            senders = 1 if send.alone else here
            leaving = self.between.seconds("pair", out * senders, num_ranks, send.num_messages)
            return max(leaving, self.inside.seconds("pair", size, num_ranks, send.num_messages))
        return self.inside.seconds(send.collective, size, here) + self.between.seconds(send.collective, size, nodes)


def link_of(entry: str | Mapping[str, Any]) -> Link:
    """Read a link: the name of a file of ``conf/link``, or its entries.

    Args:
        entry: ``"25gbit"``, or ``gbit``, ``latency_us`` and, if wanted, ``efficiency``, ``cpu_share``, ``is_shared``.

    Raises:
        MisconfigurationException: If there is none of that name, or an entry is not known.

    Example:
        >>> link_of({"gbit": 8, "latency_us": 10}).bandwidth
        1000000000.0

    """
    name, entries = "link", entry
    if isinstance(entry, str):
        name, path = entry, _PRESETS / f"{entry}.yaml"
        if not path.is_file():
            raise MisconfigurationException(f"cluster.link={entry!r} is none of {', '.join(presets())}.")
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(entries, Mapping)
    known = {"gbit", "latency_us", "efficiency", "cpu_share", "is_shared"}
    unknown, missing = sorted(set(entries) - known), sorted({"gbit", "latency_us"} - set(entries))
    if unknown or missing:
        raise MisconfigurationException(
            f"link {name}: {', '.join(unknown or missing)} {'is not known' if unknown else 'is missing'};"
            f" a link has {', '.join(sorted(known))}."
        )
    return Link(
        name,
        bandwidth=float(entries["gbit"]) * 1e9 / 8 * float(entries.get("efficiency", 1.0)),
        latency=1e-6 * float(entries["latency_us"]),
        cpu_share=float(entries.get("cpu_share", 0.0)),
        is_shared=bool(entries.get("is_shared", False)),
    )


def presets() -> list[str]:
    """The names of links that there are files for."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))
