"""Draw ``filters.png``: what a locally connected network learns of photographs, other filters at each place.

Run ``python docs/draw_filters.py [num_steps]`` after a change of the network or its data; it trains for some minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor

from squall.models import LocallyConnectedAutoencoder, PhotographDataModule


def main(num_steps: int = 2000) -> None:
    """Train on patches of two photographs, and draw the filters of every other place."""
    seed_everything(0)
    net = LocallyConnectedAutoencoder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=num_steps, max_epochs=-1, enable_progress_bar=False, **quiet)
    trainer.fit(net, PhotographDataModule())
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    draw(net.filters.weight.detach()).savefig(Path(__file__).with_name("filters.png"), dpi=110)


def draw(weight: Tensor) -> Figure:
    """A block a place, a square a filter.

    Args:
        weight: Shape (H', W', filters, 1, kernel height, kernel width).

    """
    weight = weight[::2, ::2, :, 0]
    rows, columns, num_filters = weight.shape[:3]
    wide = -(-num_filters // 2)
    figure = Figure(figsize=(2.1 * columns, 1.1 * rows))
    outer = figure.add_gridspec(rows, columns, wspace=0.08, hspace=0.12, left=0.01, right=0.99, top=0.99, bottom=0.01)
    for row in range(rows):
        for column in range(columns):
            inner = outer[row, column].subgridspec(2, wide, wspace=0.04, hspace=0.04)
            for index, kernel in enumerate(weight[row, column]):
                axes = figure.add_subplot(inner[index // wide, index % wide])
                limit = float(kernel.abs().max())
                axes.imshow(kernel.numpy(), cmap="gray", vmin=-limit, vmax=limit)
                axes.axis("off")
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
