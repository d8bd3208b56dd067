"""Write a table of results the same way everywhere: Markdown to read, JSON to compute with, and what it was made on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
_WIDEST = 1000  # columns of a table in a file


def format_value(value: Any) -> str:
    """Write a number for people: thousands separated, four significant digits of a fraction.

    Args:
        value: Anything; None becomes a dash.

    Returns:
        The text.

    Example:
        >>> format_value(60965224), format_value(0.98123), format_value(None)
        ('60,965,224', '0.9812', '-')

    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def to_markdown(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table; numbers are set to the right.

    Args:
        rows: The rows; the columns are all their keys, in order of appearance.

    Returns:
        The table, a line a row, with a newline at the end.

    Example:
        >>> print(to_markdown([{"net": "LeNet-5", "weights": 61706}]), end="")
        | net | weights |
        |:--|--:|
        | LeNet-5 | 61,706 |

    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c: all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns}
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("--:" if numeric[c] else ":--" for c in columns) + "|",
        *("| " + " | ".join(format_value(row.get(c)).replace("|", "\\|") for c in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def print_whole(table: Table, *below: str) -> None:
    """Print a table, and what is to be said below it.

    Args:
        table: Is as wide as it needs to be where there is no terminal: a file has room.
        below: Paragraphs.

    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    wide = console if console.is_terminal else Console(width=max(console.width, needed))
    wide.print(table, crop=False)
    console.print(*below, sep="\n")


def describe_machine() -> dict[str, Any]:
    """Say what a result was made on.

    Returns:
        System, processor, cores this process may use, the versions that matter, and the command.

    """
    versions = {"python": platform.python_version()}
    for name in ("lightning-squall", "torch", "lightning", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "-"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": cores,
        "versions": versions,
        "command": " ".join([Path(sys.argv[0]).name, *map(shlex.quote, sys.argv[1:])]),
    }


def write_results(
    stem: Path, title: str, rows: Sequence[Row], *, notes: str = "", extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``<stem>.md`` and ``<stem>.json``.

    Args:
        stem: Path without suffix; its folder is made.
        title: Heading of the Markdown file.
        rows: The table.
        notes: A paragraph below the table.
        extra: More that only the JSON file holds, beside `title`, `rows` and `machine`.

    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    made_on = f"`{machine['command']}` on {machine['cores']} cores of {machine['processor']} ({versions})."
    parts = [f"# {title}", to_markdown(rows).rstrip(), notes, made_on]
    stem.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    record = {"title": title, "rows": [dict(row) for row in rows], **(extra or {}), "machine": machine}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
