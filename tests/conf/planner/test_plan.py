"""The command ``squall-plan``, its files, and what it recommends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

import squall.conf
from squall.conf import plan
from squall.conf.main import UserError
from squall.conf.planner import auto, steps
from squall.conf.planner.alternatives import Alternative, Batch, alternatives
from squall.conf.planner.calibration import Calibration
from squall.conf.planner.clusters import cluster_of
from squall.conf.planner.here import calibrate
from squall.conf.planner.links import link_of, presets
from squall.conf.planner.predictions import Prediction, predict_all
from squall.conf.planner.recommending import recommend
from squall.models import AlexNet, LeNet5

TREE = Path(plan.__file__).parent
CLUSTERS = sorted(path.stem for path in (TREE / "cluster").glob("*.yaml"))
TINY = ["model=lenet5", "images={num_classes: 10, num_channels: 1, image_size: 28}"]


@pytest.fixture(scope="module")
def task() -> steps.Task:
    net = AlexNet(num_classes=10, image_size=28, width=0.25, in_channels=1)
    return steps.Task(net, torch.zeros(1, 1, 28, 28))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def command(*arguments: str) -> dict[str, object]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["squall-plan", *TINY, f"hydra.run.dir={tmp_path}", *arguments])
        plan.main()
        return json.loads((tmp_path / "plan.json").read_text())

    return command


def _composed(*overrides: str):
    with initialize_config_module("squall.conf", version_base="1.3"):
        return compose("plan", [*TINY, *overrides])


@pytest.mark.parametrize("name", [name for name in CLUSTERS if name != "here"])
def test_clusters(name: str) -> None:
    cfg = _composed(f"cluster={name}")
    cluster = cluster_of(OmegaConf.to_container(cfg.cluster))  # type: ignore[arg-type]
    assert cluster.num_ranks >= 2
    assert cluster.device.flops > 1e11
    assert cluster.network.inside.bandwidth >= cluster.network.between.bandwidth or name in ("cots", "k20x8")


@pytest.mark.parametrize("name", presets())
def test_links(name: str) -> None:
    assert link_of(name).latency > 0


@pytest.mark.parametrize("group", ["device", "link", "cluster"])
def test_every_file_says_where_its_figures_are_from(group: str) -> None:
    for path in (TREE / group).glob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_a_range_of_machines_makes_a_table_and_pictures(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = run("cluster=h200x8", "cluster.num_nodes=1..4", "cluster.link=25gbit")
    assert {row["machines"] for row in result["rows"]} == {1, 2, 4}
    names = {row["strategy"] for row in result["rows"]}
    assert {"single", "ddp", "zero1", "columns 2 x 16", "spatial 8 x 4", "hybrid (b)", "downpour"} <= names
    assert all(row["euros"] > 0 and row["GB a rank"] > 0 for row in result["rows"])
    assert "Recommended: " in capsys.readouterr().out
    for name in ("plan.png", "plan_scaling.png", "plan.md"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert {layer["layer"] for layer in result["layers"]} >= {"conv1", "conv2", "fc3", "fc4"}


def test_a_slower_link_is_never_faster(task: steps.Task) -> None:
    speeds = {}
    for link in ("1gbit", "25gbit", "3200gbit"):
        cfg = _composed("cluster=h200x8", "cluster.num_nodes=4", f"cluster.link={link}")
        cluster = cluster_of(OmegaConf.to_container(cfg.cluster))  # type: ignore[arg-type]
        found, _ = predict_all(task, Batch(64, True), cluster, {})
        speeds[link] = {p.alternative.label: p.images_per_second for p in found}
    for slow, fast in (("1gbit", "25gbit"), ("25gbit", "3200gbit")):
        own = [name for name in speeds[slow] if "hybrid" not in name]  # whose layout is another on another link
        assert all(speeds[slow][name] <= 1.0001 * speeds[fast][name] for name in own)
    assert speeds["1gbit"]["ddp"] < 0.5 * speeds["3200gbit"]["ddp"]


def test_alternatives_are_those_that_ranks_and_images_allow() -> None:
    def labels(*arguments) -> list[str]:
        return [a.label for a in alternatives(*arguments, {})]

    assert labels(1, 1, Batch(8)) == ["single"]
    assert "columns 2 x 2" in labels(4, 4, Batch(8))
    assert "columns" in labels(4, 4, Batch(8))
    assert "columns 4 x 2" not in labels(8, 2, Batch(8))  # four ranks would be on two machines
    assert "ddp" not in labels(8, 8, Batch(4))
    (ddp,) = [a for a in alternatives(16, 8, Batch(16), {}) if a.strategy == "ddp"]
    assert ddp.overrides == ["strategy=ddp", "trainer.devices=8", "trainer.num_nodes=2"]


def test_overrides_are_what_squall_understands() -> None:
    found = [a for a in alternatives(4, 4, Batch(8), {"push_every": 2}) if a.overrides]
    assert {a.strategy for a in found} == {"single", "ddp", "columns", "spatial", "hybrid", "downpour"}
    with initialize_config_module("squall.conf", version_base="1.3"):
        for alternative in found:
            cfg = compose("squall", overrides=alternative.overrides)
            assert cfg.trainer.devices == (None if alternative.strategy == "single" else 4)


def _prediction(strategy: str, seconds: float, fits: bool = True) -> Prediction:
    trace = steps.single(steps.Task(LeNet5(), torch.zeros(1, 1, 28, 28)), 1)
    ranks = 1 if strategy == "single" else 2
    options = {"scheme": "c"} if strategy == "hybrid" else {}
    alternative = Alternative(strategy, ranks, 2 if strategy in ("columns", "spatial") else 1, options)
    return Prediction(alternative, seconds, 10, 0.0, trace.memory, fits=fits)


def test_recommended_is_the_simplest_of_the_fastest_that_fit() -> None:
    single, ddp, columns = _prediction("single", 2.0), _prediction("ddp", 1.04), _prediction("columns", 1.0)
    assert recommend([single, ddp, columns])[0] is ddp
    assert recommend([single, _prediction("ddp", 1.2), columns])[0] is columns
    assert recommend([single, _prediction("ddp", 0.5, fits=False), columns])[0] is columns
    downpour = _prediction("downpour", 0.1)
    assert recommend([single, downpour])[0] is single
    assert recommend([single, downpour], asynchronous=True)[0] is downpour
    chosen, reason = recommend([single, columns])
    assert chosen is columns
    assert "2.00 x single" in reason
    with pytest.raises(MisconfigurationException, match="fits"):
        recommend([_prediction("single", 1.0, fits=False)])


def test_simulate_is_another_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stub = ModuleType("squall.conf.simulate")
    stub.main = lambda: seen.append(list(sys.argv))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "squall.conf.simulate", stub)
    monkeypatch.setattr(squall.conf, "simulate", stub, raising=False)
    monkeypatch.setattr(sys, "argv", ["squall-plan", "simulate", "workers=3"])
    plan.main()
    assert seen == [["squall-plan", "workers=3"]]


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = steps.Task(LeNet5(), torch.zeros(1, 1, 28, 28))
    path = tmp_path / "calibration.json"
    only = ["single", "ddp", "columns", "downpour"]
    first = calibrate(task, Batch(16), "loopback", 2, {}, path, only)
    assert first.device.flops > 1e9
    assert first.network.inside.bandwidth > 1e7
    assert set(first.overheads) == set(only)
    assert 0 <= first.shard_seconds < 1e-7  # a byte
    found, left_out = predict_all(task, Batch(16), first, {}, only)
    assert not left_out
    assert all(1e-4 < p.seconds < 1.0 for p in found)
    monkeypatch.setattr("squall.conf.planner.here.ranks_over", lambda *_: pytest.fail("measured again"))
    again = calibrate(task, Batch(16), "loopback", 2, {}, path, only)
    assert again.device == first.device


def test_a_calibration_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text("{}")
    with pytest.raises(MisconfigurationException, match="can't be read"):
        Calibration.load(path)
    Calibration(1.0, 1.0).save(path)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(MisconfigurationException, match=r"made with torch 1\.0"):
        Calibration.load(path)


# ---------------------------------------------------------------------- strategy=auto


class _Data:
    num_classes, num_channels, image_size, batch_size = 10, 1, 28, 16


def _auto(*overrides: str):
    with initialize_config_module("squall.conf", version_base="1.3"):
        return compose("squall", ["strategy=auto", "model=lenet5", *overrides])


def _fake(speed: float):
    """A machine on which nothing is measured: two devices, with a wire of so many bytes a second."""
    cfg = {"name": "x", "num_nodes": 1, "devices_per_node": 2, "link": "1gbit"}
    entry = {**cfg, "device": {"name": "x", "tflops": 0.1, "memory_bandwidth_gb": 10}}
    return lambda *_: cluster_of({**entry, "fabric": {"gbit": 8e-9 * speed, "latency_us": 1}})


@pytest.mark.parametrize(("speed", "single"), [(1e12, False), (1e4, True)])
def test_auto_takes_what_is_recommended(monkeypatch: pytest.MonkeyPatch, speed: float, single: bool) -> None:
    monkeypatch.delenv("SQUALL_PLANNED", raising=False)
    monkeypatch.setattr("squall.conf.planner.here.calibrate", _fake(speed))
    cfg = _auto()
    OmegaConf.set_struct(cfg, False)
    reason = auto.choose(cfg, _Data())
    assert cfg.strategy._target_.endswith("SingleDeviceStrategy") is single
    assert cfg.trainer.devices == (1 if single else 2)
    assert reason.startswith("strategy=auto takes ")
    # A rank that is started by the first one is told, and measures nothing.
    monkeypatch.setattr("squall.conf.planner.here.calibrate", lambda *_: pytest.fail("measured again"))
    again = _auto()
    OmegaConf.set_struct(again, False)
    assert auto.choose(again, _Data()) == reason
    assert again.strategy == cfg.strategy
    monkeypatch.delenv("SQUALL_PLANNED")


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("SLURM_NTASKS", "4")])
def test_auto_is_for_ranks_that_squall_starts(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("SQUALL_PLANNED", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="squall-plan"):
        auto.choose(_auto(), _Data())


def test_auto_elsewhere_says_where_it_belongs() -> None:
    with pytest.raises(MisconfigurationException, match="squall-plan"):
        auto.chosen_by_the_command(num_ranks=2)


def test_a_figure_of_a_device_can_be_another() -> None:
    cfg = _composed("cluster=k20x8", "cluster.device.tflops=7")
    assert cluster_of(OmegaConf.to_container(cfg.cluster)).device.flops == 7e12  # type: ignore[arg-type]
