"""Machines to plan for: what they compute with, how they reach each other, and what an hour of them costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .devices import Device, device_of
from .links import Link, Network, link_of

HERE = "here"
_KNOWN = ("name", "device", "num_nodes", "devices_per_node", "cores_per_node", "fabric", "link", "price_per_hour")


@dataclass(frozen=True)
class Cluster:
    """Machines that are all alike.

    Args:
        name: What tables call them.
        device: What each rank computes with.
        network: How many there are, and how they reach each other.
        price_per_hour: Of one machine, in euros; 0 for that of its devices.
        cores_per_node: Cores that serve ranks and their shards; 0 where ranks compute on devices of their own.
        overheads: By strategy, the seconds that one operation takes more than alone. Most operations of hybrid and
            Downpour are as under DDP and on one rank: theirs is what a message, or a push, takes.
        shard_seconds: That a shard and its worker take to push, apply and fetch a byte of parameters.

    """

    name: str
    device: Device
    network: Network
    price_per_hour: float = 0.0
    cores_per_node: int = 0
    overheads: Mapping[str, float] = field(default_factory=dict)
    shard_seconds: float = 0.0

    @property
    def num_ranks(self) -> int:
        """All devices."""
        return self.network.num_ranks

    @property
    def euros_per_hour(self) -> float:
        """Of all machines; 0 if nobody says."""
        own = self.price_per_hour or self.device.price_per_hour * self.network.devices_per_node
        return own * self.network.num_nodes

    def resized(self, num_nodes: int) -> Cluster:
        """The same with another number of machines."""
        return replace(self, network=replace(self.network, num_nodes=num_nodes))


def sizes_of(num_nodes: int | str) -> list[int]:
    """Read a number of machines, or a range of them in powers of two.

    Args:
        num_nodes: ``4``, or ``"1..4096"``.

    Raises:
        MisconfigurationException: If it is neither.

    Example:
        >>> sizes_of("1..12")
        [1, 2, 4, 8, 12]

    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(num_nodes))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if first < 1 or last < first:
        raise MisconfigurationException(
            f"cluster.num_nodes={num_nodes!r} must be a number like 4 or a range like 1..64."
        )
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == last else [*sizes, last]


def cluster_of(entry: Mapping[str, Any]) -> Cluster:
    """Read a file of ``conf/cluster``, of the smallest number of machines that it says.

    Args:
        entry: Its entries. ``fabric`` is the link between the devices of a machine, ``link`` that between machines.

    Raises:
        MisconfigurationException: If an entry makes no sense.

    """
    unknown = sorted(set(entry) - set(_KNOWN))
    if unknown:
        raise MisconfigurationException(f"cluster.{unknown[0]} is not known; a cluster has {', '.join(_KNOWN)}.")
    inside = link_of(entry["fabric"])
    between: Link = link_of(entry["link"])
    per_node = int(entry.get("devices_per_node") or 1)
    if per_node < 1:
        raise MisconfigurationException(f"cluster.devices_per_node={per_node} must be at least 1.")
    return Cluster(
        name=str(entry["name"]),
        device=device_of(entry["device"]),
        network=Network(sizes_of(entry["num_nodes"])[0], per_node, inside, between),
        price_per_hour=float(entry.get("price_per_hour") or 0),
        cores_per_node=int(entry.get("cores_per_node") or 0),
    )
