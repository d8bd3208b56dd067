"""Peak memory of a rank that trains on large images, whole and in tiles.

``python benchmarks/tiles.py [--networks AlexNet] [--image-size 1024] [--num-images 1] [--width 0.5] [--num-tiles 4]``,
with ``--markdown`` as in ``tiles.md``.

The convolutional part of a network (VGG-16's and the 2012 network's), forward and backward, in a process of its own for
each rank. What counts is the largest resident set (``VmHWM``) above that of the process before its first step, with
weights and images in place: activations, gradients, and what passes through. Ranks are real processes on gloo. The C
library gives what is freed back at once (``MALLOC_MMAP_THRESHOLD_``): by itself it keeps blocks of up to 32 MB, which a
rank's tensors are and those of the whole image aren't, and so it would be measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn

from squall.models import VGG16, AlexNet, LocalResponseNorm
from squall.placement import Columns, make_grid, place_tiles, plan_tiles

NETWORKS: dict[str, Callable[..., nn.Module]] = {"AlexNet": AlexNet, "VGG-16": VGG16}


def convolutional_part(name: str, image_size: int, width: float) -> nn.Module:
    """A network without its linear layers, whose weights at this size are more than all else."""
    small = NETWORKS[name](10, 224 if name == "AlexNet" else 32, width=width)
    layers: list[nn.Module] = []
    for child in small.children():
        if isinstance(child, nn.Linear):
            break
        if layers and isinstance(layers[-1], nn.Conv2d) and not isinstance(child, LocalResponseNorm):
            layers.append(nn.ReLU())  # which this normalisation does itself
        layers += list(child) if isinstance(child, nn.Sequential) else [child]
    return nn.Sequential(*layers)


def peak(path: str = "/proc/self/status") -> float:
    """The largest resident set so far, in MB."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Let the largest resident set begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(rank: int, options: argparse.Namespace, name: str, num_tiles: int, rendezvous: str, results: Any) -> None:
    """Train on one rank for two steps, and say what the second one took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_tiles)
    torch.manual_seed(0)
    net = convolutional_part(name, options.image_size, options.width)
    images = torch.randn(options.num_images, 3, options.image_size, options.image_size)
    if num_tiles > 1:
        grid = make_grid(Columns(dist.group.WORLD, rank, num_tiles), num_tiles, 1, 1, "cpu")
        place_tiles(net, plan_tiles(net, grid), grid)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net(images[:, :, :64, :64]).sum().backward()  # libraries take their memory
    forget_peak()
    before = peak()
    net(images).square().mean().backward()
    results[rank] = peak() - before
    dist.destroy_process_group()


def measured(options: argparse.Namespace, name: str, num_tiles: int) -> float:
    """The peak of the rank that takes most, in MB."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        arguments = (options, name, num_tiles, os.path.join(folder, "rendezvous"), results)
        mp.spawn(measure, arguments, nprocs=num_tiles)
        return float(max(results.values()))


def main() -> None:
    """Measure both networks, whole and in tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--num-tiles", type=int, default=4)
    parser.add_argument("--markdown", action="store_true", help="print the table as benchmarks/tiles.md has it")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # in the ranks
    heads = ("network", "one rank, MB", f"{options.num_tiles} ranks, MB each", "ratio")
    rows = []
    for name in options.networks:
        alone, tiled = (measured(options, name, num_tiles) for num_tiles in (1, options.num_tiles))
        rows.append((name, f"{alone:.0f}", f"{tiled:.0f}", f"{tiled / alone:.3f}"))
    if options.markdown:
        for row in (heads, (":--", "--:", "--:", "--:"), *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
