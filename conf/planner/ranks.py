"""Ranks that time operations, their link, and Strategies: what calibration asks, and what predictions are held to.

Run as a program, this is one rank.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from squall.conf.suites.links import Link as Hosts
from squall.conf.suites.programs import Order, free_port, programs, serve
from squall.conf.suites.ranks import Rank, Ranks

from .links import Link

_LONG_ENOUGH, _MOST_RUNS, _LEAST_RUNS = 0.003, 9, 3
_VERY_LONG = 0.05  # seconds: what takes so long twice isn't timed again
_CACHE = 24 << 20  # bytes: more than a core's own, and less than what a processor's cores share
_MESSAGE_SECONDS = 0.08
_MESSAGE_TURNS = 3
_SWAPPED, _LEAST_SWAPS, _MOST_SWAPS = 1 << 20, 4, 32
_SIDE = 256  # of the matrices that a rank multiplies while a message is on its way
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 24


class TimingRanks(Ranks):
    """Processes that wait to be told what to time."""

    def operations(self, keys: Sequence[str], together: bool) -> dict[str, float]:
        """Time operations.

        Args:
            keys: Which.
            together: Whether all ranks do it at once, as they compute in a step, or the first alone.

        Returns:
            Seconds of each; the mean over the ranks.

        """
        ranks = range(len(self.link.prefixes) if together else 1)
        answers = self.processes.ask({rank: {"do": "operations", "keys": list(keys)} for rank in ranks})
        return {key: statistics.mean(answers[rank][at] for rank in ranks) for at, key in enumerate(keys)}

    def measure_link(self) -> Link:
        """Time messages between all ranks, alone and while they compute."""
        ranks = range(len(self.link.prefixes))
        order = {
            "do": "link", "address": self.link.main_address, "port": free_port(), "size": len(ranks),
            "name": self.link.name,
        }  # fmt: skip
        return Link(**self.processes.ask(dict.fromkeys(ranks, order))[0])

    def fit(
        self, net: Mapping[str, Any], strategy: str, batch_size: int, num_steps: int, options: Mapping[str, Any]
    ) -> tuple[list[float], float]:
        """Fit a network, see :meth:`~squall.conf.suites.ranks.Ranks.measure`."""
        return Ranks(self.processes, self.link, net).measure(strategy, batch_size, num_steps, options)


@contextmanager
def timing_ranks(link: Hosts) -> Iterator[TimingRanks]:
    """Ranks that are gone afterwards.

    Args:
        link: How they reach each other.

    """
    with programs("squall.conf.planner.ranks", link) as processes:
        yield TimingRanks(processes, link, {})


class _TimingRank(Rank):
    def loader(self, images: Any, labels: Any, num_steps: int) -> tuple[Any, int]:
        """One epoch of batches that are there as a whole: what is timed is the step."""
        from torch.utils.data import DataLoader

        dataset: Any = _Batches(images, labels, num_steps)
        return DataLoader(dataset, batch_size=len(images), collate_fn=_as_it_is), 1

    def carry_out(self, order: Order) -> Any:
        """Time what is asked for."""
        import torch

        torch.set_num_threads(1)
        if order.get("do") == "operations":
            # The C library takes memory from the system for each large tensor anew, until one as large as this was
            # freed, as it soon is in a training.
            torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
            return [_seconds_of(key) for key in order["keys"]]
        if order.get("do") == "link":
            return _measure_link(self.rank, order)
        return super().carry_out(order)


class _Batches:
    """A batch again and again, handed out whole."""

    def __init__(self, images: Any, labels: Any, num_batches: int) -> None:
        self._batch, self._num_samples = (images, labels), len(images) * num_batches

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Any:
        images, labels = self._batch
        return images[index % len(images)], labels[index % len(labels)]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _seconds_of(key: str) -> float:
    import torch

    from .operators import Call

    with torch.no_grad():
        call = Call(key, torch.device("cpu"), _CACHE)
        # Memory for results is the system's at first, and then at hand: once all turns have had theirs.
        return quickest(call, call.prepare, max(_LEAST_RUNS, call.num_turns + 2))


def quickest(
    action: Callable[[], object], prepare: Callable[[], object] = lambda: None, num_runs: int = _LEAST_RUNS
) -> float:
    """Seconds of an action: the quickest of several runs.

    Args:
        action: What is timed; has been called before.
        prepare: Is called before each run, and isn't timed.
        num_runs: At the least, unless they take very long.

    """
    taken: list[float] = []
    while len(taken) < num_runs or (sum(taken) < _LONG_ENOUGH and len(taken) < _MOST_RUNS):
        if len(taken) > 1 and sum(taken) > _VERY_LONG:
            break
        prepare()
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _measure_link(rank: int, order: Order) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from squall.placement.columns import Columns
    from squall.placement.speeds import measure_speeds

    address = f"tcp://{order['address']}:{order['port']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=order["size"])
    try:
        columns = Columns(dist.group.WORLD, rank, order["size"])
        speeds = measure_speeds(columns, torch.device("cpu"))
        tiny = torch.zeros(1)
        dist.all_reduce(tiny)
        latency = min(_timed(lambda: dist.all_reduce(tiny)) for _ in range(20))
        size = int(min(max(speeds.link * _MESSAGE_SECONDS, _LEAST_BYTES), _MOST_BYTES))
        # Gradients aren't at hand when they leave: each turn has other values.
        turns = [torch.zeros(size // 4) for _ in range(_MESSAGE_TURNS)]
        seconds = min(_timed(partial(dist.all_reduce, values)) for values in turns * 2)
        share, during = _overlapped(columns, turns)
        found = torch.tensor([latency, seconds, share, during], dtype=torch.float64)
        latency, seconds, share, during = columns.max_(found).tolist()
        bandwidth = min(speeds.link, _between_operations(columns, speeds.latency))
        rounds = 2 * (order["size"] - 1)
        moved = rounds / order["size"] * turns[0].nbytes
        link = Link(
            order["name"], bandwidth, speeds.latency,
            reduce_bandwidth=moved / max(seconds - latency, 1e-9), reduce_latency=latency / rounds,
            cpu_share=min(max(share, 0.0), 0.95), slowdown=max(during / seconds, 1.0),
        )  # fmt: skip
        return asdict(link)
    finally:
        dist.destroy_process_group()


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _between_operations(columns: Any, latency: float) -> float:
    """Bytes a second of a message as a step has them: what is sent was just computed, and was not sent before."""
    import torch

    others = {(columns.rank + 1) % columns.num_columns, (columns.rank - 1) % columns.num_columns}
    outgoing, computed = torch.zeros(_SWAPPED, dtype=torch.uint8), torch.zeros(_CACHE, dtype=torch.uint8)
    total = 0.0
    taken: list[float] = []
    while len(taken) < _MOST_SWAPS and (len(taken) < _LEAST_SWAPS or total < _MESSAGE_SECONDS):
        computed.add_(1)
        outgoing.add_(1)
        total = columns.sum_(torch.tensor(sum(taken))).item()  # all begin together, and end together
        begin = time.perf_counter()
        incoming = {rank: torch.empty(_SWAPPED, dtype=torch.uint8) for rank in others}
        for work in columns.start_swap(dict.fromkeys(others, outgoing), incoming):
            work.wait()
        taken.append(time.perf_counter() - begin)
    seconds = columns.max_(torch.tensor(statistics.median(taken), dtype=torch.float64)).item()
    return float(len(others) * _SWAPPED / max(seconds - latency, 1e-9))


def _is_past(end: float) -> bool:
    return time.perf_counter() > end


def _overlapped(columns: Any, turns: Sequence[Any]) -> tuple[float, float]:
    """The share of its core that a rank loses while a message is on its way, and how long that is then."""
    import torch
    import torch.distributed as dist

    first, second = torch.rand(2, _SIDE, _SIDE)

    def products_a_second(is_over: Callable[[], bool]) -> tuple[float, float]:
        begin, done = time.perf_counter(), 0
        while not done or not is_over():
            torch.mm(first, second)
            done += 1
        seconds = time.perf_counter() - begin
        return done / seconds, seconds

    shares, lengths = [], []
    for values in turns:
        columns.sum_(torch.zeros(1))  # begin together
        work = dist.all_reduce(values, async_op=True)
        assert work is not None
        during, seconds = products_a_second(work.is_completed)
        work.wait()
        columns.sum_(torch.zeros(1))
        end = time.perf_counter() + seconds
        alone, _ = products_a_second(partial(_is_past, end))
        lengths.append(seconds)
        shares.append(1 - during / alone)
    return statistics.median(shares), statistics.median(lengths)


if __name__ == "__main__":
    serve(_TimingRank(int(sys.argv[1])).carry_out)
