"""How fast this machine computes and its ranks reach each other, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .columns import Columns

_SIDE = 384  # of the matrices that are multiplied
_NUM_UPDATED = 1 << 21
_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 24
_LONG_ENOUGH = 0.03  # seconds: longer than a link's buffers hide what it can do


@dataclass(frozen=True)
class Speeds:
    """What the slowest rank of a replica can do.

    Args:
        flops: Floating point operations a second in a matrix product; a multiply-add is two.
        bytes: Bytes a second that an elementwise update reads and writes.
        link: Bytes a second that a rank sends to another, while it receives as many.
        latency: Seconds that an exchange of almost nothing takes.

    Example:
        >>> Speeds(flops=1e11, bytes=1e10, link=1.25e8, latency=1e-4).link * 8 / 1e9  # Gbit/s
        1.0

    """

    flops: float
    bytes: float
    link: float
    latency: float

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e9:,.0f} GFLOP/s, updates of {self.bytes / 1e9:,.1f} GB/s, "
            f"a link of {self.link * 8 / 1e9:,.3g} Gbit/s and {self.latency * 1e6:,.0f} us"
        )


def measure_speeds(columns: Columns, device: torch.device, dtype: torch.dtype = torch.float32) -> Speeds:
    """Measure, on all ranks of a replica at once; takes a tenth of a second, on a slow link a few.

    Args:
        columns: The ranks; each of them calls this.
        device: Where they compute.
        dtype: What the network computes in.

    Returns:
        The same on every rank.

    """
    # Nothing is drawn: dropout masks must not depend on whether a layout was measured.
    first, second = torch.full((2, _SIDE, _SIDE), 0.5, device=device, dtype=dtype)
    values = torch.zeros(_NUM_UPDATED, device=device, dtype=dtype)
    multiplying = _shortest(lambda: first @ second, device)
    updating = _shortest(lambda: values.add_(values, alpha=0.5), device)
    latency, num_bytes, sending = _measure_link(columns, device)
    times = columns.max_(torch.tensor([multiplying, updating, latency, sending], device=device, dtype=torch.float64))
    multiplying, updating, latency, sending = times.tolist()
    return Speeds(
        flops=2 * _SIDE**3 / multiplying,
        bytes=2 * values.numel() * values.element_size() / updating,  # read once, written once
        link=num_bytes / max(sending - latency, 1e-9),
        latency=latency,
    )


def _measure_link(columns: Columns, device: torch.device) -> tuple[float, int, float]:
    """Seconds of an exchange of almost nothing; and how many bytes took how long."""
    following, before = (columns.rank + 1) % columns.num_columns, (columns.rank - 1) % columns.num_columns

    def swap(num_bytes: int, times: int) -> float:
        outgoing, incoming = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device)

        def once() -> None:
            for work in columns.start_swap({following: outgoing}, {before: incoming}):
                work.wait()

        return _shortest(once, device, times)

    latency, num_bytes = swap(8, 5), _FIRST_BYTES
    while True:
        seconds = torch.tensor(swap(num_bytes, 2), device=device, dtype=torch.float64)
        taken = float(columns.max_(seconds))  # so that all go on, or none
        if taken > _LONG_ENOUGH or num_bytes >= _MOST_BYTES:
            return latency, num_bytes, taken
        num_bytes *= 4


def _shortest(action: Callable[[], object], device: torch.device, times: int = 4) -> float:
    """Seconds of the quickest of several runs, after one that isn't counted."""
    taken = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return max(min(taken[1:]), 1e-9)
