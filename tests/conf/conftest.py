"""What suites must not leave behind."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

Left = Callable[..., list[str]]


@pytest.fixture(scope="module")
def left() -> Left:
    """Tells which processes of some modules have begun below this one since the file's first test, and aren't gone."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}

    def since(*modules: str) -> list[str]:
        begun = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        commands = [" ".join(process.cmdline()) for process in begun]
        return [command for command in commands if any(module in command for module in modules)]

    return since
