"""Processes that end with the one that forked them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> bool:
    """Have the kernel end this process when its parent ends, however that ends.

    Args:
        parent: Its number before the fork.

    Returns:
        Whether it is still there.

    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return os.getppid() == parent
    return True
