"""Suite ``columns``: what splitting AlexNet in two columns gains over data parallelism, and over one core."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.suites.links import Link, loopback, shaped_hosts, why_not
from squall.conf.suites.ranks import ranks_on

_CLAIMS = {"loopback": {"ddp": 1.15, "single": 1.9}, "1gbit": {"ddp": 1.5}}
_ORDER = ("single", "ddp", "column_parallel")


def measure(
    net: Mapping[str, Any], batch_size: int, num_rounds: int, num_steps: int, links: Sequence[str]
) -> SuiteResult:
    """Time training steps over each link.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        batch_size: Images of one step, all ranks together.
        num_rounds: How often the alternatives take turns.
        num_steps: Timed steps of a turn.
        links: "loopback", or a rate as ``tc`` writes it.

    Returns:
        Median images/s of each alternative and the median of the rounds' ratios.

    """
    rows: list[dict[str, Any]] = []
    notes, failures, timings = [], [], {}
    for name in links:
        if name == "loopback":
            seconds = _take_turns(loopback(2), net, batch_size, num_rounds, num_steps)
        else:
            reason = why_not()
            if reason:
                notes.append(f"The link {name} was left out: {reason}.")
                continue
            with shaped_hosts(name) as link:
                seconds = _take_turns(link, net, batch_size, num_rounds, num_steps)
        timings[name] = seconds
        rows += _rows(name, seconds, batch_size)
        for other, least in _CLAIMS.get(name, {}).items():
            ratio = _ratio(seconds, other)
            if ratio < least:
                failures.append(f"Over {name} columns reached {ratio:.2f} x {other}, not {least}.")
    notes.insert(
        0,
        f"AlexNet {dict(net)}, {batch_size} images a step in all, two ranks of one thread; ratios are medians over "
        f"{num_rounds} rounds in which the alternatives took turns.",
    )
    return SuiteResult(
        "Columns against data parallelism", rows, " ".join(notes), _plot(rows), {"seconds": timings}, failures
    )


def _take_turns(
    link: Link, net: Mapping[str, Any], batch_size: int, num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Median seconds a step of each alternative, a figure a round."""
    seconds: dict[str, list[float]] = {name: [] for name in _ORDER}
    with ranks_on(link, net) as ranks:
        for _ in track(range(num_rounds), description=link.name):
            for name in _ORDER:
                seconds[name].append(statistics.median(ranks.time(name, batch_size, num_steps)))
    return seconds


def _ratio(seconds: Mapping[str, Sequence[float]], other: str) -> float:
    """How many times faster columns are than ``other``: the median over rounds."""
    return statistics.median(b / a for a, b in zip(seconds["column_parallel"], seconds[other], strict=True))


def _rows(link: str, seconds: Mapping[str, Sequence[float]], batch_size: int) -> list[dict[str, Any]]:
    return [
        {
            "link": link,
            "strategy": name,
            "images/s": batch_size / statistics.median(seconds[name]),
            "lowest": batch_size / max(seconds[name]),
            "highest": batch_size / min(seconds[name]),
            "columns are faster by": _ratio(seconds, name),
        }
        for name in _ORDER
    ]


def _plot(rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    links = list(dict.fromkeys(row["link"] for row in rows))
    figure = Figure(figsize=(1.6 + 2.2 * len(links), 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, (name, colour) in enumerate(zip(_ORDER, ("0.7", "#4c78a8", "#e45756"), strict=True)):
        own = [row for row in rows if row["strategy"] == name]
        places = [links.index(row["link"]) + (offset - 1) * 0.27 for row in own]
        speeds = [row["images/s"] for row in own]
        spread = [[row["images/s"] - row["lowest"] for row in own], [row["highest"] - row["images/s"] for row in own]]
        axes.bar(places, speeds, 0.25, yerr=spread, color=colour, label=name, capsize=2, error_kw={"lw": 0.8})
        for place, speed in zip(places, speeds, strict=True):
            axes.annotate(f"{speed:.0f}", (place, speed / 2), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(links)), links)
    axes.set_ylabel("training images/s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
