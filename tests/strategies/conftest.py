"""Jobs of real processes, for tests that kill some of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .fault_programs import Job, Nursery, Start


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def job(nursery: Nursery, tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def make(num_ranks: int, statement: str) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, nursery, num_ranks, statement))
        return jobs[-1]

    yield make
    for made in jobs:
        made.end()
