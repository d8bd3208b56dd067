"""Shared memory that a test could leave behind."""

from __future__ import annotations

import os

import psutil


def own_memory() -> list[str]:
    """Shared memory that this process, or one under it, has named."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    names = [name for name in names if name.startswith("squall-")]
    family = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))} if names else set()
    return [name for name in names if name.split("-")[1] in map(str, family)]
