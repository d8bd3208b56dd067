"""Hosts on one machine: network namespaces joined by shaped links.

Needs root and ``iproute2``. ``tc``'s token bucket sets the rate; latency is the kernel's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LEAST_BURST = 16 << 10  # bytes: a few packets


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


def _burst(rate: str) -> int:
    """Bytes that may leave at once: no more than a link carries in two milliseconds, or small messages cost nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if found is None:
        raise RuntimeError(f"a link's rate is written as 1gbit, 100mbit or 500kbit, not {rate!r}")
    bits = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]
    return max(round(2e-3 * bits / 8), _LEAST_BURST)


@contextmanager
def shaped_hosts(rate: str, num_hosts: int = 2) -> Iterator[Link]:
    """Hosts that are joined by links of ``rate`` in each direction: two by a wire, more by a switch.

    Args:
        rate: As ``tc`` writes it: ``"1gbit"``, ``"100mbit"``.
        num_hosts: How many.

    Yields:
        The link. The namespaces are gone afterwards, whatever happened.

    Raises:
        RuntimeError: If a namespace or a link can't be made.

    """
    tag = f"sq{os.getpid()}"
    hosts = [f"{tag}-{rank}" for rank in range(num_hosts)]
    switch = f"{tag}-switch"
    try:
        for host in hosts if num_hosts == 2 else [*hosts, switch]:
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "set", "lo", "up")
        if num_hosts == 2:
            _join(hosts[0], hosts[1], "eth0")
        else:
            _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "bridge", "up")
            for rank, host in enumerate(hosts):
                _join(host, switch, f"port{rank}")
                _run("ip", "-n", switch, "link", "set", f"port{rank}", "master", "bridge", "up")
        for rank, host in enumerate(hosts):
            _run("ip", "-n", host, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", host, "link", "set", "eth0", "up")
            _run(
                *("tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf"),
                *("rate", rate, "burst", str(_burst(rate)), "latency", "20ms"),
            )
        yield Link(
            name=rate,
            prefixes=tuple(("ip", "netns", "exec", host) for host in hosts),
            environment=({"GLOO_SOCKET_IFNAME": "eth0"},) * num_hosts,
            main_address="10.77.0.1",
        )
    finally:
        for host in [*hosts, switch]:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def _join(host: str, other: str, port: str) -> None:
    _run("ip", "link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", other)


def set_link(link: Link, rank: int, state: str) -> None:
    """Take one host's end of a link ``"down"``, or ``"up"`` again.

    Args:
        link: Of :func:`shaped_hosts`.
        rank: Whose end.
        state: Which.

    """
    _run("ip", "-n", link.prefixes[rank][3], "link", "set", "eth0", state)
