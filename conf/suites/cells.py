"""Results of long suites, a line of JSON each, so that a suite that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def digest(settings: Mapping[str, Any]) -> str:
    """Name settings briefly: equal ones have one name.

    Args:
        settings: What JSON can hold.

    Example:
        >>> digest({"lr": 0.1, "seed": 0}) == digest({"seed": 0, "lr": 0.1}) != digest({"lr": 0.2, "seed": 0})
        True

    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_cells(path: Path) -> list[tuple[str, Cell]]:
    """Read what there is.

    Args:
        path: The file; it need not exist.

    Returns:
        The name of the settings of each cell, and the cell.

    """
    cells = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
        except ValueError:  # the run was ended while it wrote
            continue
        cells.append((cell.pop("settings"), cell))
    return cells


def add_cell(path: Path, settings: str, cell: Cell) -> None:
    """Write one more.

    Args:
        path: The file; its folder is made.
        settings: The name of its settings.
        cell: What was measured.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"settings": settings, **cell}) + "\n")
