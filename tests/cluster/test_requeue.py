"""Jobs that are interrupted, queued again by themselves, and end as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.jobs import ends, said, script
from tests.cluster.program import EPOCHS, NUM_SAMPLES
from tests.cluster.slurm import Slurm, eventually, why_not
from tests.required import needs

pytestmark = [pytest.mark.asynchronous, pytest.mark.timeout(600), needs("slurm", why_not())]


def pause(slurm: Slurm, folder: Path, strategy: str, step: int, lines: str = "", **options: Any) -> str:
    """Submit a job, and wait until both ranks have come to a step and wait there."""
    number = slurm.submit(script(folder, strategy, lines, pause=step, **options), folder)
    eventually(lambda: all((folder / f"reached-{rank}").exists() for rank in range(2)), lambda: said(folder))
    return number


def check(folder: Path, state: Mapping[str, str], undisturbed: Mapping[str, Any]) -> None:
    """The job has been started twice, and what it has learned is what it would have learned at once."""
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said(folder)
    for (end,) in ends(folder):
        assert end["restarts"] == "1"
        assert end["steps"] == undisturbed["steps"]
        if end["strategy"] != "downpour":  # which averages what its ranks have seen
            assert end["seen"] == undisturbed["seen"]
        if end["strategy"] == "column_parallel":  # the others see their batches in another order
            assert end["weights"] == pytest.approx(undisturbed["weights"], rel=1e-9)
    assert not list(folder.glob("hpc_ckpt_*")), "the next job in this folder would go on from it"


def test_a_time_limit_is_announced(slurm: Slurm, tmp_path: Path, undisturbed: Mapping[str, Any]) -> None:
    lines = "#SBATCH --time=1 --signal=USR1@15"  # which SLURM sends up to half a minute before
    number = pause(slurm, tmp_path, "column_parallel", 5, lines)
    # The ranks wait in their steps; what they have heard they act on once they are let go on.
    eventually(lambda: "USR1" in said(tmp_path), lambda: said(tmp_path))
    (tmp_path / "go on").touch()
    check(tmp_path, slurm.wait(number), undisturbed["column_parallel"])


def test_downpour_is_queued_again(slurm: Slurm, tmp_path: Path, undisturbed: Mapping[str, Any]) -> None:
    number = pause(slurm, tmp_path, "downpour", 5)
    slurm.call("scancel", "--signal=USR1", number)
    eventually(lambda: "USR1" in said(tmp_path), lambda: said(tmp_path))
    (tmp_path / "go on").touch()
    check(tmp_path, slurm.wait(number), undisturbed["downpour"])
    assert undisturbed["downpour"]["steps"] == EPOCHS * NUM_SAMPLES / 2


def test_slurm_wants_the_place(slurm: Slurm, tmp_path: Path, undisturbed: Mapping[str, Any]) -> None:
    """What scontrol and a pre-emption do: SIGTERM, and the job is queued again without being asked."""
    number = pause(slurm, tmp_path, "hybrid_parallel", 4)
    slurm.call("scontrol", "requeue", number)
    eventually(lambda: "TERM" in said(tmp_path), lambda: said(tmp_path))
    (tmp_path / "go on").touch()
    check(tmp_path, slurm.wait(number), undisturbed["hybrid_parallel"])


def test_a_node_dies(slurm: Slurm, tmp_path: Path, undisturbed: Mapping[str, Any]) -> None:
    """Nobody has time to save anything: the job goes on from what ModelCheckpoint has written last."""
    number = pause(slurm, tmp_path, "column_parallel", 8, saves=True)
    slurm.kill_node("node1")
    (tmp_path / "go on").touch()
    eventually(lambda: slurm.job(number)["Restarts"] == "1", lambda: said(tmp_path))
    slurm.start_node("node1")
    check(tmp_path, slurm.wait(number), undisturbed["column_parallel"])
    assert "node1 is gone" in said(tmp_path)
