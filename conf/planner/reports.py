"""Plans for people: tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from squall.conf.plots import BLUE, COLOURS, GREY, ORANGE, clean_axes, new_figure

from .predictions import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OF_KIND = {
    "single": GREY, "ddp": COLOURS[0], "zero1": COLOURS[5], "columns": COLOURS[1], "spatial": COLOURS[2],
    "hybrid": COLOURS[3], "downpour": COLOURS[4],
}  # fmt: skip
_MOST_BARS = 24


def rows_of(predictions: Sequence[Prediction], samples: float) -> list[dict[str, Any]]:
    """A row a strategy.

    Args:
        predictions: In their order.
        samples: Of a whole training.

    """
    rows = []
    for p in predictions:
        hours = samples / p.images_per_second / 3600
        row: dict[str, Any] = {
            "strategy": p.alternative.label,
            "ranks": p.alternative.num_ranks,
            "ms a step": 1e3 * p.seconds,
            "images/s": p.images_per_second,
            "MB sent a step": p.num_bytes / 1e6,
            "GB a rank": p.memory.total / 1e9,
            "hours": hours,
        }
        if p.euros_per_hour:
            row |= {"samples a euro": p.samples_per_euro, "euros": hours * p.euros_per_hour}
        if not p.fits:
            row["strategy"] += " (too large)"
        rows.append(row)
    return rows


def colour_of(strategy: str) -> str:
    """The colour of a strategy in every picture."""
    return _OF_KIND.get(strategy, GREY)


def draw_plan(predictions: Sequence[Prediction], chosen: Prediction) -> Figure:
    """Draw where a step's time goes: of each strategy, and of each layer of the chosen one.

    Args:
        predictions: The fastest first.
        chosen: The one whose layers are drawn.

    """
    layers = _heavy_layers(chosen)
    figure = new_figure(9.6, max(2.6, 0.24 * max(len(predictions), len(layers)) + 1.3))
    left, right = figure.subplots(1, 2)
    _bars(
        left,
        [p.alternative.label for p in predictions],
        [(p.seconds - _waiting(p), _waiting(p)) for p in predictions],
        per_image=[p.num_examples for p in predictions],
    )
    left.get_yticklabels()[[p.alternative for p in predictions].index(chosen.alternative)].set_fontweight("bold")
    clean_axes(left, "ms an image", title="Time of an image")
    _bars(right, list(layers), list(layers.values()))
    clean_axes(right, "ms a step", title=f"Layers under {chosen.alternative.label}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _waiting(prediction: Prediction) -> float:
    line = prediction.timeline
    return sum(line.waiting.values()) if line is not None else 0.0


def _heavy_layers(prediction: Prediction) -> dict[str, tuple[float, float]]:
    line = prediction.timeline
    layers = line.by_layer() if line is not None else {}
    named = {name or "(other)": seconds for name, seconds in layers.items()}
    heaviest = sorted(named, key=lambda name: -sum(named[name]))[:_MOST_BARS]
    return {name: seconds for name, seconds in named.items() if name in heaviest}


def _bars(
    axes: Axes, names: Sequence[str], parts: Sequence[tuple[float, float]], per_image: Sequence[int] | None = None
) -> None:
    shares = per_image or [1] * len(names)
    computing = [1e3 * a / n for (a, _), n in zip(parts, shares, strict=True)]
    waiting = [1e3 * b / n for (_, b), n in zip(parts, shares, strict=True)]
    places = range(len(names))
    axes.barh(places, computing, 0.7, color=BLUE, label="computing")
    axes.barh(places, waiting, 0.7, left=computing, color=ORANGE, label="waiting for messages")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def draw_scaling(by_size: Mapping[int, Sequence[Prediction]], samples: float, xlabel: str) -> Figure:
    """Draw images/s against machines for each strategy, and the frontier of cost against time.

    Args:
        by_size: Predictions by number of machines.
        samples: Of a whole training.
        xlabel: What sizes are numbers of.

    """
    priced = any(p.euros_per_hour for predictions in by_size.values() for p in predictions)
    figure = new_figure(9.6 if priced else 5.4, 3.6)
    panels = figure.subplots(1, 2 if priced else 1, squeeze=False)[0]
    best: dict[str, dict[int, Prediction]] = {}
    for size, predictions in by_size.items():
        for p in predictions:
            own = best.setdefault(p.alternative.strategy, {})
            if p.fits and (size not in own or p.images_per_second > own[size].images_per_second):
                own[size] = p
    for strategy, own in best.items():
        if strategy == "single" or not own:
            continue
        speeds = [p.images_per_second for p in own.values()]
        panels[0].plot(list(own), speeds, marker="o", markersize=3, color=colour_of(strategy), label=strategy)
    first = min(by_size)
    alone = max((p.images_per_second / p.alternative.num_ranks for p in by_size[first]), default=0.0)
    ranks = max((p.alternative.num_ranks for p in by_size[first]), default=1)
    panels[0].plot(
        list(by_size),
        [alone * ranks * size / first for size in by_size],
        color="#bbbbbb",
        linestyle=":",
        label="linear",
    )
    panels[0].set_xscale("log", base=2)
    panels[0].set_yscale("log")
    panels[0].set_xticks(list(by_size), [f"{size:,}" for size in by_size], rotation=45 if len(by_size) > 8 else 0)
    panels[0].minorticks_off()
    clean_axes(panels[0], xlabel, "training images/s", "Speed")
    panels[0].legend(frameon=False, fontsize=8)
    if priced:
        _draw_frontier(panels[1], best, samples)
    return figure


def _draw_frontier(axes: Axes, best: Mapping[str, Mapping[int, Prediction]], samples: float) -> None:
    points = []
    for strategy, own in best.items():
        found = [(samples / p.images_per_second / 3600, p) for p in own.values() if p.euros_per_hour]
        costs = [(hours, hours * p.euros_per_hour) for hours, p in found]
        points += costs
        axes.plot(*zip(*costs, strict=True), "o", markersize=3.5, color=colour_of(strategy)) if costs else None
    front: list[tuple[float, float]] = []
    for hours, euros in sorted(points):
        if not front or euros < front[-1][1]:
            front.append((hours, euros))
    if front:
        axes.step(
            *zip(*front, strict=True), where="post", color="#222222", linewidth=1.0, label="nothing is better in both"
        )
        axes.legend(frameon=False, fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    clean_axes(axes, "hours of the whole training", "euros", "Cost against time")
