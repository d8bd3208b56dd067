"""Up to millions of chips in a few learners, and what share of their time is of use while chips fail.

A learner is some chips in step with each other. One learner is synchronous training; several that wait for nobody are
Downpour, or Decoupled DiLoCo. Steps aren't simulated one by one: the events are failures and returns, those of all
chips of a learner together (superposed Poisson processes), so that a month of a million chips takes seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from squall._arguments import check_whole

from .distributions import Distribution, make_distribution

HOUR, DAY, YEAR = 3600.0, 86400.0, 365 * 86400.0


@dataclass(frozen=True)
class Fleet:
    """Chips, and how their failures are dealt with.

    Args:
        chips: In all.
        learners: That don't wait for each other; each has an equal part of the chips.
        mtbf: Mean seconds between two failures of one chip, without memory; it ages only while its learner computes.
        elastic: Go on without a failed chip's slice until it returns; otherwise all of the learner waits until it is
            replaced, and goes on from the last checkpoint.
        slice_chips: Chips that are out together, if one fails.
        restart: Seconds that a learner stands still, if it isn't elastic.
        downscale: Seconds that an elastic learner stands still when it loses a slice.
        upscale: And when one returns.
        repair: Seconds after which a slice returns.
        checkpoint_every: Seconds of computing between checkpoints: a failure costs what was computed since. 0 where
            every step is kept by another.
        checkpoint: Seconds that a checkpoint takes.

    """

    chips: int
    learners: int = 1
    mtbf: float = YEAR
    elastic: bool = False
    slice_chips: int = 1
    restart: Distribution | float = 60.0
    downscale: Distribution | float = 10.0
    upscale: Distribution | float = 10.0
    repair: Distribution | float = 600.0
    checkpoint_every: float = 0.0
    checkpoint: float = 0.0

    def __post_init__(self) -> None:
        check_whole("chips", self.chips, 1)
        check_whole("learners", self.learners, 1)
        check_whole("slice_chips", self.slice_chips, 1)
        if self.learners > self.chips:
            raise ValueError(f"learners={self.learners} must be as many as there are chips={self.chips}, or fewer.")
        for name, value, least in (("mtbf", self.mtbf, True), ("checkpoint_every", self.checkpoint_every, False),
                                   ("checkpoint", self.checkpoint, False)):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (least and value == 0):
                raise ValueError(f"{name}={value!r} must be seconds, {'above 0' if least else '0 or more'}.")
        if self.checkpoint_every == 0 and self.checkpoint > 0:
            raise ValueError(
                f"checkpoint={self.checkpoint} without checkpoint_every: say after how many seconds one is made."
            )

    @property
    def chips_per_learner(self) -> int:
        """The least that a learner has."""
        return self.chips // self.learners

    def run(self, seconds: float, seed: int = 0) -> FleetOutcome:
        """Simulate so long.

        Args:
            seconds: Of the fleet's clock.
            seed: Equal ones give equal results.

        Returns:
            What it came to.

        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds={seconds!r} must be finite and above 0.")
        env = simpy.Environment()
        clock = _Uptime(env, self.learners, seconds)
        learners = [
            _Learner(env, self, seconds, rng, clock.change) for rng in np.random.default_rng(seed).spawn(self.learners)
        ]
        for learner in learners:
            env.process(learner.live())
        env.run()  # until each has come to the end
        clock.change(0)
        useful = sum(learner.useful for learner in learners)
        in_all = seconds * self.chips_per_learner * self.learners
        failures = sum(learner.failures for learner in learners)
        return FleetOutcome(useful / in_all, clock.up / seconds, failures, seconds)


@dataclass(frozen=True)
class FleetOutcome:
    """Of one simulated fleet.

    Args:
        goodput: Useful chip-seconds over all of them.
        uptime: Share of time in which at least one learner computes.
        failures: Of chips, that learners had to deal with.
        seconds: That were simulated.

    """

    goodput: float
    uptime: float
    failures: int
    seconds: float


class _Learner:
    """Chips in step: they compute, or stand still."""

    def __init__(
        self, env: simpy.Environment, fleet: Fleet, end: float, rng: np.random.Generator, change: Callable[[int], None]
    ) -> None:
        self._env, self._fleet, self._end, self._rng = env, fleet, end, rng
        self._change = change
        self._is_up = True
        self.useful = 0.0  # chip-seconds
        self.failures = 0
        said = {name: getattr(fleet, name) for name in ("restart", "downscale", "upscale", "repair")}
        self._streams: Mapping[str, Iterator[float]] = {
            name: (value if isinstance(value, Distribution) else make_distribution(name, value)).stream(rng)
            for name, value in said.items()
        }

    def _switch(self, is_up: bool) -> None:
        if is_up != self._is_up:
            self._is_up = is_up
            self._change(1 if is_up else -1)

    def _kept(self, seconds: float, ends_in_failure: bool) -> float:
        """Of so many seconds of computing and writing checkpoints, those whose work is of use."""
        every, cost = self._fleet.checkpoint_every, self._fleet.checkpoint
        if every == 0:
            return seconds
        whole, rest = divmod(seconds, every + cost)
        return whole * every + (0.0 if ends_in_failure else min(rest, every))

    def live(self) -> Generator[Any, Any, None]:
        """Compute, fail, stand still, and so on until the end."""
        env, fleet, chips = self._env, self._fleet, self._fleet.chips_per_learner
        away: list[float] = []  # when slices return
        while env.now < self._end:
            live = max(0, chips - len(away) * fleet.slice_chips)
            self._switch(live > 0)
            failure = self._rng.exponential(fleet.mtbf / live) if live else math.inf
            back = away[0] - env.now if away else math.inf
            seconds = min(failure, back, self._end - env.now)
            yield env.timeout(seconds)
            fails = failure == seconds
            self.useful += live * self._kept(seconds, fails)
            if env.now >= self._end:
                return
            self._switch(False)
            if fails:
                self.failures += 1
            if fails and fleet.elastic:
                heapq.heappush(away, env.now + next(self._streams["repair"]))
            yield env.timeout(next(self._streams[_STALLS[fails, fleet.elastic]]))
            while away and away[0] <= env.now:  # who has come meanwhile is taken in with the rest
                heapq.heappop(away)


_STALLS = {(True, False): "restart", (True, True): "downscale", (False, True): "upscale"}


class _Uptime:
    """Seconds in which at least one learner computes."""

    def __init__(self, env: simpy.Environment, num_up: int, end: float) -> None:
        self._env, self._num_up, self._end = env, num_up, end
        self._since = 0.0
        self.up = 0.0

    def change(self, by: int) -> None:
        """Take note that so many more compute from now on."""
        now = min(self._env.now, self._end)  # a learner may stand still beyond it
        self.up += (now - self._since) * (self._num_up > 0)
        self._since = now
        self._num_up += by
