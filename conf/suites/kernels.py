"""Suite ``kernels``: what is sparse or normalised by Squall's kernels against the same work by stock Torch."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.suites import kernel_cases
from squall.conf.suites.kernel_cases import Ways

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASES: dict[str, Any] = {
    "LRN, 64x96x55x55, forward and backward": kernel_cases.response_norm,
    "AlexNet-2012, a training step of 64 images": kernel_cases.alexnet_step,
    "fc6 at 9 %, batch 1, 5-bit codebook": partial(kernel_cases.linear, 1, 0.09, 5),
    "fc6 at 9 %, batch 1, values": partial(kernel_cases.linear, 1, 0.09, None),
    "fc6 at 9 %, batch 32": partial(kernel_cases.linear, 32, 0.09, None),
    "3x3 512 to 512, 14x14, batch 16, 10 %": partial(kernel_cases.convolution, 0.1),
    "3x3 512 to 512, 14x14, batch 16, 5 %": partial(kernel_cases.convolution, 0.05),
    "AlexNet at 10 %, batch 1": partial(kernel_cases.network, "AlexNet", 0.1, 1, "conv1."),
    "AlexNet at 10 %, batch 16": partial(kernel_cases.network, "AlexNet", 0.1, 16, "conv1."),
    "AlexNet compressed, file on disk to first answer": partial(kernel_cases.first_answer, True),
    "AlexNet compressed, file in memory to first answer": partial(kernel_cases.first_answer, False),
    "VGG-16 at 5 %, batch 1": partial(kernel_cases.network, "VGG16", 0.05, 1, "features.conv1_1."),
    "VGG-16 at 5 %, batch 8": partial(kernel_cases.network, "VGG16", 0.05, 8, "features.conv1_1."),
    "VGG-D at 5 %, a training step of 64 images": partial(kernel_cases.sparse_step, 0.05, 64),
}


def measure(
    cases: Sequence[str] | None, claims: Mapping[str, float], num_rounds: int, num_threads: Sequence[int]
) -> SuiteResult:
    """Let the ways of each piece of work take turns.

    Args:
        cases: Parts of the names of what to measure; None for all.
        claims: By name, how many times as fast as dense ours has to be with one thread.
        num_rounds: How often the ways take turns.
        num_threads: Of Torch, for all ways alike; a table for each.

    Returns:
        Milliseconds, medians, and ratios.

    Raises:
        ValueError: A case or claim names nothing.

    """
    import torch

    unknown = [name for name in claims if name not in CASES]
    unknown += [part for part in cases or () if not any(part in name for name in CASES)]
    if unknown:
        raise ValueError(f"suite.cases, suite.claims: there is no {unknown[0]!r}. There are: {'; '.join(CASES)}.")
    chosen = [name for name in CASES if cases is None or any(part in name for part in cases)]
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    times: dict[str, Any] = {}
    try:
        for name in track(chosen, description="kernels"):
            torch.manual_seed(0)
            with CASES[name]() as ways:
                for threads in num_threads:
                    torch.set_num_threads(threads)
                    of_ways = _time(ways, num_rounds)
                    times[f"{name}, {threads} threads"] = of_ways
                    rows.append(_row(name, threads, of_ways, list(ways.dense)))
            gc.collect()
    finally:
        torch.set_num_threads(before)
    rows.sort(key=lambda row: num_threads.index(row["threads"]))
    _compare_threads(rows)
    failures = [
        f"{row['work']}: {row['ratio']:.2f} times as fast as dense, not {claims[row['work']]}."
        for row in rows
        if row["threads"] == 1 and row["work"] in claims and row["ratio"] < claims[row["work"]]
    ]
    notes = (
        f"Milliseconds, medians of {num_rounds} rounds in which all ways took turns; the ratio is the median of the"
        " rounds' own. *dense* is stock Torch in single precision, for convolutions the faster of its two memory"
        " formats, *bf16* the same in bfloat16. CSR is torch's sparse matrix, behind im2col for a convolution. Weights"
        " are Gaussian, live ones at random places. A file is AlexNet-2012 at the paper's densities and bits, against"
        " the quickest of torch.load, mapped or not, and safetensors; *on disk* means that the system had to forget it,"
        " *in memory* that it hadn't. *against 1 thread* is how many times as fast ours is with more. What bounds"
        " them, and how much of it is memory that stock Torch has anew each time, is in docs/how-to/inference.md."
    )
    return SuiteResult("Kernels", rows, notes, _plot(rows, claims), {"seconds": times}, failures)


def _time(ways: Ways, num_rounds: int) -> dict[str, list[float]]:
    works = {**ways.dense, "ours": ways.ours, **ways.beside}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(num_rounds):
        for name, work in works.items():
            if ways.prepare is not None:
                ways.prepare()
            begin = time.perf_counter()
            for _ in range(ways.repeats):
                work()
            times[name].append((time.perf_counter() - begin) / ways.repeats)
    return times


def _row(name: str, threads: int, times: Mapping[str, list[float]], dense: Sequence[str]) -> dict[str, Any]:
    best = min(dense, key=lambda way: statistics.median(times[way]))

    def ms(way: str) -> float | None:
        return 1e3 * statistics.median(times[way]) if way in times else None

    return {
        "work": name,
        "threads": threads,
        "dense ms": ms(best),
        "ours ms": ms("ours"),
        "ratio": statistics.median(a / b for a, b in zip(times[best], times["ours"], strict=True)),
        "bf16 ms": ms("bf16"),
        "CSR ms": ms("CSR"),
    }


def _compare_threads(rows: Sequence[dict[str, Any]]) -> None:
    single = {row["work"]: row["ours ms"] for row in rows if row["threads"] == 1}
    for row in rows:
        row["against 1 thread"] = (
            single[row["work"]] / row["ours ms"] if row["threads"] != 1 and row["work"] in single else None
        )


def _plot(rows: Sequence[Mapping[str, Any]], claims: Mapping[str, float]) -> Figure:
    from squall.conf.plots import BLUE, GREY, ORANGE, clean_axes, new_figure

    first = [row for row in rows if row["threads"] == rows[0]["threads"]][::-1]
    figure = new_figure(7.6, 0.8 + 0.36 * len(first))
    axes = figure.subplots()
    names = [row["work"] for row in first]
    axes.barh(names, [row["ratio"] for row in first], 0.6, color=BLUE, label="ours")
    half = [row["dense ms"] / row["bf16 ms"] if row["bf16 ms"] else 0.0 for row in first]
    axes.barh(names, half, 0.2, color=ORANGE, label="dense in bf16")
    for place, row in enumerate(first):
        if row["work"] in claims:
            axes.plot([claims[row["work"]]] * 2, [place - 0.38, place + 0.38], color="#222222", linewidth=1.4)
        axes.annotate(
            f"{row['ratio']:.1f}", (row["ratio"], place), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    axes.margins(x=0.07)
    clean_axes(axes, "times as fast as dense fp32 (a stroke is what was aimed at)")
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
