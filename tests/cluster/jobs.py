"""Jobs of the user's program, and what they leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.cluster.slurm import ROOT


def script(folder: Path, strategies: str, lines: str = "", **options: Any) -> str:
    """A batch script that runs the user's program on two nodes, a task each."""
    return head(folder, f"--nodes=2 --ntasks-per-node=1\n{lines}") + run(folder, strategies, **options)


def head(folder: Path, options: str) -> str:
    """What a batch script begins with: options of sbatch, and a home of its own."""
    (folder / "home").mkdir(exist_ok=True)
    return f"#!/bin/bash\n#SBATCH {options}\nexport HOME={folder}/home\ncd {ROOT}\n"


def run(folder: Path, strategies: str, srun: str = "srun", **options: Any) -> str:
    """The line of a batch script that starts the user's program."""
    return f"{srun} {sys.executable} -m tests.cluster.program {folder} {strategies} '{json.dumps(options)}'\n"


def ends(folder: Path) -> list[list[dict[str, Any]]]:
    """What the ranks have said at their end."""
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(2)]


def said(folder: Path) -> str:
    """What a job has written."""
    return "\n".join(path.read_text() for path in folder.glob("*.out"))
