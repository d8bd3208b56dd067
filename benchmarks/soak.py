"""Train for a while under random kills of workers and shards, and account for every sample and every update.

``python benchmarks/soak.py --minutes 10 --period 15`` needs no data and no device. Each sample has a weight of its
own, whose gradient is -1 whenever the sample is trained on, and each element of ``updates`` has one of -1 in every
update: with a learning rate of 1 the weights themselves count what was applied, exactly.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

NUM_SAMPLES, BATCH_SIZE = 512, 4


def train(rank: int, world_size: int, seconds: float, folder: Path) -> None:
    """Be one rank of the run."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from squall import DownpourStrategy

    class Counting(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(NUM_SAMPLES, dtype=torch.float64))
            self.updates = nn.Parameter(torch.zeros(1 << 18, dtype=torch.float64))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return -self.seen[batch[0]].sum() - self.updates.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class Clock(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.end = time.monotonic() + seconds

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (folder / f"trains-{rank}").touch()

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if rank == 0 and time.monotonic() > self.end:
                trainer.should_stop = True

    torch.manual_seed(0)
    strategy = DownpourStrategy(num_shards=2, lease_timeout=10.0)
    trainer = Trainer(
        strategy=strategy, devices=world_size, accelerator="cpu", logger=False, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()],
    )  # fmt: skip
    model = Counting()
    trainer.fit(model, DataLoader(TensorDataset(torch.arange(NUM_SAMPLES)), batch_size=BATCH_SIZE, shuffle=True))
    if rank == 0:
        result = {
            "seen": model.seen.detach(),
            "updates": model.updates.detach(),
            "report": dict(strategy.report),
            "global_step": trainer.global_step,
        }
        torch.save(result, folder / "result")


class Soak:
    """The ranks of the run, and what is done to them."""

    def __init__(self, num_workers: int, seconds: float, folder: Path, seed: int) -> None:
        self.num_workers = num_workers
        self.seconds = seconds
        self.folder = folder
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def start(self, rank: int) -> None:
        """Start a rank, as an external launcher does."""
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port), "WORLD_SIZE": str(self.num_workers),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder), "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        (self.folder / f"trains-{rank}").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--rank", str(rank), "--workers", str(self.num_workers),
                   "--minutes", str(self.seconds / 60), "--folder", str(self.folder)]  # fmt: skip
        with (self.folder / f"output-{rank}").open("ab") as output:
            self.ranks[rank] = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)

    def kill_something(self) -> None:
        """End a worker that trains, and start it again; or end a shard, which its host starts again."""
        trains = [rank for rank in self.ranks if rank and (self.folder / f"trains-{rank}").exists()]
        if trains and self.random.random() < 0.5:
            rank = self.random.choice(trains)
            self.ranks[rank].kill()
            self.ranks[rank].wait()
            self.kills["workers"] += 1
            self.start(rank)
            return
        shards = [shard for host in self._children(self.ranks[0].pid) for shard in self._children(host.pid)]
        if shards:
            os.kill(self.random.choice(shards).pid, signal.SIGKILL)
            self.kills["shards"] += 1

    @staticmethod
    def _children(pid: int) -> list[psutil.Process]:
        try:
            return psutil.Process(pid).children()
        except psutil.NoSuchProcess:
            return []

    def run(self, period: float) -> None:
        """Kill until rank 0 has come to its end."""
        for rank in range(self.num_workers):
            self.start(rank)
        while not (self.folder / "trains-0").exists():
            if self.ranks[0].poll() is not None:
                return
            time.sleep(0.1)
        while True:
            try:
                self.ranks[0].wait(period)
                return
            except subprocess.TimeoutExpired:
                self.kill_something()

    def end(self) -> None:
        """End ranks that had been started again too late to find the run."""
        for rank, process in self.ranks.items():
            if process.poll() is None and (self.folder / f"trains-{rank}").exists():
                try:
                    process.wait(20.0)
                except subprocess.TimeoutExpired:
                    print(f"rank {rank} did not end")
            process.kill()
            process.wait()


def account(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was counted in two ways: a name, by the coordinator, by the weights."""
    report, seen = result["report"], result["seen"]
    version = report["version"]
    # The queue keeps the epochs that are not covered whole; all samples of the others were trained on once each.
    rest = torch.zeros_like(seen)
    for epoch in report["queue"].values():
        done = epoch["done"].bool().repeat_interleave(epoch["sizes"])
        rest += torch.bincount(epoch["samples"][done], minlength=NUM_SAMPLES)
    num_whole = (report["num_samples"] - int(rest.sum())) / NUM_SAMPLES
    return [
        ("updates, on each of the weights", version, float(result["updates"].min())),
        ("updates, at most", version, float(result["updates"].max())),
        ("updates, by staleness", version, sum(count for _, count in report["staleness"])),
        ("trainer.global_step", version, result["global_step"]),
        ("samples", report["num_samples"], float(seen.sum())),
        ("samples trained on as often as dealt out", NUM_SAMPLES, int(seen.eq(rest + num_whole).sum())),
    ]


def main() -> int:
    """Run it; the exit code says whether everything added up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--period", type=float, default=15.0, help="seconds between kills")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank >= 0:
        train(options.rank, options.workers, options.minutes * 60, options.folder)
        return 0
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soak = Soak(options.workers, options.minutes * 60, folder, options.seed)
        try:
            soak.run(options.period)
        finally:
            soak.end()
        if not (folder / "result").exists():
            for path in sorted(folder.glob("output-*")):
                print(f"{path.name}\n{path.read_text()[-4000:]}")
            return 1
        result = torch.load(folder / "result", weights_only=False)
    report = result["report"]
    console = Console(width=110)
    done = Table(title=f"{options.minutes:g} minutes, a kill every {options.period:g} s, {options.workers} workers")
    for heading in ("workers killed", "shards killed", "joined", "batches dealt out again", "pushes lost", "updates"):
        done.add_column(heading, justify="right")
    done.add_row(*map(str, (soak.kills["workers"], soak.kills["shards"], report["num_joined"], report["num_reissued"],
                            report["num_lost"], report["version"])))  # fmt: skip
    console.print(done)
    exact = True
    accounts = Table("account", "the coordinator", "the weights", "")
    for name, expected, found in account(result):
        exact &= expected == found
        accounts.add_row(name, f"{expected:g}", f"{found:.0f}", "exact" if expected == found else "[red]DIFFERS")
    console.print(accounts)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
