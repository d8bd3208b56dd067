"""Scenarios that set synchronous training and Downpour side by side, on the same workers with the same faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.progress import Progress

from squall._arguments import check_whole
from squall.conf.bench import SuiteResult

from .crew import Crew
from .distributions import make_distribution
from .downpour import Downpour, Link, Rules
from .faults import Faults
from .outcome import Outcome, Report
from .sandblaster import Sandblaster
from .synchronous import Synchronous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SWEPT = ("workers", "mtbf")


def compare(
    workers: int,
    steps: int,
    batch_size: int,
    compute: float | Mapping[str, Any],
    link: Mapping[str, Any],
    shards: Mapping[str, Any],
    synchronous: Mapping[str, Any],
    downpour: Mapping[str, Any],
    stragglers: Mapping[str, Any] | None = None,
    faults: Mapping[str, Any] | None = None,
    sandblaster: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> SuiteResult:
    """Simulate both, and perhaps both again over a range of one argument.

    Args:
        workers: How many.
        steps: Of each, if all are equal: ``steps * workers`` updates of Downpour, ``steps`` of all together.
        batch_size: Samples of a worker's step.
        compute: Seconds of one, as of :func:`make_distribution`.
        link: ``push``, ``fetch`` and ``call``, in seconds, each as of :func:`make_distribution`.
        shards: ``number``, and ``service``: seconds that one takes for its slice of a push.
        synchronous: ``exchange``, in seconds, and perhaps ``barriers``, ``checkpoint_every`` (steps) and ``checkpoint``
            (seconds).
        downpour: The Strategy's ``push_every``, ``fetch_every``, ``max_staleness``, ``warm_start_steps``, ``overlap``.
        stragglers: ``slowdown``, and a ``number`` or ``share`` of workers.
        faults: ``mtbf``, ``restart`` and ``notice``, of a worker, in seconds.
        sandblaster: ``portions`` of a batch, each of which takes as long as a step, ``direction`` in seconds, and
            perhaps ``backups``; it knows no faults. None to leave it out.
        sweep: One of ``workers`` and ``mtbf``, and its values.
        seed: Equal ones give equal results.

    Returns:
        A row for each Strategy, with a picture of staleness and of goodput over the range.

    Raises:
        MisconfigurationException: If an argument of the Strategies, or a number, makes no sense.
        ValueError: If a duration or another argument makes no sense; names it.

    """
    check_whole("steps", steps, 1)
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    swept = _sweep_of(sweep)

    def simulators(workers: int, faults: Mapping[str, Any] | None) -> dict[str, Callable[[Report | None], Outcome]]:
        crew = Crew.of(workers, compute, stragglers)
        wrong = Faults.of(faults)
        barrier = Synchronous(crew, **_synchronous(synchronous), faults=wrong, batch_size=batch_size)
        lines = _known("shards", shards, {"number", "service"})
        free = Downpour(
            crew, Link(**{name: make_distribution(f"link.{name}", said) for name, said in _link(link).items()}),
            lines["number"], make_distribution("shards.service", lines["service"]), _rules(downpour), wrong,
            batch_size=batch_size,
        )  # fmt: skip
        settle = workers + _rules(downpour).warm_start_steps  # the first update of each can't be late
        return {
            "synchronous": lambda report: barrier.run(steps, seed, report),
            "downpour": lambda report: free.run(steps * workers + settle, seed, report, settle),
        }

    def portions(report: Report | None) -> Outcome:
        said = dict(sandblaster or {})
        if not {"portions", "direction"} <= set(said) <= {"portions", "direction", "backups"}:
            raise ValueError(f"sandblaster={_plain(said)} must have portions and direction, and may have backups.")
        push = make_distribution("link.push", _link(link)["push"])
        said["direction"] = make_distribution("sandblaster.direction", said["direction"])
        training = Sandblaster(Crew.of(workers, compute, stragglers), **said, push=push, batch_size=batch_size)
        return training.run(max(1, steps * workers // said["portions"]), seed, report)

    points: list[tuple[float, Outcome, Outcome]] = []
    with Progress() as progress:
        chosen = simulators(workers, faults) | ({} if sandblaster is None else {"sandblaster": portions})
        named = [_follow(progress, f"{workers} workers, {name}", run) for name, run in chosen.items()]
        task = progress.add_task(f"over {len(swept[1])} {swept[0]}", total=len(swept[1]), visible=bool(swept[1]))
        for value in swept[1]:
            number = int(value) if swept[0] == "workers" else workers
            wrong = dict(faults or {}) | ({} if swept[0] == "workers" else {"mtbf": value})
            one, other = (run(None) for run in simulators(number, wrong).values())
            points.append((value, one, other))
            progress.advance(task)
    rows = [_row(outcome) for outcome in named]
    extra = {
        "staleness": sorted(named[1].staleness.items()), "sweep": swept[0],
        "points": [[value, one.goodput, other.goodput] for value, one, other in points],
    }  # fmt: skip
    notes = (
        f"{workers} workers for {steps} steps each; seed {seed}. Compute: {_plain(compute)}. Stragglers:"
        f" {_plain(stragglers)}. Link: {_plain(link)}. Shards: {_plain(shards)}. Synchronous: {_plain(synchronous)}."
        f" Downpour: {_plain(downpour)}. Faults: {_plain(faults)}. Sandblaster: {_plain(sandblaster)}. Goodput"
        " is samples a second over what the workers would do alone, never waiting and never failing. Staleness is"
        " counted by the coordinator that real runs have, without the first update of each worker."
    )
    return SuiteResult("Simulated training", rows, notes, _plot(named[1], swept[0], points), extra)


def _follow(progress: Progress, name: str, run: Callable[[Report | None], Outcome]) -> Outcome:
    task = progress.add_task(name, total=1.0)
    outcome = run(lambda share: progress.update(task, completed=share))
    progress.update(task, completed=1.0)
    return outcome


def _sweep_of(sweep: Mapping[str, Sequence[float]] | None) -> tuple[str, list[float]]:
    if not sweep:
        return "workers", []
    if len(sweep) != 1 or next(iter(sweep)) not in _SWEPT:
        raise ValueError(f"sweep={_plain(sweep)} must have one of {', '.join(_SWEPT)}, and its values.")
    ((name, values),) = sweep.items()
    return name, list(values)


def _known(name: str, said: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    if not isinstance(said, Mapping) or set(said) != keys:
        raise ValueError(f"{name}={_plain(said)} must have {', '.join(sorted(keys))}, and nothing else.")
    return dict(said)


def _link(said: Mapping[str, Any]) -> dict[str, Any]:
    return _known("link", said, {"push", "fetch", "call"})


def _rules(said: Mapping[str, Any]) -> Rules:
    try:
        return Rules(**said)
    except TypeError as error:
        raise MisconfigurationException(f"downpour={_plain(said)}: {error}. See squall.DownpourStrategy.") from None


def _synchronous(said: Mapping[str, Any]) -> dict[str, Any]:
    known = {"exchange", "barriers", "checkpoint_every", "checkpoint"}
    if "exchange" not in said or not set(said) <= known:
        raise ValueError(f"synchronous={_plain(said)} must have an exchange, and may have {', '.join(sorted(known))}.")
    return dict(said) | {"exchange": make_distribution("synchronous.exchange", said["exchange"])}


def _plain(said: Any) -> str:
    if isinstance(said, Mapping):
        return ", ".join(f"{name} {_plain(value)}" for name, value in said.items()) or "none"
    return "none" if said is None else str(said)


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "strategy": outcome.strategy,
        "workers": outcome.workers,
        "samples/s": outcome.throughput,
        "goodput, %": 100 * outcome.goodput,
        "updates": outcome.updates,
        "mean staleness": outcome.mean_staleness,
        "median": outcome.staleness_quantile(0.5),
        "95 %": outcome.staleness_quantile(0.95),
        "largest": outcome.staleness_quantile(1.0),
        "lost samples": outcome.lost_samples,
        "restarts": outcome.restarts,
        "seconds": outcome.seconds,
    }


def draw_staleness(axes: Axes, histograms: Mapping[str, Mapping[int, int]], title: str = "") -> None:
    """Draw histograms of staleness as steps over each other.

    Args:
        axes: Changed in place.
        histograms: By name: counts of each staleness.
        title: Above.

    """
    from matplotlib.ticker import MaxNLocator

    from squall.conf.plots import COLOURS, clean_axes

    for colour, (name, counts) in zip((COLOURS[1], COLOURS[0], COLOURS[2]), histograms.items(), strict=False):
        total = sum(counts.values())
        values = range(min(counts), max(counts) + 2)
        shares = [100 * counts.get(value, 0) / total for value in values]
        axes.fill_between([v - 0.5 for v in values], shares, step="post", color=colour, alpha=0.22, linewidth=0)
        axes.step([v - 0.5 for v in values], shares, where="post", color=colour, linewidth=1.4, label=name)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    clean_axes(axes, "staleness of an update", "updates, %", title)


def _plot(downpour: Outcome, swept: str, points: Sequence[tuple[float, Outcome, Outcome]]) -> Figure:
    from squall.conf.plots import BLUE, ORANGE, clean_axes, new_figure

    figure = new_figure(7.6 if points else 4.2, 3.2)
    panels = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    draw_staleness(panels[0], {"downpour": downpour.staleness}, f"Staleness, {downpour.workers} workers")
    for axes in panels[1:]:
        places = [3600 / value if swept == "mtbf" else value for value, _, _ in points]
        shares = {
            "Downpour": [100 * free.goodput for _, _, free in points],
            "synchronous": [100 * barrier.goodput for _, barrier, _ in points],
        }
        for colour, marker, (name, values) in zip((ORANGE, BLUE), "os", shares.items(), strict=True):
            axes.plot(places, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.set_xscale("log", base=10 if swept == "mtbf" else 2)
        axes.set_ylim(0, 104)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        label = "failures of a worker an hour" if swept == "mtbf" else "workers"
        clean_axes(axes, label, "goodput, %", "What is done of what could be")
    return figure
