"""A panel a net: what each way of training comes to, with its spread over the seeds, above or below the dense net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from squall.conf.suites.trainings import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def net_panels(
    rows: Sequence[Row], way: str, quantity: str, xlabel: str, width: float
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """Begin a picture: dense nets are lines, and the axis of what distinguishes the others is logarithmic.

    Args:
        rows: Of a suite's table, with ``net``.
        way: Column that tells how a net was trained.
        quantity: Column that is shown.
        xlabel: Of the axis.
        width: Of a panel, inches.

    Returns:
        The figure; and for each net its axes, and the rows that aren't the dense one.

    """
    from squall.conf.plots import GREY, clean_axes, new_figure

    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure = new_figure(width * len(nets), 3.2)
    panels = []
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        mine = [row for row in rows if row["net"] == net]
        dense = next(row for row in mine if row[way] == DENSE)
        axes.axhline(dense[quantity], color=GREY, linewidth=1.2, label=DENSE)
        axes.set_xscale("log")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        clean_axes(axes, xlabel, quantity, title=net)
        panels.append((axes, [row for row in mine if row is not dense]))
    return figure, panels


def draw_points(axes: Axes, places: Sequence[float], rows: Sequence[Row], quantity: str, **style: Any) -> None:
    """Draw rows as points that a line joins, with their spread.

    Args:
        axes: Of a net.
        places: Of the points.
        rows: As many; with ``std``.
        quantity: Column that is shown.
        **style: Of matplotlib.

    """
    axes.errorbar(
        places, [row[quantity] for row in rows], yerr=[row["std"] or 0.0 for row in rows], markersize=5, capsize=2,
        linewidth=1.4, elinewidth=0.8, **style,
    )  # fmt: skip


def set_ticks(axes: Axes, ticks: Sequence[float], label: str) -> None:
    """Say where the logarithmic axis has its ticks, and no others.

    Args:
        axes: Of a net.
        ticks: Their places.
        label: How a place is written, as of :meth:`str.format`.

    """
    axes.set_xticks(ticks, [label.format(tick) for tick in ticks])
    axes.minorticks_off()
