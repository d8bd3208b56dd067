"""How ranks find the job they belong to."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from squall.consistency import hosting, jobs
from squall.consistency.jobs import Address, Job, find_job, open_job
from tests.ranks import free_port


def test_one_hosts_job_is_on_loopback_whatever_the_launcher_says() -> None:
    assert Job("10.1.2.3", 29500).address == Job("10.1.2.3", 29500).interface == "127.0.0.1"
    assert Job("10.1.2.3", 29500).agreed is None


def test_hosts_agree_by_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_SECRET", "a long and random text")
    agreed = Job("127.0.0.1", 29500, 2).agreed
    assert agreed is not None
    assert (agreed.host, agreed.port, len(agreed.token)) == ("127.0.0.1", 29501, 32)
    assert agreed == Job("127.0.0.1", 29500, 2).agreed
    monkeypatch.setenv("SQUALL_PORT", "31000")
    other = Job("127.0.0.1", 29500, 2).agreed
    assert other is not None
    assert other.port == 31000
    monkeypatch.setenv("SQUALL_SECRET", "another long and random text")
    assert Job("127.0.0.1", 29500, 2).agreed.token != other.token  # type: ignore[union-attr]
    monkeypatch.setenv("SQUALL_SECRET", "short")
    with pytest.raises(MisconfigurationException, match="SQUALL_SECRET has 5 characters"):
        _ = Job("127.0.0.1", 29500, 2).agreed


def test_hosts_without_a_secret_meet_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SQUALL_SECRET", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = Job("127.0.0.1", 29500, 2)
    assert job.record.is_relative_to(tmp_path)
    with pytest.raises(RuntimeError, match="SQUALL_SECRET to the same random text"):
        find_job(job, timeout=0.1)
    said = {"host": "127.0.0.1", "port": 1, "token": "00" * 32, "opening": "x", "pid": 1, "node": "elsewhere"}
    jobs._write(job.record, said)
    assert job.record.parent.stat().st_mode & 0o077 == 0
    with pytest.raises(RuntimeError, match="has not opened"):  # it is of a program that is gone: nobody listens there
        find_job(job, timeout=0.1)
    monkeypatch.setattr(jobs, "_ask", lambda address: address)
    assert find_job(job) == Address("127.0.0.1", 1, bytes(32), "x")
    job.record.chmod(0o644)
    with pytest.raises(RuntimeError, match="has not opened"):  # others could have read it
        find_job(job, timeout=0.1)


def test_a_hosts_name_that_is_its_loopback_is_not_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, *_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert Job("localhost", 29500, 2).interface == "127.0.1.1"
    job = Job("node-7", 29500, 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            assert job.interface == "127.0.1.1"  # a host without any other network
            return
        assert job.interface == probe.getsockname()[0]


@pytest.fixture
def own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host process of this test's own, and a folder for its word."""
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(hosting, "_host", None)
    monkeypatch.setattr(jobs, "_opened", {})
    yield
    jobs._forget_all()
    hosting._close()


@pytest.mark.usefixtures("own_host")
def test_a_job_holds_its_port_until_a_process_group_wants_it() -> None:
    job = Job(main_port=free_port())
    address = open_job(job)
    assert find_job(job) == address
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", job.port))
    jobs.give_port_back()
    socket.create_server(("127.0.0.1", job.port)).close()
    assert find_job(job) == address, "who has found it must not look for it again"
    assert open_job(job) == address  # the next fit of the same program
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", job.port))


@pytest.mark.usefixtures("own_host")
def test_a_port_that_is_taken_is_done_without() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # a launcher's own store, say
        job = Job(main_port=int(other.getsockname()[1]))
        address = open_job(job)
        assert find_job(job) == address


@pytest.mark.usefixtures("own_host")
def test_what_another_job_of_the_same_port_has_left_is_not_believed() -> None:
    job = Job(main_port=free_port())
    open_job(job)
    record = json.loads(job.record.read_text())
    jobs._write(job.record, record | {"token": "00" * 32})
    with pytest.raises(RuntimeError, match="has not opened"):
        find_job(job, timeout=0.2)
    jobs._forget(job)
    assert job.record.exists(), "it is another's"
