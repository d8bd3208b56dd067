"""A study: what share of chips' time is of use as they grow in number, set beside what others have published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.progress import Progress

from squall._arguments import check_whole
from squall.conf.bench import SuiteResult
from squall.conf.writers import to_markdown

from .fleet import HOUR, YEAR, Fleet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = Mapping[str, Any]


def study(
    common: Arguments,
    cases: Mapping[str, Arguments],
    chips: Sequence[int],
    published: Sequence[Arguments],
    sensitivity: Mapping[str, Sequence[Arguments]],
    at: Arguments,
    failures: int,
    comment: str = "",
    seed: int = 0,
) -> SuiteResult:
    """Simulate fleets of growing size, and what becomes of two of them if an assumption is another.

    Args:
        common: Arguments of :class:`Fleet` that all cases have.
        cases: By name, what each has besides.
        chips: How many of them, of each case.
        published: ``case``, ``chips``, ``goodput`` and ``source``, and perhaps further arguments that it is for.
        sensitivity: By what it is called: changes of a case, one below and one above, or only one.
        at: ``chips`` for that, and ``cases``, by name.
        failures: Of chips, that each point is simulated for; at most a year of the fleet's clock, at least an hour.
        comment: What the comparison says, in words.
        seed: Equal ones give equal results.

    Returns:
        A row for each number of chips, with a column for each case; beside it, in notes, what is published and the
        sensitivity.

    Raises:
        MisconfigurationException: If an argument is unknown, or a number makes no sense.
        ValueError: If a case is spoken of that isn't there.

    """
    check_whole("failures", failures, 1)
    check_whole("seed", seed, 0)
    for said in (*(point["case"] for point in published), *at["cases"]):
        if said not in cases:
            raise ValueError(f"there is no case {said!r}. Name one of {', '.join(cases)}.")
    settings = {name: {**common, **case} for name, case in cases.items()}
    num_changes = sum(map(len, sensitivity.values())) * len(at["cases"])
    with Progress() as progress:
        task = progress.add_task("fleets", total=len(chips) * len(cases) + len(published) + num_changes)

        def goodput(arguments: Arguments) -> float:
            share = simulate(arguments, failures, seed)
            progress.advance(task)
            return share

        curves = {
            name: [
                goodput({**case, "chips": number}) if case.get("learners", 1) <= number else None for number in chips
            ]
            for name, case in settings.items()
        }
        beside = []
        for point in published:
            further = {key: value for key, value in point.items() if key not in ("case", "goodput", "source")}
            ours = goodput({**settings[point["case"]], **further})
            beside.append({
                "training": point["case"], "chips": point["chips"],
                "learners": further.get("learners", settings[point["case"]].get("learners", 1)),
                "published, %": 100.0 * point["goodput"], "simulated, %": 100 * ours,
                "points apart": 100 * (ours - point["goodput"]), "source": point["source"],
            })  # fmt: skip
        base = {name: goodput({**settings[name], "chips": at["chips"]}) for name in at["cases"]}
        swings = {
            name: {
                what: [goodput({**settings[name], "chips": at["chips"], **change}) for change in changes]
                for what, changes in sensitivity.items()
            }
            for name in at["cases"]
        }
    rows = [
        {
            "chips": number,
            "failures an hour": HOUR * number / common.get("mtbf", YEAR),
            **{f"{name}, %": _percent(curves[name][index]) for name in cases},
        }
        for index, number in enumerate(chips)
    ]
    changed = [
        {"if": _words(change)} | {f"{name}, %": 100 * swings[name][what][index] for name in at["cases"]}
        for what, changes in sensitivity.items()
        for index, change in enumerate(changes)
    ]
    first: dict[str, Any] = {"if": "as assumed"} | {f"{name}, %": 100 * base[name] for name in at["cases"]}
    notes = "\n\n".join([
        f"Share of chip-seconds that is of use. All: {_words(common)}. "
        + " ".join(f"{name}: {_words(case)}." for name, case in cases.items())
        + f" Each point is of about {failures:,} failures, or a year, or an hour at least; seed {seed}.",
        "Beside what is published:", to_markdown(beside).rstrip(), comment.strip(),
        f"With {at['chips']:,} chips, if one assumption is another:", to_markdown([first, *changed]).rstrip(),
    ])  # fmt: skip
    extra = {"published": beside, "assumed": base, "sensitivity": swings}
    figure = _plot(chips, curves, beside, base, swings, sensitivity, common.get("mtbf", YEAR))
    return SuiteResult("Goodput while chips fail", rows, notes, figure, extra)


def simulate(arguments: Arguments, failures: int, seed: int) -> float:
    """Simulate one fleet.

    Args:
        arguments: Of :class:`Fleet`.
        failures: How many are to be expected: they say how long. At most a year, at least an hour.
        seed: Equal ones give equal results.

    Returns:
        Its goodput, from 0 to 1.

    Example:
        >>> 0.29 < simulate({"chips": 1_200_000, "restart": 60.0}, failures=2000, seed=0) < 0.32
        True

    """
    try:
        fleet = Fleet(**arguments)
    except TypeError as error:
        raise MisconfigurationException(f"a fleet of {_words(arguments)}: {error}.") from None
    seconds = failures * fleet.mtbf / fleet.chips
    return fleet.run(min(max(seconds, HOUR), YEAR), seed).goodput


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _words(arguments: Arguments) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in arguments.items()) or "no change"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"({_words(value)})"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _plot(
    chips: Sequence[int],
    curves: Mapping[str, Sequence[float | None]],
    beside: Sequence[Arguments],
    base: Mapping[str, float],
    swings: Mapping[str, Mapping[str, Sequence[float]]],
    sensitivity: Mapping[str, Sequence[Arguments]],
    mtbf: float,
) -> Figure:
    from squall.conf.plots import COLOURS, clean_axes, new_figure

    figure = new_figure(7.2, 3.6 + 0.27 * len(sensitivity) + 0.8)
    halves: Any = figure.subfigures(2, 1, height_ratios=[3.6, 0.27 * len(sensitivity) + 0.8])
    axes = halves[0].subplots()
    for colour, (name, shares) in zip(COLOURS, curves.items(), strict=False):
        points = [(number, 100 * share) for number, share in zip(chips, shares, strict=True) if share is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=name)
        for point in beside:
            if point["training"] == name:
                axes.plot(point["chips"], point["published, %"], "o", color=colour, markersize=6, mfc="white")
    axes.plot([], [], "o", color="#444444", markersize=6, mfc="white", label="published")
    axes.set_xscale("log")
    axes.set_ylim(0, 103)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    clean_axes(axes, "chips", "goodput, %", "Goodput while chips fail")
    upper = axes.secondary_xaxis("top", functions=(lambda n: n * HOUR / mtbf, lambda rate: rate * mtbf / HOUR))
    upper.set_xlabel("failures an hour", fontsize=8, color="#444444")
    upper.tick_params(colors="#444444", labelsize=7)
    upper.spines["top"].set_visible(False)
    panels = halves[1].subplots(1, len(base), sharey=True, squeeze=False)[0]
    colours = dict(zip(curves, COLOURS, strict=False))
    for panel, (name, middle) in zip(panels, base.items(), strict=True):
        _tornado(panel, middle, swings[name], sensitivity, colours[name])
        clean_axes(panel, "goodput, %", "", name)
    return figure


def _tornado(
    axes: Axes,
    middle: float,
    swings: Mapping[str, Sequence[float]],
    sensitivity: Mapping[str, Sequence[Arguments]],
    colour: str,
) -> None:
    names = list(sensitivity)[::-1]
    for place, what in enumerate(names):
        ends = [100 * middle, *(100 * share for share in swings[what])]
        axes.barh(place, max(ends) - min(ends), left=min(ends), height=0.55, color=colour, alpha=0.75)
    axes.axvline(100 * middle, color="#444444", linewidth=0.9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
