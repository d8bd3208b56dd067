"""What all tests have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from tests.memory import own_memory


def pytest_configure() -> None:
    """What ranks of one thread are compared with, bit for bit, has one thread, too."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes and real clocks fail on a machine that is busy enough; what fails twice has failed."""
    for item in items:
        if "asynchronous" in item.keywords:
            item.add_marker(pytest.mark.flaky(reruns=1))
        else:
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun="did not answer|have not started"))


@pytest.fixture(autouse=True)
def no_memory_is_left() -> Iterator[None]:
    """A test that leaves shared memory behind is told so itself, not the one that finds it."""
    before = set(own_memory())
    yield
    deadline = time.monotonic() + 10  # hosts of killed ranks take a moment to end
    while left := set(own_memory()) - before:
        assert time.monotonic() < deadline, f"left in shared memory: {sorted(left)}"
        time.sleep(0.05)
