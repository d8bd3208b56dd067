"""Runs of several nodes under a real SLURM: started by srun, cancelled, short of a task or of a node."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.jobs import said, script
from tests.cluster.program import EPOCHS, NUM_SAMPLES
from tests.cluster.slurm import Slurm, eventually, why_not
from tests.required import needs

pytestmark = [pytest.mark.asynchronous, pytest.mark.timeout(600), needs("slurm", why_not())]


def test_every_strategy_runs_under_srun(undisturbed: Mapping[str, Any]) -> None:
    for name in ("column_parallel", "hybrid_parallel", "downpour"):
        assert undisturbed[name]["world_size"] == 2
        assert undisturbed[name]["interface"] == "lo"  # the way to node0, which no host is called
    assert undisturbed["column_parallel"]["seen"] == EPOCHS * NUM_SAMPLES
    assert undisturbed["hybrid_parallel"]["steps"] == undisturbed["column_parallel"]["steps"] / 2
    assert undisturbed["downpour"]["samples"] == EPOCHS * NUM_SAMPLES


def test_nothing_is_left_of_a_cancelled_job(slurm: Slurm, tmp_path: Path) -> None:
    """Downpour has a process beside the workers of each node, and shards: they are no tasks of SLURM's."""
    before = {process.pid for process in slurm.processes()}
    number = slurm.submit(script(tmp_path, "downpour", pause=4), tmp_path)
    eventually(lambda: (tmp_path / "reached-1").exists(), lambda: said(tmp_path))
    new = [process for process in slurm.processes() if process.pid not in before]
    hosts = [process for process in new if "squall.consistency.host" in process.cmdline()]
    assert len(hosts) >= 4  # one a node, and a shard each that was forked from it
    slurm.call("scancel", number)
    assert slurm.wait(number)["JobState"] == "CANCELLED"
    eventually(lambda: not any(process.is_running() for process in new), lambda: f"left: {new}", 20)
    pids = {str(process.pid) for process in hosts}
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("squall-") and name.split("-")[1] in pids]
    eventually(lambda: slurm.states() == ["idle", "idle"], lambda: f"{slurm.states()}")


def test_downpour_does_without_a_task_that_is_killed(slurm: Slurm, tmp_path: Path) -> None:
    number = slurm.submit(script(tmp_path, "downpour", pause=4), tmp_path)
    eventually(lambda: all((tmp_path / f"reached-{rank}").exists() for rank in range(2)), lambda: said(tmp_path))
    kill_rank(slurm, 1)
    (tmp_path / "go on").touch()
    assert slurm.wait(number)["JobState"] == "FAILED"  # srun tells of the task
    (end,) = json.loads((tmp_path / "end-0.json").read_text())
    assert end["samples"] == EPOCHS * NUM_SAMPLES
    assert not (tmp_path / "end-1.json").exists()


def test_columns_end_with_a_task_that_is_killed(slurm: Slurm, tmp_path: Path) -> None:
    """Its node lives, so the job is not queued again: what has killed it once would do so once more."""
    number = slurm.submit(script(tmp_path, "column_parallel", pause=4), tmp_path)
    eventually(lambda: all((tmp_path / f"reached-{rank}").exists() for rank in range(2)), lambda: said(tmp_path))
    kill_rank(slurm, 1)
    (tmp_path / "go on").touch()
    state = slurm.wait(number)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")


def kill_rank(slurm: Slurm, rank: int) -> None:
    """The task itself, and not what it has started."""
    victims = [
        process
        for process in slurm.processes()
        if process.environ().get("SLURM_PROCID") == str(rank) and "tests.cluster.program" in process.cmdline()
    ]
    assert len(victims) == 1
    victims[0].kill()
