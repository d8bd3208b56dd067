"""Which layers of a replica are better computed by every rank alike than split: by FLOPs, bytes, and what was measured.

Splitting a layer over K ranks saves 1 - 1/K of its arithmetic, and costs what has to travel for it. Where the link is
slow and the layer light, a layer on every rank is faster, as AlexNet's authors found for its softmax layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .layout import CONVOLUTIONS, WHOLE, Layout, call_on, to_meta, without_values
from .speeds import Speeds

_LEAST_SAVING, _LEAST_SHARE = 5e-3, 0.1
_PASSES = 3  # of arithmetic: forward, gradients of inputs, gradients of weights
_MOST_TRIALS = 32
UPDATED = 5  # times that an optimizer with one buffer reads or writes something of a weight's size


def is_worthwhile(before: float, after: float) -> bool:
    """Whether a change is faster by more than a measurement errs: five milliseconds, and a tenth.

    Args:
        before: Seconds as it is.
        after: Seconds as it would be.

    """
    return before - after > max(_LEAST_SAVING, _LEAST_SHARE * before)


def flops_per_example(module: nn.Module, example_input: Any) -> dict[str, int]:
    """Floating point operations of each convolution and linear layer in a forward pass, of one example.

    Args:
        module: Any network. It is not changed, nor run with values.
        example_input: Its input with the batch in the first dimension.

    Raises:
        Exception: Whatever a network raises that looks at its values.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
        >>> flops_per_example(net, torch.zeros(2, 3, 4, 4))
        {'0': 1728, '2': 640}

    """
    dry = without_values(module)
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Module, value: Tensor, output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        places = output.numel() // (len(value) * weight.shape[0])
        found[name] = found.get(name, 0) + 2 * weight.numel() * places

    for name, layer in dry.named_modules():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            layer.register_forward_hook(lambda layer, args, output, name=name: count(name, layer, args[0], output))
    with torch.no_grad():
        call_on(dry.eval(), to_meta(example_input))
    return found


def seconds_of(
    layout: Layout, flops: Mapping[str, int], num_examples: int, speeds: Speeds, element_size: int = 4
) -> dict[str, tuple[float, float]]:
    """What each layer, and each other crossing, takes of a training step: seconds of computing, and of sending.

    Args:
        layout: With what crosses.
        flops: Of each layer, forward, an example.
        num_examples: Of a replica in a step.
        speeds: Of its ranks.
        element_size: Bytes of a float.

    """

    def link(floats: int | None) -> float:
        return 2 * (floats * num_examples * element_size / speeds.link + speeds.latency) if floats else 0.0

    times = {}
    for row in layout:
        share = 1 if row.split == WHOLE else layout.num_columns
        arithmetic = _PASSES * flops.get(row.name, 0) * num_examples / speeds.flops / share
        update = UPDATED * row.parameters_per_rank * element_size / speeds.bytes
        times[row.name] = (arithmetic + update, link(row.floats_per_image))
    return times | {name: (0.0, link(floats)) for name, floats in layout.other_floats_per_image}


def choose_whole(
    derive: Callable[[Mapping[str, str]], Layout],
    flops: Mapping[str, int],
    num_examples: int,
    speeds: Speeds,
    element_size: int = 4,
) -> Layout:
    """Keep those layers whole for which that makes a step faster.

    Those are tried, one by one, that take longer on the link than splitting them saves: alone, with all before them,
    and with all after. What others then have to fetch is derived anew, and a table counts as a whole.

    Args:
        derive: Makes a layout, with what crosses, of lines ``{layer: split}``.
        flops: Of each layer, forward, an example.
        num_examples: Of a replica in a step.
        speeds: Of the replica's ranks.
        element_size: Bytes of a float.

    Returns:
        The layout, with the reasons.

    """
    chosen: dict[str, str] = {}  # and why
    layout = derive({})

    def of(layout: Layout) -> dict[str, tuple[float, float]]:
        return seconds_of(layout, flops, num_examples, speeds, element_size)

    def total(layout: Layout) -> float:
        return sum(map(sum, of(layout).values()))

    times, best = of(layout), total(layout)
    saving = {name: (layout.num_columns - 1) * arithmetic for name, (arithmetic, _) in times.items()}
    doubtful = [
        row.name for row in layout
        if row.split != WHOLE and is_worthwhile(times[row.name][1], saving[row.name])
    ]  # fmt: skip
    doubtful.sort(key=lambda name: saving[name] - times[name][1])
    for name in doubtful[:_MOST_TRIALS]:
        split = [row.name for row in layout if row.split != WHOLE]
        if name not in split:
            continue
        at = split.index(name)
        # What a whole layer reads has to be whole, too: that comes for nothing only where what makes it is whole.
        tried = [({*chosen, *group}, group) for group in ([name], split[: at + 1], split[at:])]
        layouts = [(derive(dict.fromkeys(names, WHOLE)), group) for names, group in tried]
        other, group = min(layouts, key=lambda trial: total(trial[0]))
        gain = best - total(other)
        if gain > max(_LEAST_SAVING, _LEAST_SHARE * times[name][1]):
            reason = f"whole with {name}: a step is {gain * 1e3:,.1f} ms shorter"
            chosen |= dict.fromkeys(group, reason)
            layout, best = other, best - gain
    times = of(layout)
    rows = []
    for row in layout:
        reason = chosen.get(row.name, row.reason)
        if row.split != WHOLE and row.floats_per_image:
            arithmetic, link = times[row.name]
            saved = (layout.num_columns - 1) * arithmetic
            reason = f"splitting saves {saved * 1e3:,.1f} ms and sends for {link * 1e3:,.1f}"
        rows.append(replace(row, reason=reason))
    return replace(layout, layers=tuple(rows))
