"""Programs that the tests start, and how they are started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

# A user's own Hydra application, which knows of Squall nothing but a Strategy. It fits with two Trainers, and every
# rank says what it was told; `victim` is the rank that comes to grief, in the way that `fate` says, in the second
# batch.
APP = """
import json, os, signal, time
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    import torch
    from hydra.core.hydra_config import HydraConfig
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from squall.launching import DDPStrategy

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            if self.global_rank == cfg.victim and batch_idx == 1:
                if cfg.fate == "raise":
                    raise ArithmeticError("a bad batch")
                os.kill(os.getpid(), signal.SIGKILL)
            if cfg.fate == "asleep" and batch_idx == 1:  # killed too, and the others hear nothing of it
                time.sleep(120)
            return super().training_step(batch, batch_idx)

    found = {name: os.environ.get(name) for name in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    for _ in range(2):
        trainer = Trainer(strategy=DDPStrategy(), devices=2, accelerator="cpu", logger=False, max_steps=3,
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                          limit_val_batches=0)
        trainer.fit(Model())
    record = dict(rank=trainer.global_rank, world_size=trainer.world_size, x=cfg.x, when=cfg.when, out=cfg.out,
                  text=cfg.text, num=cfg.num, threads=torch.get_num_threads(),
                  port=os.environ["MASTER_PORT"], found=found, output_dir=HydraConfig.get().runtime.output_dir)
    with open(f"{cfg.log}/records.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")

if __name__ == "__main__":
    main()
"""

APP_CONFIG = """
x: 1
victim: -1
fate: kill
when: ${now:%f}
out: ${hydra:runtime.output_dir}
num: ${hydra:job.num}
text: "it's \\"quoted\\", ${x}"
log: ???
"""


def write_app(folder: Path) -> None:
    """Put the application, ``app.py`` and ``conf/app.yaml``, into a folder."""
    (folder / "conf").mkdir()
    (folder / "conf" / "app.yaml").write_text(APP_CONFIG)
    (folder / "app.py").write_text(APP)


def environment(**more: str) -> dict[str, str]:
    """The tests' environment without what a launch would take for orders."""
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HYDRA_FULL_ERROR")
    return {name: value for name, value in os.environ.items() if name not in names} | more


def start(command: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start a program in a session of its own, its output in a pipe."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 90.0) -> tuple[int, str]:
    """Wait for a program; return its exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for survivor in survivors(process):
            survivor.kill()
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output}") from None
    return process.returncode, output


def run(command: list[str], cwd: Path, timeout: float = 90.0, **env: str) -> tuple[int, str]:
    """Start a program and wait for it; return its exit code and output."""
    return finish(start(command, cwd, **env), timeout)


def survivors(process: subprocess.Popen[str], patience: float = 5.0) -> list[psutil.Process]:
    """What is left, after a moment, of all that a program has started."""
    deadline = time.monotonic() + patience
    while True:
        left = []
        for candidate in psutil.process_iter():
            try:
                if os.getsid(candidate.pid) == process.pid and candidate.status() != psutil.STATUS_ZOMBIE:
                    left.append(candidate)
            except (psutil.Error, ProcessLookupError):
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def job_folders(folder: Path) -> list[Path]:
    """The folders that Hydra made for runs: those with a ``.hydra`` in them."""
    return sorted(path.parent for path in folder.rglob(".hydra"))


PYTHON = sys.executable
