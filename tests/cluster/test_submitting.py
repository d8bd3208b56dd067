"""What users submit with: the launcher of Hydra, and the batch script of the examples."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import said
from tests.cluster.slurm import ROOT, Slurm, eventually, why_not
from tests.required import needs

pytestmark = [pytest.mark.asynchronous, pytest.mark.timeout(600), needs("slurm", why_not())]
# So little that starting is all that takes time.
SMALL = (
    *("model=lenet5", "trainer.max_epochs=1", "callbacks=none", "logger=none", "+trainer.limit_train_batches=3"),
    *("+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_launcher_submits_a_job_of_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "squall.conf.main", "hydra/launcher=slurm", "hydra.launcher.signal_seconds=30"]
    out = slurm.call(
        *command, "trainer.num_nodes=2", "strategy=column_parallel", *SMALL, cwd=tmp_path, HOME=str(tmp_path)
    )
    found = re.search(r"job (\d+), 2 x 1 ranks", out)
    assert found, out
    (sweep,) = tmp_path.glob("multirun/*/*")
    text = "\n".join(path.read_text() for path in sweep.glob("slurm/*.sh"))
    assert "#SBATCH --signal=USR1@30" in text
    assert "#SBATCH --requeue" in text
    state = slurm.wait(found[1])
    assert state["JobState"] == "COMPLETED", "\n".join(path.read_text() for path in sweep.glob("slurm/*.out"))
    assert files(sweep) == ["0", "multirun.yaml", "slurm"]
    assert ".hydra" in files(sweep / "0")
    assert len(list(sweep.rglob("*.log"))) == 1 + len(list(sweep.glob("slurm/*.log")))


def test_nodes_that_ranks_do_not_fit_are_refused_before_anything_is_submitted(slurm: Slurm, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "squall.conf.main", "hydra/launcher=slurm", "strategy=column_parallel"]
    out = slurm.call(*command, "trainer.num_nodes=3", cwd=tmp_path, check=False)
    assert "hosts can't share 2 ranks evenly" in out
    assert not list(tmp_path.rglob("*.sh"))


def test_the_batch_script_of_the_examples_runs(slurm: Slurm, tmp_path: Path) -> None:
    text = (ROOT / "examples" / "squall.sbatch").read_text()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin"
    (tmp_path / "squall.sbatch").write_text(text)
    number = slurm.call(
        "sbatch", "--parsable", "squall.sbatch", "strategy=column_parallel", *SMALL, cwd=tmp_path, PATH=path,
        HOME=str(tmp_path),
    ).strip()  # fmt: skip
    assert slurm.wait(number)["JobState"] == "COMPLETED", said(tmp_path)
    eventually((tmp_path / "outputs" / f"slurm-{number}" / ".hydra").exists, lambda: said(tmp_path))
