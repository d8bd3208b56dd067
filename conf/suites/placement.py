"""Suite ``placement``: replicas, columns and the hybrid of both, by batch size and link."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.suites.links import Link, loopback, shaped_hosts, why_not
from squall.conf.suites.ranks import ranks_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Turns = dict[tuple[str, int, str], list[tuple[float, float]]]  # link, batch, alternative: images/s and bytes of a step


def measure(
    net: Mapping[str, Any],
    links: Sequence[str],
    batch_sizes: Sequence[int],
    alternatives: Mapping[str, Mapping[str, Any]],
    claims: Mapping[str, Any],
    num_rounds: int,
    num_steps: int,
) -> SuiteResult:
    """Let all alternatives take turns at every batch size, over each link.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        links: "loopback", or a rate as ``tc`` writes it.
        batch_sizes: Images of one step, all ranks together.
        alternatives: By name: ``strategy`` as :meth:`~squall.conf.suites.ranks.Ranks.measure` takes it, ``options``.
        claims: ``link``, ``batch_size``, ``times_ddp``: where a hybrid has to be how many times as fast as DDP.
        num_rounds: How often the alternatives take turns.
        num_steps: Timed steps of a turn.

    Returns:
        Images/s, the median of the rounds' ratios to DDP, and the bytes that a rank sends in a step.

    """
    alternatives, notes = _registered(alternatives)
    turns: Turns = {}
    for name in links:
        context: AbstractContextManager[Link] = nullcontext(loopback(2))
        if name != "loopback":
            reason = why_not()
            if reason:
                notes.append(f"The link {name} was left out: {reason}.")
                continue
            context = shaped_hosts(name)
        with context as link, ranks_on(link, net) as ranks:
            for batch_size in batch_sizes:
                for _ in track(range(num_rounds), description=f"{name}, {batch_size} images"):
                    for alternative, how in alternatives.items():
                        seconds, sent = ranks.measure(how["strategy"], batch_size, num_steps, how.get("options"))
                        speed = batch_size / statistics.median(seconds)
                        turns.setdefault((name, batch_size, alternative), []).append((speed, sent))
    rows = _rows(turns)
    notes.insert(
        0,
        f"AlexNet {dict(net)} on two ranks of one thread each, SGD with momentum; images of a step are those of both"
        f" ranks. Medians of {num_rounds} rounds in which all alternatives took turns. MB are what the interface of a"
        " rank's host sends in a step, all protocols included.",
    )
    extra = {"turns": [{"link": k[0], "images": k[1], "alternative": k[2], "turns": v} for k, v in turns.items()]}
    return SuiteResult("Where layers live", rows, " ".join(notes), _plot(rows), extra, _failures(rows, claims))


def _registered(alternatives: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    from lightning.pytorch.strategies import StrategyRegistry

    import squall  # noqa: F401  (registers its own)

    known = {name: how for name, how in alternatives.items() if how["strategy"] in {"zero1", *StrategyRegistry}}
    missing = [name for name in alternatives if name not in known]
    return known, [f"Left out, since they are not registered: {', '.join(missing)}."] if missing else []


def _rows(turns: Turns) -> list[dict[str, Any]]:
    rows = []
    for (link, batch_size, alternative), measured in turns.items():
        speeds = [speed for speed, _ in measured]
        reference = [speed for speed, _ in turns.get((link, batch_size, "ddp"), measured)]
        rows.append(
            {
                "link": link,
                "images a step": batch_size,
                "alternative": alternative,
                "images/s": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "against DDP": statistics.median(a / b for a, b in zip(speeds, reference, strict=True)),
                "MB sent a step": statistics.median(sent for _, sent in measured) / 1e6,
            }
        )
    return rows


def _failures(rows: Sequence[Mapping[str, Any]], claims: Mapping[str, Any]) -> list[str]:
    failures = []
    there = [row for row in rows if row["link"] == claims["link"]]
    hybrids = [row for row in there if row["alternative"].startswith("hybrid")]
    small = [row["against DDP"] for row in hybrids if row["images a step"] == claims["batch_size"]]
    if small and max(small) < claims["times_ddp"]:
        failures.append(
            f"Over {claims['link']} and at {claims['batch_size']} images a step the best hybrid reached "
            f"{max(small):.2f} x DDP, not {claims['times_ddp']}."
        )
    best = {row["images a step"]: max(there, key=_speed_at(row["images a step"]))["alternative"] for row in there}
    if hybrids and not any(name.startswith("hybrid") for name in best.values()):
        failures.append(f"Over {claims['link']} a hybrid is the fastest at no batch size: {best}.")
    return failures


def _speed_at(batch_size: int) -> Any:
    return lambda row: row["images/s"] if row["images a step"] == batch_size else 0.0


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from squall.conf.plots import COLOURS, GREY, clean_axes, new_figure

    links = list(dict.fromkeys(row["link"] for row in rows)) or [""]
    names = list(dict.fromkeys(row["alternative"] for row in rows))
    figure = new_figure(1.4 + 3.4 * len(links), 3.4)
    panels = figure.subplots(1, len(links), squeeze=False, sharey=True)[0]
    for axes, link in zip(panels, links, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["link"] == link and row["alternative"] == name]
            axes.plot(
                [row["images a step"] for row in own],
                [row["images/s"] for row in own],
                color=(*COLOURS, GREY)[number % (len(COLOURS) + 1)],
                marker="o",
                markersize=3,
                linestyle="-" if name.startswith("hybrid") else "--",
                label=name if link == links[0] else None,
            )
        axes.set_xscale("log", base=2)
        sizes = sorted({row["images a step"] for row in rows})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        clean_axes(axes, "images of a step", "training images/s" if link == links[0] else "", link)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
