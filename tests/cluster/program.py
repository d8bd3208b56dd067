"""A user's own script: a module, a Trainer, and the name of a Strategy."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import squall

NUM_SAMPLES = 24
EPOCHS = 2


class Net(LightningModule):
    """Small, in double precision, and it counts what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 6)
        ).double()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen += len(batch[0])
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Pause(Callback):
    """On a job's first start: say that a step is reached, and train on when told to.

    Args:
        folder: Where both are files.
        step: Of this rank.

    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        steps = getattr(trainer.strategy, "_num_steps", trainer.global_step)
        if steps == self.step and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
            (self.folder / f"reached-{trainer.global_rank}").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.02)


def loader() -> DataLoader:
    """Batches that are all alike: resumed within an epoch, a DataLoader begins again, and must not matter."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.double).repeat(NUM_SAMPLES // 2, 1, 1, 1)
    return DataLoader(TensorDataset(images, torch.arange(NUM_SAMPLES) % 2), batch_size=2)


def fit(folder: Path, strategy: str, pause: int = -1, devices: int = 1, num_nodes: int = 2, saves: bool = False) -> Any:
    """Train; returns what came of it."""
    made: Any = strategy
    if strategy == "ddp":
        from squall.launching import DDPStrategy

        made = DDPStrategy()
    elif strategy == "downpour":
        made = squall.DownpourStrategy(lease_timeout=3.0)
    elif strategy == "hybrid_parallel":
        made = squall.HybridParallelStrategy(zero_stage=None)
    callbacks: list[Callback] = [Pause(folder, pause)]
    if saves:
        callbacks.append(ModelCheckpoint(folder / "saved", save_last=True, every_n_train_steps=3, save_top_k=0))
    module = Net()
    trainer = Trainer(
        strategy=made, accelerator="cpu", devices=devices, num_nodes=num_nodes, max_epochs=EPOCHS, logger=False,
        default_root_dir=folder, callbacks=callbacks, enable_checkpointing=saves, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader())
    return {
        "strategy": strategy, "rank": trainer.global_rank, "world_size": trainer.world_size,
        "steps": trainer.global_step, "seen": int(module.seen),
        "samples": dict(getattr(trainer.strategy, "report", {})).get("num_samples"),
        "weights": [parameter.detach().sum().item() for parameter in module.parameters()],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"), "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }  # fmt: skip


def main(folder: str, names: str, options: str = "{}") -> None:
    """Fit with each of some Strategies, and leave a file that says what came of it."""
    ends = [fit(Path(folder), name, **json.loads(options)) for name in names.split(",")]
    Path(folder, f"end-{ends[0]['rank']}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
