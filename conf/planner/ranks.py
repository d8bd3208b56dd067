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
from typing import Any

from squall.conf.suites.links import Link as Hosts
from squall.conf.suites.programs import Order, free_port, programs, serve
from squall.conf.suites.ranks import Rank, Ranks

from .links import Link

_LONG_ENOUGH, _MOST_RUNS, _LEAST_RUNS = 0.006, 12, 3
_VERY_LONG = 0.1  # seconds: what takes so long twice isn't timed again
_CACHE = 24 << 20  # bytes: more than a core's own, and less than what a processor's cores share
_MESSAGE_SECONDS = 0.12
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

    from .operators import callable_of

    action = callable_of(key, torch.device("cpu"), _CACHE)
    with torch.no_grad():
        return quickest(action)


def quickest(action: Callable[[], object]) -> float:
    """Seconds of an action: the quickest of several runs after one that isn't counted.

    Args:
        action: What is timed.

    """
    action()
    taken: list[float] = []
    while len(taken) < _LEAST_RUNS or (sum(taken) < _LONG_ENOUGH and len(taken) < _MOST_RUNS):
        if len(taken) > 1 and sum(taken) > _VERY_LONG:
            break
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
        values = torch.zeros(size // 4)
        seconds = min(_timed(lambda: dist.all_reduce(values)) for _ in range(4))
        share, during = _overlapped(columns, values)
        found = torch.tensor([latency, seconds, share, during], dtype=torch.float64)
        latency, seconds, share, during = columns.max_(found).tolist()
        rounds = 2 * (order["size"] - 1)
        moved = rounds / order["size"] * values.numel() * 4
        link = Link(
            order["name"], speeds.link, speeds.latency,
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


def _overlapped(columns: Any, values: Any) -> tuple[float, float]:
    """The share of its core that a rank loses while a message is on its way, and how long that is then."""
    import torch
    import torch.distributed as dist

    first, second = torch.rand(2, _SIDE, _SIDE)
    alone = quickest(lambda: first @ second)
    shares, lengths = [], []
    for _ in range(3):
        columns.sum_(torch.zeros(1))  # begin together
        begin, done = time.perf_counter(), 0
        work = dist.all_reduce(values, async_op=True)
        assert work is not None
        while not work.is_completed():
            torch.mm(first, second)
            done += 1
        work.wait()
        lengths.append(time.perf_counter() - begin)
        shares.append(1 - done * alone / lengths[-1])
    return statistics.median(shares), statistics.median(lengths)


if __name__ == "__main__":
    serve(_TimingRank(int(sys.argv[1])).carry_out)
