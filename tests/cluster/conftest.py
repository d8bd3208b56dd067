"""One SLURM for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.jobs import ends, said, script
from tests.cluster.slurm import Slurm, running


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """SLURM's daemons, with two nodes of this host."""
    with tempfile.TemporaryDirectory(prefix="squall-slurm-", dir="/tmp") as folder, running(Path(folder)) as made:
        yield made


@pytest.fixture(scope="session")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What comes of a job on two nodes that nothing happens to, by Strategy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    state = slurm.wait(slurm.submit(script(folder, "column_parallel,hybrid_parallel,downpour"), folder))
    assert state["JobState"] == "COMPLETED", said(folder)
    found = ends(folder)
    for first, second in zip(*found, strict=True):
        assert first["weights"] == second["weights"]
    return {end["strategy"]: end for end in found[0]}
