"""How fast codecs encode and decode on one thread, compiled and by Torch, and a shard's update, which decodes as well.

``python benchmarks/codecs.py [--num-elements 262144] [--num-rounds 31] [--markdown]``
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from squall.consistency import Codec, get_codec
from squall.consistency.codecs.dynamic import dynamic_values
from squall.consistency.fused import Fused
from squall.kernels import add_and_step, native

SPECS = ("fp32", "bf16", "int8", "1bit", "topk:0.001", "topk:0.01", "topk:0.1")
COMPILED = SPECS[2:]
COPY, SEARCH = "memcpy", "torch.bucketize"
ENCODE, FEEDBACK, DECODE = "encode", "with residual", "decode"
KINDS = (ENCODE, FEEDBACK, DECODE)
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=1e-3, fused=True),
    "SGD momentum": lambda parameters: SGD(parameters, lr=1e-3, momentum=0.9, fused=True),
    "Adagrad": lambda parameters: Adagrad(parameters, lr=1e-3, fused=True),
    "Adam": lambda parameters: Adam(parameters, lr=1e-3, fused=True),
}
UPDATE_SPECS = ("fp32", "bf16", "int8", "1bit", "topk:0.01")
LOCAL_STEP = "local step and sum"
Tasks = dict[tuple[str, ...], Callable[[], object]]
Seconds = dict[tuple[str, ...], float]


def by_torch(task: Callable[[], object]) -> Callable[[], object]:
    """The same by Torch operations."""

    def run() -> None:
        with native.forced(native.TORCH):
            task()

    return run


def tasks_of(codec: Codec, values: Tensor) -> dict[str, Callable[[], object]]:
    """What is measured of a codec, each in memory of its own that is used again and again."""
    out, residual = torch.empty_like(values), torch.zeros_like(values)
    data, sent = (torch.empty(codec.num_bytes(values.numel()), dtype=torch.uint8) for _ in range(2))
    codec.encode(values, data)
    return {
        ENCODE: lambda: codec.encode(values, sent),
        FEEDBACK: lambda: codec.encode(values, sent, residual),
        DECODE: lambda: codec.decode(data, out),
    }


def codec_tasks(values: Tensor) -> Tasks:
    """All codecs, those that are compiled by Torch as well, and what they are compared with."""
    target = torch.empty_like(values)
    tasks: Tasks = {(COPY, ENCODE): lambda: target.copy_(values), (SEARCH, ENCODE): search(values)}
    for spec in SPECS:
        for kind, task in tasks_of(get_codec(spec), values).items():
            tasks[spec, kind] = task
            if spec in COMPILED and not (spec.startswith("topk") and kind == DECODE):
                tasks[spec, kind, native.TORCH] = by_torch(task)
    return tasks


def update_tasks(values: Tensor) -> Tasks:
    """A shard's updates, in one pass and as decoding and a step of Torch's; and a worker's local step."""
    sums, weights = torch.zeros_like(values), torch.zeros_like(values)
    local = lambda: add_and_step(sums, values, weights, 1e-3)  # noqa: E731
    tasks: Tasks = {(LOCAL_STEP, ""): local, (LOCAL_STEP, "", native.TORCH): by_torch(local)}
    for name, make in OPTIMIZERS.items():
        for spec in UPDATE_SPECS:
            tasks[name, spec], apart = updates(make, spec, values)
            tasks[name, spec, native.TORCH] = by_torch(apart)
    return tasks


def updates(
    make: Callable[[list[nn.Parameter]], Optimizer], spec: str, values: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """An update in one pass, and one in two. A code of ``fp32`` is a gradient as it is."""
    codec, parameter = get_codec(spec), nn.Parameter(torch.zeros_like(values))
    code = torch.empty(codec.num_bytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, code)
    optimizer, gradient = make([parameter]), torch.empty_like(values)
    parameter.grad = code.view(torch.float32) if spec == "fp32" else gradient
    optimizer.step()  # makes its state
    memories = {key: value.view(-1) for key, value in optimizer.state[parameter].items() if value is not None}
    fused, group = Fused(spec), optimizer.param_groups[0]

    def in_one() -> None:
        plan = fused.plan(optimizer, group, parameter.detach(), memories, False, 1.0)
        assert plan is not None, "the kernels aren't compiled"
        fused.step(plan, code, parameter.detach(), memories, False)

    def apart() -> None:
        if spec != "fp32":
            codec.decode(code, gradient)
        optimizer.step()

    return in_one, apart


def search(values: Tensor) -> Callable[[], object]:
    """The nearest codes of int8 by binary search; without the scales, which only makes it faster."""
    codes = dynamic_values().float()
    midpoints = (codes[1:] + codes[:-1]) / 2
    return lambda: torch.bucketize(values, midpoints).to(torch.uint8)


def measure(tasks: Tasks, num_elements: int, num_rounds: int) -> Seconds:
    """Median seconds of CPU of each task over rounds in which all take turns."""
    repeats = max(1, (1 << 21) // num_elements)
    seconds: dict[tuple[str, ...], list[float]] = {key: [] for key in tasks}
    for round_index in range(num_rounds + 1):
        order = list(tasks.items())
        random.Random(round_index).shuffle(order)  # nobody finds the cache as the same one before has left it
        for key, task in order:
            start = time.thread_time()  # of the CPU: what else runs on the machine takes no part
            for _ in range(repeats):
                task()
            if round_index:  # the first fills tables and caches
                seconds[key].append((time.thread_time() - start) / repeats)
    return {key: statistics.median(times) for key, times in seconds.items()}


def codec_rows(seconds: Seconds, num_elements: int) -> list[list[str]]:
    """A row for each codec: GB of float32 a second, how many times a copy's time that takes, and Torch ours."""
    rows, copy = [], seconds[COPY, ENCODE]
    for name in (COPY, *SPECS, SEARCH):
        num_bytes = get_codec(name).num_bytes(num_elements) if name in SPECS else None
        row = [name, f"{8 * num_bytes / num_elements:.2f}" if num_bytes else ""]
        taken = [seconds.get((name, kind)) for kind in KINDS]
        row += [f"{4e-9 * num_elements / time_:.2f}" if time_ else "" for time_ in taken]
        row += [f"{time_ / copy:.1f}" if time_ else "" for time_ in (taken[0], taken[2])]
        rows.append(row + [ratio(seconds, (name, kind)) for kind in KINDS])
    return rows


def update_rows(seconds: Seconds, num_elements: int) -> list[list[str]]:
    """A row for each optimizer and codec: millions of numbers a second, and how much faster that is than Torch."""
    keys = [key for key in seconds if len(key) == 2]
    return [[*key, f"{1e-6 * num_elements / seconds[key]:,.0f}", ratio(seconds, key)] for key in keys]


def ratio(seconds: Seconds, key: tuple[str, ...]) -> str:
    """How many times as long Torch takes."""
    theirs = seconds.get((*key, native.TORCH))
    return f"{theirs / seconds[key]:.2f}" if theirs else ""


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """Print a table."""
    if markdown:
        for row in (heads, [":--", *["--:"] * (len(heads) - 1)], *rows):
            print("| " + " | ".join(row) + " |")
        print()
        return
    table = Table(title=title)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--num-elements", type=int, default=1 << 18)
    parser.add_argument("--num-rounds", type=int, default=31)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    num_elements, num_rounds = arguments.num_elements, arguments.num_rounds
    torch.set_num_threads(1)
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(0)) * 1e-3
    heads = ["codec", "bits", *KINDS, f"{ENCODE} / {COPY}", f"{DECODE} / {COPY}", *[f"{k}, ratio" for k in KINDS]]
    rows = codec_rows(measure(codec_tasks(values), num_elements, num_rounds), num_elements)
    show(f"GB/s of {num_elements:,} float32, one thread, {num_rounds} rounds", heads, rows, arguments.markdown)
    rows = update_rows(measure(update_tasks(values), num_elements, num_rounds), num_elements)
    heads = ["update", "code", "million numbers/s", "ratio"]
    show("Decoding and a step in one pass against Torch", heads, rows, arguments.markdown)


if __name__ == "__main__":
    main()
