"""Draw ``strategies/*.png``: who sends what to whom, a picture a Strategy.

Run ``python docs/draw_strategies.py`` after a change; ``columns.png`` has a script of its own, since it is drawn from a
layout that Squall derives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

RANKS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2")
SHARD, GREY = "#f58518", "#777777"
Point = tuple[float, float]


class Picture:
    """A plane to draw on, in units of about a centimetre.

    Args:
        name: Of the file.
        width: Of the plane.
        height: Of the plane.
    """

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name = name
        self.figure = Figure(figsize=(width / 2, height / 2))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.axis("off")

    def box(self, centre: Point, size: Point, text: str, colour: str, fontsize: float = 10) -> None:
        """A rounded box with a text in it."""
        (x, y), (width, height) = centre, size
        corner = x - width / 2 + 0.1, y - height / 2 + 0.1
        look = {"boxstyle": "round,pad=0.1", "lw": 1.3, "facecolor": colour + "2a", "edgecolor": colour}
        self.axes.add_patch(FancyBboxPatch(corner, width - 0.2, height - 0.2, **look))
        self.axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, linespacing=1.35)

    def arrow(self, start: Point, stop: Point, colour: str = "0.35", style: str = "-|>") -> None:
        """An arrow; ``<|-|>`` has two heads."""
        self.axes.add_patch(
            FancyArrowPatch(
                start, stop, arrowstyle=style, mutation_scale=10, lw=1.3, color=colour, shrinkA=0, shrinkB=0
            )
        )

    def text(self, place: Point, text: str, colour: str = "0.25", ha: str = "center", fontsize: float = 9.5) -> None:
        """A text on nothing."""
        self.axes.text(*place, text, ha=ha, va="center", fontsize=fontsize, color=colour, linespacing=1.35)

    def save(self) -> None:
        """Write the file."""
        self.figure.savefig(Path(__file__).parent / "strategies" / f"{self.name}.png", dpi=110, facecolor="white")


def spatial_parallel() -> None:
    """Two tiles through three convolutions, and a linear layer that needs them all."""
    picture = Picture("spatial_parallel", 20, 7.6)
    for stage, name in enumerate(("image", "conv1", "conv2", "conv3")):
        x = 3.2 + 3.6 * stage
        for rank in (0, 1):
            y = 5.3 - 2.6 * rank
            picture.box((x, y), (2.0, 2.0), f"{name}\n{'upper' if rank == 0 else 'lower'} rows", RANKS[rank])
            fringe = y - 1.0 if rank == 0 else y + 0.72
            if stage < 3:
                picture.axes.add_patch(
                    Rectangle((x - 0.95, fringe), 1.9, 0.28, facecolor=RANKS[rank] + "77", edgecolor="none")
                )
                picture.arrow((x + 1.1, y), (x + 2.5, y))
        if stage < 3:
            picture.arrow((x + 1.05, 4.45), (x + 2.55, 3.35), RANKS[0])
            picture.arrow((x + 1.05, 3.55), (x + 2.55, 4.65), RANKS[1])
    for rank in (0, 1):
        y = 5.3 - 2.6 * rank
        picture.text((1.9, y), f"rank {rank}", RANKS[rank], "right", 11)
        picture.box((18.0, y), (2.2, 2.0), "linear\nlayers,\nwhole", GREY)
        picture.arrow((15.1, y), (16.8, y))
    picture.arrow((15.05, 4.7), (16.85, 3.3), RANKS[0])
    picture.arrow((15.05, 3.3), (16.85, 4.7), RANKS[1])
    picture.text((8.6, 0.85), "fringes that the windows read: sent while\nthe interior computes; gradients go home")
    picture.text((16.0, 0.85), "flatten gathers the map")
    picture.save()


def hybrid_parallel() -> None:
    """Two ranks: convolutions replicated, linear layers split."""
    picture = Picture("hybrid_parallel", 20, 7.6)
    for rank in (0, 1):
        y = 5.6 - 3.2 * rank
        picture.text((1.9, y), f"rank {rank}", RANKS[rank], "right", 11)
        picture.box((3.5, y), (2.2, 1.7), f"batch {rank}", RANKS[rank])
        picture.box((7.3, y), (3.0, 1.7), "convolutions,\nall of them", GREY)
        picture.box((13.2, y), (3.2, 1.7), f"linear layers,\noutputs of rank {rank}", RANKS[rank])
        picture.box((17.8, y), (2.6, 1.7), f"logits and loss\nof batch {rank}", RANKS[rank])
        picture.arrow((4.65, y), (5.75, y))
        picture.arrow((8.85, y), (11.55, y))
        picture.arrow((14.85, y), (16.45, y))
    for x, wide in ((8.9, 2.6), (14.9, 1.5)):
        picture.arrow((x, 4.95), (x + wide, 3.05), RANKS[0])
        picture.arrow((x, 3.05), (x + wide, 4.95), RANKS[1])
    picture.arrow((7.3, 4.7), (7.3, 3.3), style="<|-|>")
    picture.text((7.1, 4.0), "gradients:\naveraged", ha="right")
    picture.text((10.2, 0.7), "activations of a part of the\nexamples, a pass at a time")
    picture.text((15.65, 0.7), "outputs go back to\nwhose examples they are")
    picture.save()


def downpour() -> None:
    """Workers, shards and the coordinator."""
    picture = Picture("downpour", 20, 9.6)
    workers, shards = (7.0, 5.4, 3.8, 2.2), (6.6, 4.6, 2.6)
    for rank, y in enumerate(workers):
        picture.box((4.0, y), (3.6, 1.25), f"rank {rank}: gradients", RANKS[rank])
        for shard in shards:
            picture.arrow((5.85, y + 0.1), (13.05, shard + 0.2), RANKS[rank])
    for shard, y in enumerate(shards):
        picture.box((15.6, y), (5.0, 1.5), f"shard {shard}: a slice of weights\nand the optimizer on it", SHARD)
    picture.arrow((13.05, 2.1), (5.85, 1.75), SHARD)
    picture.text((9.5, 1.35), "fetch: weights, as others have moved them", SHARD)
    picture.text((9.4, 7.35), "push: a slice of the gradient to each", RANKS[0])
    picture.box((9.7, 8.85), (9.4, 1.1), "coordinator: one queue of batches, one order of updates", GREY)
    picture.arrow((4.9, 8.6), (4.0, 7.75), style="<|-|>")
    picture.text((3.8, 8.35), "a batch, under lease", ha="right")
    picture.arrow((14.5, 8.6), (15.6, 7.45), style="<|-|>")
    picture.text((15.5, 8.2), "next in order", ha="left")
    picture.text((10.0, 0.5), "nobody waits: a slow rank slows nobody, a dead one stops nobody")
    picture.save()


def hogwild() -> None:
    """Ranks around one memory."""
    picture = Picture("hogwild", 20, 7.8)
    picture.box(
        (10.0, 4.0), (5.6, 3.4), "shared memory of one host:\nall weights, all of\nthe optimizer's state", SHARD
    )
    places = ((3.2, 5.3), (3.2, 2.7), (16.8, 5.3), (16.8, 2.7))
    for rank, (x, y) in enumerate(places):
        picture.box((x, y), (3.4, 1.5), f"rank {rank}: gradient\nand step", RANKS[rank])
        side = 1 if x < 10 else -1
        picture.arrow((x + side * 1.8, y + 0.25), (10 - side * 2.9, y + 0.25), RANKS[rank])
        picture.arrow((10 - side * 2.9, y - 0.25), (x + side * 1.8, y - 0.25), SHARD)
    picture.text((6.05, 6.1), "steps, in place")
    picture.text((6.05, 1.5), "weights, as they are")
    picture.text((13.95, 6.1), "no lock")
    picture.text((13.95, 1.5), "no copy")
    picture.box((10.0, 7.1), (6.4, 1.0), "coordinator: one queue of batches", GREY)
    picture.arrow((6.75, 7.1), (3.2, 6.15), style="<|-|>")
    picture.arrow((13.25, 7.1), (16.8, 6.15), style="<|-|>")
    picture.text((10.0, 0.7), "two ranks that step one element at one instant may lose one of the two steps of it")
    picture.save()


def sandblaster() -> None:
    """Ranks, shards with vectors, and the coordinator between them."""
    picture = Picture("sandblaster", 20, 9.2)
    ranks, shards = (6.0, 4.3, 2.6), (5.6, 3.0)
    for rank, y in enumerate(ranks):
        picture.box((4.0, y), (3.8, 1.3), f"rank {rank}: gradient\nof its portions", RANKS[rank])
        for shard in shards:
            picture.arrow((5.95, y + 0.1), (12.85, shard + 0.2), RANKS[rank])
    for shard, y in enumerate(shards):
        picture.box((15.6, y), (5.4, 1.9), f"shard {shard}: slices of weights,\ngradient, direction, history", SHARD)
    picture.text((9.3, 6.45), "a gradient each, once an evaluation", RANKS[0])
    picture.arrow((12.85, 2.2), (5.95, 1.9), SHARD)
    picture.text((9.4, 1.5), "weights, once an evaluation", SHARD)
    picture.box((9.8, 8.4), (7.6, 1.2), "coordinator: L-BFGS and its line search", GREY)
    picture.arrow((6.0, 8.2), (4.2, 6.75), style="<|-|>")
    picture.text((4.6, 7.8), "portions of the batch,\nlosses", ha="right")
    picture.arrow((13.6, 8.2), (15.4, 6.65), style="<|-|>")
    picture.text((15.2, 7.75), "dot, scale, add: scalars,\nnever a vector", ha="left")
    picture.text((10.0, 0.55), "portions that slow ranks still have are dealt out again; whoever is first is believed")
    picture.save()


def sparse() -> None:
    """A layer's mask before, between and after, and the ranks that agree on it."""
    picture = Picture("sparse", 20, 8.0)
    rng = np.random.default_rng(4)
    live = rng.random((6, 6)) < 0.34
    pruned = live & (rng.random((6, 6)) < 0.3)
    room = np.argwhere(~live)
    chosen = room[rng.permutation(len(room))[: pruned.sum()]]
    grown = np.zeros_like(live)
    grown[tuple(chosen.T)] = True
    titles = ("an epoch: few live weights", "the smallest go", "as many come, where the\nmomentum is largest")
    for stage, title in enumerate(titles):
        left = 1.6 + 6.4 * stage
        for row, column in np.ndindex(6, 6):
            colour = "white"
            if (live & ~pruned)[row, column]:
                colour = RANKS[0]
            elif pruned[row, column] and stage < 2:
                colour = RANKS[0] if stage == 0 else RANKS[1] + "66"
            elif grown[row, column] and stage == 2:
                colour = RANKS[2]
            cell = Rectangle((left + 0.62 * column, 6.6 - 0.62 * row), 0.58, 0.58, facecolor=colour, edgecolor="0.75")
            picture.axes.add_patch(cell)
        picture.text((left + 1.85, 2.85), title)
        if stage < 2:
            picture.arrow((left + 4.2, 5.3), (left + 5.9, 5.3))
    picture.text((10.0, 7.6), "one layer's weights; elsewhere they are exactly 0", fontsize=10)
    picture.box((4.2, 1.1), (3.4, 1.2), "rank 0", RANKS[0])
    picture.box((15.8, 1.1), (3.4, 1.2), "rank 1", RANKS[1])
    picture.arrow((6.0, 1.1), (14.0, 1.1), style="<|-|>")
    picture.text((10.0, 1.5), 'inner="ddp": gradients are averaged')
    picture.text((10.0, 0.65), "masks are the first rank's")
    picture.save()


def deep_compression() -> None:
    """What becomes of the weights of a layer."""
    picture = Picture("deep_compression", 20, 7.2)
    rng = np.random.default_rng(0)
    dense = rng.normal(size=6000)
    kept = dense[np.abs(dense) > 0.9]
    retrained = np.sign(kept) * (np.abs(kept) * 0.8 + 0.45)
    values = np.linspace(-2.6, 2.6, 9)
    values = values[np.abs(values) > 0.4]
    shared = values[np.abs(retrained[:, None] - values).argmin(1)]
    stages = (
        ("train", dense, RANKS[0]),
        ("prune: the smallest\nbecome 0", kept, RANKS[1]),
        ("retrain\nwhat is left", retrained, RANKS[1]),
        ("share values,\ntrain these", shared, RANKS[2]),
    )
    for stage, (title, weights, colour) in enumerate(stages):
        x = 0.6 + 4.0 * stage
        axes = picture.figure.add_axes(((x + 0.1) / 20, 2.9 / 7.2, 3.0 / 20, 2.6 / 7.2))
        axes.hist(weights, bins=np.linspace(-3.2, 3.2, 60), color=colour)
        axes.set_yticks([])
        axes.set_xticks([0])
        axes.tick_params(labelsize=8)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        picture.text((x + 1.6, 6.35), title, fontsize=10)
        picture.arrow((x + 3.25, 4.2), (x + 3.95, 4.2))
    picture.box((18.2, 4.2), (3.0, 2.6), "one file:\npositions, codes,\nvalues, coded", SHARD)
    picture.arrow((9.6, 2.15), (5.4, 2.15))
    picture.text((7.5, 1.65), "in rounds")
    picture.text((18.2, 2.35), "rank 0 writes it")
    picture.text((10.0, 0.6), 'inner="ddp": ranks average gradients, and have the masks and shared values of the first')
    picture.save()


PICTURES: tuple[Callable[[], None], ...] = (
    spatial_parallel, hybrid_parallel, downpour, hogwild, sandblaster, sparse, deep_compression,
)  # fmt: skip


def main() -> None:
    """Draw all of them."""
    for picture in PICTURES:
        picture()


if __name__ == "__main__":
    main()
