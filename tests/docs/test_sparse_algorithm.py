"""The page "Add a sparse algorithm", done as it says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from tests.conf.programs import run

from .pages import ROOT, read_blocks

PAGE = ROOT / "docs" / "how-to" / "sparse_algorithm.md"


def block(name: str) -> str:
    """The code whose marker ends with a name."""
    (code,) = (block.code for block in read_blocks(PAGE) if (block.says("tested by") or "").endswith(f": {name}"))
    return code + "\n"


def test_three_functions_and_a_file_are_an_algorithm(tmp_path: Path) -> None:
    for name in ("mine.py", "strategy/mine.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(block(name))
    small = "model.model.width=0.3 +trainer.limit_train_batches=8 callbacks=none logger=csv hydra.run.dir=out"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code, output = run(["bash", "-c", f"{block('command').strip()} {small}"], tmp_path, PATH=path, OMP_NUM_THREADS="1")
    assert code == 0, output
    config = yaml.safe_load((tmp_path / "out" / ".hydra" / "config.yaml").read_text())
    assert config["strategy"]["sparsity"]["grow"] == "mine.grow"
    (metrics,) = (tmp_path / "out").rglob("metrics.csv")
    head, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    grown = [float(row[head.index("sparsity/num_grown")] or 0) for row in rows]
    dense = [float(row[head.index("density/model.fc1")]) for row in rows if row[head.index("density/model.fc1")]]
    assert sum(number > 0 for number in grown) == 2, "the masks move between epochs"
    assert len(set(dense)) > 1, "weights go from layer to layer"
    assert "DynamicSparsity" in output
