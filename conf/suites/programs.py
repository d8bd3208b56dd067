"""Processes that stay, and are told what to do a line at a time, so that alternatives take turns within seconds.

What they print isn't shown, unless one of them ends: a hundred trainings for a table would bury it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from squall.conf.suites.links import Link, loopback

Order = dict[str, Any]
_NUM_LINES = 30  # that are shown of what a process said before its end


class Programs:
    """Some processes of one module, each a rank of one thread.

    Args:
        module: Run with ``python -m``; its ``main`` calls :func:`serve`.
        link: How they reach each other, a rank each.

    """

    def __init__(self, module: str, link: Link) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._said: list[IO[str]] = []
        for rank, (prefix, extra) in enumerate(zip(link.prefixes, link.environment, strict=True)):
            environment = {**os.environ, **extra, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            self._said.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115  (closed by stop)
            self._processes.append(
                subprocess.Popen(
                    [*prefix, sys.executable, "-m", module, str(rank)], env=environment, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=self._said[-1], text=True,
                )
            )  # fmt: skip

    def ask(self, orders: Mapping[int, Order]) -> dict[int, Any]:
        """Give some of them an order each, and wait for their answers.

        Raises:
            RuntimeError: If one of them ends instead; with the last lines that it printed.

        """
        for rank, order in orders.items():
            stdin = cast(IO[str], self._processes[rank].stdin)
            with suppress(BrokenPipeError):  # it has ended: said below
                stdin.write(json.dumps(order) + "\n")
                stdin.flush()
        answers = {}
        for rank, order in orders.items():
            line = cast(IO[str], self._processes[rank].stdout).readline()
            if not line:
                raise RuntimeError(f"rank {rank} ended while it was asked for {order}:\n{self._last_lines(rank)}")
            answers[rank] = json.loads(line)
        return answers

    def _last_lines(self, rank: int) -> str:
        self._said[rank].seek(0)
        return "".join(deque(self._said[rank], maxlen=_NUM_LINES))

    def stop(self) -> None:
        """End them."""
        for process in self._processes:
            with suppress(BrokenPipeError):
                cast(IO[str], process.stdin).close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            cast(IO[str], process.stdout).close()
        for said in self._said:
            said.close()


@contextmanager
def programs(module: str, link: int | Link) -> Iterator[Programs]:
    """Processes that are gone afterwards.

    Args:
        module: As of :class:`Programs`.
        link: How they reach each other; so many on this host, if it is a number.

    """
    started = Programs(module, loopback(link) if isinstance(link, int) else link)
    try:
        yield started
    finally:
        started.stop()


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(carry_out: Callable[[Order], Any]) -> None:
    """The life of such a process: one order after the other, until there are no more."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up among the answers
    for line in sys.stdin:
        answer.write(json.dumps(carry_out(json.loads(line))) + "\n")
        answer.flush()
