"""Time AlexNet's first answer in new processes, which have no memory that was there before.

``python benchmarks/first_answer.py [--num-rounds 5] [--num-threads 1]``. In ``squall-bench suite=kernels`` ways take
turns in one process, whose allocator has memory left from the turn before. Here each turn is a process of its own: what
has been imported is not timed, all the rest is. Before each turn the system is made to forget the files, or has read
them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from squall.conf.suites.compression import make_state_dict
from squall.models import AlexNet
from squall.sparsity import save_compressed, to_inference

WAYS = {
    "torch.load": "checkpoint",
    "torch.load, mapped": "checkpoint",
    "safetensors": "tensors",
    "to_inference": "compressed",
}
"""What each way reads."""


def answer(way: str, path: Path) -> float:
    """Answer once; returns the seconds it took from nothing but a file."""
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        begin = time.perf_counter()
        with torch.device("meta"):
            net: torch.nn.Module = AlexNet()
        if way == "to_inference":
            net = to_inference(net, path=path, show=False)
        else:
            is_tensors = way == "safetensors"
            state_dict = (
                load_file(path) if is_tensors else torch.load(path, weights_only=True, mmap=way.endswith("mapped"))
            )
            net.eval().load_state_dict(state_dict, assign=True)
        net(x)
        return time.perf_counter() - begin


def write(folder: Path) -> None:
    """Write AlexNet-2012 at the paper's densities and bits, for every way."""
    state_dict = make_state_dict("alexnet_2012")
    save_compressed(state_dict, folder / "compressed")
    torch.save(state_dict, folder / "checkpoint")
    save_file(state_dict, folder / "tensors")


def prepare(path: Path, forget: bool) -> None:
    """Have the system forget a file, or read it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if forget:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


def main() -> None:
    """Let the ways take turns, and show the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    if arguments.way:
        print(answer(arguments.way, arguments.path))
        return
    times: dict[tuple[str, bool], list[float]] = {(way, forget): [] for forget in (True, False) for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        turns = [key for _ in range(arguments.num_rounds) for key in times]
        for way, forget in track(turns, description="first answers"):
            path = Path(name) / WAYS[way]
            prepare(path, forget)
            command = [sys.executable, __file__, "--way", way, "--path", str(path)]
            command += ["--num-threads", str(arguments.num_threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            times[way, forget].append(float(done.stdout))
    table = Table("way", "file on disk, ms", "file in memory, ms", title="AlexNet's first answer in a new process")
    for way in WAYS:
        table.add_row(way, *(f"{1e3 * statistics.median(times[way, forget]):.1f}" for forget in (True, False)))
    Console().print(table)


if __name__ == "__main__":
    main()
