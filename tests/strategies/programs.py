"""Users' scripts, run as users run them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

# A user's script. It knows nothing of the tests but what comes in as arguments.
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningModule, Trainer
import squall
from squall import ColumnParallelStrategy


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 2))

    def training_step(self, batch, batch_idx):
        hook(self, batch_idx)
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def hook(model, batch_idx):
    pass


def main(strategy="column_parallel", num=16, **options):
    data = TensorDataset(torch.randn(num, 3, 8, 8), torch.zeros(num, dtype=torch.long))
    trainer = Trainer(**{**dict(
        strategy=strategy, devices=2, accelerator="cpu", logger=False, max_epochs=2, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False), **options})
    trainer.fit(Model(), DataLoader(data, batch_size=4), ckpt_path=CKPT)
    print("finished on rank", trainer.global_rank)


CKPT = None
if __name__ == "__main__":
    torch.manual_seed(0)
    exec(sys.argv[1])
"""


@dataclass(frozen=True)
class Ended:
    """How a script ended.

    Args:
        code: Exit code.
        output: What all its processes wrote.
        seconds: How long it took.
        left_behind: Processes that outlived it.
    """

    code: int
    output: str
    seconds: float
    left_behind: list[str]


def run_script(folder: Path, statement: str, timeout: float = 60) -> Ended:
    """Run the script, with ``statement`` at its end, in a folder of its own."""
    (folder / "script.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER", "LOCAL_RANK"))}
    environment.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    start = time.monotonic()
    command = [sys.executable, "script.py", statement]
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        family: dict[int, psutil.Process] = {}
        try:
            while process.poll() is None and time.monotonic() - start < timeout:
                try:
                    family.update({p.pid: p for p in psutil.Process(process.pid).children(recursive=True)})
                except psutil.NoSuchProcess:
                    break
                time.sleep(0.1)
            code = process.wait(max(0.1, timeout - (time.monotonic() - start)))
            seconds = time.monotonic() - start
            _, alive = psutil.wait_procs(list(family.values()), timeout=3)
            left = [str(p) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        finally:
            for started in [process, *family.values()]:
                if started.pid in family or process.poll() is None:
                    try:
                        psutil.Process(started.pid).kill()
                    except psutil.NoSuchProcess:
                        continue
        output.seek(0)
        return Ended(code, output.read(), seconds, left)
