"""Suite ``simulation``: the staleness that the simulator of ``squall-plan`` tells, and that real runs of Downpour have.

Run as a program, this is one of the workers. It notes how long it was between its pushes, in them, and until the
weights after them were there; a histogram of staleness is never looked at before it is compared.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from squall.conf.bench import SuiteResult
from squall.conf.planner.simulation import (
    Constant,
    Crew,
    Downpour,
    Drifting,
    Empirical,
    Faults,
    Link,
    Outcome,
    Rules,
    total_variation,
)
from squall.conf.suites.programs import Order, free_port, programs, serve
from squall.conf.suites.training import make_classifier
from squall.conf.writers import describe_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from squall.consistency.replica import Replica

Times = dict[str, list[float]]  # seconds of each step: compute, of it cpu, push, land
Run = dict[str, Any]

_LARGEST = 0.15
_PARTS = ("compute", "push", "land")
_WINDOW = 10  # steps of a worker, in which the machine is taken to be as busy as before


def measure(
    net: Mapping[str, Any], batch_size: int, updates: int, workers: Sequence[int], turn: float, seed: int
) -> SuiteResult:
    """Train with each number of workers, simulate the same, and compare.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        batch_size: Images of an update.
        updates: Of each run.
        workers: Numbers of workers.
        turn: Seconds of a core that a process has before another has its turn, where there are more of them.
        seed: Of the simulations.

    Returns:
        A row for each number of workers: how far the simulated histograms are from the real one.

    Raises:
        ValueError: If there is nothing to compare.

    """
    if not workers or min(workers) < 2 or updates < 10 * max(workers):
        raise ValueError(
            f"suite.workers={list(workers)} must each be 2 or more, and suite.updates={updates} ten times as many."
        )
    numbers = [1, *workers]
    runs: dict[int, Run] = {}
    with programs("squall.conf.suites.simulation", max(numbers)) as ranks, Progress() as progress:
        task = progress.add_task("runs", total=len(numbers))
        common = {"net": dict(net), "batch_size": batch_size}
        for number in numbers:
            for length in (10 * number, updates):  # the first of anything is slow
                order = common | {"updates": length, "workers": number, "port": free_port()}
                answers = ranks.ask({rank: order for rank in range(number)})
            runs[number] = dict(answers[0]) | {"times": [answers[rank]["times"] for rank in range(number)]}
            progress.advance(task)
    return compare(runs, describe_machine()["cores"], turn, seed)


def compare(runs: Mapping[int, Run], cores: int, turn: float, seed: int) -> SuiteResult:
    """Simulate what real runs were, and see how far apart they are.

    Args:
        runs: By number of workers, one of them alone: ``staleness``, pairs of value and count; ``seconds``; and
            ``times`` of each rank.
        cores: That they shared.
        turn: As of :func:`measure`.
        seed: Of the simulations.

    """
    rows, failures, extra = [], [], {}
    histograms = {}
    for number in sorted(set(runs) - {1}):
        run = runs[number]
        real = {int(value): int(count) for value, count in run["staleness"]}
        updates = sum(real.values())
        measured = simulate_as_measured(run["times"], updates, seed)
        predicted = simulate_from_one(runs[1]["times"][0], number, updates, cores, turn, seed)
        apart = total_variation(real, measured.staleness)
        rows.append({
            "workers": number, "updates": updates,
            "mean staleness": sum(value * count for value, count in real.items()) / updates,
            "simulated": measured.mean_staleness, "total variation": apart,
            "of one worker's times": total_variation(real, predicted.staleness),
            "updates/s": updates / run["seconds"], "simulated updates/s": measured.updates / measured.seconds,
            "of one worker's times, updates/s": predicted.updates / predicted.seconds,
        })  # fmt: skip
        if apart >= _LARGEST:
            failures.append(
                f"{number} workers: simulated and real staleness are {apart:.3f} apart, not below {_LARGEST}."
            )
        histograms[number] = {"real": real, "simulated": measured.staleness, "from one worker": predicted.staleness}
        extra[str(number)] = {
            name: sorted((int(value), int(count)) for value, count in counts.items())
            for name, counts in histograms[number].items()
        } | {"ms": {name: _quartiles(run["times"], name) for name in _PARTS}}
    notes = (
        "Real runs of DownpourStrategy on one host, every worker a process of one thread; total variation is half the"
        " sum of the differences of the histograms' shares. Simulated: each worker's steps take as long"
        f" as they were measured to in that run, drawn anew, apart from the other workers', among {_WINDOW} that"
        " followed each other, since how busy the machine was with other things changed for all workers at once."
        f" Of one worker's times: all is drawn from what a worker alone needed of a core, and the workers take turns of"
        f" {1000 * turn:g} ms on {cores} cores; nothing is known of the run itself. Staleness is counted by the"
        " coordinator of real runs in both. The histogram itself is never fitted to."
    )
    return SuiteResult("Simulated and real staleness", rows, notes, _plot(histograms), {"runs": extra}, failures)


def simulate_as_measured(times: Sequence[Times], updates: int, seed: int) -> Outcome:
    """Simulate workers that take as long as these took, whatever it was that they waited for.

    Args:
        times: Of each rank.
        updates: By all of them.
        seed: Equal ones give equal results.

    """
    steps = [[sum(parts) for parts in zip(*(_cut(own[name]) for name in _PARTS), strict=False)] for own in times]
    crew = Crew(len(times), Constant(1.0), own=tuple(Drifting(own, _WINDOW) for own in steps))
    nothing = Constant(0.0)
    return Downpour(crew, Link(nothing, nothing, nothing), 1, nothing, Rules(), Faults()).run(updates, seed)


def simulate_from_one(times: Times, workers: int, updates: int, cores: int, turn: float, seed: int) -> Outcome:
    """Simulate several workers from what one alone needed, as they share cores.

    Args:
        times: Of the one.
        workers: How many there would be.
        updates: By all of them.
        cores: That they share.
        turn: Seconds of a core before another's turn.
        seed: Equal ones give equal results.

    """
    crew = Crew(workers, Empirical(_cut(times["cpu"])))
    nothing = Constant(0.0)
    link = Link(Empirical(_cut(times["push"])), nothing, nothing)
    service = Empirical(_cut(times["land"]))
    return Downpour(crew, link, 1, service, Rules(), Faults(), cores=cores, turn=turn).run(updates, seed)


def _cut(values: Sequence[float]) -> Sequence[float]:
    """Without the first, which is from before the training."""
    return values[1:] or values


def _quartiles(times: Sequence[Times], name: str) -> list[float]:
    import numpy as np

    pooled = [1000 * value for own in times for value in _cut(own[name])]
    return [round(float(value), 4) for value in np.quantile(pooled, [0.25, 0.5, 0.75])]


def _plot(histograms: Mapping[int, Mapping[str, Mapping[int, int]]]) -> Figure:
    from squall.conf.planner.simulation.side_by_side import draw_staleness
    from squall.conf.plots import new_figure

    figure = new_figure(2.9 * len(histograms), 2.9)
    panels = figure.subplots(1, len(histograms), squeeze=False)[0]
    for axes, (number, named) in zip(panels, histograms.items(), strict=True):
        draw_staleness(axes, named, f"{number} workers")
        common = [value for counts in named.values() for value, count in counts.items() for _ in range(count)]
        axes.set_xlim(-0.6, sorted(common)[int(0.999 * (len(common) - 1))] + 1.6)
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels[1:]:
        axes.set_ylabel("")
    return figure


# ---------------------------------------------------------------------- one worker


class _Watch:
    """Times of each push, taken around it."""

    def __init__(self) -> None:
        self.times: Times = {"compute": [], "cpu": [], "push": [], "land": []}
        self._watched: Any = None
        self._since, self._cpu_since = time.perf_counter(), time.thread_time()

    def watch(self, replica: Replica) -> None:
        """Take times from here on."""
        if self._watched is replica:
            return
        self._watched = replica
        vars(replica).update(push=self._around(replica.push, "push"), land=self._around(replica.land, "land"))

    def _around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            if name == "push":
                self.times["compute"].append(begin - self._since)
                self.times["cpu"].append(time.thread_time() - self._cpu_since)
            result = function(*args, **kwargs)
            self._since, self._cpu_since = time.perf_counter(), time.thread_time()
            self.times[name].append(self._since - begin)
            return result

        return timed


class _Worker:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._module: Any = None

    def carry_out(self, order: Order) -> Run:
        """Fit once; returns the times of each step, and on rank 0 what the Strategy says of staleness."""
        import torch
        from lightning.pytorch import Callback, Trainer

        import squall

        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if self._module is None:
            self._module = make_classifier(order["net"])
        os.environ.update(
            LOCAL_RANK=str(self._rank), NODE_RANK="0", WORLD_SIZE=str(order["workers"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )  # fmt: skip
        strategy = squall.DownpourStrategy(num_shards=1)
        watch = _Watch()

        class Watching(Callback):
            def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
                watch.watch(strategy.replica)

        self._module.ticks = []
        Trainer(
            strategy=strategy, accelerator="cpu", devices=order["workers"], max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[Watching()],
        ).fit(self._module, self._module.loader(order["batch_size"], order["updates"]))  # fmt: skip
        times = {name: [round(value, 7) for value in values] for name, values in watch.times.items()}
        ticks = self._module.ticks
        answer = {"times": times, "seconds": ticks[-1] - ticks[0] if ticks else 0.0}
        return answer if self._rank else answer | {"staleness": sorted(strategy.staleness.counts.items())}


if __name__ == "__main__":
    serve(_Worker(int(sys.argv[1])).carry_out)
