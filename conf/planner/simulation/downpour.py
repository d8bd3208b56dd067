"""Downpour: workers that push, fetch and wait for nobody, around the coordinator that real runs have.

Only time is simulated. Who gets which batch, what version a push makes, how stale it is, what a lost worker leaves to
others and who has to wait for the slowest is decided by :class:`squall.consistency.coordinator.Coordinator` itself,
which has neither clock nor sockets of its own.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from squall._arguments import check_flag, check_whole
from squall.consistency.coordinator import Coordinator, RunOptions
from squall.consistency.order import Order

from .cores import Cores
from .crew import Crew
from .distributions import Distribution
from .faults import Faults
from .outcome import Outcome, Report
from .shards import ShardLines
from .worker import SimulatedWorker

_REPORT_EVERY = 500


@dataclass(frozen=True)
class Rules:
    """What :class:`squall.DownpourStrategy` is told, in its own words.

    Args:
        push_every: Steps whose gradients are summed before they are pushed.
        fetch_every: Steps between fetches.
        max_staleness: How many steps a worker may be ahead of the slowest; None for any number.
        warm_start_steps: Updates that the first worker makes alone.
        overlap: Compute the next gradient while the last one is carried and applied.

    Raises:
        MisconfigurationException: If one of them makes no sense.

    """

    push_every: int = 1
    fetch_every: int = 1
    max_staleness: int | None = None
    warm_start_steps: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        check_whole("downpour.push_every", self.push_every, 1)
        check_whole("downpour.fetch_every", self.fetch_every, 1)
        check_whole("downpour.max_staleness", 0 if self.max_staleness is None else self.max_staleness, 0)
        check_whole("downpour.warm_start_steps", self.warm_start_steps, 0)
        check_flag("downpour.overlap", self.overlap)


@dataclass(frozen=True)
class Link:
    """Between a worker and the shards.

    Args:
        push: Seconds that a push is on its way.
        fetch: Seconds that weights are on their way back.
        call: Seconds of a question to the coordinator and its answer: a step asks for a batch.

    """

    push: Distribution
    fetch: Distribution
    call: Distribution


class Downpour:
    """A Downpour training.

    Args:
        crew: The workers.
        link: Of each worker.
        num_shards: Shards in all.
        service: Seconds that a shard takes for its slice of a push, the fetch after it included.
        rules: The Strategy's arguments.
        faults: Of each worker but the first, without which a run ends.
        batch_size: Samples of a step.
        cores: How many cores the workers share; None for one each.
        turn: Seconds of a core that a worker has before another has its turn, where they share.

    """

    def __init__(
        self,
        crew: Crew,
        link: Link,
        num_shards: int,
        service: Distribution,
        rules: Rules,
        faults: Faults,
        *,
        batch_size: int = 1,
        cores: int | None = None,
        turn: float = 0.004,
    ) -> None:
        check_whole("cores", 1 if cores is None else cores, 1)
        if not turn > 0:
            raise ValueError(f"turn={turn} must be seconds above 0, such as 0.004.")
        self.crew, self.link, self.rules, self.faults = crew, link, rules, faults
        self._num_shards, self._service = num_shards, service
        self._batch_size = batch_size
        self._cores, self._turn = cores, turn

    def run(self, updates: int, seed: int = 0, report: Report | None = None, settle: int = 0) -> Outcome:
        """Simulate until so many updates are made.

        Args:
            updates: By all workers together.
            seed: Equal ones give equal results.
            report: Hears what share is done.
            settle: Updates at the beginning whose staleness isn't counted: the first of a worker misses nothing.

        Returns:
            What it came to.

        """
        check_whole("updates", updates, 1)
        run = SimulatedRun(self, updates, seed, report, settle)
        run.finish()
        said = run.coordinator.report()
        speed = self.crew.speed
        if self._cores is not None:
            speed *= min(1.0, self._cores / self.crew.workers)
        counts = Counter(run.coordinator.statistics.counts)
        counts.subtract(run.settled)
        return Outcome(
            "downpour", self.crew.workers, run.ended, said["version"], said["num_samples"] * self._batch_size,
            speed * self._batch_size, run.num_restarts,
            (said["num_reissued"] + run.num_refused) * self._batch_size,
            {value: count for value, count in sorted(counts.items()) if count},
        )  # fmt: skip

    def make_cores(self, env: simpy.Environment) -> Cores | None:
        """The cores that workers share, if they do."""
        return None if self._cores is None else Cores(env, self._cores, self._turn)

    def make_lines(self, rng: np.random.Generator) -> ShardLines:
        """The lines before the shards."""
        return ShardLines(self._num_shards, self._service, rng)


class SimulatedRun:
    """One run's clock, its coordinator, and the messages between it and the workers.

    Args:
        setup: What is simulated.
        updates: After how many it ends.
        seed: Of all that is drawn.
        report: Hears what share is done.
        settle: Updates at the beginning whose staleness isn't counted.

    """

    def __init__(self, setup: Downpour, updates: int, seed: int, report: Report | None, settle: int) -> None:
        rules, workers = setup.rules, setup.crew.workers
        self.env = simpy.Environment()
        options = RunOptions(
            workers, max_staleness=rules.max_staleness, warm_start_steps=rules.warm_start_steps, max_steps=updates
        )
        self.coordinator = Coordinator(options, self._send, self._command)
        self.num_restarts = 0
        self.num_refused = 0  # batches of pushes that came after somebody else was given them
        self.ended = 0.0
        self.settled: Counter[int] = Counter()
        self._updates, self._report, self._settle = updates, report, settle
        rngs = np.random.default_rng(seed).spawn(workers + 1)
        self._lines = setup.make_lines(rngs[-1])
        self.cores = setup.make_cores(self.env)
        self._replies: dict[int, dict[str, Any]] = {}
        self._waiting: dict[int, simpy.Event] = {}
        self._numbers: Iterator[int] = iter(range(1 << 62))
        self._done: dict[Any, deque[simpy.Event]] = {}
        self._workers = [SimulatedWorker(self, setup, rank, rngs[rank]) for rank in range(workers)]
        for worker in self._workers:
            worker.hello()
        self.coordinator.start(0, num_shards=1)  # they are in step: the last to be done is told of
        # More than all could have in hand at the end, so that nobody runs out of them.
        batches = updates * rules.push_every + workers * (rules.push_every + 4)
        self.coordinator.queue.open(0, Order(array("q", [1]) * batches, array("q", [0]) * batches, bytearray(batches)))

    def finish(self) -> None:
        """Let it happen."""
        for worker in self._workers:
            self.env.process(worker.live())
        while not self.ended:
            self.env.step()

    def ask(self, peer: Any, **header: Any) -> dict[str, Any] | simpy.Event:
        """Ask the coordinator.

        Returns:
            The answer; or, if there is none yet, what to wait for, whose value it will be.

        """
        number = next(self._numbers)
        self.coordinator.handle(peer, {**header, "id": number}, b"", self.env.now)
        if number in self._replies:
            return self._replies.pop(number)
        event = self.env.event()
        self._waiting[number] = event
        return event

    def committed(self) -> None:
        """Take note of an update."""
        version = self.coordinator.version
        if version == self._settle:
            self.settled = Counter(self.coordinator.statistics.counts)
        if version >= self._updates:
            self.ended = self.env.now
        if self._report is not None and version % _REPORT_EVERY == 0:
            self._report(version / self._updates)

    def is_told(self, peer: Any) -> simpy.Event:
        """An event of the moment in which a worker hears that the push it has just made is applied."""
        event = self.env.event()
        self._done.setdefault(peer, deque()).append(event)
        return event

    def _send(self, peer: Any, header: dict[str, Any], payload: bytes) -> None:
        if "re" not in header:
            if "done" in header and self._done.get(peer):
                self._done[peer].popleft().succeed()
            return
        waiting = self._waiting.pop(header["re"], None)
        if waiting is None:
            self._replies[header["re"]] = header
        else:
            waiting.succeed(header)

    def _command(self, command: dict[str, Any]) -> None:
        number = command["c"]
        timeout = self.env.timeout(self._lines.serve(self.env.now) - self.env.now)
        timeout.callbacks.append(lambda _: self.coordinator.commands.done(0, number))
