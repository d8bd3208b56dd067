"""A process that is killed, within the process of the test: at any point at which a test can reach in."""

from __future__ import annotations

from typing import Any


class KilledError(BaseException):
    """What a test throws where a process would be killed."""


class Countdown:
    """Throws at the n-th of all points at which a test can reach in."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self) -> None:
        self.count -= 1
        if self.count < 0:
            raise KilledError


class Control:
    """The control words of a slice, each store of which may be the last thing done, or the first that isn't."""

    def __init__(self, words: Any, countdown: Countdown) -> None:
        self.words, self.countdown = words, countdown

    def __getitem__(self, index: int) -> Any:
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.countdown()
        self.words[index] = value
        self.countdown()
