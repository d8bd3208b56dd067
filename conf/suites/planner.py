"""Suite ``planner``: what was predicted of a step, beside what it took."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.planner.alternatives import Alternative
from squall.conf.planner.calibration import REGISTERED, Calibration, alternative_of, options_of, task_of
from squall.conf.planner.here import ranks_over
from squall.conf.planner.predictions import Prediction, predict, trace_of
from squall.conf.planner.ranks import TimingRanks
from squall.conf.planner.recommending import recommend
from squall.conf.planner.steps import Task
from squall.conf.suites.links import why_not

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_RANKS = 2
_LEAST_STEPS, _MOST_STEPS = 3, 12


@dataclass
class _Case:
    net: str
    link: str
    strategy: str
    prediction: Prediction
    roofline: float  # seconds, from that alone
    seconds: list[float] = field(default_factory=list)  # of each round

    @property
    def measured(self) -> float:
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        return self.prediction.num_examples / self.measured

    @property
    def error(self) -> float:
        return self.prediction.seconds / self.measured - 1


def measure(
    nets: Mapping[str, Mapping[str, Any]],
    strategies: Sequence[str],
    links: Sequence[str],
    downpour: Mapping[str, Any],
    claims: Mapping[str, float],
    num_rounds: int,
    seconds_a_turn: float,
) -> SuiteResult:
    """Calibrate, predict, and then let all strategies take turns.

    Args:
        nets: By name: ``name`` and arguments of a class of ``squall.models``; ``batch_size``, images of a step of all
            ranks; ``links`` if not all are for it.
        strategies: As of :class:`~squall.conf.planner.alternatives.Alternative`.
        links: "loopback", or a rate as ``tc`` writes it.
        downpour: Options of Downpour.
        claims: ``median_error``, ``worst_error``; ``recommended``, the part of cases in which the recommended strategy
            is ``within`` such a part of the fastest; ``calibration_seconds``; of how many ``configurations``.
        num_rounds: How often the strategies take turns.
        seconds_a_turn: Steps are as many as fit, three at the least.

    Returns:
        A row a net, link and strategy.

    """
    calibration, watch, notes, cases = Calibration(), _Watch(), [], list[_Case]()
    tasks = {name: task_of(_net_of(entry)) for name, entry in nets.items()}
    for link in links:
        reason = "" if link == "loopback" else why_not()
        if reason:
            notes.append(f"The link {link} was left out: {reason}.")
            continue
        chosen = {name: entry for name, entry in nets.items() if link in entry.get("links", links)}
        with ranks_over(link, _NUM_RANKS) as ranks:
            with watch.running():
                _calibrate(calibration, ranks, strategies, downpour, {name: tasks[name] for name in chosen}, nets)
            for name, entry in chosen.items():
                own = _predict(calibration, name, link, strategies, downpour, tasks[name], int(entry["batch_size"]))
                _take_turns(ranks, own, entry, num_rounds, seconds_a_turn)
                cases += own
    return _result(cases, claims, watch.seconds, notes, num_rounds)


class _Watch:
    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin


def _net_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("batch_size", "links")}


def _alternatives(strategies: Sequence[str], downpour: Mapping[str, Any]) -> dict[str, Alternative]:
    return {s: alternative_of(s, _NUM_RANKS, **(downpour if s == "downpour" else {})) for s in strategies}


def _calibrate(
    calibration: Calibration,
    ranks: TimingRanks,
    strategies: Sequence[str],
    downpour: Mapping[str, Any],
    tasks: Mapping[str, Task],
    nets: Mapping[str, Mapping[str, Any]],
) -> None:
    if not calibration.flops:
        calibration.measure_roofline(ranks)
    calibration.measure_link(ranks)
    for name, task in tasks.items():
        for strategy, alternative in _alternatives(strategies, downpour).items():
            trace = trace_of(task, alternative, int(nets[name]["batch_size"]))
            calibration.measure_operations(ranks, [trace], together=strategy != "single")
    calibration.measure_overheads(ranks, strategies)


def _predict(
    calibration: Calibration,
    net: str,
    link: str,
    strategies: Sequence[str],
    downpour: Mapping[str, Any],
    task: Task,
    batch_size: int,
) -> list[_Case]:
    cases = []
    for strategy, alternative in _alternatives(strategies, downpour).items():
        cluster = calibration.cluster(link, _NUM_RANKS, alone=strategy == "single")
        prediction = predict(task, alternative, batch_size, cluster)
        bare = predict(task, alternative, batch_size, replace(cluster, device=calibration.roofline())).seconds
        cases.append(_Case(net, link, strategy, prediction, bare))
    return cases


def _take_turns(
    ranks: TimingRanks, cases: Sequence[_Case], entry: Mapping[str, Any], num_rounds: int, seconds_a_turn: float
) -> None:
    for _ in track(range(num_rounds), description=f"{cases[0].net}, {cases[0].link}"):
        for case in cases:
            every = int(case.prediction.alternative.options.get("push_every", 1))
            steps = min(max(round(seconds_a_turn / case.prediction.seconds), _LEAST_STEPS), _MOST_STEPS)
            if every > 1:  # whole periods, of which neither the first counts nor those in which a worker is through
                steps = (-(-steps // every) + 3) * every
            options = options_of(case.prediction.alternative)
            taken, _ = ranks.fit(_net_of(entry), REGISTERED[case.strategy], int(entry["batch_size"]), steps, options)
            case.seconds.append(_typical(taken, every))


def _typical(seconds: Sequence[float], every: int) -> float:
    """A step's seconds, the mean over whole periods if some of them push.

    In the first, memory is new, and DDP puts its buckets in another order. Downpour's steps are dealt to whoever is
    free, so the first rank may have had fewer than its share; and the last ones wait for all that is under way.
    """
    if every == 1:
        return statistics.median(seconds[1:])
    periods = [statistics.mean(seconds[at : at + every]) for at in range(every - 1, len(seconds) - every, every)]
    return statistics.median(periods or [statistics.mean(seconds)])


def _result(
    cases: Sequence[_Case], claims: Mapping[str, float], calibrating: float, notes: list[str], num_rounds: int
) -> SuiteResult:
    by_case: dict[tuple[str, str], list[_Case]] = {}
    for case in cases:
        by_case.setdefault((case.net, case.link), []).append(case)
    hits, rows = [], []
    for group in by_case.values():
        chosen, _ = recommend([case.prediction for case in group], asynchronous=True)
        best = max(case.speed for case in group)
        for case in group:
            is_chosen = case.prediction is chosen
            if is_chosen:
                hits.append(case.speed >= (1 - claims["within"]) * best)
            rows.append(
                {
                    "net": case.net,
                    "link": case.link,
                    "strategy": case.strategy,
                    "ms predicted": 1e3 * case.prediction.seconds,
                    "ms measured": 1e3 * case.measured,
                    "error %": 100 * case.error,
                    "by roofline alone %": 100 * (case.roofline / case.measured - 1),
                    "images/s": case.speed,
                    "": ("recommended" if is_chosen else "") + (", fastest" if case.speed == best else ""),
                }
            )
    errors = [abs(case.error) for case in cases] or [math.nan]
    median, worst = statistics.median(errors), max(errors)
    right = sum(hits) / max(len(hits), 1)
    bare = statistics.median(abs(case.roofline / case.measured - 1) for case in cases) if cases else math.nan
    summary = {
        "configurations": len(cases), "median error": median, "worst error": worst, "recommended": right,
        "cases": len(hits), "calibration seconds": calibrating, "median error by roofline alone": bare,
    }  # fmt: skip
    notes.insert(
        0,
        f"{len(cases)} configurations on two ranks of one thread each: the error of a predicted step is"
        f" {100 * median:.0f} % (median) and {100 * worst:.0f} % (worst), from a calibration of {calibrating:.0f} s for"
        f" all nets and links together; with nothing but the roofline the median is {100 * bare:.0f} %. The recommended"
        f" strategy is within {100 * claims['within']:.0f} % of the fastest in {sum(hits)} of {len(hits)} cases."
        f" Measured are medians of {num_rounds} rounds in which the strategies took turns; hosts of a slow link are"
        " network namespaces. Images/s are those of all ranks.",
    )
    failures = []
    if median > claims["median_error"] or worst > claims["worst_error"]:
        failures.append(
            f"Predictions err by {100 * median:.0f} % (median) and {100 * worst:.0f} % (worst), not"
            f" {100 * claims['median_error']:.0f} and {100 * claims['worst_error']:.0f}."
        )
    if right < claims["recommended"]:
        failures.append(f"The recommended strategy is right in {100 * right:.0f} % of cases.")
    if calibrating > claims["calibration_seconds"]:
        failures.append(f"Calibration took {calibrating:.0f} s.")
    if len(cases) < claims["configurations"]:
        failures.append(f"Only {len(cases)} configurations were measured.")
    extra = {"summary": summary, "rounds": [[c.net, c.link, c.strategy, c.seconds] for c in cases]}
    return SuiteResult("Predicted and measured steps", rows, " ".join(notes), _plot(cases), extra, failures)


def _plot(cases: Sequence[_Case]) -> Figure:
    from squall.conf.planner.reports import colour_of
    from squall.conf.plots import clean_axes, new_figure

    figure = new_figure(5.2, 4.2)
    axes = figure.subplots()
    marks = dict(zip(dict.fromkeys(case.link for case in cases), "osD^v", strict=False))
    for strategy in dict.fromkeys(case.strategy for case in cases):
        for link, mark in marks.items():
            own = [case for case in cases if (case.strategy, case.link) == (strategy, link)]
            axes.plot(
                [1e3 * case.measured for case in own], [1e3 * case.prediction.seconds for case in own], mark,
                color=colour_of(strategy), markersize=4, label=strategy if link == next(iter(marks)) else None,
            )  # fmt: skip
    ends = [1e3 * f(case.measured for case in cases) for f in (min, max)] if cases else [1.0, 2.0]
    for share, style in ((1.0, "-"), (1.2, ":"), (1 / 1.2, ":")):
        axes.plot(ends, [share * end for end in ends], style, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if cases:
        axes.legend(frameon=False, fontsize=8)
    title = ", ".join(
        f"{link} {dict(zip('osD^v', ('circle', 'square', 'diamond', 'up', 'down'), strict=True))[m]}"
        for link, m in marks.items()
    )
    clean_axes(axes, "ms a step, measured", "ms a step, predicted", title)
    return figure
