"""How fast codecs encode and decode on one thread, next to a copy of the same numbers in the same run.

``python benchmarks/codecs.py [--num-elements 262144] [--num-rounds 31] [--markdown]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from squall.consistency import Codec, get_codec
from squall.consistency.codecs.dynamic import dynamic_values

SPECS = ("fp32", "bf16", "int8", "1bit", "topk:0.001", "topk:0.01", "topk:0.1")
COPY, SEARCH = "memcpy", "torch.bucketize"
ENCODE, FEEDBACK, DECODE = "encode", "with residual", "decode"


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


def search(values: Tensor) -> Callable[[], object]:
    """The nearest codes of int8 by binary search; without the scales, which only makes it faster."""
    codes = dynamic_values().float()
    midpoints = (codes[1:] + codes[:-1]) / 2
    return lambda: torch.bucketize(values, midpoints).to(torch.uint8)


def measure(num_elements: int, num_rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of CPU of each task over rounds in which all take turns."""
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(0)) * 1e-3
    target = torch.empty_like(values)
    tasks: dict[tuple[str, str], Callable[[], object]] = {(COPY, ENCODE): lambda: target.copy_(values)}
    for spec in SPECS:
        tasks |= {(spec, kind): task for kind, task in tasks_of(get_codec(spec), values).items()}
    tasks[SEARCH, ENCODE] = search(values)
    repeats = max(1, (1 << 21) // num_elements)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in tasks}
    for round_index in range(num_rounds + 1):
        for key, task in tasks.items():
            start = time.thread_time()  # of the CPU: what else runs on the machine takes no part
            for _ in range(repeats):
                task()
            if round_index:  # the first fills tables and caches
                seconds[key].append((time.thread_time() - start) / repeats)
    return {key: statistics.median(times) for key, times in seconds.items()}


def rows_of(seconds: dict[tuple[str, str], float], num_elements: int) -> list[list[str]]:
    """A row for each codec: GB of float32 a second, and how many times a copy's time that takes."""
    rows, copy = [], seconds[COPY, ENCODE]
    for name in (COPY, *SPECS, SEARCH):
        num_bytes = get_codec(name).num_bytes(num_elements) if name in SPECS else None
        row = [name, f"{8 * num_bytes / num_elements:.2f}" if num_bytes else ""]
        taken = [seconds.get((name, kind)) for kind in (ENCODE, FEEDBACK, DECODE)]
        row += [f"{4e-9 * num_elements / time_:.2f}" if time_ else "" for time_ in taken]
        row += [f"{time_ / copy:.1f}" if time_ else "" for time_ in (taken[0], taken[2])]
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--num-elements", type=int, default=1 << 18)
    parser.add_argument("--num-rounds", type=int, default=31)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(measure(arguments.num_elements, arguments.num_rounds), arguments.num_elements)
    heads = ["codec", "bits", ENCODE, FEEDBACK, DECODE, f"{ENCODE} / {COPY}", f"{DECODE} / {COPY}"]
    if arguments.markdown:
        for row in (heads, [":--", *["--:"] * (len(heads) - 1)], *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(title=f"GB/s of {arguments.num_elements:,} float32, one thread, {arguments.num_rounds} rounds")
    for head in heads:
        table.add_column(head, justify="left" if head == "codec" else "right", no_wrap=head == "codec")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
