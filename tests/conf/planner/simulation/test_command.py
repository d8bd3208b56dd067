"""``squall-plan simulate``: what it asks for, what it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from squall.conf import simulate
from squall.conf.main import UserError
from tests.docs.pages import ROOT, read_blocks

SMALL = ["scenario.steps=10", "workers=4"]


def _compose(*overrides: str) -> DictConfig:
    with initialize_config_module("squall.conf", version_base="1.3"):
        return compose("simulate", list(overrides))


@pytest.mark.parametrize("name", ["stragglers", "failures"])
def test_scenarios_in_small(name: str, tmp_path: Path) -> None:
    sweep = "{workers: [1, 3]}" if name == "stragglers" else "{mtbf: [300, 3000]}"
    result = simulate.run(_compose(f"scenario={name}", *SMALL, f"scenario.sweep={sweep}"))
    names = ["synchronous", "downpour"] + ["sandblaster"] * (name == "stragglers")
    assert [row["strategy"] for row in result.rows] == names
    assert all(row["workers"] == 4 and 0 < row["goodput, %"] < 110 for row in result.rows)
    assert result.rows[1]["mean staleness"] > 0
    assert len(result.extra["points"]) == 2
    assert result.figure is not None
    result.figure.savefig(tmp_path / "x.png")


def test_every_scenario_composes() -> None:
    assert simulate.scenarios() == ["failures", "goodput", "stragglers"]
    for name in simulate.scenarios():
        assert _compose(f"scenario={name}").scenario._target_.startswith("squall.conf.planner.simulation.")


def test_the_same_seed_gives_the_same_rows() -> None:
    def rows(seed: int) -> Any:
        return simulate.run(_compose("scenario=stragglers", *SMALL, "scenario.sweep=null", f"seed={seed}")).rows

    assert rows(3) == rows(3) != rows(4)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["scenario=failures", *SMALL, "scenario.sweep={mtbf: [600]}", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["squall-plan", *arguments])
    simulate.main()
    assert "synchronous" in capsys.readouterr().out
    record = json.loads((tmp_path / "failures.json").read_text())
    assert record["rows"][1]["strategy"] == "downpour"
    assert record["staleness"]
    assert (tmp_path / "failures.md").is_file()
    assert (tmp_path / "failures.png").stat().st_size > 10_000


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([], "scenario=NAME, with NAME one of: failures, goodput, stragglers"),
        (["scenario=goodput", "workers=3"], "workers=3: this scenario has none"),
        (["scenario=stragglers", "workers=0"], "workers=0 must be a whole number"),
        (["scenario=stragglers", "scenario.compute=slow"], "compute='slow' must be seconds"),
        (["scenario=stragglers", "scenario.downpour.push_every=0"], "downpour.push_every=0"),
        (["scenario=stragglers", "+scenario.downpour.pull_every=2"], "pull_every"),
        (["scenario=stragglers", "~scenario.link.push"], "link="),
        (["scenario=failures", "scenario.faults.mtbf=-1"], "faults.mtbf=-1"),
        (["scenario=stragglers", "+scenario.sweep.chips=[1]"], "one of workers, mtbf"),
        (["scenario=stragglers", "~scenario.synchronous.exchange"], "must have an exchange"),
    ):
        monkeypatch.setattr(sys, "argv", ["squall-plan", *arguments, f"hydra.run.dir={tmp_path}"])
        with pytest.raises(SystemExit) as ended:
            simulate.main()
        assert ended.value.code == 1
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_scenario_must_be_named() -> None:
    with pytest.raises(UserError, match="Say what to simulate"):
        simulate.run(_compose())


def test_the_commands_of_the_page_compose() -> None:
    """Of docs/how-to/simulate.md."""
    (block,) = (block for block in read_blocks(ROOT / "docs" / "how-to" / "simulate.md") if block.language == "bash")
    for line in block.code.splitlines():
        command, word, *overrides = line.split()
        assert (command, word) == ("squall-plan", "simulate")
        assert _compose(*overrides).scenario._target_
