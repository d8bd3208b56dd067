"""Messages between the processes of an asynchronous run: a JSON header and raw bytes, behind a token.

Nothing that arrives is ever unpickled. Whoever connects first sends the job's token, which is compared in constant
time before a single byte after it is looked at; a header or payload larger than agreed ends the connection.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import socket
import struct
from collections.abc import Mapping
from typing import Any

TOKEN_BYTES = 32
MAX_HEADER_BYTES = 4 << 20
MAX_HEADER_DEPTH = 200  # of lists and objects in each other, far from where Python gives up
MAX_PAYLOAD_BYTES = 1 << 32
MAX_CARRIED_BYTES = 1 << 42  # to an end that knows how much is to come, and where it belongs: all of a shard, say
_LENGTHS = struct.Struct("<IQ")
_SILENT_SECONDS = 20  # of a peer, after which the kernel asks whether it is there
_NUM_PROBES = 6
_QUOTED = re.compile(rb'"(?:[^"\\]+|\\.)*"?', re.DOTALL)  # never fails, so what has no end costs no more
_BRACKET = re.compile(rb"[\[\]{}]")

Header = dict[str, Any]


class WireError(ConnectionError):
    """What arrived is no message of this protocol; the connection is of no more use."""


def new_token() -> bytes:
    """A secret for one job."""
    return secrets.token_bytes(TOKEN_BYTES)


def pack(header: Mapping[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """One message as it goes over the wire, for payloads small enough to be copied."""
    return _head(header, len(payload)) + bytes(payload)


def parse_header(text: bytes | bytearray | memoryview) -> Header:
    """Read a header; anything but a JSON object is refused, and one that is nested deeper than any of ours."""
    text = bytes(text)
    if text.count(b"[") + text.count(b"{") > MAX_HEADER_DEPTH and _depth(text) > MAX_HEADER_DEPTH:
        raise WireError(f"a header is nested more than {MAX_HEADER_DEPTH} deep")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise WireError(f"a header is a {type(header).__name__}, not an object")
    return header


def _depth(text: bytes) -> int:
    """How deep the lists and objects of a JSON text are nested."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_QUOTED.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def prepare(sock: socket.socket) -> None:
    """Let a connection send at once, and let the kernel find out if the other end is gone and could not say so."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Keepalive says nothing while data is under way, so that has a limit of its own, in milliseconds.
    options = {
        "TCP_KEEPIDLE": _SILENT_SECONDS, "TCP_KEEPINTVL": _SILENT_SECONDS, "TCP_KEEPCNT": _NUM_PROBES,
        "TCP_USER_TIMEOUT": 1000 * _SILENT_SECONDS * (_NUM_PROBES + 1),
    }  # fmt: skip
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Blocking:
    """One end of a connection for code that waits: a worker's, a shard's.

    Args:
        sock: A connected stream socket, which this object now owns.

    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        prepare(sock)

    def send(self, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send one message."""
        if len(payload) < 1 << 16:
            self.sock.sendall(pack(header, payload))
        else:
            self.sock.sendall(_head(header, len(payload)))
            self.sock.sendall(payload)

    def receive(self, most: int = MAX_PAYLOAD_BYTES) -> tuple[Header, bytearray]:
        """Wait for one message.

        Args:
            most: Bytes of payload that may come; more are not taken.

        Returns:
            Its header and its payload.

        Raises:
            ConnectionError: If the other end is gone, or sends what is no message.

        """
        header, num_payload = self.receive_header(most)
        return header, self._exactly(num_payload)

    def receive_header(self, most: int = MAX_CARRIED_BYTES) -> tuple[Header, int]:
        """Wait for one message's header, and take its payload by :meth:`receive_into`, to where it belongs.

        Args:
            most: Bytes of payload that may come.

        Returns:
            The header, and the number of bytes that come behind it.

        """
        num_header, num_payload = check_lengths(self._exactly(_LENGTHS.size), most)
        return parse_header(self._exactly(num_header)), num_payload

    def receive_into(self, view: memoryview) -> None:
        """Fill memory with what comes."""
        while view:
            received = self.sock.recv_into(view)
            if not received:
                raise ConnectionError("the other end has closed the connection")
            view = view[received:]

    def _exactly(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self.receive_into(memoryview(buffer))
        return buffer

    def close(self) -> None:
        """Hang up. May be called twice."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def _head(header: Mapping[str, Any], num_payload: int) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), num_payload) + text


def check_lengths(data: bytes | bytearray, most: int = MAX_PAYLOAD_BYTES) -> tuple[int, int]:
    """Read the two lengths before a message, and refuse what nobody here would send."""
    num_header, num_payload = _LENGTHS.unpack(data)
    if num_header > MAX_HEADER_BYTES or num_payload > most:
        raise WireError(f"a message of {num_header} + {num_payload} bytes is larger than any of ours")
    return num_header, num_payload


def connect(address: tuple[str, int], token: bytes, timeout: float = 30.0) -> Blocking:
    """Connect to a listener of this job.

    Args:
        address: Host and port.
        token: The job's.
        timeout: Seconds to wait for the connection; nothing after that times out.

    """
    sock = socket.create_connection(address, timeout=timeout)
    sock.settimeout(None)
    sock.sendall(token)
    return Blocking(sock)


class Buffered:
    """One end of a connection for an event loop: never waits, neither for a peer to speak nor for one to listen.

    Args:
        sock: A connected stream socket, which this object now owns.
        token: What the other end must send first; None for a connection made by :func:`socket.socketpair`.

    """

    def __init__(self, sock: socket.socket, token: bytes | None = None) -> None:
        sock.setblocking(False)
        prepare(sock)
        self.sock = sock
        self.trusted = token is None
        self._token = token
        self._incoming = bytearray()
        self._outgoing = bytearray()

    @property
    def wants_to_write(self) -> bool:
        """Whether something waits for the other end to take it."""
        return bool(self._outgoing)

    def send(self, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send one message as far as the other end takes it now; :meth:`flush` sends the rest."""
        self._outgoing += pack(header, payload)
        self.flush()

    def flush(self) -> None:
        """Send what waits. A peer that is gone is noticed by :meth:`receive`."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._outgoing:
                sent = self.sock.send(self._outgoing)
                del self._outgoing[:sent]

    def receive(self) -> list[tuple[Header, bytes]]:
        """Take the messages that have arrived whole.

        Raises:
            ConnectionError: If the other end is gone.
            WireError: If it has not shown the token, or sent what is no message.

        """
        with contextlib.suppress(BlockingIOError):
            data = self.sock.recv(1 << 20)
            if not data:
                raise ConnectionError("the other end has closed the connection")
            self._incoming += data
        if not self.trusted and not self._check_token():
            return []
        messages = []
        while len(self._incoming) >= _LENGTHS.size:
            num_header, num_payload = check_lengths(self._incoming[: _LENGTHS.size])
            end = _LENGTHS.size + num_header + num_payload
            if len(self._incoming) < end:
                break
            middle = _LENGTHS.size + num_header
            header = parse_header(self._incoming[_LENGTHS.size : middle])
            messages.append((header, bytes(self._incoming[middle:end])))
            del self._incoming[:end]
        return messages

    def _check_token(self) -> bool:
        if len(self._incoming) < TOKEN_BYTES:
            return False
        shown = bytes(self._incoming[:TOKEN_BYTES])
        assert self._token is not None
        if not hmac.compare_digest(shown, self._token):
            raise WireError("it does not hold the job's token")
        del self._incoming[:TOKEN_BYTES]
        self.trusted = True
        return True

    def detach(self) -> socket.socket:
        """Give the socket away, in a forked process that is to serve it."""
        return self.sock.dup()

    def close(self) -> None:
        """Hang up."""
        self.sock.close()
