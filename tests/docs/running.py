"""Run a block of Python as a reader would, on as many ranks as its Trainer asks for, with small things to train."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import squall
import squall.models  # what a block may call by its full name
from squall.models import AlexNet, ImageClassifier, LeNet5

SECRET = "nobody will ever guess this"
# What a block leaves to the Trainer is a short training that leaves little behind.
DEFAULTS = {"MAX_EPOCHS": "1", "LOGGER": "False", "ENABLE_PROGRESS_BAR": "False", "ENABLE_MODEL_SUMMARY": "False"}


def small_model() -> LightningModule:
    """A network with the names of AlexNet's layers, which takes milliseconds."""
    return ImageClassifier(AlexNet(10, image_size=28, width=0.3, in_channels=1), lr=0.01, schedule="none")


def small_data() -> DataLoader[Any]:
    """Eight images in two batches."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 1, 28, 28, generator=generator), torch.arange(8)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def names() -> dict[str, Any]:
    """What a block may use without saying where it comes from."""
    torch.manual_seed(0)
    model, data = small_model(), small_data()
    return {
        "__name__": "__main__",
        "squall": squall,
        "torch": torch,
        "Trainer": Trainer,
        "model": model,
        "data": data,
        "net": model.model,
        "images": torch.randn(2, 1, 28, 28),
        "state_dict": model.state_dict(),
    }


def write_files(folder: Path) -> None:
    """Write what a block may read: a checkpoint of a dense training, and a compressed file of LeNet-5's weights."""
    model = small_model()
    torch.save({"state_dict": model.state_dict()}, folder / "weights.ckpt")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(model, small_data())
    trainer.save_checkpoint(folder / "dense.ckpt")
    weights = {name: value * (value.abs() > value.abs().mean()) for name, value in LeNet5().state_dict().items()}
    squall.sparsity.save_compressed(weights, folder / "compressed.safetensors")


def world(code: str) -> tuple[int, int]:
    """How many ranks a block wants, and on how many hosts."""
    devices = [int(number) for number in re.findall(r"\bdevices=(\d+)", code)]
    hosts = [int(number) for number in re.findall(r"\bnum_nodes=(\d+)", code)]
    return max(devices, default=1) * max(hosts, default=1), max(hosts, default=1)


def execute(code: str, name: str, folder: str, num_hosts: int, port: int) -> list[str]:
    """Run a block on one rank; return what is new in its names."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update({f"PL_TRAINER_{key}": value for key, value in DEFAULTS.items()})
    if num_hosts > 1:
        os.environ.update(NODE_RANK=str(rank * num_hosts // size), LOCAL_RANK=str(rank % (size // num_hosts)))
        os.environ.update(SQUALL_SECRET=SECRET, SQUALL_PORT=str(port))
    before = os.getcwd()
    os.chdir(folder)
    try:
        space = names()
        known = set(space)
        exec(compile(code, name, "exec"), space)
        return sorted(set(space) - known)
    finally:
        os.chdir(before)
