"""Downpour on two hosts with a wire between them that is taken down and up again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from squall.conf.suites.links import Link, set_link, shaped_hosts, why_not
from tests.required import needs

from .test_downpour import LR, START

pytestmark = [
    pytest.mark.asynchronous,
    needs("namespaces", why_not()),
]
SECRET = "of a wire that comes and goes"
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def two_hosts(folder: Path, pause: int, num_rows: int, **options: Any) -> Iterator[tuple[Link, list[subprocess.Popen]]]:
    """A rank on each of two hosts, of which the second waits at a step; nothing of them is left."""
    before = set(os.listdir("/dev/shm"))
    with shaped_hosts("1gbit") as link:
        started = []
        for rank, prefix in enumerate(link.prefixes):
            environment = {
                **{name: value for name, value in os.environ.items() if name not in ("RANK", "PL_GLOBAL_SEED")},
                "MASTER_ADDR": link.main_address, "MASTER_PORT": "29500", "NODE_RANK": str(rank), "LOCAL_RANK": "0",
                "WORLD_SIZE": "2", "SQUALL_SECRET": SECRET, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            arguments = [str(folder), str(pause), str(num_rows), json.dumps(options)]
            command = [*prefix, sys.executable, "-m", "tests.strategies.host_programs", *arguments]
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT))
        try:
            yield link, started
        finally:
            for process in started:
                process.kill()
                process.wait()
            _, left = psutil.wait_procs(_family(), timeout=30)
    assert not left
    left_names = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("squall-")}
    assert not {name for name in left_names if not psutil.pid_exists(int(name.split("-")[1]))}


def _family() -> list[psutil.Process]:
    """All processes of the job, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SQUALL_SECRET") == SECRET:
                found.append(process)
    return found


def _wait_for(path: Path, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


def _ends(folder: Path, processes: list[subprocess.Popen]) -> list[dict[str, Any]]:
    for process in processes:
        assert process.wait(120) == 0
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("leases", [2, 6])
def test_a_wire_is_taken_down_and_up(tmp_path: Path, leases: int) -> None:
    """For longer than a worker's lease; and for so long that its host is given up, and its shards go on elsewhere."""
    lease = 1.5
    with two_hosts(tmp_path, 10, 400, lease_timeout=lease) as (link, processes):
        _wait_for(tmp_path / "reached-1")
        set_link(link, 1, "down")
        (tmp_path / "go on").touch()
        time.sleep(leases * lease)  # this is the fault, and not a wait for something to happen
        set_link(link, 1, "up")
        ends = _ends(tmp_path, processes)
    report = ends[0]["report"]
    assert report["num_samples"] == 400
    assert report["version"] == 400  # one update a batch, however often it was dealt out
    assert report["num_joined"] >= 3  # the second rank came again
    assert (report["num_rolled_back"] > 0) == (leases > 4)
    in_vain = report["num_rolled_back"]
    moved = [(START - weight) / LR for weight in ends[0]["up"]] + [(w - START) / (2 * LR) for w in ends[0]["down"]]
    assert set(moved) == {400.0, 400.0 - in_vain}
    assert (ends[0]["up"], ends[0]["down"]) == (ends[1]["up"], ends[1]["down"])
