"""Allocations that ranks would wait in for ever end at once, and say which line to change."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from squall._allocation import check_allocation, dead_nodes
from squall._requeue import Requeue
from tests.cluster.jobs import head, run, said
from tests.cluster.slurm import Slurm, why_not
from tests.required import needs

COLUMNS = "column_parallel"


@pytest.mark.asynchronous
@pytest.mark.timeout(600)
@needs("slurm", why_not())
def test_what_does_not_fit_ends_at_once(slurm: Slurm, tmp_path: Path) -> None:
    """Jobs of several lines each, since a start takes seconds; only the first one is of Lightning's own finding."""
    began = time.monotonic()
    jobs = {
        "Use `--ntasks-per-node": head(tmp_path, "--nodes=2 --ntasks=2") + run(tmp_path, COLUMNS),
        "HINT: Set `devices=1`": head(tmp_path, "--nodes=2 --ntasks-per-node=1") + run(tmp_path, COLUMNS, devices=2),
        "`srun` before the command": head(tmp_path, "--nodes=2 --ntasks-per-node=1") + run(tmp_path, COLUMNS, srun=""),
        "`--ntasks` out of the srun line": head(tmp_path, "--nodes=2 --ntasks-per-node=2")
        + run(tmp_path, COLUMNS, srun="srun --ntasks=3", devices=2),
    }  # fmt: skip
    for words, text in jobs.items():
        assert slurm.wait(slurm.submit(text, tmp_path))["JobState"] == "FAILED", words
        assert words in said(tmp_path)
    assert time.monotonic() - began < 240  # ranks that wait for others do so for half an hour


TASK = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "squall", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "1",
}  # fmt: skip


def test_gpus_of_one_task_are_no_gpus_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MisconfigurationException, match="#SBATCH --gpus-per-node=4"):
        check_allocation(SLURMEnvironment(), 1, 2, on_gpu=True)
    check_allocation(SLURMEnvironment(), 4, 2, on_gpu=False)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    check_allocation(SLURMEnvironment(), 4, 2, on_gpu=True)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # where Lightning looks at nothing
    check_allocation(SLURMEnvironment(), 1, 1, on_gpu=True)


def test_nodes_are_dead_only_to_those_who_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = ("127.0.0.1", 1)
    monkeypatch.setenv("SLURM_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with socket.create_server(("127.0.0.1", 0)) as daemon:
        here = daemon.getsockname()
        monkeypatch.setattr("squall._allocation._addresses", lambda nodes: {"n1": here, "n2": nowhere})
        assert dead_nodes() == ["n2"]
        monkeypatch.setattr("squall._allocation._addresses", lambda nodes: {"n1": nowhere, "n2": nowhere})
        assert dead_nodes() == []


@pytest.mark.parametrize(("is_given", "elsewhere"), [(False, False), (True, False), (False, True)])
def test_only_what_was_saved_for_the_job_is_removed(tmp_path: Path, is_given: bool, elsewhere: bool) -> None:
    path = tmp_path / "hpc_ckpt_7.ckpt"
    path.touch()
    root = tmp_path / "root" if elsewhere else tmp_path
    trainer: Any = SimpleNamespace(ckpt_path=str(path), default_root_dir=str(root), is_global_zero=True)
    Requeue(signal.SIGUSR1, False, is_given).forget(trainer)
    assert path.exists() == (is_given or elsewhere)
