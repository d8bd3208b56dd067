"""A program for one of several hosts, which waits at a step until it is let go on."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

import squall

from .test_downpour import Constant, rows


class Pause(Callback):
    """Say that a step is reached, and wait for a word.

    Args:
        folder: Where both are files.
        step: Of this rank.

    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.strategy._num_steps == self.step:
            (self.folder / f"reached-{trainer.global_rank}").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.01)


def main(folder: str, pauses: str, num_rows: str, options: str) -> None:
    """Train, and leave a file behind that says what came of it."""
    torch.set_num_threads(1)
    rank = int(os.environ["NODE_RANK"])
    strategy = squall.DownpourStrategy(**json.loads(options))
    module = Constant()
    callbacks = [Pause(Path(folder), int(pauses))] if rank == 1 else []
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=1, num_nodes=2, max_epochs=1, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, rows(int(num_rows)))
    said = {"up": module.up.flatten().tolist(), "down": module.down.tolist(), "report": dict(strategy.report)}
    Path(folder, f"end-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
