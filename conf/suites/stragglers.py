"""Suite ``stragglers``: how much of what ranks can do alone they do together, when one is slow or cores are scarce.

Run as a program, this is one of the ranks. A slowed rank sleeps a multiple of the time that its forward and backward
pass took, after each: its core is free meanwhile, as that of a machine that waits for its disk would be.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from squall.conf.bench import SuiteResult
from squall.conf.suites.programs import Order, Programs, free_port, programs, serve
from squall.conf.suites.training import make_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Ticks = list[list[float]]  # of each rank, when its steps ended

_LEAST = 0.95
_ORDER = ("alone", "downpour", "ddp")


def measure(
    net: Mapping[str, Any],
    batch_size: int,
    slowdown: float,
    num_oversubscribed: int,
    num_rounds: int,
    num_steps: int,
    downpour: Mapping[str, Any],
) -> SuiteResult:
    """Time both cases.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        batch_size: Images of a step of one rank.
        slowdown: How many times slower the second of two ranks is.
        num_oversubscribed: Ranks of the other case, which share the cores.
        num_rounds: How often the alternatives take turns.
        num_steps: Steps of the slowest rank in a turn.
        downpour: Arguments of :class:`squall.DownpourStrategy`.

    Returns:
        Median images/s of each alternative, and the median of the rounds' ratios.

    """
    cases = {
        f"2 ranks, one {slowdown:g} x slower": [1.0, slowdown],
        f"{num_oversubscribed} ranks on {_num_cores()} cores": [1.0] * num_oversubscribed,
    }
    common = {"do": "fit", "net": dict(net), "batch_size": batch_size, "downpour": dict(downpour)}
    speeds: dict[str, dict[str, list[float]]] = {}
    with Progress() as progress:
        for case, slowdowns in cases.items():
            speeds[case] = {name: [] for name in _ORDER}
            task = progress.add_task(case, total=num_rounds * len(_ORDER))
            with programs("squall.conf.suites.stragglers", len(slowdowns)) as ranks:
                for name in _ORDER:
                    _turn(ranks, name, slowdowns, 1, common)  # the first of anything is slow
                for _ in range(num_rounds):
                    for name in _ORDER:
                        groups = _turn(ranks, name, slowdowns, num_steps, common)
                        speeds[case][name].append(batch_size * sum(map(steps_per_second, groups)))
                        progress.advance(task)
    return _result(net, batch_size, num_rounds, downpour, speeds)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _turn(ranks: Programs, name: str, slowdowns: Sequence[float], num_steps: int, common: Order) -> list[Ticks]:
    """Train once; what ran at the same time is one entry."""
    everyone = range(len(slowdowns))
    slowest = max(slowdowns)
    port = free_port()
    orders = {
        rank: common
        | {"strategy": name, "slowdown": slowdowns[rank], "num_ranks": len(slowdowns), "port": port}
        | {"num_steps": num_steps}
        for rank in everyone
    }
    if name == "alone" and slowest > 1.0:
        return [[ranks.ask({rank: order})[rank]] for rank, order in orders.items()]
    if name == "downpour":  # the queue's, for all together: as many as they make while the slowest makes its own
        for order in orders.values():
            order["num_steps"] = round(sum(num_steps * slowest / own for own in slowdowns))
    # Where cores are what they share, they are alone with their weights, but at the same time.
    ticks = ranks.ask(orders)
    return [[ticks[rank] for rank in everyone]]


def steps_per_second(ticks: Ticks) -> float:
    """Add the speeds up that ranks had while all of them were training.

    Args:
        ticks: When each rank's steps ended.

    Raises:
        RuntimeError: If a rank made fewer than two steps beside the others.

    Example:
        >>> steps_per_second([[0.0, 1.0, 2.0, 3.0, 4.0], [0.5, 2.5, 4.5]])
        1.5

    """
    begin, end = max(own[0] for own in ticks), min(own[-1] for own in ticks)
    speed = 0.0
    for own in ticks:
        # A step that only ends within the common time counts from where the rank stood at its beginning.
        inside = [index for index, tick in enumerate(own) if begin <= tick <= end]
        first, last = max(inside[0] - 1, 0) if inside else 0, inside[-1] if inside else 0
        if last <= first:
            raise RuntimeError("A rank made fewer than two steps beside the others; raise suite.num_steps.")
        speed += (last - first) / (own[last] - own[first])
    return speed


def _result(
    net: Mapping[str, Any],
    batch_size: int,
    num_rounds: int,
    downpour: Mapping[str, Any],
    speeds: Mapping[str, Mapping[str, list[float]]],
) -> SuiteResult:
    rows, failures = [], []
    for case, of_case in speeds.items():
        for name in _ORDER:
            ratios = [mine / alone for mine, alone in zip(of_case[name], of_case["alone"], strict=True)]
            ratio = statistics.median(ratios)
            rows.append(
                {
                    "case": case,
                    "strategy": "sum of each alone" if name == "alone" else name,
                    "images/s": statistics.median(of_case[name]),
                    "lowest": min(of_case[name]),
                    "highest": max(of_case[name]),
                    "share of alone": ratio,
                }
            )
            if name == "downpour" and ratio < _LEAST:
                failures.append(f"{case}: Downpour reached {ratio:.3f} of what the ranks do alone, not {_LEAST}.")
    notes = (
        f"AlexNet {dict(net)}, {batch_size} images a step and one thread a rank, SGD with momentum (fused);"
        f" Downpour with {dict(downpour)}. The slowed rank sleeps three"
        " times as long as its forward and backward pass took (in general, the slowdown less one), which leaves its"
        " core to the shard. Two ranks alone: one after the other, each with the machine to itself. Oversubscribed"
        " ranks alone: independent trainings at the same time, since each by itself would have a core. Speeds are"
        " those of steps while all ranks train, without beginnings and ends of runs. Shares are medians over"
        f" {num_rounds} rounds in which the alternatives took turns."
    )
    return SuiteResult("Stragglers", rows, notes, _plot(speeds), {"images/s": speeds}, failures)


def _plot(speeds: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    from squall.conf.plots import BLUE, GREY, ORANGE, clean_axes, new_figure

    figure = new_figure(6.2, 3.2)
    for axes, (case, of_case) in zip(figure.subplots(1, len(speeds)), speeds.items(), strict=True):
        middles = [statistics.median(of_case[name]) for name in _ORDER]
        spread = [
            [middle - min(of_case[name]) for middle, name in zip(middles, _ORDER, strict=True)],
            [max(of_case[name]) - middle for middle, name in zip(middles, _ORDER, strict=True)],
        ]
        labels = ["sum of\neach alone", "Downpour", "DDP"]
        axes.bar(labels, middles, 0.6, yerr=spread, color=[GREY, ORANGE, BLUE], capsize=2, error_kw={"lw": 0.8})
        for place, middle in enumerate(middles):
            axes.annotate(f"{middle:.3g}", (place, middle / 2), ha="center", va="center", fontsize=8, color="white")
        clean_axes(axes, "", "training images/s", case)
    return figure


# ---------------------------------------------------------------------- one rank


class _Rank:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._module: Any = None

    def carry_out(self, order: Order) -> list[float]:
        """Fit once; returns when each step ended."""
        import torch
        from lightning.pytorch import Trainer
        from lightning.pytorch.strategies import DDPStrategy

        import squall

        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if self._module is None:
            self._module = make_classifier(order["net"])
        self._module.slowdown = order["slowdown"]
        self._module.ticks = []
        name, num_ranks = order["strategy"], order["num_ranks"]
        for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(key, None)
        if name != "alone":
            os.environ.update(
                LOCAL_RANK=str(self._rank), NODE_RANK="0", WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(order["port"]),
            )  # fmt: skip
        strategy: Any = {
            "alone": lambda: "auto",
            # Ours to tune for DDP too: gradients reduced where they lie.
            "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),
            "downpour": lambda: squall.DownpourStrategy(**order["downpour"]),
        }[name]()
        Trainer(
            strategy=strategy, accelerator="cpu", devices=1 if name == "alone" else num_ranks, max_epochs=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(self._module, self._module.loader(order["batch_size"], order["num_steps"]))  # fmt: skip
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        ticks: list[float] = self._module.ticks
        return ticks


if __name__ == "__main__":
    serve(_Rank(int(sys.argv[1])).carry_out)
