"""Cores that more processes than there are cores take turns on, as an operating system lets them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy


class Cores:
    """Some cores, and turns of so many seconds.

    A process that finds a core free has it at once; others wait in a line, and go to its end after each turn.

    Args:
        env: Whose clock it is.
        number: How many.
        turn: Seconds after which a process that isn't done goes to the end of the line.

    """

    def __init__(self, env: simpy.Environment, number: int, turn: float) -> None:
        self._env = env
        self._turn = turn
        self._line = simpy.Resource(env, number)

    def work(self, seconds: float) -> Generator[Any, Any, None]:
        """Compute for so long, and wait for one's turn as often as it takes.

        Args:
            seconds: Of one core.

        """
        while seconds > 0:
            with self._line.request() as mine:
                yield mine
                # Nobody to give way to: the turn goes on, but others may come meanwhile.
                part = min(seconds, self._turn)
                yield self._env.timeout(part)
                seconds -= part
