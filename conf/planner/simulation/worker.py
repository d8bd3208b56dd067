"""One simulated worker of Downpour: what :class:`squall.DownpourStrategy` does in a step, and how long it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

if TYPE_CHECKING:
    from .downpour import Downpour, SimulatedRun

Steps = Generator[Any, Any, Any]


class DiedError(Exception):
    """The worker has failed."""


class SimulatedWorker:
    """A rank, in all its generations.

    Args:
        run: Whose it is.
        setup: What is simulated.
        rank: Its number.
        rng: What its times are drawn with.

    """

    def __init__(self, run: SimulatedRun, setup: Downpour, rank: int, rng: np.random.Generator) -> None:
        self._run, self._rank, self._rules = run, rank, setup.rules
        self._compute = setup.crew.of_rank(rank).stream(rng)
        link = setup.link
        self._push, self._fetch, self._call = (each.stream(rng) for each in (link.push, link.fetch, link.call))
        self._gaps, self._restarts = setup.faults.gaps(rng), setup.faults.restart.stream(rng)
        self._notice = setup.faults.notice
        self._generation = -1
        self._peer: Any = None
        self._dies_at = 0.0

    def hello(self) -> None:
        """Begin a generation."""
        self._generation += 1
        self._peer = (self._rank, self._generation)
        self._run.ask(self._peer, op="hello", rank=self._rank, run=0)

    def live(self) -> Steps:
        """Train, fail, be started again, and so on until the run ends."""
        env = self._run.env
        while True:
            # Rank 0 is the leader: a run ends with it.
            self._dies_at = env.now + next(self._gaps) if self._rank else float("inf")
            try:
                yield from self._train()
                return
            except DiedError:
                self._run.num_restarts += 1
                self._notice_later(self._peer)
                yield env.timeout(next(self._restarts))
                self.hello()

    def _notice_later(self, peer: Any) -> None:
        timeout = self._run.env.timeout(self._notice)
        timeout.callbacks.append(lambda _: self._run.coordinator.lost(peer, self._run.env.now))

    def _train(self) -> Steps:
        run, rules = self._run, self._rules
        base = int((yield from self._ask(op="join", mailbox="m"))["version"])
        on_their_way: deque[tuple[simpy.Event, int]] = deque()  # fetches: when they are done, and of which version
        tickets: list[Any] = []
        steps = 0
        ahead = yield from self._lease(False)
        while ahead is not None:
            ticket, ahead = ahead, (yield from self._lease(True))
            if rules.max_staleness is not None:
                yield from self._ask(op="gate")
            if self._rank and base < rules.warm_start_steps:  # it joined before the leader went ahead
                base = yield from self._fetch_now()
            while len(on_their_way) > (1 if rules.overlap else 0):
                event, base = on_their_way.popleft()
                yield from self._until(event)
            yield from self._work(next(self._compute))
            tickets.append(ticket)
            steps += 1
            pushes, fetches = steps % rules.push_every == 0, steps % rules.fetch_every == 0
            if pushes:
                yield from self._spend(next(self._push))
                header = {"op": "commit", "slot": 0, "base": base, "tickets": tickets, "fetch": 0 if fetches else None}
                reply = yield from self._ask(**header)
                if "finished" in reply:
                    return
                given, tickets = tickets, []
                if "lost" in reply:
                    run.num_refused += len(given)
                    on_their_way.clear()
                    base = yield from self._fetch_now()
                    continue
                told = run.is_told(self._peer)
                run.committed()
                if fetches and not rules.overlap:
                    yield from self._until(told)
                    yield from self._spend(next(self._fetch))
                    base = int(reply["version"])
                elif fetches:
                    on_their_way.append((told, int(reply["version"])))
            elif fetches:
                base = yield from self._fetch_now()

    def _lease(self, is_ahead: bool) -> Steps:
        yield from self._spend(next(self._call))
        reply = yield from self._ask(op="lease", epoch=0, last=False, ahead=is_ahead)
        ticket = reply.get("ticket")
        return None if ticket is None else tuple(ticket)

    def _fetch_now(self) -> Steps:
        reply = yield from self._ask(op="fetch", buffer=0)
        yield from self._spend(next(self._fetch))
        return int(reply["version"])

    # ------------------------------------------------------------------ time

    def _ask(self, **header: Any) -> Steps:
        answer = self._run.ask(self._peer, **header)
        if isinstance(answer, simpy.Event):
            answer = yield answer
        self._check()
        return answer

    def _until(self, event: simpy.Event) -> Steps:
        if not event.processed:
            yield event
        self._check()

    def _work(self, seconds: float) -> Steps:
        if self._run.cores is None:
            yield from self._spend(seconds)
        else:
            yield from self._run.cores.work(seconds)
            self._check()

    def _spend(self, seconds: float) -> Steps:
        env = self._run.env
        if env.now + seconds >= self._dies_at:
            yield env.timeout(max(0.0, self._dies_at - env.now))
            raise DiedError
        if seconds > 0:
            yield env.timeout(seconds)

    def _check(self) -> None:
        if self._run.env.now >= self._dies_at:
            raise DiedError
