"""What an argument may be, said before anything has begun."""

from __future__ import annotations

import threading
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_whole(name: str, value: Any, least: int) -> int:
    """Return a whole number; refuse what is none, or too small a one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(f"{name}={value!r} must be a whole number, {least} or more.")
    return value


def check_seconds(name: str, value: Any) -> None:
    """Refuse what nobody can wait for: no number, nothing, or longer than a clock knows."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= threading.TIMEOUT_MAX:
        raise MisconfigurationException(f"{name}={value!r} must be a number of seconds above 0, such as 30.0.")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: ``"no"`` would count as yes."""
    if not isinstance(value, bool):
        raise MisconfigurationException(f"{name}={value!r} must be True or False.")
