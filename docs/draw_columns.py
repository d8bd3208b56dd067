"""Draw ``columns.png``: AlexNet's layout in two columns, from the layout that Squall derives.

Run ``python docs/draw_columns.py`` after a change of the layout's rules.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from squall.models import AlexNet
from squall.placement import derive_layout

COLOURS = ("#4c78a8", "#e45756")


def main() -> None:
    """Derive the layout of the 2012 network, and draw it."""
    layout = derive_layout(AlexNet(), torch.zeros(1, 3, 224, 224), num_columns=2)
    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    axes = figure.subplots()
    for place, layer in enumerate(layout):
        outputs = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256}.get(layer.name, 4096)
        for column, colour in enumerate(COLOURS):
            y = 1.6 - 1.6 * column
            whole = layer.split == "whole"
            box = FancyBboxPatch(
                (place - 0.33, y - 0.36), 0.66, 0.72, boxstyle="round,pad=0.02", lw=1.2,
                facecolor="0.88" if whole else colour + "33", edgecolor="0.5" if whole else colour,
            )  # fmt: skip
            axes.add_patch(box)
            count = 1000 if whole else outputs // 2
            axes.text(place, y + 0.1, layer.name, ha="center", va="center", fontsize=11, weight="bold")
            axes.text(place, y - 0.16, f"{count:,}", ha="center", va="center", fontsize=9)
            if place:
                axes.add_patch(_arrow((place - 0.63, y), (place - 0.37, y), "0.4"))
        if layer.crosses:
            axes.add_patch(_arrow((place - 0.63, 1.5), (place - 0.36, 0.22), COLOURS[0]))
            axes.add_patch(_arrow((place - 0.63, 0.1), (place - 0.36, 1.38), COLOURS[1]))
            axes.text(
                place - 0.5,
                -0.62,
                f"{layer.floats_per_image:,}\nfloats",
                ha="center",
                va="top",
                fontsize=9,
                color="0.25",
            )
    for column, colour in enumerate(COLOURS):
        axes.text(-0.5, 1.6 - 1.6 * column, f"rank {column}", ha="right", va="center", fontsize=11, color=colour)
    axes.set_xlim(-1.1, 7.5)
    axes.set_ylim(-1.15, 2.15)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("columns.png"), dpi=110)


def _arrow(start: tuple[float, float], stop: tuple[float, float], colour: str) -> FancyArrowPatch:
    return FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=9, lw=1.2, color=colour, shrinkA=0, shrinkB=0)


if __name__ == "__main__":
    main()
