"""Which address and which network interface a host talks to the others of its run by."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_OUTSIDE = "192.0.2.1"  # nobody's; nothing is sent there


def resolve(name: str) -> str:
    """The numerical address of rank 0's host.

    Args:
        name: What a launcher calls it.

    Raises:
        MisconfigurationException: If this host doesn't know the name.

    Example:
        >>> resolve("127.0.0.1")
        '127.0.0.1'

    """
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise MisconfigurationException(
            f"{socket.gethostname()} doesn't know rank 0's host by the name {name!r} ({error}). Set the environment"
            " variable MASTER_ADDR, on every host, to an address of rank 0's host that all of them can reach."
        ) from error


def served(name: str) -> str:
    """Where rank 0 listens for ranks of other hosts: its name may be one of its loopback addresses to itself.

    Args:
        name: What a launcher calls rank 0's host.

    Raises:
        MisconfigurationException: If this host doesn't know the name.

    """
    found = resolve(name)
    if name not in ("localhost", found) and ipaddress.ip_address(found).is_loopback:
        return _source_towards(_OUTSIDE) or found
    return found


def facing(name: str) -> str:
    """The network interface of this host by which it reaches rank 0's, or is reached if it is that host.

    Args:
        name: What a launcher calls rank 0's host.

    Returns:
        The interface's name; empty where the system doesn't tell.

    Raises:
        MisconfigurationException: If this host doesn't know the name, or no way there.

    """
    address = served(name)
    source = _source_towards(address)
    if source is None:
        raise MisconfigurationException(
            f"{socket.gethostname()} has no route to rank 0's host, {address}. Set the environment variable MASTER_ADDR"
            " to an address of it that this host can reach."
        )
    return _interface_of(source)


def _source_towards(address: str) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing; the system says which interface it would take
        return str(probe.getsockname()[0])
    return None


def _interface_of(address: str) -> str:
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:  # lo answers for all of 127.0.0.0/8
        return next((name for name in ("lo", "lo0") if name in _names()), "")
    if not sys.platform.startswith("linux"):
        return ""
    if ":" in address:
        wanted = ipaddress.IPv6Address(address.partition("%")[0]).exploded.replace(":", "")
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((line[-1] for line in lines if line[0] == wanted), "")
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in _names():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return ""


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
