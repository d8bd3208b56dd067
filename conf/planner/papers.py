"""What the planner makes of machines that papers have published figures of.

Nothing here is fitted to the figures that are compared: devices and links are those of datasheets in ``conf/device``,
``conf/link`` and ``conf/cluster``, and where a step of one device was published, that is what one device takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from squall.conf.writers import to_markdown
from squall.models import LocalResponseNorm
from squall.models.locally_connected import LocallyConnected2d

from . import steps
from .alternatives import Alternative
from .clusters import Cluster, cluster_of
from .events import Compute, Event, Send, Trace
from .predictions import Prediction, predict
from .timeline import play

_TREE = Path(__file__).parent.parent
_IMAGES = 1_281_167  # of ImageNet 2012
_EPOCHS = 90
TABLE_1: dict[tuple[int, bool], float] = {  # GPUs, and whether linear layers are updated after every 128 images
    (2, False): 1.95, (4, False): 3.74, (8, False): 6.25, (2, True): 1.93, (4, True): 3.66, (8, True): 6.16
}  # fmt: skip
HOURS_ALONE = 98.05
"""Of one K20, as published (Krizhevsky 2014, table 1)."""


def published_cluster(name: str, **entries: Any) -> Cluster:
    """Read a file of ``conf/cluster`` as Hydra would.

    Args:
        name: Without suffix.
        **entries: What is to be other than in the file.

    """
    entry: dict[str, Any] = yaml.safe_load((_TREE / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))
    for default in entry.pop("defaults", []):
        if isinstance(default, Mapping):
            (device,) = default.values()
            entry["device"] = yaml.safe_load((_TREE / "device" / f"{device}.yaml").read_text(encoding="utf-8"))
    return cluster_of({**entry, **entries})


def one_tower() -> nn.Module:
    """The network of "one weird trick": one tower of 64, 192, 384, 256, 256 kernels (section 6)."""
    layers: list[nn.Module] = []
    channels = 3
    shapes = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    for number, (kernels, side, stride, padding) in enumerate(shapes):
        layers += [nn.Conv2d(channels, kernels, side, stride, padding), nn.ReLU()]
        if number in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
        channels = kernels
    layers += [nn.Flatten(), nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(), nn.Linear(4096, 1000))


def _task(make: Any, side: int = 224, channels: int = 3) -> steps.Task:
    with torch.device("meta"):
        return steps.Task(make(), torch.empty(1, channels, side, side))


def table_1(scheme: str = "b", batch_size: int = 128) -> dict[tuple[int, bool], float]:
    """Speed-ups of one weird trick on up to eight K20, from the time of one and datasheets.

    Args:
        scheme: Of section 4; (b) is what its multi-pass program does.
        batch_size: Images of each GPU.

    Returns:
        By number of GPUs and whether linear layers are updated after each pass, how many times as fast.

    """
    task, cluster = _task(one_tower), published_cluster("k20x8")
    alone = steps.single(task, batch_size)
    seconds = HOURS_ALONE * 3600 / (_EPOCHS * _IMAGES / batch_size)
    cluster = replace(cluster, device=cluster.device.scaled_to(alone, seconds))
    found = {}
    for num_ranks in (2, 4, 8):
        trace = _left_in_columns(steps.hybrid(task, batch_size, num_ranks, scheme), num_ranks)  # type: ignore[arg-type]
        for every_pass in (False, True):
            own = _updated_every_pass(trace, num_ranks) if every_pass else trace
            line = play(own, cluster.device, cluster.resized(max(1, num_ranks // 4)).network)
            found[num_ranks, every_pass] = num_ranks * seconds / line.seconds
    return found


def _left_in_columns(trace: Trace, num_ranks: int) -> Trace:
    """With activities that stay where they were computed from one linear layer to the next.

    Squall's ranks get all outputs of their own examples back, so that any code may stand between two layers; in the
    paper's program a pass goes through all linear layers, and in between its parts are gathered by all ranks at once.
    """
    sends = [event for event in trace if isinstance(event, Send) and event.collective == "pair"]
    layers = list(dict.fromkeys(send.layer for send in sends))
    events: list[Event] = []
    for event in trace:
        if isinstance(event, Send) and event.collective == "pair":
            own = [send.num_bytes for send in sends if send.layer == event.layer]
            is_input = event.num_bytes == max(own)  # of a layer with fewer outputs a rank than inputs
            if is_input and event.layer != layers[0]:
                event = replace(
                    event, num_bytes=event.num_bytes // num_ranks if event.alone else event.num_bytes, alone=False
                )
            elif not is_input and event.layer != layers[-1]:
                event = replace(event, num_bytes=0)
        events.append(event)
    return trace.with_events(events)


def _updated_every_pass(trace: Trace, num_passes: int) -> Trace:
    """With as many updates of what is in columns as there are passes; convolutions have one.

    Which update belongs to which layer, a trace doesn't say; linear layers are all but 4 % of what a rank of few holds.
    """
    updates = [event for event in trace if isinstance(event, Compute) and event.phase == "update"]
    largest = sorted(updates, key=lambda event: -event.operation.num_bytes)
    linear = [event for event in largest if event.operation.num_bytes > largest[0].operation.num_bytes / 100]
    return trace.with_events([*trace, *linear * (num_passes - 1)])


def one_gpu_net() -> nn.Module:
    """The one-GPU net of 2012: half the kernels of each convolution but the last, and the same linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    shapes = ((48, 11, 4, 2), (128, 5, 1, 2), (192, 3, 1, 1), (192, 3, 1, 1), (256, 3, 1, 1))
    for number, (kernels, side, stride, padding) in enumerate(shapes):
        layers.append(nn.Conv2d(channels, kernels, side, stride, padding))
        layers.append(LocalResponseNorm(relu=True) if number < 2 else nn.ReLU())
        if number in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
        channels = kernels
    layers += [nn.Flatten(), nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(), nn.Linear(4096, 1000))


def two_gpus_of_2012(batch_size: int = 128) -> tuple[Prediction, Prediction]:
    """AlexNet on two GTX 580, and the net of half as many kernels on one (Krizhevsky et al. 2012, section 3.2).

    Args:
        batch_size: Images of a step.

    Returns:
        Both; the paper says that the first takes "slightly less time to train".

    """
    from squall.models import AlexNet

    cluster = published_cluster("gtx580x2")
    return (
        predict(_task(AlexNet), Alternative("columns", 2, 2), batch_size, cluster),
        predict(_task(one_gpu_net), Alternative("single", 1), batch_size, cluster),
    )


class _Speech(nn.Module):
    """Dean's speech net: 11 frames of 40 log energies, four layers of 2,560, 8,192 classes; 42 million weights."""

    def __init__(self) -> None:
        super().__init__()
        widths = (440, 2560, 2560, 2560, 2560)
        pairs = pairwise(widths)
        layers = [part for inputs, outputs in pairs for part in (nn.Linear(inputs, outputs), nn.Sigmoid())]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(2560, 8192))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


class _Images(nn.Module):
    """A net like Dean's largest: three stages of filters, pooling and normalisation over images of 100 x 100.

    Receptive fields of 10 x 10 of units that share no weights, 36 at each place. Pooling leaves every place, as in the
    net that found cats (Le et al. 2012), so that there are the 1.7 billion parameters that the paper speaks of.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for side in (100, 91, 82):
            layers += [LocallyConnected2d(channels, 36, side, 10), nn.ReLU(), nn.MaxPool2d(3, 1, 1)]
            channels = 36
        self.stages = nn.Sequential(*layers, nn.MaxPool2d(12, 12))
        self.last = nn.Linear(36 * 6 * 6, 21_000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.flatten(self.stages(x), 1))
        return result


def image_speedups(batch_size: int, sides: tuple[int, ...] = (2, 3, 4, 6, 9, 12)) -> dict[int, float]:
    """Model parallelism of Dean's largest net, in tiles over machines (Dean et al. 2012, figure 3).

    Args:
        batch_size: Images of a step, which the paper doesn't say.
        sides: Tiles beside and above one another.

    """
    task = _task(_Images, side=100)
    cluster = published_cluster("distbelief")
    alone = cluster.device.step_seconds(steps.single(task, batch_size))
    found = {}
    for side in sides:
        trace = steps.spatial(task, batch_size, (side, side))
        found[side * side] = alone / play(trace, cluster.device, cluster.resized(side * side).network).seconds
    return found


def speech_speedups(batch_size: int, sizes: tuple[int, ...] = (2, 4, 8, 16, 32)) -> dict[int, float]:
    """Model parallelism of Dean's speech net, in columns over machines (Dean et al. 2012, figure 3).

    Args:
        batch_size: Images of a step, which the paper doesn't say.
        sizes: Numbers of machines.

    """
    with torch.device("meta"):
        task = steps.Task(_Speech(), torch.empty(1, 1, 1, 440))
    cluster = published_cluster("distbelief")
    alone = cluster.device.step_seconds(steps.single(task, batch_size))
    found = {}
    for size in sizes:
        trace = steps.columns(task, batch_size, size, layout={"layers.9": "columns"})  # the softmax layer, too
        found[size] = alone / play(trace, cluster.device, cluster.resized(size).network).seconds
    return found


def tables() -> str:
    """What is published beside what the planner makes of it, as Markdown; ``docs/how-to/plan.md`` has it."""
    rows: list[dict[str, Any]] = []

    def row(what: str, published: str, found: str) -> None:
        rows.append({"figure": what, "published": published, "predicted": found})

    by_scheme = {scheme: table_1(scheme) for scheme in "abc"}
    for (num_ranks, every_pass), speed in TABLE_1.items():
        batches = f"({128 * num_ranks}, {128 if every_pass else 128 * num_ranks})"
        found = ", ".join(f"({scheme}) {by_scheme[scheme][num_ranks, every_pass]:.2f}" for scheme in "bca")
        row(f"one weird trick, {num_ranks} K20, batches {batches}", f"{speed:.2f} x", found)
    two, one = two_gpus_of_2012()
    ratio = two.images_per_second / one.images_per_second
    row("AlexNet on two GTX 580, against half the kernels on one", "slightly faster", f"{ratio:.2f} x")
    for batch_size in (8, 16, 64):
        speech = speech_speedups(batch_size)
        text = ", ".join(f"{size}: {speed:.1f}" for size, speed in speech.items())
        row(f"speech net in columns, machines: speed, {batch_size} examples a step", "8: 2.2, worse beyond", text)
    text = ", ".join(f"{size}: {speed:.1f}" for size, speed in image_speedups(16).items())
    row("net of 1.7 billion weights in tiles, 16 images a step", "81: more than 12", text)
    return to_markdown(rows)


def main() -> None:
    """Print the table."""
    print(tables(), end="")


if __name__ == "__main__":
    main()
