"""The process beside the workers: whatever one peer sends, the others' run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from squall.consistency import host as hosts
from squall.consistency import snapshot
from squall.consistency.client import Client, RunFailedError
from squall.consistency.events import from_pairs
from squall.consistency.hosting import HostProcess
from squall.consistency.jobs import Address
from squall.consistency.memory import Segment
from squall.consistency.optimizers import carry, carry_groups, try_state
from squall.consistency.plan import ParameterInfo, StateEntry, make_plan
from squall.consistency.replica import Replica
from squall.consistency.rows import Rows
from squall.consistency.shard import ShardSpec
from squall.consistency.staleness import MEAN_SQUARE, StalenessRule
from squall.consistency.updates import SliceMemory
from squall.consistency.wire import MAX_HEADER_DEPTH, TOKEN_BYTES, Blocking, pack

from .loops import OPTIONS, LoopInAThread


def is_dropped(sock: socket.socket) -> bool:
    """Wait for the other end to hang up, reading whatever it says before."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@given(st.binary(min_size=TOKEN_BYTES, max_size=80))
@settings(max_examples=30, deadline=None)
def test_strangers_are_dropped(loop: LoopInAThread, data: bytes) -> None:
    with loop.raw() as sock:
        sock.sendall(data)
        assert is_dropped(sock)
    assert loop.still_serves()["num_live"] == 1


@given(st.binary(min_size=12, max_size=80))
@settings(max_examples=30, deadline=None)
def test_garbage_behind_the_token_is_dropped(loop: LoopInAThread, data: bytes) -> None:
    with loop.raw() as sock:
        sock.sendall(loop.address.token + data)
        sock.shutdown(socket.SHUT_WR)
        assert is_dropped(sock)
    loop.still_serves()


def test_an_oversized_message_is_dropped_at_its_first_bytes(loop: LoopInAThread) -> None:
    for lengths in ((1 << 31, 0), (2, 1 << 60)):
        with loop.raw() as sock:
            sock.sendall(loop.address.token + struct.pack("<IQ", *lengths))
            assert is_dropped(sock)
    loop.still_serves()


def test_a_connection_reset_in_the_middle_of_the_token_or_of_a_message_is_forgotten(loop: LoopInAThread) -> None:
    for data in (b"", loop.address.token[:5], loop.address.token, loop.address.token + pack({"op": "hello"})[:-1]):
        sock = loop.raw()
        sock.sendall(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() is a reset
        sock.close()
        loop.still_serves()


def test_a_connection_that_stays_half_open_is_dropped_after_a_while(
    loop: LoopInAThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_SILENT_SECONDS", 0.2)
    with loop.raw() as silent, loop.raw() as half:
        half.sendall(loop.address.token[:7])
        assert is_dropped(silent)
        assert is_dropped(half)
    loop.still_serves()


# ---------------------------------------------------------------------- messages of the right form

OPERATIONS = [
    "hello", "alive", "meet", "share", "join", "epoch", "order", "lease", "gate", "await", "commit", "fetch", "done",
    "return", "leave", "snapshot", "release", "buffers", "report", "events", "handle", "", "__init__", "no such",
]  # fmt: skip
FIELDS = [
    "rank", "run", "mailbox", "epoch", "num_batches", "queue", "last", "version", "tickets", "slot", "base",
    "base_buffer", "absent", "fetch", "buffer", "hyper", "hyper_version", "buffers", "key", "kind", "value", "write",
    "id",
]  # fmt: skip
ODD = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.sampled_from([1e400, -1e400, float("nan"), 0.5])
    | st.text(max_size=3) | st.sampled_from(["\ud800", "a\0b", "/", "../x"])
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
TICKETS = st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), max_size=3)
HEADERS = st.builds(
    lambda operation, fields, tickets: {"op": operation, "id": 1, "tickets": tickets, **fields},
    st.sampled_from(OPERATIONS) | VALUES,
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=7),
    TICKETS,
)


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=24)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_odd_requests_drop_their_peer_and_nobody_else(loop: LoopInAThread, messages: list[Any], greets: bool) -> None:
    before = loop.still_serves()
    with loop.raw() as sock:
        sock.sendall(loop.address.token)
        hello = {"op": "hello", "rank": 5, "run": loop.run["run"], "id": 0}
        data = pack(hello) if greets else b""
        for header, payload in messages:
            rank = header.get("rank")
            if header["op"] == "hello" and isinstance(rank, (int, float, str)) and rank in (0, "0", False):
                continue  # that would be the witness itself, come again
            if header["op"] in ("leave", "order", "meet", "await", "snapshot"):
                header["id"] = 2
            text = json.dumps(header).encode()
            data += struct.pack("<IQ", len(text), len(payload)) + text + payload
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert is_dropped(sock)
    after = loop.still_serves()
    assert after["num_live"] == 1
    assert after["version"] >= before["version"]


COMMIT = {"op": "commit", "slot": 0, "base": 0, "base_buffer": 0, "absent": [], "fetch": None, "tickets": []}
BAD = {
    "no rank": {"op": "hello", "run": 1},
    "no run": {"op": "hello", "rank": 1},
    "a rank of no number": {"op": "hello", "rank": [], "run": 1},
    "another rank": {"op": "hello", "rank": 6, "run": 1},
    "an infinite rank": {"op": "hello", "rank": 1e400, "run": 1},
    "an infinite run": {"op": "hello", "rank": 1, "run": 1e400},
    "an infinite epoch": {"op": "lease", "epoch": 1e400},
    "a mailbox of no name": {"op": "join", "mailbox": "\ud800"},
    "a mailbox of another's": {"op": "join", "mailbox": "squall-1-1-abcdef-w0.0"},
    "a mailbox of zeros": {"op": "join", "mailbox": "a\0b"},
    "no slot": {key: value for key, value in COMMIT.items() if key != "slot"},
    "a slot that is none": {**COMMIT, "slot": 99},
    "a slot of no number": {**COMMIT, "slot": "0"},
    "a buffer that is none": {**COMMIT, "fetch": 99},
    "absent of no list": {**COMMIT, "absent": 5},
    "absent of lists": {**COMMIT, "absent": [[]]},
    "no tickets": {key: value for key, value in COMMIT.items() if key != "tickets"},
    "tickets of one number": {**COMMIT, "tickets": [[0]]},
    "a push from the future": {**COMMIT, "base": 10**6},
    "a fetch to nowhere": {"op": "fetch"},
    "a fetch to a buffer that is none": {"op": "fetch", "buffer": -1},
    "a version of no number": {"op": "await", "version": []},
    "an order of no number": {"op": "order", "epoch": 3, "num_batches": "a"},
    "an order of more than it has": {"op": "order", "epoch": 3, "num_batches": 100},
    "an order of more than there can be": {"op": "order", "epoch": 3, "num_batches": 1 << 61},
    "a meeting of no name": {"op": "meet", "kind": "all"},
    "no such thing": {"op": "explode"},
    "an operation of no name": {"op": ["commit"]},
}


def enter(loop: LoopInAThread, rank: int) -> tuple[socket.socket, Blocking]:
    sock = loop.raw()
    sock.sendall(loop.address.token)
    connection = Blocking(sock)
    loop.ask(connection, "hello", rank=rank, run=loop.run["run"])
    mailbox = f"{loop.run['name']}-w{rank}.{os.urandom(4).hex()}"
    Segment(mailbox, 64)
    loop.ask(connection, "join", mailbox=mailbox)
    return sock, connection


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_drops_its_peer_and_changes_nothing(loop: LoopInAThread, name: str) -> None:
    before = loop.still_serves()
    sock, connection = enter(loop, 5)
    with sock:
        connection.send({"id": 8, **BAD[name]})
        sock.settimeout(5.0)
        assert is_dropped(sock)
    after = loop.still_serves()
    assert {**after, "num_joined": 0} == {**before, "num_joined": 0}


@pytest.mark.parametrize("depth", [150, 300, 900, 960, 970, 990, 2000, 100_000])
def test_a_deep_value_harms_nobody(loop: LoopInAThread, depth: int) -> None:
    """As deep as can be read and not written, say."""
    sock, _ = enter(loop, 5)
    with sock:
        text = b'{"op":"share","key":"k","id":2,"value":' + b"[" * depth + b"]" * depth + b"}"
        sock.sendall(struct.pack("<IQ", len(text), 0) + text)
        sock.settimeout(5.0)
        if depth < MAX_HEADER_DEPTH:
            assert Blocking(sock).receive()[0]["parts"]
        else:
            assert is_dropped(sock)
    loop.still_serves()


def test_an_error_that_nobody_thought_of_costs_its_peer_alone(
    loop: LoopInAThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = loop.host._run
    assert run is not None
    monkeypatch.setattr(run.coordinator, "_on_gate", lambda *args: {}["no such"])
    sock, connection = enter(loop, 5)
    with sock:
        connection.send({"op": "gate", "id": 8})
        sock.settimeout(5.0)
        assert is_dropped(sock)
    loop.still_serves()
    assert "KeyError: 'no such'" in capsys.readouterr().err


def test_a_batch_named_twice_counts_once(loop: LoopInAThread) -> None:
    before = loop.still_serves()
    sock, connection = enter(loop, 5)
    with sock:
        ticket = loop.ask(connection, "lease", epoch=0)["ticket"]
        connection.send({**COMMIT, "id": 8, "tickets": [ticket, ticket]})
        sock.settimeout(5.0)
        assert is_dropped(sock)
    after = loop.still_serves()
    assert (after["version"], after["num_samples"]) == (before["version"], before["num_samples"])
    assert after["num_reissued"] == before["num_reissued"] + 1


def test_a_parked_requests_fault_is_its_own(loop: LoopInAThread) -> None:
    """What waits is looked at again when others speak; it must not be they who pay for it."""
    run = loop.host._run
    assert run is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.coordinator._replay, "_schedule", from_pairs([["lease", 3]]))
        sock, connection = enter(loop, 5)
        with sock:
            with contextlib.suppress(OSError):  # it may be dropped before all is said
                for header in ({**COMMIT, "slot": None}, {"op": "fetch"}, {**COMMIT, "base": None}):
                    connection.send({"id": 8, **header})
            sock.settimeout(5.0)
            assert is_dropped(sock)
    loop.still_serves()


# ---------------------------------------------------------------------- a real process, with shards


class RealRun:
    """A host process with shards, and a worker that trains.

    Args:
        process: The host.
        rule: What to do about staleness.

    """

    def __init__(self, process: HostProcess, rule: str = "none") -> None:
        self.process = process
        opened = process.request({"op": "open", "address": "127.0.0.1"})
        self.address = Address("127.0.0.1", opened["port"], bytes.fromhex(opened["token"]))
        self.run = process.request({"op": "run", "options": OPTIONS})
        self.parameters = [nn.Parameter(torch.zeros(6, dtype=torch.float64))]
        optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.rule = StalenessRule(rule)
        state = try_state(optimizer, optimizer.param_groups[0], (5,), torch.float64)
        if self.rule.compensates:
            state.append(StateEntry(MEAN_SQUARE, "like", (), torch.float64))
        info = ParameterInfo((6,), torch.float64, 0, 0, tuple(state))
        self.plan = make_plan([info], [True], 2, lambda n, dtype: n * dtype.itemsize)
        sizes = [slice_.num_bytes for slice_ in self.plan.slices]
        names = process.request({"op": "memory", "num_bytes": sizes})["names"]
        memories = [SliceMemory(Segment(name), slice_) for name, slice_ in zip(names, self.plan.slices, strict=True)]
        snapshot.fill(memories, Rows(self.parameters), [optimizer])
        num_buffers = 3 if self.rule.compensates else 2
        spec = ShardSpec(self.plan, (carry(optimizer),), carry_groups([optimizer]), self.rule, "fp32", num_buffers)
        process.request({"op": "go", "version": 0}, pickle.dumps(spec))
        self.client = Client(self.address, 0, self.run["run"], 1.0)
        self.replica = Replica(self.client, self.plan, self.parameters, self.run["name"], num_buffers)
        self.replica.join()

    @property
    def shards(self) -> list[int]:
        return list(self.process.request({"op": "shards"})["pids"])

    def push(self, value: float, land: bool = True) -> None:
        gradient = torch.full((6,), value, dtype=torch.float64)
        assert self.replica.push([gradient], [], True).applied
        if land:
            assert self.replica.land()

    def end(self) -> None:
        self.replica.close()
        self.client.close()
        self.process.request({"op": "end"})


@pytest.fixture(scope="module")
def process() -> Iterator[HostProcess]:
    running = HostProcess()
    yield running
    children = psutil.Process(running.process.pid).children()
    running.close()
    assert running.process.returncode == 0
    assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.fixture
def real(process: HostProcess) -> Iterator[RealRun]:
    run = RealRun(process)
    yield run
    run.end()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(run.run["name"])]


def test_a_run_goes_on_whoever_else_connects(real: RealRun) -> None:
    shards = real.shards
    token = real.address.token
    attacks = [
        b"GET / HTTP/1.1\r\nHost: a-host-of-our-own\r\n\r\n",
        os.urandom(TOKEN_BYTES) + pack({"op": "hello", "rank": 0, "run": real.run["run"]}),
        token + b"\xff" * 100,
        token + pack({"op": "commit"}),
        token + pack({"op": "hello", "run": 1e300}),
        token + pack({"op": "hello", "rank": 3, "run": real.run["run"]}) + pack({**COMMIT, "slot": 7}),
        token + pack({"op": "hello", "rank": 3, "run": real.run["run"]}) + pack({"op": "join", "mailbox": "nowhere"}),
    ]
    half_open = [socket.create_connection((real.address.host, real.address.port)) for _ in range(2)]
    half_open[1].sendall(token[:9])
    for number, attack in enumerate(attacks, start=1):
        with socket.create_connection((real.address.host, real.address.port), timeout=20.0) as sock:
            sock.sendall(attack)
            assert is_dropped(sock), attack
        real.push(1.0)
        assert real.parameters[0].tolist() == [-float(number)] * 6
    for sock in half_open:
        sock.close()
    report, _ = real.client.call({"op": "report"})
    assert (report["version"], report["num_live"], report["num_lost"]) == (len(attacks), 1, 0)
    assert real.shards == shards


def test_a_shard_killed_between_and_in_updates_costs_nothing(real: RealRun) -> None:
    for number in range(1, 13):
        real.push(1.0, land=number % 3 == 0)
        if number % 4 == 0:
            os.kill(real.shards[number % 2], signal.SIGKILL)
    real.replica.fetch()
    assert real.parameters[0].tolist() == [-12.0] * 6


def test_the_weights_a_push_was_computed_from_outlive_any_number_of_pushes(process: HostProcess) -> None:
    """Several pushes between two fetches (manual optimization) must not take the buffer that a rule looks into."""
    real = RealRun(process, "delay_compensated")
    weight = square = 0.0
    try:
        for step in range(1, 8):
            gradient = 0.1 * step
            real.push(gradient, land=False)
            square = 0.95 * square + 0.05 * gradient**2
            weight -= gradient + 2.0 / (square + 1e-7) ** 0.5 * gradient**2 * weight  # all from weights of zero
        real.replica.fetch()
        expected = torch.full((6,), weight, dtype=torch.float64)
        torch.testing.assert_close(real.parameters[0].detach(), expected, rtol=1e-12, atol=1e-12)
    finally:
        real.end()


def test_a_run_that_rests_has_no_memory_and_still_answers(real: RealRun) -> None:
    real.push(1.0)
    process = psutil.Process(real.shards[0]).parent()
    assert process is not None
    real.process.request({"op": "rest"})
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(real.run["name"])]
    assert process.children() == []
    assert real.parameters[0].tolist() == [-1.0] * 6
    report, _ = real.client.call({"op": "report"})
    assert (report["version"], report["num_live"]) == (1, 1)
    with pytest.raises(RunFailedError, match="ended without this rank"):
        Client(real.address, 1, real.run["run"], 1.0)


def test_nothing_is_left_when_the_program_that_began_it_is_gone() -> None:
    """A host whose parent and workers are gone ends, and its memory with it."""
    orphan = HostProcess()
    orphan.request({"op": "open", "address": "127.0.0.1"})
    name = orphan.request({"op": "run", "options": OPTIONS})["name"]
    orphan.request({"op": "memory", "num_bytes": [4096]})
    assert any(file.startswith(name) for file in os.listdir("/dev/shm"))
    orphan._connection.close()  # what the death of this process would do
    assert orphan.process.wait(20) == 0
    assert not any(file.startswith(name) for file in os.listdir("/dev/shm"))
