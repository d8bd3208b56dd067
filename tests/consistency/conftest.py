"""What several tests here begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .loops import LoopInAThread


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopInAThread]:
    """A host's event loop for the tests of a file."""
    running = LoopInAThread()
    yield running
    running.end()
