"""Two hosts on one machine: network namespaces joined by a shaped link.

Needs root and ``iproute2``. ``tc``'s token bucket sets the rate; latency is the kernel's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """How ranks reach each other.

    Args:
        name: What tables call it.
        prefixes: For each rank, the command that puts a program on its host.
        environment: For each rank, what its process must be told.
        main_address: Address of rank 0.

    """

    name: str
    prefixes: tuple[tuple[str, ...], ...]
    environment: tuple[dict[str, str], ...]
    main_address: str


def loopback(num_ranks: int) -> Link:
    """All ranks on this host."""
    return Link("loopback", ((),) * num_ranks, ({"GLOO_SOCKET_IFNAME": "lo"},) * num_ranks, "127.0.0.1")


def why_not() -> str:
    """Why namespaces can't be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need the commands ip and tc (apt-get install iproute2)"
    probe = subprocess.run(["ip", "netns", "add", f"squall-probe-{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode:
        return f"ip netns add failed: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"squall-probe-{os.getpid()}"], check=True)
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")


@contextmanager
def shaped_pair(rate: str) -> Iterator[Link]:
    """Two hosts, joined by a link of ``rate`` in each direction.

    Args:
        rate: As ``tc`` writes it: ``"1gbit"``, ``"100mbit"``.

    Yields:
        The link. The namespaces are gone afterwards, whatever happened.

    Raises:
        RuntimeError: If a namespace or the link can't be made.

    """
    tag = f"sq{os.getpid()}"
    hosts = [f"{tag}-{rank}" for rank in range(2)]
    try:
        for host in hosts:
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "set", "lo", "up")
        _run("ip", "link", "add", "eth0", "netns", hosts[0], "type", "veth", "peer", "name", "eth0", "netns", hosts[1])
        for rank, host in enumerate(hosts):
            _run("ip", "-n", host, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", host, "link", "set", "eth0", "up")
            _run(
                *("tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf"),
                *("rate", rate, "burst", "256kb", "latency", "20ms"),
            )
        yield Link(
            name=rate,
            prefixes=tuple(("ip", "netns", "exec", host) for host in hosts),
            environment=({"GLOO_SOCKET_IFNAME": "eth0"},) * 2,
            main_address="10.77.0.1",
        )
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
