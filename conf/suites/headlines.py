"""What each suite comes to, in a line or three: the table of figures in the README is made of the results on record.

``python -m squall.conf.suites.headlines benchmarks README.md`` makes it anew.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Headline = tuple[str, str]  # what was measured, and the figure

MARKS = "<!-- headlines:start -->", "<!-- headlines:end -->"


def _of(rows: Rows, name: str, **wanted: Any) -> Any:
    """A value of the only row that has these others; no number if there is none."""
    found = [row for row in rows if all(row.get(key.replace("_", " ")) == value for key, value in wanted.items())]
    return found[0][name] if len(found) == 1 else math.nan


def _columns(rows: Rows) -> Iterator[Headline]:
    for link in dict.fromkeys(row["link"] for row in rows):
        ratio = _of(rows, "columns are faster by", link=link, strategy="ddp")
        yield f"two columns against DDP, AlexNet, 64 images a step, {link}", f"{ratio:.2f} x"


def _placement(rows: Rows) -> Iterator[Headline]:
    for link in dict.fromkeys(row["link"] for row in rows):
        at = [row for row in rows if row["link"] == link and row["images a step"] == rows[0]["images a step"]]
        hybrids = [row for row in at if row["alternative"].startswith("hybrid")] or at
        best = max(hybrids, key=lambda row: row["against DDP"])
        what = f"{best['alternative']} against DDP, AlexNet, {best['images a step']} images a step, {link}"
        yield what, f"{best['against DDP']:.2f} x"


def _links(rows: Rows) -> Iterator[Headline]:
    for images in dict.fromkeys(row["images a rank"] for row in rows):
        ratio = _of(rows, "against DDP", alternative="downpour int8", images_a_rank=images)
        yield f"Downpour with int8 codes against DDP, two hosts, 1 Gbit/s, {images} images a rank", f"{ratio:.2f} x"


def _stragglers(rows: Rows) -> Iterator[Headline]:
    case = rows[0]["case"]
    ours, ddp = (_of(rows, "share of alone", case=case, strategy=name) for name in ("downpour", "ddp"))
    yield f"of what the ranks do alone, Downpour does, {case}", f"{ours:.2f} (DDP {ddp:.2f})"


def _staleness(rows: Rows) -> Iterator[Headline]:
    most = max(row["workers"] for row in rows)
    points, late = (_of(rows, name, workers=most, rule="none") for name in ("points above DDP", "mean staleness"))
    yield f"points of accuracy against DDP, {most} workers, updates {late:.0f} late", f"{points:+.2f}"


def _simulation(rows: Rows) -> Iterator[Headline]:
    numbers = ", ".join(str(row["workers"]) for row in rows)
    apart = ", ".join(f"{row['total variation']:.2f}" for row in rows)
    yield f"simulated staleness of {numbers} workers against real runs, total variation", apart


def _shards(rows: Rows) -> Iterator[Headline]:
    row = rows[-1]
    what = f"push and fetch of {row['MB each way']:.0f} MB through one shard, Adagrad included, against bare gloo"
    yield what, f"{row['speed against gloo']:.2f} x"


def _sandblaster(rows: Rows) -> Iterator[Headline]:
    ours, without = rows[0]["x the ideal"], rows[1]["x the ideal"]
    what = "a Sandblaster batch beside a rank 10 x slower, against the ideal of the ranks' speeds"
    yield what, f"{ours:.2f} x (no backups {without:.2f})"


def _sparse_training(rows: Rows) -> Iterator[Headline]:
    ratio = _of(rows, "x dense", net="LeNet300", density=0.05, algorithm="sparse_momentum")
    yield "error of sparse momentum with 5 % of the weights, LeNet-300-100, against dense", f"{ratio:.2f} x"


def _deep_compression(rows: Rows) -> Iterator[Headline]:
    for net, setting in (("LeNet300", "paper"), ("LeNet5", "convs kept, faster values")):
        rate, lost = (_of(rows, name, net=net, setting=setting) for name in ("rate", "points lost"))
        yield f"Deep Compression of {net}: file smaller, and points of accuracy lost", f"{rate:.1f} x, {lost:.2f}"


def _compression(rows: Rows) -> Iterator[Headline]:
    for net in dict.fromkeys(row["net"] for row in rows):
        rate = _of(rows, "rate", net=net, coder="ans")
        yield f"compressed file, {net} at the paper's densities and bits", f"{rate:.1f} x smaller"


def _planner(rows: Rows) -> Iterator[Headline]:
    errors = sorted(abs(row["error %"]) for row in rows)
    yield (
        f"error of {len(rows)} predicted steps, median and worst",
        f"{statistics.median(errors):.0f} %, {errors[-1]:.0f} %",
    )


def _kernels(rows: Rows) -> Iterator[Headline]:
    for work in (
        "LRN, 64x96x55x55, forward and backward", "fc6 at 9 %, batch 1, 5-bit codebook",
        "3x3 512 to 512, 14x14, batch 16, 10 %", "VGG-16 at 5 %, batch 1", "VGG-D at 5 %, a training step of 64 images",
    ):  # fmt: skip
        yield f"{work}, against dense fp32, one thread", f"{_of(rows, 'ratio', work=work, threads=1):.1f} x"


HEADLINES: dict[str, Callable[[Rows], Iterator[Headline]]] = {
    "columns": _columns,
    "placement": _placement,
    "links": _links,
    "stragglers": _stragglers,
    "staleness": _staleness,
    "simulation": _simulation,
    "shards": _shards,
    "sandblaster": _sandblaster,
    "sparse_training": _sparse_training,
    "deep_compression": _deep_compression,
    "compression": _compression,
    "kernels": _kernels,
    "planner": _planner,
}


def headlines_of(suite: str, rows: Rows) -> list[Headline]:
    """What a suite comes to, as far as it was measured.

    Args:
        suite: Its name.
        rows: Of its table.

    """
    return [(what, figure) for what, figure in HEADLINES[suite](rows) if "nan" not in figure]


def table(folder: Path) -> str:
    """The Markdown table of all results in a folder.

    Args:
        folder: Of ``<suite>.json`` files.

    """
    lines = ["| measured | figure | `squall-bench` |", "| --- | --: | --- |"]
    for suite in HEADLINES:
        path = folder / f"{suite}.json"
        if path.is_file():
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            link = f"[`suite={suite}`](benchmarks/{suite}.md)"
            lines += [f"| {what} | {figure} | {link} |" for what, figure in headlines_of(suite, rows)]
    return "\n".join(lines)


def put_into(text: str, made: str) -> str:
    """A text with another table between the marks.

    Raises:
        ValueError: If it hasn't got the marks.

    """
    pattern = re.compile(f"{MARKS[0]}.*{MARKS[1]}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"There is no {MARKS[0]} ... {MARKS[1]} in this text.")
    return pattern.sub(lambda _: f"{MARKS[0]}\n{made}\n{MARKS[1]}", text)


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    target.write_text(put_into(target.read_text(encoding="utf-8"), table(folder)), encoding="utf-8")
