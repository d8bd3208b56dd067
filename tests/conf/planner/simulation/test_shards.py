"""The line before a shard against queueing theory, and against an event simulation of several."""

from __future__ import annotations

import numpy as np
import pytest

from squall.conf.planner.simulation import Constant, Exponential, Gamma, ShardLines


def _mean_wait(lines: ShardLines, rate: float, number: int) -> float:
    """Between a command's arrival and its end, for arrivals without memory."""
    arrivals = np.cumsum(np.random.default_rng(5).exponential(1 / rate, number))
    return float(np.mean([lines.serve(float(now)) - now for now in arrivals]))


@pytest.mark.parametrize(("load", "cv"), [(0.3, 0.0), (0.7, 0.0), (0.7, 1.0), (0.6, 0.5)])
def test_pollaczek_and_khinchine(load: float, cv: float) -> None:
    """M/G/1: the wait is ``load service (1 + cv^2) / (2 (1 - load))``; cv=0 is M/D/1, cv=1 M/M/1."""
    service = 0.1
    made = {0.0: Constant(service), 1.0: Exponential(service)}.get(cv) or Gamma(service, cv)
    lines = ShardLines(1, made, np.random.default_rng(0))
    expected = service + load * service * (1 + cv**2) / (2 * (1 - load))
    assert _mean_wait(lines, load / service, 200_000) == pytest.approx(expected, rel=0.03)


def test_a_command_is_done_when_the_last_shard_has_done_it() -> None:
    """Four shards without a line: the mean of the largest of four exponential times is 1 + 1/2 + 1/3 + 1/4."""
    lines = ShardLines(4, Exponential(1.0), np.random.default_rng(0))
    assert _mean_wait(lines, 0.001, 20_000) == pytest.approx(25 / 12, rel=0.02)
    assert lines.busy == pytest.approx(20_000, rel=0.02)


def test_commands_are_done_in_their_order() -> None:
    lines = ShardLines(3, Exponential(1.0), np.random.default_rng(0))
    done = [lines.serve(0.1 * number) for number in range(1000)]
    assert done == sorted(done)
    assert done[-1] > 900  # the shards are ten times as slow as the commands
