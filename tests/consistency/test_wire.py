"""Messages behind a token: nothing before it is parsed, and whatever else arrives costs its sender the connection."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.consistency import wire
from squall.consistency.wire import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    TOKEN_BYTES,
    Blocking,
    Buffered,
    WireError,
    connect,
    new_token,
    pack,
)  # fmt: skip

TOKEN = bytes(range(TOKEN_BYTES))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.tuples(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.binary(max_size=40)), max_size=4
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


def hear(reader: Buffered, sender: socket.socket, data: bytes, cuts: list[int]) -> list[Any]:
    """Send data in pieces, and take what has become whole after each."""
    heard, at = [], 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        if end > at:
            sender.sendall(data[at:end])
            heard += reader.receive()
        at = end
    return heard


@given(MESSAGES, st.lists(st.integers(0, 999), max_size=6))
@settings(max_examples=100, deadline=None)
def test_messages_arrive_whole_however_they_are_cut(messages: list[Any], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Buffered(ours, TOKEN)
        assert hear(reader, theirs, TOKEN + b"".join(pack(*message) for message in messages), cuts) == messages
        assert reader.trusted


def test_a_slow_listener_gets_everything_and_holds_nobody_up(ends: Any) -> None:
    writer, reader = Buffered(ends[0]), Blocking(ends[1])
    payload = random.Random(0).randbytes(3 << 20)
    for number in range(3):
        writer.send({"n": number}, payload)
    assert writer.wants_to_write  # more than a socket takes; and yet it came back
    for number in range(3):
        done = threading.Event()

        def flush(done: threading.Event = done) -> None:
            while not done.is_set():
                writer.flush()

        thread = threading.Thread(target=flush)
        thread.start()
        header, received = reader.receive()
        done.set()
        thread.join()
        assert (header, bytes(received)) == ({"n": number}, payload)
    assert not writer.wants_to_write


def test_blocking_sends_and_receives_large_payloads(ends: Any) -> None:
    one, other = Blocking(ends[0]), Blocking(ends[1])
    payload = random.Random(1).randbytes(1 << 20)
    thread = threading.Thread(target=one.send, args=({"op": "x"}, payload))
    thread.start()
    assert other.receive() == ({"op": "x"}, bytearray(payload))
    thread.join()
    one.close()
    one.close()  # may be called twice
    with pytest.raises(ConnectionError):
        other.receive()


# ---------------------------------------------------------------------- the token


@given(st.integers(0, TOKEN_BYTES * 8 - 1), st.binary(max_size=60), st.lists(st.integers(0, 99), max_size=4))
@settings(max_examples=60, deadline=None)
def test_with_a_wrong_token_nothing_after_it_is_parsed(bit: int, after: bytes, cuts: list[int]) -> None:
    wrong = bytearray(TOKEN)
    wrong[bit // 8] ^= 1 << bit % 8
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.MonkeyPatch.context() as patch:
        parsed: list[Any] = []
        patch.setattr(wire, "parse_header", lambda text: parsed.append(text) or {})
        patch.setattr(wire, "check_lengths", lambda data: parsed.append(data) or (0, 0))
        reader = Buffered(ours, TOKEN)
        with pytest.raises(WireError, match="token"):
            hear(reader, theirs, bytes(wrong) + after, cuts)
        assert not parsed
        assert not reader.trusted


def test_before_the_whole_token_is_there_nothing_is_parsed(ends: Any) -> None:
    reader = Buffered(ends[0], TOKEN)
    ends[1].sendall(TOKEN[:-1])
    assert reader.receive() == []
    assert not reader.trusted
    ends[1].close()
    with pytest.raises(ConnectionError):
        reader.receive()


def test_tokens_are_compared_in_constant_time(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(wire.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    reader = Buffered(ends[0], TOKEN)
    ends[1].sendall(TOKEN)
    reader.receive()
    assert compared == [(TOKEN, TOKEN)]
    assert len({new_token() for _ in range(100)}) == 100
    assert len(new_token()) == TOKEN_BYTES


def test_connect_shows_the_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = connect(listener.getsockname()[:2], TOKEN)
        sock, _ = listener.accept()
        connection.send({"op": "hello"})
        reader = Buffered(sock, TOKEN)
        heard: list[Any] = []
        sock.setblocking(True)  # the test has nothing else to do
        while not heard:
            heard = reader.receive()
        assert heard == [({"op": "hello"}, b"")]
        connection.close()
        reader.close()


# ---------------------------------------------------------------------- what is no message

SPOILED = {
    "a header of no JSON": struct.pack("<IQ", 3, 0) + b"{a}",
    "no header": struct.pack("<IQ", 0, 0),
    "a header that is a list": struct.pack("<IQ", 2, 0) + b"[]",
    "a header that is a number": struct.pack("<IQ", 1, 0) + b"1",
    "no UTF-8": struct.pack("<IQ", 2, 0) + b"\xff\xfe",
    "lists that could be read": struct.pack("<IQ", 605, 0) + b'{"":' + b"[" * 300 + b"]" * 300 + b"}",
    "objects that could be read": struct.pack("<IQ", 1501, 0) + b'{"":' * 300 + b"1" + b"}" * 300,
    "depth": struct.pack("<IQ", 200_000, 0) + b"[" * 200_000,
    "a huge number": struct.pack("<IQ", 5_005, 0) + b'{"":' + b"1" * 5_000 + b"}",
    "an oversized header": struct.pack("<IQ", MAX_HEADER_BYTES + 1, 0),
    "an oversized payload": struct.pack("<IQ", 2, MAX_PAYLOAD_BYTES + 1) + b"{}",
    "all ones": b"\xff" * 12,
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_message_ends_the_connection(name: str, ends: Any) -> None:
    ends[1].sendall(SPOILED[name])
    with pytest.raises(WireError):
        Buffered(ends[0]).receive()


@pytest.mark.parametrize("name", SPOILED)
def test_nor_does_one_who_waits_take_it(name: str, ends: Any) -> None:
    ends[1].sendall(SPOILED[name])
    with pytest.raises(WireError):
        Blocking(ends[0]).receive()


def test_who_knows_how_much_is_to_come_takes_that_and_no_more(ends: Any) -> None:
    ends[1].sendall(struct.pack("<IQ", 2, MAX_PAYLOAD_BYTES + 1) + b"{}")
    assert Blocking(ends[0]).receive_header() == ({}, MAX_PAYLOAD_BYTES + 1)  # all of a shard, say
    ends[1].sendall(pack({}, b"1234") + pack({}, b"12345"))
    assert Blocking(ends[0]).receive(most=4) == ({}, b"1234")
    with pytest.raises(WireError, match="larger"):
        Blocking(ends[0]).receive(most=4)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such option")
@pytest.mark.parametrize("kind", [Blocking, Buffered])
def test_the_kernel_gives_a_silent_host_up_within_minutes(kind: Any) -> None:
    """One that has lost its power says nothing; by default what is under way to it is tried again for 15 minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        kind(sock)
        assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 180_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_lengths_are_refused_before_anything_of_that_size_is_awaited(ends: Any) -> None:
    """A peer that announces 2**64 bytes is gone at once, and not when memory is."""
    reader = Buffered(ends[0])
    ends[1].sendall(struct.pack("<IQ", 2, 2**64 - 1))
    with pytest.raises(WireError, match="larger than any of ours"):
        reader.receive()


@given(
    st.binary(max_size=200) | st.lists(st.sampled_from([pack({"a": 1}, b"x"), b"\0", b"{}"]), max_size=5).map(b"".join)
)
@settings(max_examples=200, deadline=None)
def test_garbage_is_a_message_nothing_yet_or_the_end(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Buffered(ours)
        if data:
            theirs.sendall(data)
        else:
            theirs.close()
        try:
            messages = reader.receive()
        except ConnectionError:
            return
        for header, payload in messages:
            json.dumps(header)
            assert isinstance(payload, bytes)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


TRICKY = st.recursive(
    st.integers() | st.text(st.sampled_from('[]{}\\"a\u00e9'), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('[{"\\'), max_size=2), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=2), TRICKY, max_size=4), st.booleans())
def test_depth_is_counted_outside_of_text(header: dict[str, Any], is_ascii: bool) -> None:
    assert wire._depth(json.dumps(header, ensure_ascii=is_ascii).encode()) == depth_of(header)


@given(st.integers(0, 400), st.sampled_from(['{"a":', '{"a":[', '{"[\\"":']), st.text('[]{}:,\\" 1', max_size=12))
@settings(max_examples=300, deadline=None)
def test_headers_are_read_whole_or_refused(depth: int, opening: str, garbage: str) -> None:
    closing = "]}" if opening.endswith("[") else "}"
    for text in (opening * depth + "{}" + closing * depth, opening * depth + garbage + closing * depth):
        try:
            header = wire.parse_header(text.encode())
        except WireError:
            continue
        assert depth_of(header) <= wire.MAX_HEADER_DEPTH
        json.dumps(header)


def test_a_header_of_much_that_is_not_deep_is_read() -> None:
    header = {"parts": [[[]] * 3] * 50_000, "text": "[" * 1000}
    assert wire.parse_header(json.dumps(header).encode()) == header


def test_a_text_without_an_end_is_refused_at_once() -> None:
    with pytest.raises(WireError):  # and not after the square of its length
        wire.parse_header(b"[" * 300 + b'"' + b'\\"' * 1_000_000)
